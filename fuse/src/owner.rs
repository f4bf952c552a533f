//! Whose files they are.

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

/// How owners on the host and in the guest go together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// What is created belongs to the server's own user, and everything seems to the guest to belong to this one.
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
        setfsgid(wanted.1);
        setfsuid(wanted.0);
        // They say what was, not whether they succeeded.
        if setfsgid(wanted.1) != wanted.1 || setfsuid(wanted.0) != wanted.0 {
            return Err(Errno::PERM);
        }
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
