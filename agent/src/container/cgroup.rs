//! The container's cgroup (Linux `admin-guide/cgroup-v2`): limits, the ends of its processes, and what memory cost.

use std::fs::{self as stdfs, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use protocol::container::Limits;
use rustix::fs::{self, Mode, OFlags};
use rustix::process::Pid;

use crate::sys;

/// Where the agent mounts cgroup2.
pub const MOUNT_POINT: &str = "/sys/fs/cgroup";

/// The controllers that containers get when the kernel has them.
const CONTROLLERS: [&str; 5] = ["cpuset", "cpu", "io", "memory", "pids"];

/// The period of `cpu.max` in microseconds.
const CPU_PERIOD_US: u64 = 100_000;

/// The longest interface file that is read as a whole; the ones read have a dozen short lines.
const FILE_MAX: usize = 4096;

/// Passes the controllers on to the containers' cgroups. Once, when the agent starts.
///
/// # Errors
/// What the interface files say.
pub fn enable_controllers() -> io::Result<()> {
    let available = stdfs::read_to_string(format!("{MOUNT_POINT}/cgroup.controllers"))?;
    let wanted: Vec<String> =
        available.split_whitespace().filter(|name| CONTROLLERS.contains(name)).map(|name| format!("+{name}")).collect();
    stdfs::write(format!("{MOUNT_POINT}/cgroup.subtree_control"), wanted.join(" "))
}

/// The signal that cgroups can send by themselves, to all processes at once.
pub const SIGKILL: u8 = libc::SIGKILL as u8;

/// A cgroup that exists as long as this value.
#[derive(Debug)]
pub struct Cgroup {
    path: String,
    directory: OwnedFd,
    events: OwnedFd,
}

impl Cgroup {
    /// Makes a cgroup of a name that can be a file name.
    ///
    /// # Errors
    /// What the kernel says of the directory or of a limit.
    pub fn create(name: &str, limits: &Limits) -> io::Result<Self> {
        let path = format!("{MOUNT_POINT}/{name}");
        fs::mkdir(&path, Mode::from_raw_mode(0o755))?;
        let open = || {
            let directory = fs::open(&path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
            let events = fs::openat(&directory, "cgroup.events", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
            Ok::<_, io::Error>((directory, events))
        };
        match open() {
            Ok((directory, events)) => {
                let cgroup = Self { path, directory, events };
                cgroup.limit(limits)?;
                Ok(cgroup)
            }
            Err(error) => {
                // The directory is empty, and the first error is the one to tell.
                let _ = fs::rmdir(&path);
                Err(error)
            }
        }
    }

    fn limit(&self, limits: &Limits) -> io::Result<()> {
        if let Some(bytes) = limits.memory_bytes {
            self.write("memory.max", &bytes.to_string())?;
        }
        if let Some(count) = limits.pids {
            self.write("pids.max", &count.to_string())?;
        }
        if let Some(quota) = limits.cpu_quota_us {
            self.write("cpu.max", &format!("{quota} {CPU_PERIOD_US}"))?;
        }
        Ok(())
    }

    /// The directory, for starting a process in it.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// What to poll (for `POLLPRI`) to hear of a change of [`Cgroup::is_empty`].
    pub fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// Whether no process is left in it or below it.
    ///
    /// # Errors
    /// What reading `cgroup.events` says.
    pub fn is_empty(&self) -> io::Result<bool> {
        let mut buffer = [0; FILE_MAX];
        let length = rustix::io::pread(&self.events, &mut buffer, 0)?;
        Ok(value_of("populated", &buffer[..length]) == Some(0))
    }

    /// How many of its processes the kernel killed because memory ran out.
    pub fn oom_kills(&self) -> u64 {
        let Ok(file) = self.open("memory.events", OFlags::RDONLY) else { return 0 };
        let mut buffer = Vec::new();
        match File::from(file).take(FILE_MAX as u64).read_to_end(&mut buffer) {
            Ok(_) => value_of("oom_kill", &buffer).unwrap_or(0),
            Err(_) => 0,
        }
    }

    /// Sends a signal to every process in it.
    ///
    /// # Errors
    /// What the interface files say.
    pub fn signal(&self, signal: u8) -> io::Result<()> {
        if signal == SIGKILL {
            return self.write("cgroup.kill", "1");
        }
        for line in BufReader::new(File::from(self.open("cgroup.procs", OFlags::RDONLY)?)).lines() {
            if let Some(pid) = line?.parse().ok().and_then(Pid::from_raw) {
                // One that has ended since the file was read needs no signal.
                let _ = sys::send_signal(pid, signal);
            }
        }
        Ok(())
    }

    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        rustix::io::write(self.open(file, OFlags::WRONLY)?, value.as_bytes())?;
        Ok(())
    }

    fn open(&self, file: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        fs::openat(&self.directory, file, flags | OFlags::CLOEXEC, Mode::empty())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::rmdir(&self.path) {
            eprintln!("cofferdam-agent: cannot remove {}: {error}", self.path);
        }
    }
}

/// The number after `key` in a file of `key number` lines.
fn value_of(key: &str, file: &[u8]) -> Option<u64> {
    let text = str::from_utf8(file).ok()?;
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_found_by_its_whole_key() {
        let file = b"low 0\noom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(value_of("oom_kill", file), Some(2));
        assert_eq!(value_of("oom", file), Some(3));
        assert_eq!(value_of("max", file), None);
        assert_eq!(value_of("low", b"low x\n"), None);
    }
}
