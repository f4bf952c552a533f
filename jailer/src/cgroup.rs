//! Groups of the kernel's accounting.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

/// The cgroup of one monitor.
#[derive(Debug, Default)]
pub struct Group {
    unified: Option<OwnedFd>,
    procs: Vec<OwnedFd>,
}

impl Group {
    /// Its folder in the unified hierarchy.
    pub(crate) fn unified(&self) -> Option<BorrowedFd<'_>> {
        self.unified.as_ref().map(OwnedFd::as_fd)
    }

    /// What moves a process into it in the others.
    pub(crate) fn procs(&self) -> &[OwnedFd] {
        &self.procs
    }
}
