//! The folder that a monitor writes its container's log and the record of its end to.
//!
//! It is known by a descriptor: a monitor in its jail reaches it in no other way. Who reads in it does not trust who writes
//! in it: no link is followed, and nothing is opened but regular files, which make nobody wait.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, fstat, open, openat, renameat, unlinkat};

/// Its name in a state directory.
pub const NAME: &str = "monitor";

/// A folder. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Folder {
    descriptor: Arc<OwnedFd>,
    path: PathBuf,
}

impl Folder {
    /// A folder that is open already and is known to others by this path.
    pub fn new(descriptor: OwnedFd, path: PathBuf) -> Self {
        Self { descriptor: Arc::new(descriptor), path }
    }

    /// Opens a folder.
    ///
    /// # Errors
    /// What the system says.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self::new(open(path, flags, Mode::empty())?, path.to_owned()))
    }

    /// Its path, as others know it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a file to be read.
    ///
    /// # Errors
    /// What the system says, or that it is no regular file.
    pub fn read(&self, name: &str) -> io::Result<File> {
        self.file(name, OFlags::RDONLY)
    }

    /// Opens a file to be added to, which is made when there is none.
    ///
    /// # Errors
    /// As [`Folder::read`].
    pub fn append(&self, name: &str) -> io::Result<File> {
        self.file(name, OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE)
    }

    /// Opens an empty file to be written, in place of what is there.
    ///
    /// # Errors
    /// As [`Folder::read`].
    pub fn create(&self, name: &str) -> io::Result<File> {
        self.file(name, OFlags::WRONLY | OFlags::TRUNC | OFlags::CREATE)
    }

    /// Gives a file another name, in place of what has that.
    ///
    /// # Errors
    /// What the system says.
    pub fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(renameat(&self.descriptor, from, &self.descriptor, to)?)
    }

    /// Removes a file.
    ///
    /// # Errors
    /// What the system says.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        Ok(unlinkat(&self.descriptor, name, AtFlags::empty())?)
    }

    fn file(&self, name: &str, flags: OFlags) -> io::Result<File> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(openat(&self.descriptor, name, flags, Mode::RUSR | Mode::WUSR)?);
        if FileType::from_raw_mode(fstat(&file)?.st_mode).is_file() {
            Ok(file)
        } else {
            Err(io::Error::other(format!("{name} is no regular file")))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_leads_elsewhere_or_waits_is_not_opened() {
        let place = tempfile::tempdir().unwrap();
        let folder = Folder::open(place.path()).unwrap();
        fs::write(place.path().join("file"), b"1").unwrap();
        symlink("file", place.path().join("link")).unwrap();
        nix::unistd::mkfifo(&place.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        folder.read("file").unwrap();
        for name in ["link", "pipe", "none"] {
            assert!(folder.read(name).is_err(), "{name}");
        }
        assert!(folder.create("link").is_err() && folder.append("link").is_err());
        assert_eq!(fs::read(place.path().join("file")).unwrap(), b"1");
    }
}
