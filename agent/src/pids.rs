//! Process ids across namespaces (pid_namespaces(7)): the agent's children are born where their container's ids are.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, getpid, pidfd_open};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use crate::sys::{self, Fork};

/// The agent's own pid namespace, which children are born in unless it is said otherwise.
#[derive(Debug)]
pub struct Home(OwnedFd);

impl Home {
    /// The namespace of the caller.
    ///
    /// # Errors
    /// What pidfd_open(2) says.
    pub fn new() -> io::Result<Self> {
        Ok(Self(open(getpid())?))
    }

    /// Forks as [`sys::fork_into`]; with a `member` the child is born in the pid namespace of that process, and still
    /// is a child of the caller.
    ///
    /// # Errors
    /// What setns(2) and clone3(2) say.
    pub fn fork(
        &self,
        member: Option<BorrowedFd<'_>>,
        cgroup: Option<BorrowedFd<'_>>,
        namespaces: libc::c_int,
    ) -> io::Result<Fork> {
        let Some(member) = member else { return sys::fork_into(cgroup, namespaces) };
        // It is where children are born that changes, not where the caller is.
        move_into_thread_name_spaces(member, ThreadNameSpaceType::PROCESS_ID)?;
        let fork = sys::fork_into(cgroup, namespaces);
        if !matches!(fork, Ok(Fork::Child)) {
            // A process may always go back to its own.
            move_into_thread_name_spaces(rustix::fd::AsFd::as_fd(&self.0), ThreadNameSpaceType::PROCESS_ID)?;
        }
        fork
    }
}

/// A descriptor that means a child of the caller which was not waited for, whatever becomes of its id.
///
/// # Errors
/// What pidfd_open(2) says.
pub fn open(pid: Pid) -> io::Result<OwnedFd> {
    // Closed by execve(2) without being told.
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Whether the process of a descriptor has ended.
pub fn has_ended(process: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(process, PollFlags::IN)];
    matches!(poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1..))
}
