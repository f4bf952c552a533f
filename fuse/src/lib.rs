//! Serves a directory or a file of the host to a guest, over FUSE messages (`linux/fuse.h`).
//!
//! # Layout
//! - [`wire`]: messages taken apart and put together; the only place that looks at bytes of the guest.
//! - [`server`]: from a message to an operation and back; the session and what it counts.
//! - [`export`]: what is exported, and how names below it are resolved and opened.
//! - [`node`], [`handle`]: what the guest knows and what it has open, each bounded.
//! - [`lock`], [`quota`], [`owner`]: locks that hold between VMs, how much may be added, whose files they are.
//! - `operations`: what the guest can ask for, by theme.
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
pub mod server;
pub mod wire;

use nix::sched::CloneFlags;
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

pub use self::export::{Cache, Export, ExportError, Limits, Options, Source};
pub use self::owner::Ownership;
pub use self::quota::Quota;
pub use self::server::{Served, Server};
pub use self::wire::Message;

/// Makes the calling thread one that serves: its umask is its own and empty, since a guest applies its programs' umask itself;
/// and it loses the capabilities to keep set-user-ID bits through writes and to make device nodes.
///
/// # Errors
/// What the system says.
pub fn prepare_thread() -> Result<(), Errno> {
    nix::sched::unshare(CloneFlags::CLONE_FS).map_err(|error| Errno::from_raw_os_error(error as i32))?;
    rustix::process::umask(Mode::empty());
    let mut sets = rustix::thread::capabilities(None)?;
    let dropped = CapabilitySet::FSETID | CapabilitySet::MKNOD;
    // Permitted too: what is only not effective comes back with the file system ids.
    if sets.permitted.intersects(dropped) {
        sets.effective -= dropped;
        sets.permitted -= dropped;
        sets.inheritable -= dropped;
        rustix::thread::set_capabilities(None, sets)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::io::Write as _;
    use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};

    use super::*;

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
                prepare_thread().unwrap();
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
                prepare_thread().unwrap();
                fs::File::options().append(true).open(&path).unwrap().write_all(b"changed").unwrap();
            });
        });
        assert_eq!(mode(&path), 0o755);
    }
}
