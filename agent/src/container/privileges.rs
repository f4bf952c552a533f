//! What a process of a container may do (OCI runtime specification, "Process": `rlimits`, `capabilities`,
//! `noNewPrivileges`, `user`; "Linux: Seccomp"). Runs in the child, which still has every privilege.

use protocol::container::{ProcessSpec, Seccomp};
use rustix::fs::{Gid, Uid};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
    set_thread_gid, set_thread_groups, set_thread_uid,
};

use super::error::{InStep, SetupError};
use super::user::User;
use crate::seccomp;

/// The highest capability number plus one that the kernel's interface has room for.
const CAPABILITY_BITS: u32 = 64;

/// Resource limits by their number on Linux x86-64.
const RESOURCES: [Resource; 16] = [
    Resource::Cpu,
    Resource::Fsize,
    Resource::Data,
    Resource::Stack,
    Resource::Core,
    Resource::Rss,
    Resource::Nproc,
    Resource::Nofile,
    Resource::Memlock,
    Resource::As,
    Resource::Locks,
    Resource::Sigpending,
    Resource::Msgqueue,
    Resource::Nice,
    Resource::Rtprio,
    Resource::Rttime,
];

/// Sets the resource limits.
///
/// # Errors
/// The limit that does not exist or that the kernel refused.
pub fn set_limits(process: &ProcessSpec) -> Result<(), SetupError> {
    let value = |limit: u64| (limit != u64::MAX).then_some(limit);
    for limit in &process.rlimits {
        let resource = *RESOURCES
            .get(usize::from(limit.resource))
            .ok_or(SetupError::UnknownResource { resource: limit.resource })?;
        setrlimit(resource, Rlimit { current: value(limit.soft), maximum: value(limit.hard) })
            .in_step("set a resource limit")?;
    }
    Ok(())
}

/// Leaves the process with the user, capabilities and system calls that it is to have.
///
/// # Errors
/// The step that the kernel refused.
pub fn drop(process: &ProcessSpec, user: &User) -> Result<(), SetupError> {
    let held = rustix::thread::capabilities(None).in_step("read the capabilities")?.permitted;
    for bit in 0..CAPABILITY_BITS {
        let capability = 1 << bit;
        if held.bits() & capability != 0 && process.capabilities & capability == 0 {
            remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(capability))
                .in_step("drop a capability from the bounding set")?;
        }
    }
    if process.no_new_privileges {
        set_no_new_privs(true).in_step("set no_new_privs")?;
    }
    if process.seccomp == Seccomp::Default {
        seccomp::confine().in_step("filter system calls")?;
    }
    let groups: Vec<Gid> = user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    set_thread_groups(&groups).in_step("set the supplementary groups")?;
    set_thread_gid(Gid::from_raw(user.gid)).in_step("set the group")?;
    set_thread_uid(Uid::from_raw(user.uid)).in_step("set the user")?;
    // Inheritable stays empty, as docker and podman have it since CVE-2022-24769: execve(2) gives root the bounding set
    // anyway, and a file's inheritable capabilities must not give another user anything.
    let kept = if user.uid == 0 { process.capabilities & held.bits() } else { 0 };
    let kept = CapabilitySet::from_bits_retain(kept);
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).in_step("set the capabilities")
}
