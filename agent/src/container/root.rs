//! The container's root directory. Its content is the image's, so every path is resolved by the kernel inside the root
//! (`openat2` with `RESOLVE_IN_ROOT`): a symbolic link, however made, can't lead out of it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{self, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::path::Arg;

/// The most steps, of directories and of symbolic links, in making a path that is not there yet. The kernel's limits
/// for what is there are 40 links and 4096 bytes.
const STEPS_MAX: usize = 128;
/// How often a path is resolved again when something was renamed or mounted meanwhile, anywhere on the machine.
const RETRIES_MAX: usize = 1000;

/// What to make where a path is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// A directory of mode 0755.
    Directory,
    /// An empty file of mode 0644.
    File,
}

/// A directory taken as the root for every path.
#[derive(Debug)]
pub struct Root(OwnedFd);

impl Root {
    /// The root directory of the calling process.
    ///
    /// # Errors
    /// What open(2) says.
    pub fn of_process() -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        fs::open("/", flags, Mode::empty()).map(Self)
    }

    /// Refers to what is at `path`, following symbolic links, without opening it.
    ///
    /// # Errors
    /// What openat2(2) says.
    pub fn find(&self, path: &str) -> Result<OwnedFd, Errno> {
        self.open(path, OFlags::PATH)
    }

    /// Opens the file at `path` for reading; never waits for a writer, whatever kind of file it is.
    ///
    /// # Errors
    /// What openat2(2) says.
    pub fn open_file(&self, path: &str) -> io::Result<OwnedFd> {
        Ok(self.open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)?)
    }

    /// Refers to what is at `path`, or to what was made there with the directories that lead to it. Where a symbolic
    /// link points to nothing, its target is made.
    ///
    /// # Errors
    /// What openat2(2), mkdir(2) and open(2) say.
    pub fn find_or_make(&self, path: &str, missing: Missing) -> Result<OwnedFd, Errno> {
        self.make(path, missing, STEPS_MAX)
    }

    fn make(&self, path: &str, missing: Missing, steps: usize) -> Result<OwnedFd, Errno> {
        match self.find(path) {
            Err(Errno::NOENT) if steps > 0 => {}
            Err(Errno::NOENT) => return Err(Errno::LOOP),
            result => return result,
        }
        let path = path.trim_end_matches('/');
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        if matches!(name, "" | "." | "..") {
            return Err(Errno::NOENT);
        }
        let directory = self.make(&format!("{parent}/"), Missing::Directory, steps - 1)?;
        if let Ok(link) = fs::readlinkat(&directory, name, Vec::new()) {
            let link = link.to_str().map_err(|_| Errno::ILSEQ)?;
            let target = if link.starts_with('/') { link.to_owned() } else { format!("{parent}/{link}") };
            return self.make(&target, missing, steps - 1);
        }
        match missing {
            Missing::Directory => {
                fs::mkdirat(&directory, name, Mode::from_raw_mode(0o755))?;
                fs::openat(&directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
            }
            Missing::File => {
                let flags = OFlags::RDONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                fs::openat(&directory, name, flags, Mode::from_raw_mode(0o644))
            }
        }
    }

    /// Opens what is at `path` with these flags.
    ///
    /// # Errors
    /// What openat2(2) says.
    pub fn open(&self, path: impl Arg + Copy, flags: OFlags) -> Result<OwnedFd, Errno> {
        resolve(&self.0, path, flags, ResolveFlags::IN_ROOT)
    }
}

/// Opens what is at `path` below a directory. A path that leaves it, be it through a symbolic link, is an error.
///
/// # Errors
/// What openat2(2) says; that the path leaves is EXDEV.
pub fn open_beneath(directory: impl AsFd, path: impl Arg + Copy, flags: OFlags) -> Result<OwnedFd, Errno> {
    resolve(directory, path, flags, ResolveFlags::BENEATH)
}

fn resolve(directory: impl AsFd, path: impl Arg + Copy, flags: OFlags, bounds: ResolveFlags) -> Result<OwnedFd, Errno> {
    let bounds = bounds | ResolveFlags::NO_MAGICLINKS;
    let attempt = || fs::openat2(&directory, path, flags | OFlags::CLOEXEC, Mode::empty(), bounds);
    let mut result = attempt();
    for _ in 0..RETRIES_MAX {
        // Somewhere something was renamed or mounted while the path went up, and the kernel cannot tell whether it
        // left the directory.
        if result.as_ref().err() != Some(&Errno::AGAIN) {
            break;
        }
        result = attempt();
    }
    result
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn root() -> (tempfile::TempDir, Root) {
        let directory = tempfile::tempdir().unwrap();
        let fd = fs::open(directory.path(), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        (directory, Root(fd))
    }

    #[test]
    fn directories_on_the_way_are_made() {
        let (directory, root) = root();
        root.find_or_make("/a/b/c/", Missing::Directory).unwrap();
        root.find_or_make("/a/d/file", Missing::File).unwrap();
        assert!(directory.path().join("a/b/c").is_dir());
        assert!(directory.path().join("a/d/file").is_file());
    }

    #[test]
    fn a_link_to_nothing_has_its_target_made_inside_the_root() {
        let (directory, root) = root();
        root.find_or_make("/etc", Missing::Directory).unwrap();
        symlink("../run/systemd/stub.conf", directory.path().join("etc/resolv.conf")).unwrap();
        symlink("../../../../../../outside", directory.path().join("etc/hosts")).unwrap();
        symlink("/absolute/target", directory.path().join("etc/hostname")).unwrap();
        for name in ["resolv.conf", "hosts", "hostname"] {
            root.find_or_make(&format!("/etc/{name}"), Missing::File).unwrap();
        }
        for made in ["run/systemd/stub.conf", "outside", "absolute/target"] {
            assert!(directory.path().join(made).is_file(), "{made}");
        }
    }

    #[test]
    fn links_in_a_circle_end() {
        let (directory, root) = root();
        symlink("b", directory.path().join("a")).unwrap();
        symlink("a/c", directory.path().join("b")).unwrap();
        assert_eq!(root.find_or_make("/a", Missing::File).unwrap_err(), Errno::LOOP);
        let deep = "/x".repeat(2000);
        assert_eq!(root.find_or_make(&deep, Missing::Directory).unwrap_err(), Errno::LOOP);
    }

    #[test]
    fn the_way_up_stops_at_the_root() {
        let (directory, root) = root();
        std::fs::write(directory.path().join("inside"), "").unwrap();
        assert!(root.find("/../../inside").is_ok());
        assert_eq!(root.find("/proc/self").unwrap_err(), Errno::NOENT);
    }
}
