//! Which namespaces a container is born in and which it joins (namespaces(7); OCI runtime specification, "Linux:
//! Namespaces").

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use protocol::container::{Namespace, Namespaces, NetworkNamespace};
use rustix::fs::{self, Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType, move_into_link_name_space, move_into_thread_name_spaces};

use super::error::SetupError;
use super::filesystem::bind;

/// The namespaces that every container is born in. Its cgroup namespace it makes itself, in its cgroup.
const ALWAYS: libc::c_int = libc::CLONE_NEWNS | libc::CLONE_NEWUTS;

/// A container that runs, for another to join its namespaces.
#[derive(Debug, Clone, Copy)]
pub struct Running<'a> {
    /// Its first process.
    pub process: BorrowedFd<'a>,
    /// Its `/dev`.
    pub dev: BorrowedFd<'a>,
}

/// A namespace of another container to join.
#[derive(Debug, Clone, Copy)]
pub struct Join<'a> {
    /// Which one.
    pub kind: ThreadNameSpaceType,
    name: &'static str,
    container: &'a str,
    /// The other container.
    other: Running<'a>,
}

impl<'a> Join<'a> {
    /// What [`join`] needs descriptors of.
    pub fn kept(&self) -> [BorrowedFd<'a>; 2] {
        [self.other.process, self.other.dev]
    }

    /// That the kernel refused it: the other container has ended meanwhile.
    fn failed(&self, source: io::Error) -> SetupError {
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
    /// Finds the containers that are named; `running` gives one that runs.
    ///
    /// # Errors
    /// The container that does not run.
    pub fn new(namespaces: &'a Namespaces, running: impl Fn(&str) -> Option<Running<'a>>) -> Result<Self, SetupError> {
        let find = |id: &str| running(id).ok_or_else(|| SetupError::NotRunning { container: id.to_owned() });
        let mut plan = Self { new: ALWAYS, pids_of: None, joins: Vec::new() };
        match &namespaces.pid {
            Namespace::Own => plan.new |= libc::CLONE_NEWPID,
            Namespace::Container(id) => plan.pids_of = Some(find(id)?.process),
        }
        let mut join = |kind, name, container: &'a str| {
            plan.joins.push(Join { kind, name, container, other: find(container)? });
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

/// Joins the namespaces of other containers. `others` are the descriptors of [`Join::kept`], join by join. With an ipc
/// namespace comes what is at that container's `/dev/shm`, as a mount that is not attached yet: POSIX shared memory is
/// files there.
///
/// # Errors
/// The namespace that can't be joined.
pub fn join(joins: &[Join<'_>], others: &[OwnedFd]) -> Result<Option<OwnedFd>, SetupError> {
    let mut shm = None;
    for (join, other) in joins.iter().zip(others.chunks_exact(2)) {
        let [process, dev] = other else { continue };
        let joined = move_into_thread_name_spaces(process.as_fd(), join.kind);
        joined.map_err(|error| join.failed(error.into()))?;
        if join.kind == ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION {
            shm = Some(take_shm(process, dev).map_err(|error| join.failed(error.into()))?);
        }
    }
    Ok(shm)
}

/// A mount is copied only in the mount namespace that it is in: there and back.
fn take_shm(process: &OwnedFd, dev: &OwnedFd) -> Result<OwnedFd, Errno> {
    let home = fs::open("/proc/self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    move_into_thread_name_spaces(process.as_fd(), ThreadNameSpaceType::MOUNT)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let shm = fs::openat(dev, "shm", flags, Mode::empty()).and_then(bind);
    move_into_link_name_space(home.as_fd(), Some(LinkNameSpaceType::Mount))?;
    shm
}
