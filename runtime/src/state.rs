//! State on disk: one private directory per container below the run root, locked as long as its monitor, or whoever makes
//! it, lives ([`crate::lock`]).
//!
//! Whoever makes a directory locks it first and then looks whether it is still there, since a sweep may have come between.
//! A directory without a record is being made, or is rubbish; one whose record cannot be read is a container all the same,
//! so that it can be ended and removed.

use std::env;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use api::config::LaunchConfig;
use api::lock::NAME as LOCK;
use jailer::JailError;
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, fstat, open, openat, statat};
use rustix::io::Errno;
use thiserror::Error;

use crate::directory::{clear, sweep, write};
use crate::holders;
use crate::lock::{self, Wait};
use crate::record::Record;
use crate::run::CONFIG;
use crate::spec::ContainerId;

pub use crate::directory::StateDirectory;

/// Names the run root.
pub const RUN_VARIABLE: &str = "COFFERDAM_RUN";

/// How long a sweep waits in all for those whom it has killed.
const SWEEP: Duration = Duration::from_millis(200);

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
    #[error("the run root {} is open to others: give one that is yours alone, with mode 0700", path.display())]
    NotPrivate {
        /// Its path.
        path: PathBuf,
    },
    /// The cgroup of its monitor.
    #[error(transparent)]
    Cgroup(#[from] JailError),
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
    /// What it was made from is not known any more.
    #[error("container {id} cannot be used, since its record is damaged ({damage}): remove it with rm")]
    Damaged {
        /// Its id.
        id: String,
        /// What is wrong with the record.
        damage: String,
    },
}

pub(crate) fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
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
        if stat.st_uid != rustix::process::geteuid().as_raw() || stat.st_mode & 0o077 != 0 {
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
        let mut state = StateDirectory::new(&self.path, path, lock);
        if let Some(name) = name {
            state.named(self.link(name, id.as_str())?);
        }
        Ok(state)
    }

    /// Makes and locks a directory. A sweep that saw it before it was locked may be removing it: it is waited for.
    fn make(&self, id: &ContainerId) -> rustix::io::Result<OwnedFd> {
        rustix::fs::mkdirat(&self.directory, id.as_str(), Mode::RWXU)?;
        loop {
            match self.lock(id.as_str(), Wait::Yes, OFlags::CREATE) {
                Err(Errno::NOENT) => match rustix::fs::mkdirat(&self.directory, id.as_str(), Mode::RWXU) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err(errno),
                },
                Err(errno) => {
                    // There was room for the directory and none for the file. Not empty, it is somebody's.
                    _ = rustix::fs::unlinkat(&self.directory, id.as_str(), AtFlags::REMOVEDIR);
                    return Err(errno);
                }
                Ok(lock) => return Ok(lock),
            }
        }
    }

    /// Locks a state directory that is there. `make` says whether the file is made where there is none: not by those who
    /// want a container that is there, since it would come back to a directory that is being removed.
    fn lock(&self, id: &str, wait: Wait, make: OFlags) -> rustix::io::Result<OwnedFd> {
        let path = Path::new(id).join(LOCK);
        let flags = make | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&self.directory, &path, flags, Mode::RUSR | Mode::WUSR)?;
        lock::hold(&file, wait)?;
        let (locked, named) = (fstat(&file)?, statat(&self.directory, &path, AtFlags::SYMLINK_NOFOLLOW)?);
        if (locked.st_dev, locked.st_ino) == (named.st_dev, named.st_ino) { Ok(file) } else { Err(Errno::NOENT) }
    }

    /// Links a name to an id.
    fn link(&self, name: &str, id: &str) -> Result<PathBuf, StateError> {
        let names = self.path.join(NAMES);
        match rustix::fs::mkdirat(&self.directory, NAMES, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed("make the directory", &names)(errno.into())),
        }
        let _changes = self.lock_changes(FlockOperation::LockExclusive)?;
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

    /// One lock serialises everybody who changes names and records.
    fn lock_changes(&self, operation: FlockOperation) -> Result<OwnedFd, StateError> {
        lock::changes(&self.path, operation).map_err(failed("lock the run root", &self.path))
    }

    /// The container that a name leads to: one that lives or is kept.
    fn holder(&self, link: &Path) -> Option<String> {
        let id = fs::read_link(link).ok()?.into_os_string().into_string().ok()?;
        (is_id(&id) && (self.is_kept(&id) || self.is_alive(&id))).then_some(id)
    }

    /// Whether a container's directory stays when nobody lives in it.
    fn is_kept(&self, id: &str) -> bool {
        let folder = self.path.join(id);
        Record::load(&folder, id).is_some_and(|record| record.is_kept(&folder))
    }

    /// Whether somebody holds the lock of a container's directory.
    fn is_alive(&self, id: &str) -> bool {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(file) = openat(&self.directory, Path::new(id).join(LOCK), flags, Mode::empty()) else { return false };
        lock::is_held(&file)
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
        let record = Record::load(&folder, id)?;
        (alive || record.is_kept(&folder)).then_some(Found { folder, record, alive })
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

    /// Takes a container's directory that nobody lives in, to start it again or to remove it; with what it was made from,
    /// as that is while nobody else can start or remove it. Whoever lives in its cgroup all the same is ended.
    ///
    /// # Errors
    /// Somebody lives in it, and holds it or does not end; or it is gone.
    pub fn take(&self, found: &Found) -> Result<(StateDirectory, Record), StateError> {
        let id = &found.record.id;
        let missing = || StateError::NoSuchContainer { key: id.clone() };
        let mut lock = self.lock(id, Wait::No, OFlags::empty());
        if matches!(lock, Err(Errno::AGAIN)) && !self.is_alive(id) {
            holders::make_way(&found.folder).map_err(failed("end who is in the way of", &found.folder))?;
            lock = self.lock(id, Wait::No, OFlags::empty());
        }
        let lock = lock.map_err(|errno| match errno {
            Errno::AGAIN => StateError::Alive { id: id.clone() },
            Errno::NOENT => missing(),
            errno => failed("lock", &found.folder)(errno.into()),
        })?;
        let record = Record::load(&found.folder, id).ok_or_else(missing)?;
        clear(&found.folder)?;
        let mut state = StateDirectory::new(&self.path, found.folder.clone(), lock);
        state.keep(true);
        if let Some(name) = &record.name {
            state.named(self.path.join(NAMES).join(name));
        }
        Ok((state, record))
    }

    /// Changes the record of a container, whether it lives or not, and with it the next start by its restart policy: its
    /// limits, and the policy itself.
    ///
    /// # Errors
    /// `change` says no, the record is damaged or gone, or the file system does not let us.
    pub fn change<E: From<StateError>>(
        &self,
        found: &Found,
        change: impl FnOnce(&mut Record) -> Result<(), E>,
    ) -> Result<(), E> {
        let (folder, id) = (&found.folder, &found.record.id);
        let _changes = self.lock_changes(FlockOperation::LockExclusive)?;
        // Who removes it removes the record first, and under the same lock: what is here stays while it is written anew.
        let record = Record::load(folder, id).ok_or_else(|| StateError::NoSuchContainer { key: id.clone() })?;
        let mut record = record.usable()?;
        let was_restarted = record.restart.is_some();
        change(&mut record)?;
        let bytes = serde_json::to_vec(&record).map_err(|error| failed("encode", folder)(error.into()))?;
        write(folder, crate::record::NAME, &bytes)?;
        // What starts it again knows nothing but the document that it was started with.
        if (was_restarted || record.restart.is_some())
            && self.is_alive(id)
            && let Ok(mut config) = LaunchConfig::read(&folder.join(CONFIG))
            && let Some(container) = &mut config.container
        {
            container.spec.limits = record.container.spec.limits;
            config.restart = record.restart;
            let bytes = serde_json::to_vec(&config).map_err(|error| failed("encode", folder)(error.into()))?;
            write(folder, CONFIG, &bytes)?;
        }
        Ok(())
    }

    /// Removes what killed processes left behind: state directories that nobody holds and that are not kept, and names
    /// that lead to none. Whoever lives on in the cgroup of such a directory is killed. What cannot be removed is left to the
    /// next sweep, and so is what those have in use who are not gone at once.
    pub fn sweep(&self) {
        let deadline = Instant::now() + SWEEP;
        let Ok(entries) = fs::read_dir(&self.path) else { return };
        for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
            // Looked at again under the lock: it may have been made meanwhile.
            if !is_id(&name) || self.is_kept(&name) {
                continue;
            }
            match self.lock(&name, Wait::No, OFlags::CREATE) {
                Ok(_lock) if !self.is_kept(&name) => _ = sweep(&self.path.join(name), deadline),
                // On a full disk one without the file cannot be locked. Without the file it is empty, or not ours to remove;
                // and who has just made it makes it again.
                Err(Errno::NOSPC | Errno::DQUOT) => _ = fs::remove_dir(self.path.join(name)),
                _ => {}
            }
        }
        let names = self.path.join(NAMES);
        if !names.is_dir() {
            return;
        }
        let Ok(_changes) = self.lock_changes(FlockOperation::NonBlockingLockExclusive) else { return };
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

impl Found {
    /// The folder of what its monitor writes.
    pub fn monitor_folder(&self) -> PathBuf {
        self.folder.join(api::folder::NAME)
    }
}

fn is_id(name: &str) -> bool {
    name.len() == ContainerId::LENGTH && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::thread;

    use super::*;
    use crate::directory::tests::Inhabitant;

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
    fn a_run_root_that_others_can_enter_is_refused() {
        let temporary = tempfile::tempdir().unwrap();
        // Who can open it can lock it for ever.
        for mode in [0o777, 0o755, 0o740, 0o701] {
            fs::set_permissions(temporary.path(), fs::Permissions::from_mode(mode)).unwrap();
            let opened = RunRoot::open_at(temporary.path());
            assert!(matches!(opened, Err(StateError::NotPrivate { .. })), "{mode:o}: {opened:?}");
        }
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

    /// A container that was made and does not live.
    fn made(root: &RunRoot, name: Option<&str>) -> Found {
        let id = ContainerId::generate().unwrap();
        let mut state = root.create(&id, name).unwrap();
        let record = crate::record::tests::record(id.as_str(), name);
        state.write(crate::record::NAME, &serde_json::to_vec(&record).unwrap()).unwrap();
        state.keep(true);
        drop(state);
        root.find(id.as_str()).unwrap()
    }

    #[test]
    fn a_container_whose_record_is_damaged_is_still_one_and_can_be_removed() {
        let (temporary, root) = root();
        let bystander = temporary.path().join("bystander");
        fs::write(&bystander, b"").unwrap();
        let found = made(&root, Some("web"));
        let mut record = found.record.clone();
        record.name = Some("../../bystander".to_owned());
        let other = made(&root, Some("db"));
        for bytes in [b"{".to_vec(), serde_json::to_vec(&record).unwrap()] {
            fs::write(found.folder.join(crate::record::NAME), bytes).unwrap();
            root.sweep();
            let damaged = root.find(&found.record.id[..8]).unwrap();
            assert_eq!(
                (damaged.record.id.as_str(), damaged.record.image.as_str()),
                (&*found.record.id, "<unreadable>")
            );
            assert_eq!(root.list().unwrap().len(), 2);
            let refused = root.change(&damaged, |_| Ok::<_, StateError>(()));
            assert!(matches!(refused, Err(StateError::Damaged { .. })), "{refused:?}");
        }
        let (state, record) = root.take(&found).unwrap();
        assert!(record.usable().is_err());
        state.remove().unwrap();
        assert!(root.list().unwrap().len() == 1 && bystander.exists());
        root.sweep();
        assert!(!root.path.join("names/web").is_symlink());
        // A name that is another's stays with it.
        let thief = made(&root, None);
        let record = Record { name: Some("db".to_owned()), ..thief.record.clone() };
        fs::write(thief.folder.join(crate::record::NAME), serde_json::to_vec(&record).unwrap()).unwrap();
        root.take(&thief).unwrap().0.remove().unwrap();
        assert_eq!(root.find("db").unwrap().record.id, other.record.id);
    }

    #[test]
    fn whoever_lives_on_without_the_lock_is_ended_before_the_container_is_removed_or_started() {
        let (_temporary, root) = root();
        for remove in [false, true] {
            let found = made(&root, None);
            let Some(mut ghost) = Inhabitant::new(&found.folder) else { return };
            assert!(ghost.lives());
            let (state, _) = root.take(&found).unwrap();
            assert!(ghost.has_ended(), "it is ended by whoever takes the container");
            if remove {
                // One more, which comes while it is in somebody's hands.
                let mut another = Inhabitant::new(&found.folder).unwrap();
                state.remove().unwrap();
                assert!(another.has_ended() && !another.has_a_group() && !found.folder.exists());
            } else {
                assert!(found.folder.exists());
            }
        }
    }

    #[test]
    fn whoever_shares_the_lock_instead_of_holding_it_is_ended_too() {
        let (_temporary, root) = root();
        let found = made(&root, None);
        let start = || holders::tests::inhabit(&found.folder, "sharing");
        let Some(mut ghost) = Inhabitant::with(&found.folder, start) else { return };
        assert!(!root.is_alive(&found.record.id), "nobody holds it");
        root.take(&found).unwrap();
        assert!(ghost.has_ended());
    }

    #[test]
    fn what_cannot_be_ended_stays_a_container() {
        let (_temporary, root) = root();
        let found = made(&root, None);
        let Some(ghost) = Inhabitant::new(&found.folder) else { return };
        let (state, _) = root.take(&found).unwrap();
        // As little as one that does not end can a group be removed that has another one in it.
        let inner = ghost.groups[0].join("inner");
        fs::create_dir(&inner).unwrap();
        let error = state.remove().unwrap_err();
        assert!(matches!(error, StateError::Cgroup(_)), "{error}");
        assert_eq!(root.find(&found.record.id).unwrap().record, found.record);
        fs::remove_dir(inner).unwrap();
        root.take(&found).unwrap().0.remove().unwrap();
        assert!(!ghost.has_a_group() && root.list().unwrap().is_empty());
    }

    #[test]
    fn a_sweep_ends_whoever_lives_on_and_waits_for_nobody_long() {
        let (_temporary, root) = root();
        let dead = ContainerId::generate().unwrap();
        let folder = root.path.join(dead.as_str());
        fs::create_dir(&folder).unwrap();
        let Some(mut ghost) = Inhabitant::new(&folder) else { return };
        // Held in place by something that cannot be killed.
        let inner = ghost.groups[0].join("inner");
        fs::create_dir(&inner).unwrap();
        let began = Instant::now();
        root.sweep();
        assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
        assert!(ghost.has_ended() && folder.exists());
        fs::remove_dir(inner).unwrap();
        root.sweep();
        assert!(!folder.exists() && !ghost.has_a_group());
    }

    #[test]
    fn what_is_gone_is_neither_taken_nor_changed_and_does_not_come_back() {
        let (_temporary, root) = root();
        let found = made(&root, Some("web"));
        let (state, record) = root.take(&found).unwrap();
        assert_eq!(record, found.record);
        assert!(matches!(root.take(&found), Err(StateError::Alive { .. })));
        state.remove().unwrap();
        assert!(!found.folder.exists() && !root.path.join("names/web").is_symlink());
        assert!(matches!(root.take(&found), Err(StateError::NoSuchContainer { .. })));
        let changed = root.change(&found, |_| Ok::<_, StateError>(()));
        assert!(matches!(changed, Err(StateError::NoSuchContainer { .. })));
        assert!(!found.folder.exists());
    }

    #[test]
    fn changes_do_not_undo_each_other() {
        let (_temporary, root) = root();
        let found = made(&root, None);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let grow = |record: &mut Record| {
                            record.memory_mib += 1;
                            Ok::<_, StateError>(())
                        };
                        root.change(&found, grow).unwrap();
                    }
                });
            }
        });
        assert_eq!(root.find(&found.record.id).unwrap().record.memory_mib, 200);
        let left: Vec<_> = fs::read_dir(&found.folder).unwrap().flatten().map(|entry| entry.file_name()).collect();
        assert_eq!(left.len(), 2, "{left:?}");
    }

    #[test]
    fn what_a_policy_starts_again_has_the_limits_of_now() {
        let (_temporary, root) = root();
        let mut found = made(&root, None);
        found.record.restart = Some(api::config::RestartPolicy::Always);
        let (mut state, _) = root.take(&found).unwrap();
        state.write(crate::record::NAME, &serde_json::to_vec(&found.record).unwrap()).unwrap();
        let vm = crate::spec::vm((1, 128), "/k".into(), "/i".into(), 9);
        let config = LaunchConfig {
            vm,
            container: Some(found.record.container.clone()),
            folder: None,
            restart: found.record.restart,
            jail: api::config::JailConfig::default(),
        };
        let path = state.write(CONFIG, &serde_json::to_vec(&config).unwrap()).unwrap();
        let change = |record: &mut Record| {
            record.container.spec.limits.pids = Some(7);
            Ok::<_, StateError>(())
        };
        root.change(&found, change).unwrap();
        let now = LaunchConfig::read(&path).unwrap();
        assert_eq!((now.vm, now.container.unwrap().spec.limits.pids), (config.vm, Some(7)));
        state.keep(true);
    }

    #[test]
    fn what_was_made_while_others_sweep_stays() {
        let (_temporary, root) = root();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..100).for_each(|_| drop(made(&root, None))));
            }
            scope.spawn(|| (0..200).for_each(|_| root.sweep()));
        });
        assert_eq!(root.list().unwrap().len(), 400);
    }
}
