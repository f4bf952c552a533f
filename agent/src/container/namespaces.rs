//! Which namespaces a container is born in and which it joins (namespaces(7); OCI runtime specification, "Linux:
//! Namespaces").

use std::io;
use std::os::fd::BorrowedFd;

use protocol::container::{Namespace, Namespaces, NetworkNamespace};
use rustix::thread::ThreadNameSpaceType;

use super::error::SetupError;

/// The namespaces that every container is born in. Its cgroup namespace it makes itself, in its cgroup.
const ALWAYS: libc::c_int = libc::CLONE_NEWNS | libc::CLONE_NEWUTS;

/// A namespace of another container to join.
#[derive(Debug, Clone, Copy)]
pub struct Join<'a> {
    /// Which one.
    pub kind: ThreadNameSpaceType,
    name: &'static str,
    container: &'a str,
    /// The other container's first process.
    pub process: BorrowedFd<'a>,
}

impl Join<'_> {
    /// That the kernel refused it: the other container has ended meanwhile.
    pub fn failed(&self, source: io::Error) -> SetupError {
        SetupError::Join { namespace: self.name, container: self.container.to_owned(), source }
    }
}

/// Where a container's first process is born and what it joins.
#[derive(Debug)]
pub struct Plan<'a> {
    /// The namespaces it is born in (`CLONE_NEW*` flags).
    pub new: libc::c_int,
    /// The process in whose pid namespace it is born, unless that is a new one.
    pub pids_of: Option<BorrowedFd<'a>>,
    /// What it joins by itself.
    pub joins: Vec<Join<'a>>,
}

impl<'a> Plan<'a> {
    /// Finds the containers that are named; `running` gives the first process of one that runs.
    ///
    /// # Errors
    /// The container that does not run.
    pub fn new(
        namespaces: &'a Namespaces,
        running: impl Fn(&str) -> Option<BorrowedFd<'a>>,
    ) -> Result<Self, SetupError> {
        let process = |id: &str| running(id).ok_or_else(|| SetupError::NotRunning { container: id.to_owned() });
        let mut plan = Self { new: ALWAYS, pids_of: None, joins: Vec::new() };
        match &namespaces.pid {
            Namespace::Own => plan.new |= libc::CLONE_NEWPID,
            Namespace::Container(id) => plan.pids_of = Some(process(id)?),
        }
        let mut join = |kind, name, container: &'a str| {
            plan.joins.push(Join { kind, name, container, process: process(container)? });
            Ok(())
        };
        match &namespaces.ipc {
            Namespace::Own => plan.new |= libc::CLONE_NEWIPC,
            Namespace::Container(id) => join(ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION, "ipc", id)?,
        }
        match &namespaces.network {
            NetworkNamespace::Vm => {}
            NetworkNamespace::Own => plan.new |= libc::CLONE_NEWNET,
            NetworkNamespace::Container(id) => join(ThreadNameSpaceType::NETWORK, "network", id)?,
        }
        Ok(plan)
    }
}
