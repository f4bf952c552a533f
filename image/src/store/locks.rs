//! Locks between processes: flock(2) on files that may be unlinked while others wait for them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::{Error, IoContext};

/// How long a lease may take, and the time between two tries.
const LEASE: Duration = Duration::from_secs(5);
const BETWEEN_TRIES: Duration = Duration::from_millis(1);

/// An exclusive lock by path. The file goes with the lock.
#[derive(Debug)]
pub(crate) struct PathLock {
    pub(crate) file: File,
    path: PathBuf,
    keep: bool,
}

impl PathLock {
    /// Takes the lock if nobody has it.
    ///
    /// # Errors
    /// The file can't be made or locked.
    pub(crate) fn try_acquire(path: &Path) -> Result<Option<PathLock>, Error> {
        PathLock::attempt(path, FlockOperation::NonBlockingLockExclusive)
    }

    /// Takes the lock, and waits for it if need be.
    ///
    /// # Errors
    /// The file can't be made or locked.
    pub(crate) fn acquire(path: &Path) -> Result<PathLock, Error> {
        loop {
            if let Some(lock) = PathLock::attempt(path, FlockOperation::LockExclusive)? {
                return Ok(lock);
            }
        }
    }

    /// Leaves the file where it is when the lock goes.
    pub(crate) fn keep_file(&mut self) {
        self.keep = true;
    }

    fn attempt(path: &Path, operation: FlockOperation) -> Result<Option<PathLock>, Error> {
        loop {
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
            let file = file.during("open", path)?;
            if !take(&file, operation).during("lock", path)? {
                return Ok(None);
            }
            // The holder before may have unlinked what was opened: then the lock is on nothing.
            if is_at(&file, path).during("examine", path)? {
                return Ok(Some(PathLock { file, path: path.to_owned(), keep: false }));
            }
        }
    }
}

impl Drop for PathLock {
    fn drop(&mut self) {
        if !self.keep {
            // Still locked, so nobody else has it. If it stays, the next holder takes it away.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A lease on an image file: open for reading, locked shared. `None` if there is no such file (any more).
///
/// # Errors
/// It can't be opened or locked.
pub(crate) fn lease(path: &Path) -> Result<Option<File>, Error> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).during("open", path),
    };
    // Only waits for someone who is about to remove the file, or finds that it is in use and lets go. Whoever has a lease can
    // lock the file, also the monitor of a guest that took it over: such a lock is not waited for.
    let deadline = Instant::now() + LEASE;
    while !take(&file, FlockOperation::NonBlockingLockShared).during("lock", path)? {
        if Instant::now() >= deadline {
            let held =
                io::Error::new(io::ErrorKind::WouldBlock, "another process holds it: end those that use the image");
            return Err(held).during("lock", path);
        }
        std::thread::sleep(BETWEEN_TRIES);
    }
    let linked = file.metadata().during("examine", path)?.nlink() > 0;
    Ok(linked.then_some(file))
}

/// Locks an image file against new leases, if there are none. `None` if it is in use.
///
/// # Errors
/// It can't be opened or locked.
pub(crate) fn unused(path: &Path) -> Result<Option<File>, Error> {
    let file = File::open(path).during("open", path)?;
    Ok(take(&file, FlockOperation::NonBlockingLockExclusive).during("lock", path)?.then_some(file))
}

fn take(file: &File, operation: FlockOperation) -> io::Result<bool> {
    loop {
        match flock(file, operation) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let held = file.metadata()?;
    match std::fs::metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (held.dev(), held.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}
