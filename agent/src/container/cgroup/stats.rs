//! The figures of a cgroup: what each controller's interface files say. A controller that the kernel has not counts
//! nothing and limits nothing.

use std::fs::File;
use std::io::Read;

use protocol::report::Stats;
use rustix::fs::OFlags;

use super::{Cgroup, FILE_MAX, open, value_of};

impl Cgroup {
    /// What the processes in it use.
    pub fn stats(&self) -> Stats {
        let cpu = self.read("cpu.stat");
        let memory = self.read("memory.stat");
        let io = self.read("io.stat");
        let value = |key, file: &[u8]| value_of(key, file).unwrap_or(0);
        Stats {
            cpu_usage_us: value("usage_usec", &cpu),
            cpu_user_us: value("user_usec", &cpu),
            cpu_system_us: value("system_usec", &cpu),
            cpu_throttled_periods: value("nr_throttled", &cpu),
            cpu_throttled_us: value("throttled_usec", &cpu),
            memory_bytes: number(&self.read("memory.current")).unwrap_or(0),
            memory_peak_bytes: number(&self.read("memory.peak")).unwrap_or(0),
            memory_limit_bytes: number(&self.read("memory.max")).unwrap_or(u64::MAX),
            memory_inactive_file_bytes: value("inactive_file", &memory),
            memory_oom_kills: self.oom_kills(),
            pids: number(&self.read("pids.current")).unwrap_or(0),
            pids_limit: number(&self.read("pids.max")).unwrap_or(u64::MAX),
            io_read_bytes: sum_of("rbytes", &io),
            io_written_bytes: sum_of("wbytes", &io),
        }
    }

    /// The beginning of an interface file; nothing of one that is not there.
    fn read(&self, file: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        if let Ok(file) = open(&self.directory, file, OFlags::RDONLY) {
            // What was read before an error is as good as nothing.
            let _ = File::from(file).take(FILE_MAX as u64).read_to_end(&mut bytes);
        }
        bytes
    }
}

/// A file of one number; `None` when it is `max` or nothing.
fn number(file: &[u8]) -> Option<u64> {
    str::from_utf8(file).ok()?.trim().parse().ok()
}

/// The sum of the values of a key in a file of `device key=value key=value` lines.
fn sum_of(key: &str, file: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(file);
    let values =
        text.split_ascii_whitespace().filter_map(|pair| pair.strip_prefix(key)?.strip_prefix('=')?.parse().ok());
    values.fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_devices_count() {
        let file = b"254:0 rbytes=100 wbytes=7 rios=1 wios=1 dbytes=0 dios=0\n7:0 rbytes=23 wbytes=0 rios=1\n8:0 \n";
        assert_eq!((sum_of("rbytes", file), sum_of("wbytes", file), sum_of("bytes", file)), (123, 7, 0));
        assert_eq!(sum_of("rbytes", b"1:1 rbytes=18446744073709551615\n1:2 rbytes=1\n"), u64::MAX);
    }

    #[test]
    fn no_limit_is_no_number() {
        assert_eq!((number(b"max\n"), number(b"4096\n"), number(b"")), (None, Some(4096), None));
    }
}
