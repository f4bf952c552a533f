//! State on disk: one private directory per container below the run root, locked as long as its front end lives.
//!
//! The lock is an flock(2) on the directory itself, so a process that is killed leaves nothing that must be told from
//! something alive: a directory that can be locked belongs to nobody and is removed by the next run. Whoever makes a
//! directory locks it first and then looks whether it is still there, since a sweep may have come between.

use std::env;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, flock, fstat, open, openat, statat};
use rustix::io::Errno;
use thiserror::Error;

use crate::spec::ContainerId;

/// Names the run root.
pub const RUN_VARIABLE: &str = "COFFERDAM_RUN";

/// The directory in the run root in which each name is a symbolic link to an id.
const NAMES: &str = "names";

/// Why there is no state directory.
#[derive(Debug, Error)]
pub enum StateError {
    /// An ordinary user without a runtime directory.
    #[error(
        "there is no directory for run-time state: XDG_RUNTIME_DIR is not set; log in properly, or set {RUN_VARIABLE}"
    )]
    NoRunRoot,
    /// The run root is open to others.
    #[error("the run root {} can be changed by others: give one that is yours alone, with mode 0700", path.display())]
    NotPrivate {
        /// Its path.
        path: PathBuf,
    },
    /// A step failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The name is taken.
    #[error("the name {name:?} is in use by container {id}: give another one")]
    NameInUse {
        /// The name.
        name: String,
        /// Whose it is.
        id: String,
    },
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { action, path, source }
}

/// The directory that holds all state directories.
#[derive(Debug)]
pub struct RunRoot {
    path: PathBuf,
    directory: OwnedFd,
}

impl RunRoot {
    /// Opens `COFFERDAM_RUN`, else /run/cofferdam for root, else `$XDG_RUNTIME_DIR/cofferdam`; makes it when missing.
    ///
    /// # Errors
    /// It cannot be made, or others could change what is in it.
    pub fn open() -> Result<Self, StateError> {
        if let Some(path) = env::var_os(RUN_VARIABLE).filter(|path| !path.is_empty()) {
            return Self::open_at(Path::new(&path));
        }
        if rustix::process::geteuid().is_root() {
            return Self::open_at(Path::new("/run/cofferdam"));
        }
        let base = env::var_os("XDG_RUNTIME_DIR").filter(|path| Path::new(path).is_absolute());
        Self::open_at(&PathBuf::from(base.ok_or(StateError::NoRunRoot)?).join("cofferdam"))
    }

    /// Opens the run root at `path`; makes it when missing.
    ///
    /// # Errors
    /// As [`RunRoot::open`].
    pub fn open_at(path: &Path) -> Result<Self, StateError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = match open(path, flags, Mode::empty()) {
            Err(Errno::NOENT) => {
                let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
                made.map_err(failed("make the run root", path))?;
                open(path, flags, Mode::empty())
            }
            opened => opened,
        };
        let open_failed = |errno: Errno| failed("open the run root", path)(errno.into());
        let directory = directory.map_err(open_failed)?;
        let stat = fstat(&directory).map_err(open_failed)?;
        if stat.st_uid != rustix::process::geteuid().as_raw() || stat.st_mode & 0o022 != 0 {
            return Err(StateError::NotPrivate { path: path.to_owned() });
        }
        Ok(Self { path: path.to_owned(), directory })
    }

    /// Makes and locks the state directory of a container, and gives it its name.
    ///
    /// # Errors
    /// The name is in use, or the file system does not let us.
    pub fn create(&self, id: &ContainerId, name: Option<&str>) -> Result<StateDirectory, StateError> {
        let path = self.path.join(id.as_str());
        let lock = self.make(id).map_err(|errno| failed("make the state directory", &path)(errno.into()))?;
        let mut state = StateDirectory { path, name: None, _lock: lock };
        if let Some(name) = name {
            state.name = Some(self.link(name, id)?);
        }
        Ok(state)
    }

    /// Makes and locks a directory. A sweep that saw it before it was locked may be removing it: it is waited for.
    fn make(&self, id: &ContainerId) -> rustix::io::Result<OwnedFd> {
        rustix::fs::mkdirat(&self.directory, id.as_str(), Mode::RWXU)?;
        loop {
            match self.lock(id.as_str(), FlockOperation::LockExclusive) {
                Err(Errno::NOENT) => match rustix::fs::mkdirat(&self.directory, id.as_str(), Mode::RWXU) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err(errno),
                },
                locked => return locked,
            }
        }
    }

    /// Locks a state directory that is there.
    fn lock(&self, id: &str, operation: FlockOperation) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = openat(&self.directory, id, flags, Mode::empty())?;
        rustix::io::retry_on_intr(|| flock(&directory, operation))?;
        let (locked, named) = (fstat(&directory)?, statat(&self.directory, id, AtFlags::SYMLINK_NOFOLLOW)?);
        if (locked.st_dev, locked.st_ino) == (named.st_dev, named.st_ino) { Ok(directory) } else { Err(Errno::NOENT) }
    }

    /// Links a name to an id. One lock serialises everybody who changes names.
    fn link(&self, name: &str, id: &ContainerId) -> Result<PathBuf, StateError> {
        let names = self.path.join(NAMES);
        let _lock = self.lock_names(FlockOperation::LockExclusive)?;
        let link = names.join(name);
        let linked = match symlink(id.as_str(), &link) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if let Some(id) = self.holder(&link) {
                    return Err(StateError::NameInUse { name: name.to_owned(), id });
                }
                fs::remove_file(&link).and_then(|()| symlink(id.as_str(), &link))
            }
            linked => linked,
        };
        linked.map_err(failed("make the name", &link))?;
        Ok(link)
    }

    fn lock_names(&self, operation: FlockOperation) -> Result<OwnedFd, StateError> {
        let names = self.path.join(NAMES);
        match rustix::fs::mkdirat(&self.directory, NAMES, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed("make the directory", &names)(errno.into())),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let lock = openat(&self.directory, NAMES, flags, Mode::empty());
        let lock = lock.and_then(|lock| flock(&lock, operation).map(|()| lock));
        lock.map_err(|errno| failed("lock the directory", &names)(errno.into()))
    }

    /// The living container that a name leads to.
    fn holder(&self, link: &Path) -> Option<String> {
        let id = fs::read_link(link).ok()?.into_os_string().into_string().ok()?;
        (is_id(&id) && matches!(self.lock(&id, FlockOperation::NonBlockingLockExclusive), Err(Errno::AGAIN)))
            .then_some(id)
    }

    /// Removes what killed processes left behind: state directories that nobody holds, and names that lead to none.
    /// What cannot be removed is left to the next sweep.
    pub fn sweep(&self) {
        let Ok(entries) = fs::read_dir(&self.path) else { return };
        for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
            if is_id(&name)
                && let Ok(_lock) = self.lock(&name, FlockOperation::NonBlockingLockExclusive)
            {
                _ = fs::remove_dir_all(self.path.join(name));
            }
        }
        let names = self.path.join(NAMES);
        if !names.is_dir() {
            return;
        }
        let Ok(_lock) = self.lock_names(FlockOperation::NonBlockingLockExclusive) else { return };
        for link in fs::read_dir(&names).into_iter().flatten().flatten().map(|entry| entry.path()) {
            if self.holder(&link).is_none() {
                _ = fs::remove_file(link);
            }
        }
    }
}

fn is_id(name: &str) -> bool {
    name.len() == ContainerId::LENGTH && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// A container's state directory. Dropping it removes it and the container's name.
#[derive(Debug)]
pub struct StateDirectory {
    path: PathBuf,
    name: Option<PathBuf>,
    _lock: OwnedFd,
}

impl StateDirectory {
    /// Writes a file that only its owner can read, and gives its path.
    ///
    /// # Errors
    /// The file system does not let us.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<PathBuf, StateError> {
        let path = self.path.join(name);
        fs::write(&path, bytes).map_err(failed("write", &path))?;
        Ok(path)
    }
}

impl Drop for StateDirectory {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            _ = fs::remove_file(name);
        }
        // What is left is not locked any more, and the next run's sweep tries again.
        _ = fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn root() -> (tempfile::TempDir, RunRoot) {
        let temporary = tempfile::tempdir().unwrap();
        let root = RunRoot::open_at(&temporary.path().join("run")).unwrap();
        (temporary, root)
    }

    fn entries(root: &RunRoot) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(&root.path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_state_directory_is_private_and_goes_with_its_owner() {
        let (_temporary, root) = root();
        let id = ContainerId::generate().unwrap();
        let state = root.create(&id, None).unwrap();
        let file = state.write("config.json", b"{}").unwrap();
        assert_eq!(fs::metadata(file.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(entries(&root), [id.as_str()]);
        drop(state);
        assert!(entries(&root).is_empty());
    }

    #[test]
    fn a_sweep_takes_what_nobody_holds_and_nothing_else() {
        let (_temporary, root) = root();
        let kept = ContainerId::generate().unwrap();
        let state = root.create(&kept, Some("kept")).unwrap();
        let dead = ContainerId::generate().unwrap();
        fs::create_dir(root.path.join(dead.as_str())).unwrap();
        fs::write(root.path.join(dead.as_str()).join("config.json"), b"{}").unwrap();
        symlink(dead.as_str(), root.path.join("names/dead")).unwrap();
        fs::create_dir(root.path.join("something-else")).unwrap();
        root.sweep();
        let mut expected = vec![kept.as_str().to_owned(), "names".into(), "something-else".into()];
        expected.sort();
        assert_eq!(entries(&root), expected);
        assert!(root.path.join("names/kept").is_symlink() && !root.path.join("names/dead").is_symlink());
        drop(state);
    }

    #[test]
    fn a_name_belongs_to_one_living_container() {
        let (_temporary, root) = root();
        let (one, other) = (ContainerId::generate().unwrap(), ContainerId::generate().unwrap());
        let first = root.create(&one, Some("web")).unwrap();
        let error = root.create(&other, Some("web")).unwrap_err();
        assert!(matches!(error, StateError::NameInUse { id, .. } if id == one.as_str()));
        assert_eq!(entries(&root).len(), 2, "the refused container left its directory");
        drop(first);
        drop(root.create(&other, Some("web")).unwrap());
        assert!(!root.path.join("names/web").is_symlink());
    }

    #[test]
    fn a_name_that_a_killed_container_left_can_be_used() {
        let (_temporary, root) = root();
        fs::create_dir(root.path.join(NAMES)).unwrap();
        symlink("0".repeat(32), root.path.join("names/web")).unwrap();
        assert!(root.create(&ContainerId::generate().unwrap(), Some("web")).is_ok());
    }

    #[test]
    fn a_run_root_that_others_can_change_is_refused() {
        let temporary = tempfile::tempdir().unwrap();
        fs::set_permissions(temporary.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(RunRoot::open_at(temporary.path()), Err(StateError::NotPrivate { .. })));
    }

    #[test]
    fn runs_that_start_while_others_sweep_all_start() {
        let (_temporary, root) = root();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let state = root.create(&ContainerId::generate().unwrap(), None).unwrap();
                        root.sweep();
                        state.write("config.json", b"{}").unwrap();
                    }
                });
            }
        });
        assert!(entries(&root).is_empty());
    }
}
