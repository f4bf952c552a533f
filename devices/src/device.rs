//! The contract between a virtio device and its transport (VIRTIO 1.2 chapter 2, "Basic Facilities of a Virtio Device").
//!
//! A device is plain logic: the transport owns its queues, its registers and its place in the event loop, takes its lock,
//! and calls it. A device therefore has no threads, no locks and no interrupt of its own to get wrong.

use std::os::fd::RawFd;

use thiserror::Error;

use crate::GuestMemory;
use crate::queue::VirtQueue;

/// The driver broke a rule that the device cannot answer with an error status. The transport sets DEVICE_NEEDS_RESET
/// (VIRTIO 1.2 §2.1.2) and does not call the device until the driver resets it.
#[derive(Debug, Error)]
pub enum Broken {
    /// A ring is not usable: an index jumped, or its memory is gone.
    #[error("queue {queue} is broken")]
    Queue {
        /// The queue's index.
        queue: u16,
        /// What the ring code says.
        #[source]
        source: virtio_queue::Error,
    },
    /// A descriptor chain is malformed in a way that has no error status.
    #[error("a descriptor chain on queue {queue} is malformed: {reason}")]
    Chain {
        /// The queue's index.
        queue: u16,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// Why a device is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The driver made buffers of this queue available.
    Queue(u16),
    /// A descriptor that the device watches ([`VirtioDevice::watched`]) is ready.
    Backend,
}

/// What a device works with while it is called.
pub struct Resources<'a> {
    /// Guest memory.
    pub memory: &'a GuestMemory,
    /// The device's queues, ready to use.
    pub queues: &'a mut [VirtQueue],
}

/// A virtio device.
pub trait VirtioDevice: Send {
    /// The device's type (VIRTIO 1.2 chapter 5, "Device Types").
    fn device_type(&self) -> u32;

    /// The largest size of each queue: powers of two.
    fn queue_sizes(&self) -> &'static [u16];

    /// The device's own feature bits. The transport adds those of the ring and of virtio 1.
    fn features(&self) -> u64 {
        0
    }

    /// Reads the device configuration space at `offset`. `data` is 1, 2, 4 or 8 bytes; what lies outside reads as zero.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// The driver is ready and acknowledged `features` (VIRTIO 1.2 §3.1.1 step 8).
    fn start(&mut self, features: u64);

    /// Handles an event. Must return after a bounded amount of work.
    ///
    /// # Errors
    /// [`Broken`] when the driver can no longer be served.
    fn process(&mut self, resources: Resources<'_>, event: Event) -> Result<(), Broken>;

    /// Forgets everything that the driver set up. Must be idempotent, and leave the device as it was when new.
    fn reset(&mut self);

    /// The descriptor whose readiness is [`Event::Backend`]; asked once, when the device joins the event loop.
    fn watched(&self) -> Option<RawFd> {
        None
    }

    /// Delivers what the guest already handed over, waiting for slow receivers: called once, after the last vCPU stopped.
    fn flush(&mut self) {}
}

/// Serves a read of a configuration space that is a byte array.
pub(crate) fn read_config_bytes(space: &[u8], offset: usize, data: &mut [u8]) {
    data.fill(0);
    if let Some(rest) = space.get(offset..) {
        let length = rest.len().min(data.len());
        data[..length].copy_from_slice(&rest[..length]);
    }
}
