//! State on disk: one private directory per container below the run root, locked as long as its monitor, or whoever makes
//! it, lives.
//!
//! The lock is one of an open file description (fcntl(2), `F_OFD_SETLK`) on a file in the directory, and the descriptor that
//! holds it is inherited by the monitor. So the disk is never believed over the process: a directory that can be locked has
//! nobody alive in it, however that came. Unlike flock(2), it can be asked for without being taken, so that whoever only
//! looks is in nobody's way. Whoever makes a directory locks it first and then looks whether it is still there, since a
//! sweep may have come between.

use std::env;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, flock, fstat, open, openat, statat};
use rustix::io::Errno;
use thiserror::Error;

use crate::record::Record;
use crate::spec::ContainerId;

/// Names the run root.
pub const RUN_VARIABLE: &str = "COFFERDAM_RUN";

/// The directory in the run root in which each name is a symbolic link to an id.
const NAMES: &str = "names";

/// The file in a state directory that is locked.
pub(crate) const LOCK: &str = "lock";

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
    /// Nothing has this name or id.
    #[error("no container {key}")]
    NoSuchContainer {
        /// What was asked for.
        key: String,
    },
    /// Several ids begin like this.
    #[error("more than one container's id begins with {key}: give more of it")]
    Ambiguous {
        /// What was asked for.
        key: String,
    },
    /// It lives.
    #[error("container {id} is running: stop it first")]
    Alive {
        /// Its id.
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

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes and locks the state directory of a container, and gives it its name.
    ///
    /// # Errors
    /// The name is in use, or the file system does not let us.
    pub fn create(&self, id: &ContainerId, name: Option<&str>) -> Result<StateDirectory, StateError> {
        let path = self.path.join(id.as_str());
        let lock = self.make(id).map_err(|errno| failed("make the state directory", &path)(errno.into()))?;
        let mut state = StateDirectory { path, name: None, lock: Some(lock), kept: false };
        if let Some(name) = name {
            state.name = Some(self.link(name, id.as_str())?);
        }
        Ok(state)
    }

    /// Makes and locks a directory. A sweep that saw it before it was locked may be removing it: it is waited for.
    fn make(&self, id: &ContainerId) -> rustix::io::Result<OwnedFd> {
        rustix::fs::mkdirat(&self.directory, id.as_str(), Mode::RWXU)?;
        loop {
            match self.lock(id.as_str(), true) {
                Err(Errno::NOENT) => match rustix::fs::mkdirat(&self.directory, id.as_str(), Mode::RWXU) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err(errno),
                },
                locked => return locked,
            }
        }
    }

    /// Locks a state directory that is there, after waiting for its holder or only if there is none (else `EAGAIN`).
    fn lock(&self, id: &str, wait: bool) -> rustix::io::Result<OwnedFd> {
        let path = Path::new(id).join(LOCK);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&self.directory, &path, flags, Mode::RUSR | Mode::WUSR)?;
        let whole = whole_file(libc::F_WRLCK);
        let set = |wait| {
            let request = || if wait { FcntlArg::F_OFD_SETLKW(&whole) } else { FcntlArg::F_OFD_SETLK(&whole) };
            rustix::io::retry_on_intr(|| fcntl(&file, request()).map(drop).map_err(errno))
        };
        match set(wait) {
            // EACCES is how some file systems say EAGAIN (fcntl(2)). Those who wait for an end let go at once.
            Err(Errno::AGAIN | Errno::ACCESS) if !is_held(&file) => set(true)?,
            Err(Errno::ACCESS) => return Err(Errno::AGAIN),
            result => result?,
        }
        let (locked, named) = (fstat(&file)?, statat(&self.directory, &path, AtFlags::SYMLINK_NOFOLLOW)?);
        if (locked.st_dev, locked.st_ino) == (named.st_dev, named.st_ino) { Ok(file) } else { Err(Errno::NOENT) }
    }

    /// Links a name to an id. One lock serialises everybody who changes names.
    fn link(&self, name: &str, id: &str) -> Result<PathBuf, StateError> {
        let names = self.path.join(NAMES);
        let _lock = self.lock_names(FlockOperation::LockExclusive)?;
        let link = names.join(name);
        let linked = match symlink(id, &link) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if let Some(id) = self.holder(&link) {
                    return Err(StateError::NameInUse { name: name.to_owned(), id });
                }
                fs::remove_file(&link).and_then(|()| symlink(id, &link))
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

    /// The container that a name leads to: one that lives or is kept.
    fn holder(&self, link: &Path) -> Option<String> {
        let id = fs::read_link(link).ok()?.into_os_string().into_string().ok()?;
        (is_id(&id) && (self.is_kept(&id) || self.is_alive(&id))).then_some(id)
    }

    /// Whether a container's directory stays when nobody lives in it.
    fn is_kept(&self, id: &str) -> bool {
        Record::read(&self.path.join(id)).is_ok_and(|record| !record.auto_remove)
    }

    /// Whether somebody holds the lock of a container's directory.
    fn is_alive(&self, id: &str) -> bool {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(file) = openat(&self.directory, Path::new(id).join(LOCK), flags, Mode::empty()) else { return false };
        is_held(&file)
    }

    /// Waits until nobody lives in a container's directory; whether that came in time.
    ///
    /// # Errors
    /// The system is out of something.
    pub fn wait_unheld(&self, found: &Found, patience: Duration) -> io::Result<bool> {
        let file = match fs::File::open(found.folder.join(LOCK)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
            Err(error) => return Err(error),
        };
        if !is_held(&file) {
            return Ok(true);
        }
        let (sender, free) = mpsc::channel();
        // Where it is waited for in vain, the thread ends with the process.
        let wait = move || {
            let shared = whole_file(libc::F_RDLCK);
            let locked = rustix::io::retry_on_intr(|| fcntl(&file, FcntlArg::F_OFD_SETLKW(&shared)).map_err(errno));
            drop(file);
            _ = sender.send(locked.is_ok());
        };
        thread::Builder::new().name("wait".into()).spawn(wait)?;
        Ok(free.recv_timeout(patience).unwrap_or(false))
    }

    /// All containers that live or are kept, oldest first.
    ///
    /// # Errors
    /// The run root cannot be read.
    pub fn list(&self) -> Result<Vec<Found>, StateError> {
        let entries = fs::read_dir(&self.path).map_err(failed("read", &self.path))?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let mut found: Vec<Found> = names.filter(|name| is_id(name)).filter_map(|id| self.look(&id)).collect();
        found.sort_by_key(|found| found.record.created_ns);
        Ok(found)
    }

    /// A container as it is, unless it is being made or is rubbish.
    fn look(&self, id: &str) -> Option<Found> {
        let folder = self.path.join(id);
        // Looked at first: one that ends in between is then told as alive, and the next question goes unanswered.
        let alive = self.is_alive(id);
        let record = Record::read(&folder).ok()?;
        (alive || !record.auto_remove).then_some(Found { folder, record, alive })
    }

    /// The one container of this name, id, or beginning of an id.
    ///
    /// # Errors
    /// There is none, or more than one.
    pub fn find(&self, key: &str) -> Result<Found, StateError> {
        let missing = || StateError::NoSuchContainer { key: key.to_owned() };
        let named = if key.contains('/') { None } else { fs::read_link(self.path.join(NAMES).join(key)).ok() };
        if let Some(id) = named.and_then(|id| id.into_os_string().into_string().ok()).filter(|id| is_id(id)) {
            return self.look(&id).ok_or_else(missing);
        }
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(missing());
        }
        let entries = fs::read_dir(&self.path).map_err(failed("read", &self.path))?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let mut found = names.filter(|name| is_id(name) && name.starts_with(key)).filter_map(|id| self.look(&id));
        match (found.next(), found.next()) {
            (Some(one), None) => Ok(one),
            (None, _) => Err(missing()),
            (Some(_), Some(_)) => Err(StateError::Ambiguous { key: key.to_owned() }),
        }
    }

    /// Takes a container's directory that nobody lives in, to start it again or to remove it.
    ///
    /// # Errors
    /// Somebody lives in it, or it is gone.
    pub fn take(&self, found: &Found) -> Result<StateDirectory, StateError> {
        let id = &found.record.id;
        let lock = self.lock(id, false).map_err(|errno| match errno {
            Errno::AGAIN => StateError::Alive { id: id.clone() },
            Errno::NOENT => StateError::NoSuchContainer { key: id.clone() },
            errno => failed("lock", &found.folder)(errno.into()),
        })?;
        let name = found.record.name.as_ref().map(|name| self.path.join(NAMES).join(name));
        Ok(StateDirectory { path: found.folder.clone(), name, lock: Some(lock), kept: true })
    }

    /// Writes the record of a container anew, whether it lives or not.
    ///
    /// # Errors
    /// The file system does not let us.
    pub fn update(&self, found: &Found) -> Result<(), StateError> {
        let bytes = serde_json::to_vec(&found.record).map_err(|error| failed("encode", &found.folder)(error.into()))?;
        write(&found.folder, crate::record::NAME, &bytes).map(drop)
    }

    /// Removes what killed processes left behind: state directories that nobody holds and that are not kept, and names
    /// that lead to none. What cannot be removed is left to the next sweep.
    pub fn sweep(&self) {
        let Ok(entries) = fs::read_dir(&self.path) else { return };
        for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
            if is_id(&name)
                && !self.is_kept(&name)
                && let Ok(_lock) = self.lock(&name, false)
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

/// A container that was found.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its state directory.
    pub folder: PathBuf,
    /// What it was made from.
    pub record: Record,
    /// Whether its monitor, or whoever makes it, lived when it was looked at.
    pub alive: bool,
}

/// Writes a file that only its owner can read, whole or not at all, and gives its path.
fn write(folder: &Path, name: &str, bytes: &[u8]) -> Result<PathBuf, StateError> {
    let path = folder.join(name);
    let staged = folder.join(format!(".{name}"));
    let written = fs::write(&staged, bytes).and_then(|()| fs::rename(&staged, &path));
    written.map_err(failed("write", &path))?;
    Ok(path)
}

/// Whether somebody holds a file's exclusive lock.
fn is_held(file: impl std::os::fd::AsFd) -> bool {
    // A shared one is only in the way of that.
    let mut holder = whole_file(libc::F_RDLCK);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut holder)).is_ok() && i32::from(holder.l_type) != libc::F_UNLCK
}

/// A lock of a whole file, as fcntl(2) wants it described.
fn whole_file(kind: i32) -> libc::flock {
    let (l_type, l_whence) = (kind as i16, libc::SEEK_SET as i16);
    libc::flock { l_type, l_whence, l_start: 0, l_len: 0, l_pid: 0 }
}

fn errno(error: nix::errno::Errno) -> Errno {
    Errno::from_raw_os_error(error as i32)
}

fn is_id(name: &str) -> bool {
    name.len() == ContainerId::LENGTH && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// A container's state directory, locked. Dropping it removes it and the container's name, unless it is kept.
#[derive(Debug)]
pub struct StateDirectory {
    path: PathBuf,
    name: Option<PathBuf>,
    lock: Option<OwnedFd>,
    kept: bool,
}

impl StateDirectory {
    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What holds its lock, unless it was released: whoever inherits it holds it too.
    pub fn lock(&self) -> Option<BorrowedFd<'_>> {
        self.lock.as_ref().map(OwnedFd::as_fd)
    }

    /// Leaves the lock to whoever has inherited it.
    pub fn release_lock(&mut self) {
        self.lock = None;
    }

    /// Writes a file that only its owner can read, whole or not at all, and gives its path.
    ///
    /// # Errors
    /// The file system does not let us.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<PathBuf, StateError> {
        write(&self.path, name, bytes)
    }

    /// Removes a file that need not be there.
    pub fn forget(&self, name: &str) {
        _ = fs::remove_file(self.path.join(name));
    }

    /// From now on it stays, until it is removed.
    pub fn keep(&mut self) {
        self.kept = true;
    }

    /// Removes it and the container's name.
    pub fn remove(mut self) {
        self.kept = false;
    }
}

impl Drop for StateDirectory {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
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
        thread::scope(|scope| {
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
