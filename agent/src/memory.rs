//! The memory that the agent itself holds: every container pays for it, so it is told with every container's end.

use rustix::fs::{Mode, OFlags, open};

/// Resident pages of this process in KiB, those of its program file included; `None` without a /proc that says so
/// (proc(5), `/proc/pid/statm`).
pub fn resident_kib() -> Option<u32> {
    let file = open("/proc/self/statm", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let mut buffer = [0; 128];
    let length = rustix::io::retry_on_intr(|| rustix::io::read(&file, &mut buffer)).ok()?;
    let text = str::from_utf8(buffer.get(..length)?).ok()?;
    let pages: usize = text.split_ascii_whitespace().nth(1)?.parse().ok()?;
    u32::try_from(pages * rustix::param::page_size() / 1024).ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_process_holds_some_memory_but_not_all() {
        let kib = super::resident_kib().unwrap();
        assert!((100..1 << 20).contains(&kib), "{kib}");
    }
}
