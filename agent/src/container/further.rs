//! A further process of a running container, from its birth in the container's pid namespace and cgroup to where every
//! process goes on ([`execution`]). Everything here runs in the child.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use protocol::container::ProcessSpec;
use rustix::io::Errno;
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use super::error::{InStep, SetupError};
use super::execution::{self, Prepared};
use super::mounts::Standard;
use super::root::Root;
use super::streams::Ends;

/// What a process joins besides the pid namespace.
const NAMESPACES: ThreadNameSpaceType = ThreadNameSpaceType::MOUNT
    .union(ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION)
    .union(ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME)
    .union(ThreadNameSpaceType::NETWORK)
    .union(ThreadNameSpaceType::CONTROL_GROUP);

/// The container as the agent holds it: what [`prepare`] needs descriptors of.
pub fn kept<'a>(first: BorrowedFd<'a>, standard: &'a Standard) -> [BorrowedFd<'a>; 3] {
    [first, standard.dev.as_fd(), standard.proc.as_fd()]
}

/// Joins the container. `others` are those of [`kept`].
///
/// # Errors
/// What the request names and the container has not, or the step that the kernel refused.
pub fn prepare(process: &ProcessSpec, ends: &Ends, others: Vec<OwnedFd>) -> Result<Prepared, SetupError> {
    let [first, dev, proc] =
        <[OwnedFd; 3]>::try_from(others).map_err(|_| Errno::BADF).in_step("take the container's descriptors over")?;
    let root = join(first.as_fd())?;
    let entered = execution::enter(process, ends, &root, &Standard { proc, dev })?;
    drop((first, root));
    execution::finish(process, entered, Vec::new())
}

fn join(first: BorrowedFd<'_>) -> Result<Root, SetupError> {
    match move_into_thread_name_spaces(first, NAMESPACES) {
        // The first process is on its way out, and has none any more.
        Err(Errno::SRCH) => return Err(SetupError::Ended),
        result => result.in_step("join the container's namespaces")?,
    }
    Root::of_process().in_step("open the container's root directory")
}
