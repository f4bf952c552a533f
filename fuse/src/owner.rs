//! Whose files they are.

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

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
        let own = (Uid::effective(), Gid::effective());
        let wanted = (Uid::from_raw(uid), Gid::from_raw(gid));
        if self != Self::Mapped || own == wanted {
            return Ok(Acting(None));
        }
        let acting = Acting(Some(own));
        become_owner((uid, gid))?;
        // The guest has decided by all of the user's groups, which it does not tell.
        let mut sets = rustix::thread::capabilities(None)?;
        sets.effective |= sets.permitted & (CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH);
        rustix::thread::set_capabilities(None, sets)?;
        Ok(acting)
    }
}

/// The thread acts for another user.
#[derive(Debug)]
#[must_use = "it ends when this is dropped"]
pub struct Acting(Option<(Uid, Gid)>);

impl Drop for Acting {
    fn drop(&mut self) {
        if let Some((uid, gid)) = self.0 {
            setfsuid(uid);
            setfsgid(gid);
        }
    }
}
