//! The lock file of a state directory: whether a container lives, and in which processes, is asked of the kernel, not of a
//! file with a number in it.
//!
//! Three bytes of it are locked (fcntl(2)):
//! - [`Byte::Life`], by whoever makes the container, and then by what it has started: a lock of the open file description
//!   (`F_OFD_SETLK`), which is inherited. While it is held the container lives.
//! - [`Byte::Monitor`] and [`Byte::Supervisor`], by these processes themselves (`F_SETLK`): of such a lock the kernel says
//!   whose it is, even where nothing else can be seen of a process.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// The file's name.
pub const NAME: &str = "lock";

/// What a byte of the file stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Byte {
    /// The container lives.
    Life = 0,
    /// Its monitor.
    Monitor = 1,
    /// The process above, where a restart policy asks for one.
    Supervisor = 2,
}

/// A lock of one byte, as fcntl(2) wants it described.
pub fn region(kind: i32, byte: Byte) -> libc::flock {
    let (l_type, l_whence) = (kind as i16, libc::SEEK_SET as i16);
    libc::flock { l_type, l_whence, l_start: byte as i64, l_len: 1, l_pid: 0 }
}

/// Takes a byte for this process, for as long as it lives and closes no descriptor of the file.
///
/// # Errors
/// Another process has it, or what the system says.
pub fn take(file: impl AsFd, byte: Byte) -> io::Result<()> {
    fcntl(file, FcntlArg::F_SETLK(&region(libc::F_WRLCK, byte)))?;
    Ok(())
}

/// The id of the process that has taken a byte, as this process's namespace has it.
pub fn owner(file: impl AsFd, byte: Byte) -> Option<i32> {
    let mut lock = region(libc::F_WRLCK, byte);
    fcntl(file, FcntlArg::F_GETLK(&mut lock)).ok()?;
    (i32::from(lock.l_type) != libc::F_UNLCK && lock.l_pid > 0).then_some(lock.l_pid)
}

/// Opens the file to look at it; `None` when there is none.
///
/// # Errors
/// What the system says.
pub fn open(folder: &Path) -> io::Result<Option<File>> {
    match File::open(folder.join(NAME)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        file => file.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ones_own_lock_is_not_in_the_way() {
        let folder = tempfile::tempdir().unwrap();
        assert!(open(folder.path()).unwrap().is_none());
        let file = File::create(folder.path().join(NAME)).unwrap();
        take(&file, Byte::Monitor).unwrap();
        assert_eq!(owner(open(folder.path()).unwrap().unwrap(), Byte::Monitor), None);
    }
}
