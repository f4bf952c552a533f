//! A container's state directory, in the hands of whoever makes, starts or removes the container.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use api::config::LaunchConfig;
use jailer::cgroup;
use rustix::fs::FlockOperation;

use crate::lock;
use crate::record;
use crate::run::CONFIG;
use crate::state::{StateError, failed};

/// A container's state directory, locked. Dropping it removes it and the container's name, unless it is kept.
#[derive(Debug)]
pub struct StateDirectory {
    root: PathBuf,
    path: PathBuf,
    name: Option<PathBuf>,
    lock: Option<OwnedFd>,
    kept: bool,
}

impl StateDirectory {
    /// A directory whose lock is `lock`.
    pub(crate) fn new(root: &Path, path: PathBuf, lock: OwnedFd) -> Self {
        Self { root: root.to_owned(), path, name: None, lock: Some(lock), kept: false }
    }

    /// This link is its name.
    pub(crate) fn named(&mut self, link: PathBuf) {
        self.name = Some(link);
    }

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
        // Not while somebody changes what was there.
        let changes = lock::changes(&self.root, FlockOperation::LockExclusive);
        let _changes = changes.map_err(failed("lock the run root", &self.root))?;
        write(&self.path, name, bytes)
    }

    /// Removes a file that need not be there.
    pub fn forget(&self, name: &str) {
        _ = fs::remove_file(self.path.join(name));
    }

    /// The folder of what its monitor writes.
    pub fn monitor_folder(&self) -> PathBuf {
        self.path.join(api::folder::NAME)
    }

    /// Removes the record of the container's last end, which need not be there.
    pub fn forget_end(&self) {
        _ = fs::remove_file(self.monitor_folder().join(api::record::NAME));
    }

    /// Says whether it stays, until it is removed.
    pub fn keep(&mut self, kept: bool) {
        self.kept = kept;
    }

    /// Removes it and the container's name.
    ///
    /// # Errors
    /// The file system does not let us; what is left is no container any more, and the next sweep tries again.
    pub fn remove(mut self) -> Result<(), StateError> {
        self.kept = true;
        self.erase()
    }

    /// Whether a name leads here, and not to another container.
    fn is_named(&self, link: &Path) -> bool {
        fs::read_link(link).is_ok_and(|id| self.path.ends_with(id))
    }

    /// Removes the record first: what has none is rubbish, which a sweep takes.
    fn erase(&self) -> Result<(), StateError> {
        {
            // Nobody changes the record, and so brings it back, and nobody gives the name away meanwhile.
            let changes = lock::changes(&self.root, FlockOperation::LockExclusive);
            let _changes = changes.map_err(failed("lock the run root", &self.root))?;
            absent(fs::remove_file(self.path.join(record::NAME)))
                .map_err(failed("remove the record in", &self.path))?;
            if let Some(name) = self.name.as_ref().filter(|name| self.is_named(name)) {
                absent(fs::remove_file(name)).map_err(failed("remove the name", name))?;
            }
        }
        remove(&self.path)
    }
}

impl Drop for StateDirectory {
    fn drop(&mut self) {
        if !self.kept {
            // What is left is not locked any more, and the next run's sweep tries again.
            _ = self.erase();
        }
    }
}

/// Removes a directory that is no container any more, and the cgroup that its monitors were in.
pub(crate) fn remove(folder: &Path) -> Result<(), StateError> {
    // Which that is stands in the document that they were started with: without one, none was.
    if let Ok(config) = LaunchConfig::read(&folder.join(CONFIG)) {
        cgroup::remove(&config.jail.cgroups)?;
    }
    absent(fs::remove_dir_all(folder)).map_err(failed("remove", folder))
}

/// What is not there need not be removed.
fn absent(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Writes a file that only its owner can read, whole or not at all, and gives its path. Each one who writes does so under a
/// name of its own first.
pub(crate) fn write(folder: &Path, name: &str, bytes: &[u8]) -> Result<PathBuf, StateError> {
    static WRITTEN: AtomicU32 = AtomicU32::new(0);
    let path = folder.join(name);
    let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
    let staged = folder.join(format!(".{name}.{}.{number}", std::process::id()));
    let written = fs::write(&staged, bytes).and_then(|()| fs::rename(&staged, &path));
    written.map_err(|error| {
        // A full disk is the likely reason.
        _ = fs::remove_file(&staged);
        failed("write", &path)(error)
    })?;
    Ok(path)
}
