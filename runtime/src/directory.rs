//! A container's state directory, in the hands of whoever makes, starts or removes the container.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use api::config::LaunchConfig;
use jailer::cgroup::{self, Plan};
use rustix::fs::FlockOperation;

use crate::lock;
use crate::record;
use crate::run::CONFIG;
use crate::state::{StateError, failed};

/// How long whoever lives in the cgroup of a container that nobody lives in may take to be gone, once it was killed.
const PATIENCE: Duration = Duration::from_secs(5);

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

    /// Removes what is left of the cgroup that it had, but for these folders: where it is started from another session, its group
    /// is another one, and what stands in its document afterwards is all that is known of it.
    pub fn forget_groups_but(&self, kept: &[PathBuf]) {
        let groups: Vec<_> = cgroups(&self.path).into_iter().filter(|group| !kept.contains(group)).collect();
        // Nobody lives in it: an empty folder is no reason not to start.
        _ = cgroup::remove(&groups);
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
    /// Somebody lives in its cgroup and does not end: it is the container that it was. Or the file system does not let us:
    /// what is left is no container any more, and the next sweep tries again.
    pub fn remove(mut self) -> Result<(), StateError> {
        self.kept = true;
        self.erase()
    }

    /// Whether a name leads here, and not to another container.
    fn is_named(&self, link: &Path) -> bool {
        fs::read_link(link).is_ok_and(|id| self.path.ends_with(id))
    }

    /// Removes the record first: what has none is rubbish, which a sweep takes. Before that whoever is left in its cgroup is
    /// ended, so that a VM that does not end is still in the list of containers.
    fn erase(&self) -> Result<(), StateError> {
        cgroup::remove(&cgroups(&self.path))?;
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

/// Removes a directory that is no container any more.
fn remove(folder: &Path) -> Result<(), StateError> {
    absent(fs::remove_dir_all(folder)).map_err(failed("remove", folder))
}

/// Removes a directory that nobody holds and that is not kept, and the cgroup of its monitors. Whoever lives there is killed,
/// and has until `deadline` to be gone.
pub(crate) fn sweep(folder: &Path, deadline: Instant) -> Result<(), StateError> {
    cgroup::remove_by(&cgroups(folder), deadline)?;
    remove(folder)
}

/// Ends whoever lives in a container's cgroup although nobody holds its lock: a monitor that was taken over can let go of
/// that, but not leave the group.
pub(crate) fn clear(folder: &Path) -> Result<(), StateError> {
    Ok(cgroup::clear(&cgroups(folder), PATIENCE)?)
}

/// The folders of the cgroup that a container's monitors are in. Which they are stands in the document that they were started
/// with: without one, none was. Where it cannot be read any more, they are those that a monitor would have now.
pub(crate) fn cgroups(folder: &Path) -> Vec<PathBuf> {
    let Some(id) = folder.file_name().and_then(|name| name.to_str()) else { return Vec::new() };
    let document = folder.join(CONFIG);
    let groups = match LaunchConfig::read(&document) {
        Ok(config) => config.jail.cgroups,
        Err(_) if document.exists() => Plan::new(id).map(|plan| plan.folders()).unwrap_or_default(),
        Err(_) => Vec::new(),
    };
    // Who is in them is killed: no group of another name is taken for the container's.
    groups.into_iter().filter(|group| group.ends_with(id)).collect()
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

#[cfg(test)]
pub(crate) mod tests {
    use std::process::{Child, Command};

    use api::config::JailConfig;
    use jailer::cgroup::Bounds;

    use super::*;
    use crate::spec::ContainerId;
    use crate::state::RunRoot;

    /// A process in a cgroup, which is gone with this value, and stands in a container's document.
    pub(crate) struct Inhabitant {
        pub(crate) child: Child,
        pub(crate) groups: Vec<PathBuf>,
    }

    impl Inhabitant {
        /// `None` where no cgroup can be made.
        pub(crate) fn new(folder: &Path) -> Option<Self> {
            Self::with(folder, || Command::new("sleep").arg("600").spawn().unwrap())
        }

        pub(crate) fn with(folder: &Path, start: impl FnOnce() -> Child) -> Option<Self> {
            let id = folder.file_name()?.to_str()?;
            let plan = Plan::new(id).ok()?;
            plan.make(&Bounds::default()).ok()?;
            let groups: Vec<PathBuf> = plan.folders().into_iter().filter(|path| path.exists()).collect();
            if groups.is_empty() {
                return None;
            }
            let mut inhabitant = Self { child: start(), groups };
            for group in &inhabitant.groups {
                fs::write(group.join("cgroup.procs"), inhabitant.child.id().to_string()).unwrap();
            }
            assert!(inhabitant.lives());
            let vm = crate::spec::vm((1, 128), "/k".into(), "/i".into(), 9);
            let jail = JailConfig { cgroups: inhabitant.groups.clone(), ..JailConfig::default() };
            let config = LaunchConfig { vm, container: None, folder: None, restart: None, jail };
            write(folder, CONFIG, &serde_json::to_vec(&config).unwrap()).unwrap();
            Some(inhabitant)
        }

        pub(crate) fn lives(&mut self) -> bool {
            self.child.try_wait().unwrap().is_none()
        }

        /// Whether it is gone: it leaves its group a moment before that can be waited for.
        pub(crate) fn has_ended(&mut self) -> bool {
            let deadline = Instant::now() + PATIENCE;
            while self.lives() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            !self.lives()
        }

        pub(crate) fn has_a_group(&self) -> bool {
            self.groups.iter().any(|group| group.exists())
        }
    }

    impl Drop for Inhabitant {
        fn drop(&mut self) {
            _ = self.child.kill();
            _ = self.child.wait();
            _ = cgroup::remove(&self.groups);
        }
    }

    #[test]
    fn a_group_of_another_session_is_not_left_behind() {
        let temporary = tempfile::tempdir().unwrap();
        let root = RunRoot::open_at(&temporary.path().join("run")).unwrap();
        let id = ContainerId::generate().unwrap();
        let state = root.create(&id, None).unwrap();
        let Some(mut inhabitant) = Inhabitant::new(state.path()) else { return };
        inhabitant.child.kill().unwrap();
        assert!(inhabitant.has_ended());
        state.forget_groups_but(&inhabitant.groups);
        assert!(inhabitant.has_a_group());
        state.forget_groups_but(&[]);
        assert!(!inhabitant.has_a_group());
    }

    #[test]
    fn a_group_of_another_name_is_not_a_containers() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("one");
        fs::create_dir(&folder).unwrap();
        assert!(cgroups(&folder).is_empty());
        let vm = crate::spec::vm((1, 128), "/k".into(), "/i".into(), 9);
        let named = vec![PathBuf::from("/sys/fs/cgroup"), "/c/cofferdam/other".into(), "/c/cofferdam/one".into()];
        let jail = JailConfig { cgroups: named, ..JailConfig::default() };
        let config = LaunchConfig { vm, container: None, folder: None, restart: None, jail };
        write(&folder, CONFIG, &serde_json::to_vec(&config).unwrap()).unwrap();
        assert_eq!(cgroups(&folder), [Path::new("/c/cofferdam/one")]);
        fs::write(folder.join(CONFIG), b"{").unwrap();
        assert_eq!(cgroups(&folder), Plan::new("one").unwrap().folders());
    }
}
