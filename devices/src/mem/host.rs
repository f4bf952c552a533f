//! The host's side of a memory device: how much memory should be plugged, and how much is.

use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The size of a block in bytes: a huge page, so that each is given back whole.
pub const BLOCK: u64 = 2 << 20;

/// The host's side of a memory device. Clones share it.
#[derive(Debug, Clone)]
pub struct HostMem(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    size: u64,
    requested: AtomicU64,
    plugged: AtomicU64,
    wake: EventFd,
}

impl HostMem {
    /// One of a region of `size` bytes, as far as they are whole blocks, of which nothing is plugged.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new(size: u64) -> io::Result<Self> {
        let (requested, plugged) = (AtomicU64::new(0), AtomicU64::new(0));
        let size = size - size % BLOCK;
        Ok(Self(Arc::new(Shared { size, requested, plugged, wake: EventFd::new(EFD_NONBLOCK)? })))
    }

    /// The size of the region in bytes.
    pub fn size(&self) -> u64 {
        self.0.size
    }

    /// How many bytes the guest is asked to plug.
    pub fn requested(&self) -> u64 {
        self.0.requested.load(Ordering::SeqCst)
    }

    /// Asks the guest to plug so many bytes in all, in whole blocks and as far as the region goes.
    pub fn request(&self, bytes: u64) {
        let blocks = bytes.min(self.0.size).next_multiple_of(BLOCK);
        self.0.requested.store(blocks, Ordering::SeqCst);
        // Never read, so that it can only be full after 2^64 calls.
        let _ = self.0.wake.write(1);
    }

    /// How many bytes are plugged.
    pub fn plugged(&self) -> u64 {
        self.0.plugged.load(Ordering::SeqCst)
    }

    /// So many bytes are plugged.
    pub(super) fn set_plugged(&self, bytes: u64) {
        self.0.plugged.store(bytes, Ordering::SeqCst);
    }

    /// Becomes ready, as an edge, each time that there is something for the device to do.
    pub(super) fn descriptor(&self) -> RawFd {
        self.0.wake.as_raw_fd()
    }
}
