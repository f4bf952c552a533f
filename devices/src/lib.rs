//! The virtio devices of a micro-VM and their MMIO transport.
//!
//! # Layout
//! - [`device`]: the contract between a device and its transport.
//! - [`interrupt`]: how a device calls its driver, and why.
//! - [`queue`]: a virtqueue as devices use it: bounded, and broken for good when the driver breaks the rules.
//! - [`window`]: what a driver reads of a device, where it reads it.
//! - [`mmio`]: the virtio-mmio transport; owns the queues and drives the device from the event loop.
//! - [`balloon`], [`blk`], [`console`], [`fs`], [`mem`], [`net`], [`pmem`], [`rng`], [`vsock`]: one device a file or folder,
//!   each in the same order: what it is, its limits, its errors, the device, its request processing, its tests.
//! - [`generation`]: which VM this is, not a virtio device.
//! - [`reclaim`]: giving guest memory back to the host.
//! - [`state`]: what is kept of a device when its VM is saved.
//! - [`limit`]: token buckets for devices that move data.
//! - [`guest_io`], [`ring_io`]: file input and output straight into guest memory. Besides those, [`reclaim`] and `net/tap.rs` have
//!   unsafe code.
//! - [`serial`]: an early-boot aid, not a virtio device.
//!
//! # Trust
//! Everything a guest writes is untrusted: register values, descriptors, buffer contents. A request that makes no sense
//! gets an error status; a queue that makes no sense breaks its device (DEVICE_NEEDS_RESET) until the driver resets it.
//! Neither can make the monitor panic, wait, or allocate more than the constants in these files say.

pub mod balloon;
pub mod blk;
#[cfg(test)]
mod conformance;
pub mod console;
pub mod device;
pub mod fs;
pub mod generation;
pub mod guest_io;
pub mod interrupt;
pub mod limit;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod pmem;
pub mod queue;
pub mod reclaim;
pub mod ring_io;
pub mod rng;
pub mod serial;
pub mod state;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod vsock;
pub mod window;

/// Guest memory as every part of the monitor sees it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
