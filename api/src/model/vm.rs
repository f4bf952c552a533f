//! The micro-VM itself.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A micro-VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// Where it is in its life.
    pub state: VmState,
    /// The process id of its monitor on the host.
    pub pid: u32,
    /// The version of its monitor.
    pub version: String,
    /// The guest kernel's file.
    pub kernel: String,
    /// The number of vCPUs that the guest uses.
    pub vcpus: u8,
    /// The number of vCPUs that there are.
    pub vcpus_max: u8,
    /// Guest memory in MiB, what was plugged since it was booted included.
    pub memory_mib: u32,
    /// The memory that the guest is asked to have, in MiB. It gets there as far as it can, and takes its time.
    pub memory_requested_mib: u32,
    /// The most that can be asked for, in MiB.
    pub memory_max_mib: u32,
    /// Its devices, in the order in which the guest finds them.
    pub devices: Vec<Device>,
    /// When each part of its start was over.
    pub boot: VmBoot,
}

/// A change of a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmUpdate {
    /// How much memory the guest is asked to have, in MiB: between what it was booted with and `memory_max_mib`, rounded up
    /// to whole blocks of 2 MiB.
    pub memory_mib: Option<u32>,
    /// How many vCPUs the guest is to use: 1 to `vcpus_max`.
    pub vcpus: Option<u8>,
}

/// Where a VM is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Its kernel boots.
    Booting,
    /// Its agent takes requests.
    Running,
    /// Its vCPUs stand still.
    Paused,
    /// It ends.
    Stopping,
}

/// A device of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Device {
    /// What it is: `vsock`, `block`, `entropy`, `console`, `balloon`, `memory` or `pmem`.
    pub kind: String,
    /// What the driver has set up so far: `reset`, `ready` or `broken` (it broke a rule and must reset the device).
    pub status: String,
}

/// Which VM a VM is: a number that another one has when it was copied or put back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Generation {
    /// The 16 bytes that the guest reads, as 32 hexadecimal digits.
    pub id: String,
}

/// When each part of a start was over: nanoseconds of the host's CLOCK_MONOTONIC unless stated otherwise, and 0 for what
/// has not happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmBoot {
    /// The monitor's `main` began.
    pub monitor_started_ns: u64,
    /// The VM was built, and its vCPUs were about to run.
    pub vm_created_ns: u64,
    /// The agent's first message came in.
    pub agent_ready_ns: u64,
    /// The container that the VM is for was set up in the guest.
    pub container_created_ns: u64,
    /// The report that its program was executed came in.
    pub container_started_ns: u64,
    /// Guest time at which the agent began, in microseconds: what the kernel took.
    pub guest_agent_started_us: u64,
    /// Guest time at which the agent was ready, in microseconds.
    pub guest_agent_ready_us: u64,
}
