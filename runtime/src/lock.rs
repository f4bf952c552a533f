//! The locks of the run root.
//!
//! A container lives while the first byte of its directory's lock file is locked ([`api::lock`]), by whoever makes it, and
//! then by its monitor, which inherits the descriptor. So the disk is never believed over the process: a directory that can
//! be locked has nobody alive in it, however that came. Unlike flock(2), it can be asked for without being taken, so that
//! whoever only looks is in nobody's way.
//!
//! Names and records are changed under one lock of the run root itself.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use api::lock::{Byte, region};
use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::io::{Errno, retry_on_intr};

/// How often a lock is tried that only those are in the way of who waited for an end.
const TRIES: u32 = 1000;
/// The time between two tries.
const BETWEEN_TRIES: Duration = Duration::from_millis(1);

/// Whether to wait for the holder of a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    /// As long as it takes.
    Yes,
    /// Not at all: `EAGAIN`.
    No,
}

/// Whether somebody lives behind a lock file.
pub(crate) fn is_held(file: impl AsFd) -> bool {
    // A shared lock is only in the way of an exclusive one.
    let mut holder = region(libc::F_RDLCK, Byte::Life);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut holder)).is_ok() && i32::from(holder.l_type) != libc::F_UNLCK
}

/// Whether nobody lives in a state directory.
pub(crate) fn is_free(folder: &Path) -> bool {
    !matches!(api::lock::open(folder), Ok(Some(file)) if is_held(&file))
}

/// Locks a file for whoever has this descriptor or inherits it.
pub(crate) fn hold(file: impl AsFd, wait: Wait) -> rustix::io::Result<()> {
    let life = region(libc::F_WRLCK, Byte::Life);
    let set = |wait| {
        let request = || if wait == Wait::Yes { FcntlArg::F_OFD_SETLKW(&life) } else { FcntlArg::F_OFD_SETLK(&life) };
        retry_on_intr(|| fcntl(file.as_fd(), request()).map(drop).map_err(errno))
    };
    for _ in 0..TRIES {
        match set(wait) {
            // EACCES is how some file systems say EAGAIN (fcntl(2)). Those who waited for an end let go at once.
            Err(Errno::AGAIN | Errno::ACCESS) if !is_held(file.as_fd()) => thread::sleep(BETWEEN_TRIES),
            Err(Errno::ACCESS) => return Err(Errno::AGAIN),
            result => return result,
        }
    }
    Err(Errno::AGAIN)
}

/// Waits until nobody lives in a state directory; whether that came in time.
///
/// # Errors
/// The system is out of something.
pub fn wait_free(folder: &Path, patience: Duration) -> io::Result<bool> {
    let Some(file) = api::lock::open(folder)?.filter(|file| is_held(file)) else { return Ok(true) };
    let (sender, free) = mpsc::channel();
    // Where it is waited for in vain, the thread ends with the process.
    let wait = move || {
        let shared = region(libc::F_RDLCK, Byte::Life);
        let locked = retry_on_intr(|| fcntl(&file, FcntlArg::F_OFD_SETLKW(&shared)).map_err(errno));
        drop(file);
        _ = sender.send(locked.is_ok());
    };
    thread::Builder::new().name("wait".into()).spawn(wait)?;
    Ok(free.recv_timeout(patience).unwrap_or(false))
}

/// Locks the names and records of a run root until the descriptor is dropped.
pub(crate) fn changes(root: &Path, operation: FlockOperation) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = open(root, flags, Mode::empty())?;
    retry_on_intr(|| flock(&directory, operation))?;
    Ok(directory)
}

fn errno(error: nix::errno::Errno) -> Errno {
    Errno::from_raw_os_error(error as i32)
}
