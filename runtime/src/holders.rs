//! The processes that a container lives in, and ending them.
//!
//! The kernel says whose the bytes of the lock file are ([`api::lock`]). Each process is known by a descriptor from before
//! the kernel was asked again, so that its number cannot have become another process's.
//!
//! A monitor that was taken over can lead the kernel astray: a lock is told under the number of who took it, who may have ended
//! while another process holds it on; and one of the two locks can be let go of without the other. So nobody is taken for a
//! container's process who does not have the lock file open, and where nobody is found who holds a container, whoever lives in
//! its cgroup is killed; and, since there need not be one, whoever has the file open in a pid namespace of his own, which no
//! command is in.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use api::lock::{Byte, NAME, owner};
use jailer::{JailError, cgroup, readback};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::directory::cgroups;
use crate::lock::{is_free, wait_free};

pub use jailer::readback::InForce;

/// How long everything may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// After so long it is looked at again: who was about to start a process may have done so.
const STEP: Duration = Duration::from_secs(1);
/// How often it is looked whether a group has nobody in it any more.
const BETWEEN_LOOKS: Duration = Duration::from_millis(1);

/// How an attempt to end a container went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nobody lives in it any more.
    Ended,
    /// This process was killed, and is there all the same.
    Undying(Pid),
    /// Whoever holds it is no monitor: another command is at work on it.
    Busy,
}

/// A process that a container lives in.
#[derive(Debug)]
pub(crate) struct Holder {
    pid: Pid,
    process: OwnedFd,
}

impl Holder {
    fn find(lock: &File, byte: Byte) -> Option<Self> {
        let number = owner(lock, byte)?;
        let pid = Pid::from_raw(number)?;
        let process = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        let holder = Self { pid, process };
        // While it lives, its number is nobody else's: what was seen of that number is its own.
        (has_open(pid, lock) && owner(lock, byte) == Some(number) && holder.lives()).then_some(holder)
    }

    fn lives(&self) -> bool {
        !self.has_ended(Duration::ZERO)
    }

    /// Whether it ends in time.
    pub(crate) fn has_ended(&self, patience: Duration) -> bool {
        let mut ended = [PollFd::new(&self.process, PollFlags::IN)];
        let patience = Timespec::try_from(patience).ok();
        matches!(poll(&mut ended, patience.as_ref()), Ok(1))
    }

    /// Kills it; whether it was gone in time.
    fn kill(&self, patience: Duration) -> bool {
        // It may have ended by itself.
        _ = pidfd_send_signal(&self.process, Signal::KILL);
        self.has_ended(patience)
    }
}

/// The processes that have the lock file open in another pid namespace than ours: monitors, and no commands.
fn hidden(lock: &File) -> Vec<Holder> {
    let namespace = |process: &Path| fs::read_link(process.join("ns/pid")).ok();
    let Some(ours) = namespace(Path::new("/proc/self")) else { return Vec::new() };
    let find = |process: PathBuf| {
        let pid = Pid::from_raw(process.file_name()?.to_str()?.parse().ok()?)?;
        let holder = Holder { pid, process: pidfd_open(pid, PidfdFlags::empty()).ok()? };
        let hides = namespace(&process).is_some_and(|theirs| theirs != ours) && has_open(pid, lock);
        (hides && holder.lives()).then_some(holder)
    };
    entries(Path::new("/proc")).filter_map(find).collect()
}

/// Whether a process has the lock file open, in any of its threads: they need not share their descriptors.
fn has_open(pid: Pid, lock: &File) -> bool {
    let Ok(lock) = lock.metadata() else { return false };
    // Others of its files are not touched: they may be on a file system that does not answer.
    let is_lock = |path: &Path| {
        fs::read_link(path).is_ok_and(|file| file.file_name().is_some_and(|name| name == NAME))
            && fs::metadata(path).is_ok_and(|file| (file.dev(), file.ino()) == (lock.dev(), lock.ino()))
    };
    let threads = entries(&PathBuf::from(format!("/proc/{}/task", pid.as_raw_nonzero())));
    threads.flat_map(|thread| entries(&thread.join("fd"))).any(|descriptor| is_lock(&descriptor))
}

/// What is in a folder of /proc; nothing where it cannot be read.
fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// The monitor of a container, if there is one that can be seen.
pub(crate) fn monitor(folder: &Path) -> Option<Holder> {
    Holder::find(&api::lock::open(folder).ok()??, Byte::Monitor)
}

/// Reads the jail of a container's monitor back from the kernel; `None` when there is no monitor, or it ends meanwhile.
pub fn jail(folder: &Path) -> Option<InForce> {
    let lock = api::lock::open(folder).ok()??;
    let holder = Holder::find(&lock, Byte::Monitor)?;
    let told = readback::read(holder.pid).ok()?;
    // What was read is of no other process: this one holds its byte to its end.
    (owner(&lock, Byte::Monitor) == Some(told.pid)).then_some(told)
}

/// Kills whatever keeps a container alive, until nothing does.
///
/// # Errors
/// The system is out of something.
pub fn end(folder: &Path) -> io::Result<Outcome> {
    end_within(folder, PATIENCE)
}

fn end_within(folder: &Path, patience: Duration) -> io::Result<Outcome> {
    let Some(lock) = api::lock::open(folder)? else { return Ok(Outcome::Ended) };
    let deadline = Instant::now() + patience;
    let left = || deadline.saturating_duration_since(Instant::now());
    loop {
        let (mut found, mut undying) = (false, None);
        // The one above first: what is dead starts nothing again.
        for byte in [Byte::Supervisor, Byte::Monitor] {
            if let Some(holder) = Holder::find(&lock, byte) {
                found = true;
                if !holder.kill(left().min(STEP)) {
                    undying = Some(holder.pid);
                }
            }
        }
        if wait_free(folder, left().min(STEP))? {
            return Ok(Outcome::Ended);
        }
        // Held by nobody who can be seen: by another command, whose monitor is to end as well, or by a monitor that hides. Its
        // group it cannot leave.
        let mut trouble = None;
        if !found {
            match evict(&lock, folder, left().min(STEP)) {
                Ok(pid) => undying = undying.or(pid),
                Err(error) => trouble = Some(error),
            }
        }
        if left().is_zero() {
            return match (undying, trouble) {
                _ if is_free(folder) => Ok(Outcome::Ended),
                (Some(pid), _) => Ok(Outcome::Undying(pid)),
                (None, Some(error)) => Err(io::Error::other(error)),
                (None, None) => Ok(Outcome::Busy),
            };
        }
    }
}

/// Kills those who hide: who has the lock file open in a pid namespace of his own, and who is in the container's group. Gives
/// one who does not end.
fn evict(lock: &File, folder: &Path, patience: Duration) -> Result<Option<Pid>, JailError> {
    let mut undying = None;
    for holder in hidden(lock) {
        if !holder.kill(patience) {
            undying = Some(holder.pid);
        }
    }
    match cgroup::clear(&cgroups(folder), patience) {
        Ok(()) => Ok(undying),
        Err(JailError::Undying { pid, .. }) => Ok(Pid::from_raw(pid)),
        Err(error) => Err(error),
    }
}

/// Kills whoever is in the way of those who want a container that nobody lives in: a monitor that was taken over can share its
/// lock instead of holding it, which nobody else does for longer than it takes to see that it is free.
pub(crate) fn make_way(folder: &Path) -> io::Result<()> {
    let Some(lock) = api::lock::open(folder)? else { return Ok(()) };
    evict(&lock, folder, STEP).map(drop).map_err(io::Error::other)
}

/// Whether a container has a monitor: not merely somebody who holds it, as what starts a monitor again and other commands do.
pub(crate) fn is_monitored(folder: &Path) -> bool {
    !wait_unmonitored(folder, Duration::ZERO)
}

/// Waits for the end of a container's monitor; whether it came in time.
pub(crate) fn wait_unmonitored(folder: &Path, patience: Duration) -> bool {
    let Ok(Some(lock)) = api::lock::open(folder) else { return true };
    let groups = cgroups(folder);
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match Holder::find(&lock, Byte::Monitor) {
            Some(holder) if !holder.has_ended(left) => return false,
            Some(_) => {}
            None if !cgroup::is_inhabited(&groups) => return true,
            None if left.is_zero() => return false,
            // The last moments of a process: it lets go of its locks before it leaves its group.
            None => thread::sleep(BETWEEN_LOOKS),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::{Child, Command};

    use super::*;
    use crate::directory::tests::Inhabitant;
    use crate::lock::{Wait, hold, is_held};

    /// Names the directory for, and the role of, a copy of this test program.
    const FOLDER: &str = "HOLDERS_FOLDER";
    const ROLE: &str = "HOLDERS_ROLE";
    /// The file that says that it has its locks.
    pub(crate) const READY: &str = "ready";

    fn copy(folder: &Path, role: &str) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "holders::tests::lives_in_a_process_of_its_own"]);
        command.env(FOLDER, folder).env(ROLE, role).stdout(std::process::Stdio::null());
        command
    }

    /// Not a test on its own: what is killed by the others.
    #[test]
    fn lives_in_a_process_of_its_own() {
        let (Some(folder), Ok(role)) = (std::env::var_os(FOLDER), std::env::var(ROLE)) else { return };
        let folder = Path::new(&folder);
        if role == "supervisor" {
            // Inherited by what it starts, as a monitor inherits it.
            let lock = File::options().read(true).write(true).open(folder.join(NAME)).unwrap();
            api::lock::take(&lock, Byte::Supervisor).unwrap();
            hold(&lock, Wait::Yes).unwrap();
            rustix::io::fcntl_setfd(&lock, rustix::io::FdFlags::empty()).unwrap();
            loop {
                copy(folder, "monitor").status().unwrap();
            }
        }
        let live = move |folder: &Path| {
            let lock = File::options().read(true).write(true).open(folder.join(NAME)).unwrap();
            if !matches!(role.as_str(), "hidden" | "sharing") {
                api::lock::take(&lock, Byte::Monitor).unwrap();
            }
            if role == "sharing" {
                let shared = api::lock::region(libc::F_RDLCK, Byte::Life);
                nix::fcntl::fcntl(&lock, nix::fcntl::FcntlArg::F_OFD_SETLK(&shared)).unwrap();
            } else if role != "monitor" {
                hold(&lock, Wait::Yes).unwrap();
            }
            // Somebody hears that it is there.
            fs::write(folder.join(READY), b"").unwrap();
            thread::sleep(if role == "brief" { Duration::from_millis(300) } else { Duration::from_secs(60) });
            drop(lock);
            std::process::exit(0);
        };
        if std::env::var(ROLE).unwrap() == "apart" {
            let folder = folder.to_owned();
            let apart = move || {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_FILES).unwrap();
                live(&folder);
            };
            thread::spawn(apart).join().unwrap();
        } else {
            live(folder);
        }
    }

    /// Lets a process of its own live in a folder, in a role.
    pub(crate) fn inhabit(folder: &Path, role: &str) -> Child {
        inhabit_by(|copy| copy, folder, role)
    }

    fn inhabit_by(start: impl FnOnce(Command) -> Command, folder: &Path, role: &str) -> Child {
        if !folder.join(NAME).exists() {
            fs::write(folder.join(NAME), b"").unwrap();
        }
        let child = start(copy(folder, role)).spawn().unwrap();
        while !folder.join(READY).exists() {
            thread::sleep(Duration::from_millis(5));
        }
        child
    }

    fn begin(role: &str) -> (tempfile::TempDir, Child) {
        let folder = tempfile::tempdir().unwrap();
        let child = inhabit(folder.path(), role);
        (folder, child)
    }

    /// A state directory, which has the name of its container.
    fn state() -> (tempfile::TempDir, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join(crate::spec::ContainerId::generate().unwrap().as_str());
        fs::create_dir(&folder).unwrap();
        (root, folder)
    }

    #[test]
    fn a_monitor_is_found_by_its_lock_and_killed() {
        let (folder, mut child) = begin("alone");
        let lock = api::lock::open(folder.path()).unwrap().unwrap();
        assert_eq!(owner(&lock, Byte::Monitor), Some(i32::try_from(child.id()).unwrap()));
        assert_eq!(end(folder.path()).unwrap(), Outcome::Ended);
        assert_eq!(child.wait().unwrap().signal(), Some(9));
        assert!(!is_held(&lock) && owner(&lock, Byte::Monitor).is_none());
    }

    #[test]
    fn the_jail_of_a_monitor_is_told_while_it_lives() {
        let (folder, mut child) = begin("alone");
        let told = jail(folder.path()).unwrap();
        assert_eq!(told.pid, i32::try_from(child.id()).unwrap());
        assert!(told.namespaces.values().all(|namespace| !namespace.own), "this one is in none");
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(jail(folder.path()), None);
    }

    #[test]
    fn what_is_started_again_is_killed_with_what_starts_it() {
        let (folder, mut child) = begin("supervisor");
        assert_eq!(end(folder.path()).unwrap(), Outcome::Ended);
        child.wait().unwrap();
        thread::sleep(Duration::from_millis(100));
        let lock = api::lock::open(folder.path()).unwrap().unwrap();
        assert!(!is_held(&lock) && owner(&lock, Byte::Monitor).is_none());
    }

    #[test]
    fn where_there_is_nothing_nothing_is_to_be_ended() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(end(folder.path()).unwrap(), Outcome::Ended);
        fs::write(folder.path().join(NAME), b"").unwrap();
        assert_eq!(end(folder.path()).unwrap(), Outcome::Ended);
    }
    #[test]
    fn one_that_shares_its_descriptors_with_no_other_thread_is_found() {
        let (folder, mut child) = begin("apart");
        assert_eq!(end(folder.path()).unwrap(), Outcome::Ended);
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }

    #[test]
    fn nobody_is_a_holder_who_does_not_have_the_lock_open() {
        let (folder, mut child) = begin("alone");
        let lock = api::lock::open(folder.path()).unwrap().unwrap();
        let mut bystander = Command::new("sleep").arg("60").spawn().unwrap();
        let has_open = |child: &Child| has_open(Pid::from_child(child), &lock);
        assert!(has_open(&child) && !has_open(&bystander));
        for child in [&mut child, &mut bystander] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    #[test]
    fn a_monitor_that_is_not_found_by_its_lock_is_found_by_its_group() {
        let (_root, folder) = state();
        let Some(mut inhabitant) = Inhabitant::with(&folder, || inhabit(&folder, "hidden")) else { return };
        let lock = api::lock::open(&folder).unwrap().unwrap();
        assert!(is_held(&lock) && owner(&lock, Byte::Monitor).is_none() && is_monitored(&folder));
        let began = Instant::now();
        assert_eq!(end(&folder).unwrap(), Outcome::Ended);
        assert!(inhabitant.has_ended() && !is_held(&lock) && !is_monitored(&folder));
        assert!(began.elapsed() < PATIENCE);
    }

    #[test]
    fn a_monitor_that_is_not_found_by_its_lock_is_found_by_its_namespace() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let (_root, folder) = state();
        let start = |copy: Command| {
            let mut command = Command::new("unshare");
            let variables = copy.get_envs().filter_map(|(name, value)| Some((name, value?)));
            command.args(["--pid", "--fork", "--kill-child"]).arg(copy.get_program());
            command.args(copy.get_args()).envs(variables).stdout(std::process::Stdio::null());
            command
        };
        let mut child = inhabit_by(start, &folder, "hidden");
        assert_eq!(end(&folder).unwrap(), Outcome::Ended);
        assert!(!child.wait().unwrap().success());
        assert!(!is_held(api::lock::open(&folder).unwrap().unwrap()));
    }

    #[test]
    fn without_a_group_whoever_is_not_found_is_another_command() {
        let (_root, folder) = state();
        let mut child = inhabit(&folder, "hidden");
        assert!(!is_monitored(&folder));
        assert_eq!(end_within(&folder, STEP).unwrap(), Outcome::Busy);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
