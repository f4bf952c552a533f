//! Serves a directory or a file of the host to a guest, over FUSE messages (`linux/fuse.h`).
//!
//! # Layout
//! - [`wire`]: messages taken apart and put together; the only place that looks at bytes of the guest.
//! - [`server`]: from a message to an operation and back; the session and what it counts.
//! - [`export`]: what is exported, and how names below it are resolved and opened.
//! - [`node`], [`handle`]: what the guest knows and what it has open, each bounded.
//! - [`lock`], [`quota`], [`owner`]: locks that hold between VMs, how much may be added, whose files they are.
//! - [`saved`]: what is kept of a session when its VM is saved.
//! - `operations`: what the guest can ask for, by theme.
//! - `testing`: messages without a guest.
//!
//! # Trust
//! The guest is hostile, and so may be whoever else can write to the export. No path of either is ever resolved: a name is one
//! component, looked up in a directory that is held open. Nothing the guest sends makes the server allocate, or keep open, more
//! than [`wire`] and [`export::Limits`] say.
//!
//! # Threads
//! A server belongs to one thread, which has called [`prepare_thread`]: operations may wait as long as the host's file system does.

#![forbid(unsafe_code)]

pub mod export;
pub mod handle;
pub mod lock;
pub mod node;
mod operations;
pub mod owner;
pub mod quota;
pub mod saved;
pub mod server;
#[cfg(feature = "testing")]
pub mod testing;
pub mod wire;

use nix::sched::CloneFlags;
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};

pub use self::export::{Cache, Export, ExportError, Limits, Options, Source, descriptors};
pub use self::owner::Ownership;
pub use self::quota::Quota;
pub use self::saved::{Session, SessionError};
pub use self::server::{Served, Server};
pub use self::wire::Message;

/// Makes the calling thread one that serves: its umask is its own and empty, since a guest applies its programs' umask itself;
/// and it has the capabilities that it needs for that and no others.
///
/// With [`Ownership::Mapped`], those are what lets it create for any user and do what its guest has allowed. With
/// [`Ownership::Squash`], there are none, and the thread acts as `owner`, a user and a group, if it is given; it then needs the
/// capabilities to change to them.
///
/// # Errors
/// What the system says; `EPERM` when the thread has not the capabilities.
pub fn prepare_thread(ownership: Ownership, owner: Option<(u32, u32)>) -> Result<(), Errno> {
    nix::sched::unshare(CloneFlags::CLONE_FS).map_err(|error| Errno::from_raw_os_error(error as i32))?;
    rustix::process::umask(Mode::empty());
    let kept = match ownership {
        Ownership::Mapped => owner::NEEDED,
        Ownership::Squash { .. } => {
            owner.map_or(Ok(()), owner::become_owner)?;
            CapabilitySet::empty()
        }
    };
    if !rustix::thread::capabilities(None)?.permitted.contains(kept) {
        return Err(Errno::PERM);
    }
    // Those to keep set-user-ID bits through writes and to make device nodes are never among them. Not only not effective: they
    // would come back with the file system ids.
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    owner::changed();
    rustix::thread::set_capabilities(None, sets)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::io::Write as _;
    use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};

    use super::*;

    const OWNERSHIP: Ownership = Ownership::Squash { uid: 0, gid: 0 };

    fn mode(path: &std::path::Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_thread_that_serves_has_no_umask_and_leaves_that_of_others() {
        let folder = tempfile::tempdir().unwrap();
        rustix::process::umask(Mode::from_raw_mode(0o027));
        let served = folder.path().join("served");
        let create = |path: &std::path::Path| {
            fs::File::options().write(true).create_new(true).mode(0o666).open(path).unwrap();
            mode(path)
        };
        let thread = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                prepare_thread(OWNERSHIP, None).unwrap();
                create(&served)
            });
            thread.join().unwrap()
        });
        assert_eq!((thread, create(&folder.path().join("other"))), (0o666, 0o640));
    }

    #[test]
    fn what_a_thread_that_serves_writes_to_runs_as_nobody_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("program");
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o6755)).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                prepare_thread(OWNERSHIP, None).unwrap();
                fs::File::options().append(true).open(&path).unwrap().write_all(b"changed").unwrap();
            });
        });
        assert_eq!(mode(&path), 0o755);
    }

    /// Whether this process can be several users; only then there is anything to see.
    fn is_root() -> bool {
        nix::unistd::geteuid().is_root()
    }

    #[test]
    fn a_thread_that_squashes_is_the_owner_and_nobody_more() {
        let folder = tempfile::tempdir().unwrap();
        let (owned, others) = (folder.path().join("owned"), folder.path().join("others"));
        for (path, owner) in [(folder.path(), 1000), (&owned, 1000), (&others, 2000)] {
            if path != folder.path() {
                fs::write(path, "").unwrap();
            }
            if is_root() {
                std::os::unix::fs::chown(path, Some(owner), Some(owner)).unwrap();
            }
        }
        let serve = || {
            prepare_thread(OWNERSHIP, is_root().then_some((1000, 1000))).unwrap();
            assert!(rustix::thread::capabilities(None).unwrap().permitted.is_empty());
            fs::write(&owned, "changed").unwrap();
            fs::write(folder.path().join("made"), "").unwrap();
            fs::write(&others, "changed").is_ok()
        };
        let others_too = std::thread::scope(|scope| scope.spawn(serve).join().unwrap());
        let made = fs::metadata(folder.path().join("made")).unwrap();
        let owner = std::os::unix::fs::MetadataExt::uid(&made);
        assert_eq!(
            (others_too, owner),
            if is_root() { (false, 1000) } else { (true, nix::unistd::geteuid().as_raw()) }
        );
    }

    #[test]
    fn a_thread_that_maps_owners_needs_the_capabilities_and_keeps_no_others() {
        let prepare = || {
            let outcome = prepare_thread(Ownership::Mapped, None);
            (outcome, rustix::thread::capabilities(None).unwrap().permitted)
        };
        let outcome = std::thread::scope(|scope| scope.spawn(prepare).join().unwrap());
        let expected = if is_root() { Ok(()) } else { Err(Errno::PERM) };
        let kept = if is_root() { owner::NEEDED } else { CapabilitySet::empty() };
        assert_eq!(outcome, (expected, kept));
    }
}
