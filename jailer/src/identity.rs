//! Who a monitor is: a user with no rights outside its folder, in a user namespace that has no other, without capabilities.
//!
//! With privileges, the process first becomes a user of the host that nobody else is, then makes the namespace: its other
//! namespaces belong to the one outside, so that nothing it could become inside reaches them. Without privileges there is one
//! user to be, the caller's own; the namespace is the second one then, inside that of its birth.
//!
//! Where a privileged monitor is to serve files, its namespace has their owners as well, as [`crate::files`] says.

use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{Mode, OFlags, open, openat};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, getegid, geteuid, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, LinkNameSpaceType, Uid, capabilities, capability_is_in_bounding_set,
    clear_ambient_capability_set, move_into_link_name_space, remove_capability_from_bounding_set, set_capabilities,
    set_keep_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use crate::error::{JailError, step};
use crate::sys;

/// The first of the users that monitors are: a range that distributions and systemd leave alone, of 2^24.
pub const FIRST_USER: u32 = 0x7000_0000;
/// How many there are.
pub const USERS: u32 = 1 << 24;

/// How many users of the host a namespace can have, from the first one on.
const HOST_USERS: u32 = 0x0f00_0000;
/// Who they are outside of it, where nothing is to belong to them: behind all that monitors are.
const APART: u32 = FIRST_USER + USERS;

/// What it takes to serve files of several users, in a namespace that has those users.
const FILES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID);

/// More capabilities than any kernel has.
const CAPABILITIES: u32 = 64;

/// Who the host's users are that a namespace has under their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Users {
    /// Users whom nothing belongs to, but in mounts that are mapped likewise.
    Apart,
    /// Themselves.
    Same,
}

/// The user that the monitor of `id` is, where it can be chosen: the same one at each start. Two VMs in some thousands share
/// one, which gives neither a way to the other: there is a whole jail between them.
pub fn user(id: &str) -> u32 {
    // FNV-1a: ids need not be random.
    let hash = id.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    FIRST_USER + (hash ^ (hash >> 24)) % USERS
}

/// This process in the host's procfs, which is out of reach in the jail.
pub(crate) struct SelfFolder(OwnedFd);

impl SelfFolder {
    pub(crate) fn open() -> Result<Self, JailError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        open(c"/proc/self/", flags, Mode::empty()).map(Self).map_err(step("open /proc/self"))
    }

    fn write(&self, name: &str, text: &str) -> rustix::io::Result<()> {
        let file = openat(&self.0, name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::io::write(&file, text.as_bytes()).map(drop)
    }
}

/// Gives the folder to `user`, where that can be done.
pub(crate) fn give(folder: BorrowedFd<'_>, user: u32) -> Result<(), JailError> {
    let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
    rustix::fs::chownat(folder, c"", Some(uid), Some(gid), rustix::fs::AtFlags::EMPTY_PATH)
        .map_err(step("give the folder to the monitor's user"))
}

/// Makes a user namespace that has `user` and the host's users. Nobody is in it.
pub(crate) fn namespace(user: u32, users: Users) -> Result<OwnedFd, JailError> {
    let first = if users == Users::Apart { APART } else { 0 };
    let map = format!("0 {first} {HOST_USERS}\n{user} {user} 1\n");
    let make = |process: BorrowedFd<'_>| {
        let place = place(process)?;
        for (name, text) in [("setgroups", "deny"), ("uid_map", &map), ("gid_map", &map)] {
            let file = openat(&place, name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
            rustix::io::write(&file, text.as_bytes())?;
        }
        openat(&place, c"ns/user", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
    };
    let made = sys::beside(CloneFlags::CLONE_NEWUSER.bits() as u64, make);
    made.flatten().map_err(step("make a user namespace that has the owners of files"))
}

/// The folder of a process in the host's procfs, which knows it by another id than this process does.
fn place(process: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    let told = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", process.as_raw_fd()));
    let told = told.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    let id = told.lines().find_map(|line| line.strip_prefix("Pid:")).ok_or(Errno::SRCH)?.trim();
    open(format!("/proc/{id}"), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Becomes `user`: on the host where this process may become somebody else, else only in a namespace; in `namespace`, if there
/// is one for it.
pub(crate) fn become_user(
    user: u32,
    switch: bool,
    namespace: Option<BorrowedFd<'_>>,
    this: &SelfFolder,
) -> Result<(), JailError> {
    if switch {
        let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
        set_thread_groups(&[]).map_err(step("leave all groups"))?;
        set_thread_res_gid(gid, gid, gid).map_err(step("change the group"))?;
        // A security module may let only who has capabilities make a user namespace.
        set_keep_capabilities(true).map_err(step("keep capabilities for a moment"))?;
        set_thread_res_uid(uid, uid, uid).map_err(step("change the user"))?;
        let mut sets = capabilities(None).map_err(step("read the capabilities"))?;
        sets.effective = sets.permitted;
        set_capabilities(None, sets).map_err(step("raise the capabilities for a moment"))?;
        // The kernel takes the files of a process that has changed users away from it otherwise.
        set_dumpable_behavior(DumpableBehavior::Dumpable).map_err(step("write to its own files"))?;
    }
    if let Some(namespace) = namespace {
        move_into_link_name_space(namespace, Some(LinkNameSpaceType::User))
            .map_err(step("enter its user namespace"))?;
    } else {
        let (outer_user, outer_group) = (geteuid().as_raw(), getegid().as_raw());
        unshare(CloneFlags::CLONE_NEWUSER).map_err(|errno| {
            step("make a user namespace (see user.max_user_namespaces in sysctl)")(std::io::Error::from(errno))
        })?;
        let map = |name, text: String| this.write(name, &text).map_err(step("map the user of its namespace"));
        map("setgroups", "deny".to_owned())?;
        map("uid_map", format!("{user} {outer_user} 1"))?;
        map("gid_map", format!("{user} {outer_group} 1"))?;
    }
    // Whoever makes a user namespace has every capability in it: nobody does here.
    this.write("../sys/user/max_user_namespaces", "0").map_err(step("forbid user namespaces in its own"))
}

/// Drops every capability for good, and forbids to gain any and to be traced. Those that it takes to serve files are kept for
/// now if they are to be ([`drop_rest`]).
pub(crate) fn drop_capabilities(keep: bool) -> Result<(), JailError> {
    for number in 0..CAPABILITIES {
        // One bit; those of capabilities that are newer than rustix have no name.
        let capability = CapabilitySet::from_bits_retain(1 << number);
        // The kernel knows no more than the first one that it does not know.
        if capability_is_in_bounding_set(capability).is_err() {
            break;
        }
        remove_capability_from_bounding_set(capability).map_err(step("drop a capability of the bounding set"))?;
    }
    clear_ambient_capability_set().map_err(step("clear the ambient capabilities"))?;
    set(if keep { FILES } else { CapabilitySet::empty() })?;
    set_no_new_privs(true).map_err(step("renounce new privileges"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("forbid tracing"))
}

/// Drops the calling thread's capabilities to serve files. To be called when the threads are there that do that.
///
/// # Errors
/// [`JailError::Step`].
pub fn drop_rest() -> Result<(), JailError> {
    set(CapabilitySet::empty())
}

fn set(kept: CapabilitySet) -> Result<(), JailError> {
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(step("drop capabilities"))
}

/// The user of the host that this process is to become: `user` where it may become somebody else and that one exists, else
/// `nobody`; nobody else where the namespace has only one.
pub(crate) fn choose(user: u32) -> Result<Option<u32>, JailError> {
    const NOBODY: u32 = 65534;
    let map = std::fs::read_to_string("/proc/self/uid_map").map_err(step("read /proc/self/uid_map"))?;
    let privileged = crate::birth::is_privileged().map_err(step("read the capabilities"))?;
    Ok([user, NOBODY].into_iter().find(|user| privileged && is_mapped(&map, *user)))
}

/// Whether a user exists in a namespace with this map.
fn is_mapped(map: &str, user: u32) -> bool {
    map.lines().any(|line| {
        let mut numbers = line.split_ascii_whitespace().map(|word| word.parse::<u64>().unwrap_or(0));
        let (first, _, count) = (numbers.next().unwrap_or(0), numbers.next(), numbers.next().unwrap_or(0));
        (first..first.saturating_add(count)).contains(&user.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_in_the_documented_range_and_stay_the_same() {
        let ids = ["", "0123456789abcdef0123456789abcdef", "x"];
        for id in ids {
            assert!((FIRST_USER..FIRST_USER + USERS).contains(&user(id)));
            assert_eq!(user(id), user(id));
        }
        assert_ne!(user(ids[1]), user(ids[2]));
    }

    #[test]
    fn a_user_that_its_namespace_has_not_is_not_chosen() {
        assert!(is_mapped("         0          0 4294967295\n", FIRST_USER));
        let container = "0 100000 65536\n70000 1 1\n";
        assert!(is_mapped(container, 65534) && is_mapped(container, 70000) && !is_mapped(container, FIRST_USER));
        assert!(!is_mapped("", 0) && !is_mapped("garbage", 1));
    }
}
