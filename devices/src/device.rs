//! The contract between a virtio device and its transport (VIRTIO 1.2 chapter 2, "Basic Facilities of a Virtio Device").
//!
//! A device is plain logic: the transport owns its queues, its registers and its place in the event loop, takes its lock,
//! and calls it. A device therefore has no event loop, no locks and no interrupt of its own to get wrong.

use std::os::fd::RawFd;
use std::time::Duration;

use thiserror::Error;
use vmm_sys_util::epoll::EventSet;

use crate::GuestMemory;
use crate::queue::VirtQueue;
use crate::state::StateError;
use crate::window::Window;

/// How long the end of a VM waits for what a device has still to deliver: to a disk, or to those who receive what a guest sent.
pub(crate) const DRAIN_MAX: Duration = Duration::from_secs(10);

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
    /// The descriptor at this position of what the device watches ([`VirtioDevice::watched`]) is ready.
    Backend(usize),
}

/// The event loop that a device is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loop {
    /// The one of all devices that never wait.
    Shared,
    /// One of its own: it may wait for a disk. When the guest has ended it is flushed, as those of the shared one are.
    Disk,
    /// One of its own: it may wait for files of the host for as long as these like, and nobody waits for it.
    Files,
}

/// A descriptor that a device hears of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watch {
    /// The descriptor; it stays open as long as the device lives.
    pub descriptor: RawFd,
    /// When the device hears of it.
    pub trigger: Trigger,
}

/// When a device hears of a descriptor: at edges, since it may stay ready while the driver has no buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// Each time that it becomes readable.
    Readable,
    /// Each time that it becomes readable or writable.
    Either,
}

impl Trigger {
    /// What to ask an event loop for.
    pub(crate) fn events(self) -> EventSet {
        match self {
            Self::Readable => EventSet::IN | EventSet::EDGE_TRIGGERED,
            Self::Either => EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED,
        }
    }
}

/// What a device works with while it is called.
pub struct Resources<'a> {
    /// Guest memory.
    pub memory: &'a GuestMemory,
    /// The device's queues, ready to use.
    pub queues: &'a mut [VirtQueue],
    /// What its driver reads in its configuration space.
    pub configuration: Configuration<'a>,
}

/// The configuration space of a device, where its driver reads it: as it was when the driver last wrote a register, and
/// whenever the device says that it changed.
#[derive(Debug)]
pub struct Configuration<'a> {
    pub(crate) window: &'a Window,
    pub(crate) changed: &'a mut bool,
}

impl Configuration<'_> {
    /// It reads differently than before: the transport looks at it anew and tells the driver.
    pub fn change(&mut self) {
        *self.changed = true;
    }

    /// A field of it, of words, reads differently by what the driver itself asked for, and need not be told. To be called before
    /// the driver is answered.
    pub fn update(&mut self, offset: u64, value: &[u8]) {
        self.window.put_configuration(offset, value);
    }
}

/// A virtio device.
pub trait VirtioDevice: Send {
    /// The device's type (VIRTIO 1.2 chapter 5, "Device Types").
    fn device_type(&self) -> u32;

    /// The largest size of each queue: powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// The device's own feature bits. The transport adds those of the ring and of virtio 1.
    fn features(&self) -> u64 {
        0
    }

    /// Reads the device configuration space, of at most 64 bytes, at `offset`. `data` is 8 bytes; what lies outside reads as
    /// zero.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// Takes a write of the device configuration space at `offset`, by a driver that the device knows. `data` is 1, 2, 4 or
    /// 8 bytes; what does not fit a writable field of its size is ignored.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// The driver is ready and acknowledged `features` (VIRTIO 1.2 §3.1.1 step 8).
    fn start(&mut self, features: u64);

    /// Handles an event. Must return after a bounded amount of work.
    ///
    /// # Errors
    /// [`Broken`] when the driver can no longer be served.
    fn process(&mut self, resources: Resources<'_>, event: Event) -> Result<(), Broken>;

    /// Forgets everything that the driver set up. Must be idempotent, and leave the device as it was when new.
    fn reset(&mut self);

    /// Brings what is under way to an end, so that nothing of the driver's is held that [`VirtioDevice::save`] does not keep.
    /// The device goes on as before then, unless it is dropped.
    ///
    /// # Errors
    /// As [`VirtioDevice::process`].
    fn quiesce(&mut self, _resources: Resources<'_>) -> Result<(), Broken> {
        Ok(())
    }

    /// As [`VirtioDevice::quiesce`], for a device that is not in service: what is under way was begun for a driver that has reset
    /// the device since, or broken it, and nobody is told what comes of it.
    fn settle(&mut self) {}

    /// What the device keeps besides its queues and the features that were agreed on, encoded. What is the host's is not in
    /// it. Called after [`VirtioDevice::quiesce`] or [`VirtioDevice::settle`].
    ///
    /// # Errors
    /// [`StateError::Busy`] when that did not come to an end; [`StateError::Unsupported`], unless the device says otherwise.
    fn save(&self) -> Result<Vec<u8>, StateError> {
        Err(StateError::Unsupported(self.device_type()))
    }

    /// Takes over what [`VirtioDevice::save`] gave, of a device that was made like this one. Called after
    /// [`VirtioDevice::start`], if there was a driver. The state is not to be believed; the device is reset if it is refused.
    ///
    /// # Errors
    /// [`StateError`] says what is wrong with it.
    fn restore(&mut self, _state: &[u8]) -> Result<(), StateError> {
        Err(StateError::Unsupported(self.device_type()))
    }

    /// Lets go of what the driver made it hold before a reset, as far as the thread that resets it may not. Called by the thread
    /// that calls [`VirtioDevice::process`], before each event, also of a device that is not in service.
    fn let_go(&mut self) {}

    /// Makes what the device will need later, and nothing to describe it to the driver. Called once, by the thread that will
    /// call [`VirtioDevice::process`], before that is confined.
    fn prepare(&mut self) {}

    /// The descriptors whose readiness is [`Event::Backend`]; asked once, when the device joins the event
    /// loop, after [`VirtioDevice::prepare`].
    fn watched(&self) -> Vec<Watch> {
        Vec::new()
    }

    /// The event loop that it is to be in; asked once, when it has been made.
    fn event_loop(&self) -> Loop {
        Loop::Shared
    }

    /// What the device has counted since it was made, by name: `snake_case`, with the unit last (`read_bytes`). The
    /// transport adds what it counts itself.
    fn metrics(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// The guest has ended: limits of how much it may move do not hold for what it already handed over. Called once, before the
    /// queues are looked at a last time.
    fn hurry(&mut self) {}

    /// Delivers what the guest already handed over. Waits for slow receivers, but for all of them together no longer than a
    /// disk may take (`DRAIN_MAX`): called once, after [`VirtioDevice::hurry`].
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
