//! A container's first process from its birth to where every process goes on ([`execution`]): OCI runtime specification,
//! "Lifecycle" steps 2 to 5. Everything here runs in the child.
//!
//! Order matters: mounts and devices need every privilege, and the image's user database must be read before the root is
//! the only thing left.

use std::os::fd::OwnedFd;

use protocol::container::{ContainerSpec, NetworkNamespace};

use super::error::{InStep, SetupError};
use super::execution::{self, Prepared};
use super::mounts::Shm;
use super::namespaces::{self, Join};
use super::streams::Ends;
use super::{mounts, rootfs, terminal};
use crate::{network, sys};

/// Sets the container up. `others` are what `joins` keep, in order.
///
/// # Errors
/// What the request names and the image has not, or the step that the kernel refused.
pub fn prepare(
    spec: &ContainerSpec,
    ends: &Ends,
    joins: &[Join<'_>],
    others: Vec<OwnedFd>,
) -> Result<Prepared, SetupError> {
    let shm = namespaces::join(joins, &others)?.map_or(Shm::New { bytes: spec.shm_bytes }, Shm::Shared);
    drop(others);
    // Only now: at the fork the new namespace would have had the agent's cgroup as its root.
    sys::unshare_cgroup_namespace().in_step("make a cgroup namespace")?;
    rustix::system::sethostname(spec.hostname.as_bytes()).in_step("set the hostname")?;
    if spec.namespaces.network == NetworkNamespace::Own {
        network::set_defaults().in_step("set the defaults of the network")?;
        sys::bring_loopback_up().in_step("bring the loopback interface up")?;
    }
    let rootfs = rootfs::mount(spec)?;
    let root = rootfs.enter()?;
    let standard = mounts::mount_standard(&root, shm)?;
    mounts::mount_requested(&root, &spec.mounts)?;
    mounts::attach_files(&root, &spec.files, &rootfs.files)?;
    mounts::hide_and_protect(&root, &standard.dev, spec)?;
    let entered = execution::enter(&spec.process, ends, &root, &standard)?;
    if entered.has_terminal() {
        terminal::make_console(&standard.dev)?;
    }
    if spec.rootfs.read_only {
        rootfs::make_read_only(&root)?;
    }
    drop((root, rootfs));
    execution::finish(&spec.process, entered, vec![standard.dev, standard.proc])
}
