//! The system call filter of each kind of thread, compiled from `resources/seccomp/monitor.json` while this is built.

use seccompiler::{apply_filter, sock_filter};

use crate::error::JailError;

include!(concat!(env!("OUT_DIR"), "/monitor.rs"));

/// The kinds of thread in a monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    /// Runs the event loop, and all devices that have none of their own.
    EventLoop,
    /// Runs guest code.
    Vcpu,
    /// Serves the API, talks to the agent and moves the container's streams.
    Api,
    /// Reads and writes a disk of the guest's.
    Disk,
    /// Serves a directory or a file of the host to the guest.
    Fs,
}

/// Restricts the calling thread. After it has what it needs: only the API's can open anything any more, in the folder that it
/// was given for the container's log and the record of its end, and one that serves files, below what it exports.
///
/// # Errors
/// [`JailError::Filter`].
pub fn thread(kind: Thread) -> Result<(), JailError> {
    let filter = match kind {
        Thread::EventLoop => EVENT_LOOP,
        Thread::Vcpu => VCPU,
        Thread::Api => API,
        Thread::Disk => DISK,
        Thread::Fs => FS,
    };
    apply_filter(filter).map_err(|source| JailError::Filter { kind, source })
}
