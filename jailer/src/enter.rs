//! What a monitor does with itself, once it has opened what it needs and before it looks at anything of a guest's.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use rustix::process::{Signal, getpid, set_parent_process_death_signal};
use rustix::system::sethostname;

use crate::error::{JailError, step};
use crate::identity::{self, SelfFolder};
use crate::limits::Limits;
use crate::{landlock, root};

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
}

impl Jail<'_> {
    /// Confines this process, which has one thread and was started by a [`Birth`](crate::birth::Birth). Gives the folder.
    ///
    /// # Errors
    /// [`JailError`]; the process may be half confined then and has to end.
    pub fn enter(&self) -> Result<Option<OwnedFd>, JailError> {
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
        // What the host is called is nobody's business in there.
        sethostname(b"cofferdam").map_err(step("name its host"))?;
        root::empty()?;
        self.limits.apply()?;
        identity::become_user(chosen.unwrap_or(self.user), chosen.is_some(), &this)?;
        drop(this);
        identity::drop_capabilities()?;
        if self.tied {
            set_parent_process_death_signal(Some(Signal::KILL)).map_err(step("end with its parent"))?;
        }
        landlock::restrict(folder.as_ref().map(OwnedFd::as_fd))?;
        Ok(folder)
    }
}
