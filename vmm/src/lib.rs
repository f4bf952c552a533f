//! The monitor: one KVM virtual machine, one process.
//!
//! # Layout, in the order of a boot
//! - [`layout`]: where things are in guest-physical memory.
//! - [`memory`]: guest memory, on huge pages; files are mapped or copied into it.
//! - [`populate`]: the guest memory that every boot writes to, made present meanwhile.
//! - [`boot`]: the kernel image, the zero page, the MP table and the first registers.
//! - [`cpuid`]: what the guest's CPUs say they are.
//! - [`machine`]: the VM in phases: memory, devices, vCPUs.
//! - [`inherited`]: descriptors that the front end left open.
//! - [`vcpu`]: one thread a vCPU: run, handle the exit, run.
//! - [`monitor`]: the event loop, the container's session, and how both end.
//! - [`probe`]: whether this host's KVM can run guests.
//!
//! # Threads
//! `main` runs the event loop and all devices; `vcpu N` runs guest code and handles register accesses; `session` talks
//! to the agent and the front end; the container's streams have a thread each (crate `api`). `populate` is over before the guest runs.

pub mod boot;
pub mod cpuid;
pub mod inherited;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod monitor;
pub mod populate;
pub mod probe;
pub mod vcpu;
