//! What a monitor does with itself, once it has opened what it needs and before it looks at anything of a guest's.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use rustix::process::{Signal, getpid, set_parent_process_death_signal};
use rustix::system::sethostname;

use crate::error::{JailError, step};
use crate::files::{Taken, Tree};
use crate::identity::{self, SelfFolder};
use crate::limits::Limits;
use crate::{files, landlock, root};

/// What is in a jail.
#[derive(Debug)]
pub struct Jail<'a> {
    /// The one folder that can be reached. It comes to belong to the monitor's user.
    pub folder: Option<&'a Path>,
    /// The user to be, where that can be chosen ([`identity::user`]).
    pub user: u32,
    /// What may be used.
    pub limits: Limits,
    /// Whether to end with the process that started this one.
    pub tied: bool,
    /// The files that are shown to the guest.
    pub trees: &'a [Tree<'a>],
}

/// What leads out of a jail.
#[derive(Debug)]
pub struct Entered {
    /// To the folder.
    pub folder: Option<OwnedFd>,
    /// To the files that are shown, in their order (`O_PATH`).
    pub trees: Vec<OwnedFd>,
    /// To this process's own descriptors, by their numbers (`/proc/self/fd`, `O_PATH`), if files are shown.
    pub descriptors: Option<OwnedFd>,
    /// Whether the owners of those files are users in here, and the calling thread has the capabilities to act as any of them. It
    /// must lose them ([`identity::drop_rest`]) before anything of a guest's is looked at.
    pub owners: bool,
}

impl Jail<'_> {
    /// Confines this process, which has one thread and was started by a [`Birth`](crate::birth::Birth).
    ///
    /// # Errors
    /// [`JailError`]; the process may be half confined then and has to end.
    pub fn enter(&self) -> Result<Entered, JailError> {
        let pid = getpid();
        if !pid.is_init() {
            return Err(JailError::NotBorn { pid: pid.as_raw_nonzero().get() });
        }
        let this = SelfFolder::open()?;
        let chosen = identity::choose(self.user)?;
        let folder = self.folder.map(root::folder).transpose()?;
        if let (Some(folder), Some(user)) = (&folder, chosen) {
            identity::give(folder.as_fd(), user)?;
        }
        let Taken { trees, descriptors, namespace } = files::take(self.trees, chosen)?;
        let owners = namespace.is_some();
        // What the host is called is nobody's business in there.
        sethostname(b"cofferdam").map_err(step("name its host"))?;
        root::empty()?;
        self.limits.apply()?;
        let namespace = namespace.as_ref().map(OwnedFd::as_fd);
        identity::become_user(chosen.unwrap_or(self.user), chosen.is_some(), namespace, &this)?;
        drop(this);
        identity::drop_capabilities(owners)?;
        if self.tied {
            set_parent_process_death_signal(Some(Signal::KILL)).map_err(step("end with its parent"))?;
        }
        let served: Vec<_> = self.trees.iter().zip(&trees).collect();
        landlock::restrict(folder.as_ref().map(OwnedFd::as_fd), &served)?;
        Ok(Entered { folder, trees, descriptors, owners })
    }
}
