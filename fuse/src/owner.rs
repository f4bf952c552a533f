//! Whose files they are.

use std::cell::Cell;

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};

/// What it takes to create for any user, and to do what only an owner may.
pub(crate) const NEEDED: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID);

/// Has the calling thread act as a user and a group, from here on.
///
/// # Errors
/// `EPERM` when it may not do that.
pub(crate) fn become_owner((uid, gid): (u32, u32)) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setfsgid(gid);
    setfsuid(uid);
    // They say what was, not whether they succeeded.
    if setfsgid(gid) != gid || setfsuid(uid) != uid { Err(Errno::PERM) } else { Ok(()) }
}

/// What a thread is when it acts for nobody else.
#[derive(Debug, Clone, Copy)]
struct Own {
    user: (Uid, Gid),
    sets: CapabilitySets,
}

thread_local! {
    /// Asked for once: a thread that serves stays what it is.
    static OWN: Cell<Option<Own>> = const { Cell::new(None) };
}

impl Own {
    /// The calling thread, which acts for nobody else.
    fn get() -> Result<Self, Errno> {
        if let Some(own) = OWN.get() {
            return Ok(own);
        }
        let user = (Uid::effective(), Gid::effective());
        let own = Self { user, sets: rustix::thread::capabilities(None)? };
        OWN.set(Some(own));
        Ok(own)
    }
}

/// Has the calling thread ask again what it is, since that has changed.
pub(crate) fn changed() {
    OWN.set(None);
}

/// How owners on the host and in the guest go together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// What is created belongs to the user that the server acts as, and everything seems to the guest to belong to this one.
    Squash {
        /// The user in the guest.
        uid: u32,
        /// Its group.
        gid: u32,
    },
    /// The guest's numbers are the host's.
    Mapped,
}

impl Ownership {
    /// The owner that the guest sees.
    pub fn shown(self, uid: u32, gid: u32) -> (u32, u32) {
        match self {
            Self::Squash { uid, gid } => (uid, gid),
            Self::Mapped => (uid, gid),
        }
    }

    /// Lets the thread create for a user of the guest, until the result is dropped.
    ///
    /// # Errors
    /// `EPERM` when the server may not do that.
    pub fn act_as(self, uid: u32, gid: u32) -> Result<Acting, Errno> {
        if self != Self::Mapped {
            return Ok(Acting(None));
        }
        let own = Own::get()?;
        if own.user == (Uid::from_raw(uid), Gid::from_raw(gid)) {
            return Ok(Acting(None));
        }
        let acting = Acting(Some(own));
        become_owner((uid, gid))?;
        let mut sets = own.sets;
        // The guest has decided by all of the user's groups, which it does not tell.
        sets.effective |= sets.permitted & (CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH);
        rustix::thread::set_capabilities(None, sets)?;
        Ok(acting)
    }

    /// As [`Ownership::act_as`], of another group only.
    ///
    /// # Errors
    /// `EPERM` when the server may not do that.
    pub fn act_in(self, gid: u32) -> Result<Acting, Errno> {
        if self != Self::Mapped {
            return Ok(Acting(None));
        }
        self.act_as(Own::get()?.user.0.as_raw(), gid)
    }
}

/// The thread acts for another user.
#[derive(Debug)]
#[must_use = "it ends when this is dropped"]
pub struct Acting(Option<Own>);

impl Drop for Acting {
    fn drop(&mut self) {
        if let Some(Own { user: (uid, gid), sets }) = self.0 {
            setfsuid(uid);
            setfsgid(gid);
            // Whoever stops being root loses what root has of files from the effective ones (capabilities(7)). Each of them is
            // permitted, so that this succeeds.
            let _ = rustix::thread::set_capabilities(None, sets);
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::thread::{capabilities, set_capabilities, set_keep_capabilities, set_thread_res_uid};

    use super::*;

    #[test]
    fn who_has_acted_as_root_has_the_capabilities_of_before() {
        if !Uid::effective().is_root() {
            assert_eq!(Ownership::Mapped.act_as(0, 0).err(), Some(Errno::PERM));
            return;
        }
        // As a monitor's thread: not root, but with what it takes. Of this thread alone.
        let thread = std::thread::spawn(|| {
            set_keep_capabilities(true).unwrap();
            let user = rustix::process::Uid::from_raw(1234);
            set_thread_res_uid(user, user, user).unwrap();
            let sets = CapabilitySets { effective: NEEDED, permitted: NEEDED, inheritable: CapabilitySet::empty() };
            set_capabilities(None, sets).unwrap();
            drop(Ownership::Mapped.act_as(0, 0).unwrap());
            assert_eq!(capabilities(None).unwrap().effective, NEEDED);
        });
        thread.join().unwrap();
    }
}
