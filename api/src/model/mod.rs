//! The documents of the REST API: what requests carry and what answers say. JSON with snake_case names and units at their
//! ends; requests with a field that does not exist are refused with its name.

mod container;
mod event;
mod memory;
mod process;
mod vm;

pub use container::{
    CPU_QUOTA_MIN_US, Container, ContainerCreate, ContainerState, ContainerStatus, CpuStats, Health, HealthState,
    HostStats, IoStats, Kill, LimitsUpdate, MEMORY_MIN, MemoryStats, PIDS_MIN, PidsStats, Stats, Top, TopProcess,
};
pub use event::{Event, EventKind};
pub use memory::{Balloon, BalloonStatistics, BalloonUpdate};
pub use process::{HEADER_LENGTH, Process, ProcessCreate, ProcessState, Size, StreamKind, TROUBLE, WaitResult};
pub use vm::{Device, Generation, Vm, VmBoot, VmState, VmUpdate};
