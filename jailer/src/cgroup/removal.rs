//! Removing a group, and first of all ending whoever lives in it.
//!
//! A monitor that was taken over can let go of all that it is known by, but not leave its group: whoever is found there when
//! nobody should be is killed. Since Linux 5.14 the unified hierarchy does that by itself, and nobody who is being born at
//! that moment is missed; elsewhere it is done process by process, until there is none.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal};

use crate::error::JailError;

/// How long a group may take to become empty after everybody in it was killed.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often that is looked at where the kernel does not tell.
const BETWEEN_LOOKS: Duration = Duration::from_millis(1);

/// Removes a group. Whoever lives in it is killed.
///
/// # Errors
/// [`JailError::Undying`]: somebody does not end. [`JailError::Path`]: what the system says.
pub fn remove(folders: &[PathBuf]) -> Result<(), JailError> {
    remove_by(folders, Instant::now() + PATIENCE)
}

/// As [`remove`], for whoever cannot wait as long for those who were killed to be gone. They are killed in any case.
///
/// # Errors
/// As [`remove`].
pub fn remove_by(folders: &[PathBuf], deadline: Instant) -> Result<(), JailError> {
    folders.iter().try_for_each(|path| {
        let remove = || match fs::remove_dir(path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(false),
            Err(error) => Err(error),
        };
        clear_until(path, deadline, "remove the cgroup", remove)
    })
}

/// Kills whoever lives in a group, and waits until they are gone. The group stays.
///
/// # Errors
/// As [`remove`].
pub fn clear(folders: &[PathBuf], patience: Duration) -> Result<(), JailError> {
    let deadline = Instant::now() + patience;
    folders.iter().try_for_each(|path| {
        clear_until(path, deadline, "empty the cgroup", || members(path).map(|members| members.is_empty()))
    })
}

/// Whether somebody lives in a group. What cannot be looked at has nobody in it.
#[must_use]
pub fn is_inhabited(folders: &[PathBuf]) -> bool {
    folders.iter().any(|path| members(path).is_ok_and(|members| !members.is_empty()))
}

/// Kills whoever is in a group until something is done. What is done already costs no more than to see that: also the last
/// moments of a process, which closes descriptors and lets go of locks before it leaves its group, are waited for.
fn clear_until(
    path: &Path,
    deadline: Instant,
    step: &'static str,
    done: impl Fn() -> io::Result<bool>,
) -> Result<(), JailError> {
    let failed = |step| move |source| JailError::Path { step, path: path.to_owned(), source };
    loop {
        if done().map_err(failed(step))? {
            return Ok(());
        }
        kill(path).map_err(failed("kill the processes in the cgroup"))?;
        if Instant::now() >= deadline {
            return Err(match members(path).map_err(failed(step))?.first() {
                Some(pid) => JailError::Undying { pid: pid.as_raw_nonzero().get(), path: path.to_owned() },
                None => failed(step)(io::ErrorKind::ResourceBusy.into()),
            });
        }
        wait_empty(path, deadline).map_err(failed(step))?;
    }
}

/// Kills everybody in a group who can be seen in it now.
fn kill(path: &Path) -> io::Result<()> {
    match OpenOptions::new().write(true).open(path.join("cgroup.kill")) {
        // One by one, then: the file is newer than the hierarchy, and may be another user's where the processes are ours.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => {}
        file => return file?.write_all(b"1"),
    }
    // A number may become another process's: what was opened before it was seen in the group again is who is in it.
    let opened: Vec<(Pid, OwnedFd)> = members(path)?.into_iter().filter_map(open).collect();
    let still = members(path)?;
    for (_, process) in opened.iter().filter(|(pid, _)| still.contains(pid)) {
        match pidfd_send_signal(process, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn open(pid: Pid) -> Option<(Pid, OwnedFd)> {
    // One that is not there any more needs nobody's help.
    pidfd_open(pid, PidfdFlags::empty()).ok().map(|process| (pid, process))
}

/// The processes in a group but for this one. Those that this one's namespace has no numbers for are not told.
fn members(path: &Path) -> io::Result<Vec<Pid>> {
    let text = match fs::read_to_string(path.join("cgroup.procs")) {
        // A group that is removed while it is read.
        Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(GONE) => String::new(),
        text => text?,
    };
    let pids = text.lines().filter_map(|line| Pid::from_raw(line.trim().parse().ok()?));
    Ok(pids.filter(|pid| *pid != getpid()).collect())
}

/// What reading a file of a group says that was removed after the file was opened.
const GONE: i32 = Errno::NODEV.raw_os_error();

/// Waits until nobody is in a group, or somebody may have left it.
fn wait_empty(path: &Path, deadline: Instant) -> io::Result<()> {
    let mut events = match File::open(path.join("cgroup.events")) {
        Ok(events) => events,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            thread::sleep(BETWEEN_LOOKS);
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let mut text = String::new();
    events.read_to_string(&mut text)?;
    if text.lines().any(|line| line == "populated 1") {
        let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).ok();
        poll(&mut [PollFd::new(&events, PollFlags::PRI)], left.as_ref())?;
    } else {
        // It is about to be possible.
        thread::sleep(BETWEEN_LOOKS);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::{Child, Command};
    use std::slice::from_ref;

    use super::super::hierarchy::{Kind, mounted};
    use super::*;

    /// A group of this test's in each hierarchy where one can be made.
    fn groups(name: &str) -> Vec<PathBuf> {
        let make = |(_, root): (Kind, PathBuf)| {
            let path = root.join(format!("cofferdam-{name}-{}", std::process::id()));
            fs::create_dir(&path).ok().map(|()| path)
        };
        mounted().unwrap().into_iter().filter_map(make).collect()
    }

    fn inhabitant(path: &Path) -> Child {
        let child = Command::new("sleep").arg("600").spawn().unwrap();
        fs::write(path.join("cgroup.procs"), child.id().to_string()).unwrap();
        child
    }

    #[test]
    fn whoever_lives_in_a_group_is_killed_before_it_is_removed() {
        for path in groups("remove") {
            let (mut one, mut other) = (inhabitant(&path), inhabitant(&path));
            let group = from_ref(&path);
            assert!(is_inhabited(group));
            let began = Instant::now();
            remove(group).unwrap();
            assert!(began.elapsed() < PATIENCE && !path.exists(), "{path:?}");
            for child in [&mut one, &mut other] {
                assert_eq!(child.wait().unwrap().signal(), Some(9));
            }
            remove(group).unwrap();
            assert!(!is_inhabited(group));
        }
    }

    #[test]
    fn a_group_can_be_emptied_and_kept() {
        for path in groups("clear") {
            let mut child = inhabitant(&path);
            clear(from_ref(&path), PATIENCE).unwrap();
            assert!(path.exists() && !is_inhabited(from_ref(&path)));
            assert_eq!(child.wait().unwrap().signal(), Some(9));
            remove(from_ref(&path)).unwrap();
        }
    }

    #[test]
    fn without_time_they_are_killed_all_the_same() {
        for path in groups("hurry") {
            let mut child = inhabitant(&path);
            // Whether it is gone at once is the kernel's business.
            _ = remove_by(from_ref(&path), Instant::now());
            assert_eq!(child.wait().unwrap().signal(), Some(9));
            remove(from_ref(&path)).unwrap();
        }
    }

    #[test]
    fn what_cannot_be_removed_is_named() {
        for path in groups("undying") {
            // The kernel keeps a group that has another one in it.
            let inner = path.join("inner");
            fs::create_dir(&inner).unwrap();
            let error = remove_by(from_ref(&path), Instant::now()).unwrap_err();
            assert!(matches!(&error, JailError::Path { path: told, .. } if *told == path), "{error:?}");
            fs::remove_dir(inner).unwrap();
            remove(from_ref(&path)).unwrap();
        }
        let error = JailError::Undying { pid: 7, path: "/c/x".into() }.to_string();
        assert!(error.contains("process 7") && error.contains("/c/x") && error.contains("/proc/7"), "{error}");
    }
}
