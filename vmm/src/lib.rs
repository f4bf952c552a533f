//! The monitor: one KVM virtual machine, one process.
//!
//! # Layout, in the order of a boot
//! - [`layout`]: where things are in guest-physical memory.
//! - [`memory`]: guest memory, on huge pages; files are mapped or copied into it.
//! - [`populate`]: the guest memory that every boot writes to, made present meanwhile.
//! - [`boot`]: the kernel image, the zero page, the MP table and the first registers.
//! - [`cpuid`]: what the guest's CPUs say they are.
//! - [`resources`] and `sockets`: what a VM is made of, opened before the jail is entered.
//! - [`files`]: the threads that serve files of the host, from the moment that the jail has been entered.
//! - [`machine`]: the VM in phases: memory, devices, vCPUs.
//! - `attach`: from the configuration to devices that are connected with the VM.
//! - [`inherited`]: descriptors that the front end left open.
//! - [`vcpu`]: one thread a vCPU: run, handle the exit, run.
//! - [`pause`]: stopping vCPUs where they are.
//! - [`confinement`]: the filters of all threads, which are in force before the guest runs.
//! - [`monitor`]: the event loop, the API's thread, and how both end.
//! - `own_loop`: event loops of devices that may wait, each on a thread of its own.
//! - [`restart`]: the process above, where a policy asks for one.
//! - [`probe`]: whether this host's KVM can run guests.
//!
//! # Threads
//! `main` runs the event loop and all devices that never wait; those that can be written to are each on a `disk N`, and those
//! that serve files on a `files N`. `vcpu N` runs guest code and handles register accesses; `api` serves the API, talks to the
//! agent and moves the streams of containers (crate `api`). `populate` is over before the guest runs.

mod attach;
pub mod boot;
pub mod confinement;
pub mod cpuid;
pub mod files;
pub mod inherited;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod monitor;
mod own_loop;
pub mod pause;
pub mod populate;
pub mod probe;
pub mod resources;
pub mod restart;
mod sockets;
pub mod vcpu;
