//! The container's cgroup (Linux `admin-guide/cgroup-v2`): limits, the ends of its processes, standing still, and what
//! memory cost.

mod stats;

use std::fs::{self as stdfs, File};
use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use protocol::container::Limits;
use rustix::fs::{self, AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::Pid;

use crate::sys;

/// Where the agent mounts cgroup2.
pub const MOUNT_POINT: &str = "/sys/fs/cgroup";

/// The controllers that containers get when the kernel has them.
const CONTROLLERS: [&str; 5] = ["cpuset", "cpu", "io", "memory", "pids"];

/// The period of `cpu.max` in microseconds.
const CPU_PERIOD_US: u64 = 100_000;

/// The most that is read of an interface file; the longest, `memory.stat`, has some sixty short lines.
const FILE_MAX: usize = 16 << 10;

/// How many cgroups a container may make below its own, and how deep, should it be privileged to: all of them are looked
/// at and removed by the agent. A whole systemd has some hundred, six deep.
const BELOW: [(&str, &str); 2] = [("cgroup.max.descendants", "1024"), ("cgroup.max.depth", "8")];

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

/// What `cgroup.events` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// Whether a process is in it or below it.
    pub populated: bool,
    /// Whether all of them stand still.
    pub frozen: bool,
}

/// A cgroup that exists as long as this value.
#[derive(Debug)]
pub struct Cgroup {
    path: String,
    directory: OwnedFd,
    events: OwnedFd,
    /// `memory.events`, when there is a memory controller.
    memory_events: Option<OwnedFd>,
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
            let events = open(&directory, "cgroup.events", OFlags::RDONLY)?;
            let memory_events = match open(&directory, "memory.events", OFlags::RDONLY) {
                Err(Errno::NOENT) => None,
                result => Some(result?),
            };
            Ok::<_, io::Error>((directory, events, memory_events))
        };
        let (directory, events, memory_events) = open().inspect_err(|_| {
            // The directory is empty, and the first error is the one to tell.
            let _ = fs::rmdir(&path);
        })?;
        let cgroup = Self { path, directory, events, memory_events };
        BELOW.into_iter().try_for_each(|(file, value)| cgroup.write(file, value))?;
        cgroup.limit(limits)?;
        // Reading is what makes it wait for the next change.
        cgroup.oom_kills();
        Ok(cgroup)
    }

    /// Sets limits; those that are not given stay.
    ///
    /// # Errors
    /// What the interface files say.
    pub fn limit(&self, limits: &Limits) -> io::Result<()> {
        let number = |limit: u64| if limit == u64::MAX { "max".to_owned() } else { limit.to_string() };
        if let Some(bytes) = limits.memory_bytes {
            self.write("memory.max", &number(bytes))?;
        }
        if let Some(count) = limits.pids {
            self.write("pids.max", &number(count))?;
        }
        if let Some(quota) = limits.cpu_quota_us {
            self.write("cpu.max", &format!("{} {CPU_PERIOD_US}", number(quota)))?;
        }
        Ok(())
    }

    /// The directory, for starting a process in it.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// What to poll (for `POLLPRI`) to hear of a change of [`Cgroup::state`].
    pub fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// What to poll (for `POLLPRI`) to hear of a change of [`Cgroup::oom_kills`].
    pub fn memory_events(&self) -> Option<BorrowedFd<'_>> {
        self.memory_events.as_ref().map(AsFd::as_fd)
    }

    /// What is the state of its processes.
    ///
    /// # Errors
    /// What reading `cgroup.events` says.
    pub fn state(&self) -> io::Result<State> {
        let mut buffer = [0; FILE_MAX];
        let length = rustix::io::pread(&self.events, &mut buffer, 0)?;
        let is_set = |key| value_of(key, &buffer[..length]).is_some_and(|value| value != 0);
        Ok(State { populated: is_set("populated"), frozen: is_set("frozen") })
    }

    /// How many of its processes the kernel killed because memory ran out.
    pub fn oom_kills(&self) -> u64 {
        let Some(file) = &self.memory_events else { return 0 };
        let mut buffer = [0; FILE_MAX];
        match rustix::io::pread(file, &mut buffer, 0) {
            Ok(length) => value_of("oom_kill", &buffer[..length]).unwrap_or(0),
            Err(_) => 0,
        }
    }

    /// Stops all its processes where they are, or lets them go on; [`Cgroup::state`] says when it is so.
    ///
    /// # Errors
    /// What the interface file says.
    pub fn freeze(&self, frozen: bool) -> io::Result<()> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })
    }

    /// Sends a signal to every process in it.
    ///
    /// # Errors
    /// What the interface files say.
    pub fn signal(&self, signal: u8) -> io::Result<()> {
        if signal == SIGKILL {
            return self.write("cgroup.kill", "1");
        }
        for_each_process(self.directory(), |pid| {
            // One that has ended since the file was read needs no signal.
            let _ = sys::send_signal(pid, signal);
            true
        })
    }

    /// Limits are written without waiting until they are met: the next allocation meets them.
    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        let file = open(&self.directory, file, OFlags::WRONLY | OFlags::NONBLOCK)?;
        rustix::io::write(file, value.as_bytes())?;
        Ok(())
    }
}

/// Calls `visit` with the agent's ids of the processes in a cgroup and below it, until that says false.
///
/// # Errors
/// What the interface files say.
pub fn for_each_process(cgroup: BorrowedFd<'_>, mut visit: impl FnMut(Pid) -> bool) -> io::Result<()> {
    for group in groups(cgroup)? {
        let file = match open(cgroup, &format!("{group}/cgroup.procs"), OFlags::RDONLY) {
            Ok(file) => File::from(file),
            // A container that is privileged may remove what is below its own.
            Err(Errno::NOENT | Errno::NODEV) => continue,
            Err(error) => return Err(error.into()),
        };
        for line in BufReader::new(file).lines() {
            // Not a number: a process of a threaded group, which no container should make.
            let Some(pid) = line?.parse().ok().and_then(Pid::from_raw) else { continue };
            if !visit(pid) {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// The paths of a cgroup and those below it, each behind the one that it is in.
fn groups(cgroup: BorrowedFd<'_>) -> io::Result<Vec<String>> {
    let mut groups = vec![".".to_owned()];
    let mut index = 0;
    while let Some(group) = groups.get(index).cloned() {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        match open(cgroup, &group, flags) {
            Ok(directory) => {
                for entry in Dir::new(directory)? {
                    let entry = entry?;
                    let name = entry.file_name().to_string_lossy();
                    if entry.file_type() == FileType::Directory && name != "." && name != ".." {
                        groups.push(format!("{group}/{name}"));
                    }
                }
            }
            Err(Errno::NOENT | Errno::NODEV) => {}
            Err(error) => return Err(error.into()),
        }
        index += 1;
    }
    Ok(groups)
}

fn open(directory: impl AsFd, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    fs::openat(directory, path, flags | OFlags::CLOEXEC, Mode::empty())
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // What is below it is a privileged container's doing; one that stays shows below.
        for group in groups(self.directory()).unwrap_or_default().iter().skip(1).rev() {
            let _ = fs::unlinkat(&self.directory, group, AtFlags::REMOVEDIR);
        }
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
