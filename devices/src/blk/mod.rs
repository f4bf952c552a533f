//! The block device (VIRTIO 1.2 §5.2, "Block Device", device ID 2).
//!
//! Each queue takes requests: a 16-byte header, data, and a status byte that the device writes. Reads, writes, flushes,
//! discards, zeroing and the serial number are served; everything else is VIRTIO_BLK_S_UNSUPP. Data moves between the file
//! and guest memory without a copy: what a read finds in the host's page cache comes at once, and what the page cache takes
//! is written at once; everything that needs the disk goes through a ring ([`crate::ring_io`]). Read-only is decided here,
//! by never writing, whatever the driver negotiated.
//!
//! # The cache
//! Writes go to the host's page cache, and a flush brings them to the disk: a write-back cache, as a driver that knows
//! VIRTIO_BLK_F_FLUSH takes it for. For one that does not accept that feature, each write is complete when it is on the
//! disk (§5.2.6.2). VIRTIO_BLK_F_CONFIG_WCE, by which a driver switches between the two, is not offered: Linux switches
//! only when an administrator of the guest says so, and who wants every write on the disk can have it by O_DSYNC.
//!
//! The page cache may keep a writer waiting: when more was written than the disk keeps up with, or when part of a page is
//! written that has to be read first. There is no telling before (few file systems know RWF_NOWAIT for writes, and a ring
//! hands every write to the others to a thread of the kernel's, which takes longer than the write). A device that can be
//! written to is therefore in an event loop of its own; one that cannot never waits and is in the shared one.
//!
//! # A reset
//! Operations that the disk has not done when the driver resets the device cannot be taken back. They are still completed,
//! from and into the guest's memory, where the driver that started them put its buffers; no driver hears of them. Until
//! then they count for how much may be under way.

mod request;
mod serve;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::time::Instant;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};

use self::request::Limits;
use self::serve::Pending;
use crate::device::{Broken, DRAIN_MAX, Event, Loop, Resources, Trigger, VirtioDevice, Watch, read_config_bytes};
use crate::limit::Limiter;
use crate::queue::QUEUE_SIZE_MAX;
use crate::ring_io::{DEPTH, RingIo};
use crate::state::{self, StateError};

/// The most queues: more than a disk of a micro-VM keeps busy, and each costs a descriptor.
pub const QUEUES_MAX: u16 = 4;

/// The unit of the capacity and of request positions (§5.2.2).
const SECTOR: u64 = 512;
/// The most data in one request, also of zeros, which may have to be written. Linux does not ask for more by itself.
const REQUEST_MAX: u64 = 4 << 20;
/// The most that one request discards: letting go of a range costs by its pieces on the disk, and no more than that.
const DISCARD_MAX: u64 = 1 << 30;
/// What discarded ranges had better be multiples of, in bytes: the usual block of a file system.
const DISCARD_ALIGNMENT: u64 = 4096;
/// Header and status need a descriptor each; the rest can be data.
const SEGMENTS_MAX: u32 = QUEUE_SIZE_MAX as u32 - 2;
/// The length of the serial number field (§5.2.6).
const ID_LENGTH: usize = 20;
/// The length of the configuration space up to the last field that we have.
const SPACE_LENGTH: usize = 60;
/// How often in one call the queues are looked at again because operations were completed meanwhile.
const ROUNDS_MAX: u32 = 8;
/// After so many reads of which the page cache had nothing it is asked only at one in as many.
const MISSES_MAX: u64 = 16;

/// What a block device is to be.
#[derive(Debug, Default)]
pub struct Options {
    /// Whether nothing may be written.
    pub read_only: bool,
    /// What the guest reads as its serial number, cut at 20 bytes.
    pub id: String,
    /// How many queues it has, 1 to [`QUEUES_MAX`].
    pub queues: u16,
    /// How much it may move.
    pub limiter: Option<Limiter>,
}

/// A block device with a file behind it.
#[derive(Debug)]
pub struct Blk {
    io: RingIo,
    limits: Limits,
    id: [u8; ID_LENGTH],
    configuration: [u8; SPACE_LENGTH],
    queue_sizes: Vec<u16>,
    limiter: Option<Limiter>,
    /// The requests of operations that are under way, by token; `None` for those of a driver that is gone.
    pending: Vec<Option<Pending>>,
    /// Whether writes are complete only when they are on the disk.
    write_through: bool,
    /// Whether the page cache tells what it has.
    cache_tells: bool,
    /// How often in a row it had nothing.
    misses: u64,
    /// Whether a request was left in its queue because too much was under way.
    stalled: bool,
    /// The queue that is looked at first.
    first_queue: usize,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Counters {
    reads: u64,
    cached_reads: u64,
    writes: u64,
    flushes: u64,
    discards: u64,
    zeroings: u64,
    identifications: u64,
    read_bytes: u64,
    written_bytes: u64,
    failed: u64,
    stalls: u64,
}

impl Blk {
    /// A device as large as the file, in whole sectors.
    ///
    /// # Errors
    /// When the file's length cannot be found.
    pub fn new(file: File, options: Options) -> io::Result<Self> {
        let io = RingIo::new(file);
        let Options { read_only, id, queues, limiter } = options;
        // Seeking gives the length of block devices too, where metadata says zero.
        let sectors = io.file().seek(SeekFrom::End(0))? / SECTOR;
        let queues = queues.clamp(1, QUEUES_MAX);
        let mut padded = [0; ID_LENGTH];
        let length = id.len().min(ID_LENGTH);
        padded[..length].copy_from_slice(&id.as_bytes()[..length]);
        Ok(Self {
            io,
            limits: Limits { sectors, read_only },
            id: padded,
            configuration: configuration(sectors, queues),
            queue_sizes: vec![QUEUE_SIZE_MAX; queues.into()],
            limiter,
            pending: vec![None; DEPTH.into()],
            write_through: false,
            cache_tells: true,
            misses: 0,
            stalled: false,
            first_queue: 0,
            counters: Counters::default(),
        })
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let several = if self.queue_sizes.len() > 1 { 1 << VIRTIO_BLK_F_MQ } else { 0 };
        let changes = if self.limits.read_only {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | several | changes
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&self.configuration, offset, data);
    }

    fn start(&mut self, features: u64) {
        self.write_through = features & 1 << VIRTIO_BLK_F_FLUSH == 0;
    }

    fn process(&mut self, resources: Resources<'_>, event: Event) -> Result<(), Broken> {
        let Resources { memory, queues, .. } = resources;
        let mut served = match event {
            Event::Queue(index) => match queues.get_mut(usize::from(index)) {
                Some(queue) => self.serve(memory, index.into(), queue),
                None => Ok(()),
            },
            // The limiter, if there is one; the ring comes after it.
            Event::Backend(0) if let Some(limiter) = &mut self.limiter => {
                limiter.wake();
                self.serve_all(memory, queues)
            }
            Event::Backend(_) => Ok(()),
        };
        for _ in 0..ROUNDS_MAX {
            self.complete(memory, queues)?;
            served?;
            if !self.stalled || !self.io.has_room() {
                return Ok(());
            }
            served = self.serve_all(memory, queues);
        }
        self.complete(memory, queues)?;
        // There may be more; others have their turn first.
        if let Some(queue) = queues.first() {
            let _ = queue.kick().write(1);
        }
        served
    }

    fn reset(&mut self) {
        self.pending.fill(None);
        self.write_through = false;
        self.stalled = false;
        self.limiter.iter_mut().for_each(Limiter::reset);
    }

    /// Waits for the disk, as long as the end of a VM does.
    fn quiesce(&mut self, resources: Resources<'_>) -> Result<(), Broken> {
        let deadline = Instant::now() + DRAIN_MAX;
        loop {
            self.complete(resources.memory, resources.queues)?;
            if !self.io.wait(deadline) {
                return Ok(());
            }
        }
    }

    fn settle(&mut self) {
        // What is completed by then must not be taken for what a later driver asks for.
        self.pending.fill(None);
        self.io.drain(DRAIN_MAX);
    }

    /// Which requests were left in their queues is found out anew.
    fn save(&self) -> Result<Vec<u8>, StateError> {
        match self.io.under_way() {
            0 => Ok(state::encode(&Limiter::save(&self.limiter))),
            operations => Err(StateError::Busy { operations }),
        }
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        Limiter::restore(&mut self.limiter, state::decode("block device", state)?);
        Ok(())
    }

    fn prepare(&mut self) {
        // It takes up to a tenth of a millisecond, which nobody has to wait for.
        self.io.make_ring();
    }

    fn watched(&self) -> Vec<Watch> {
        let watch = |descriptor| Watch { descriptor, trigger: Trigger::Readable };
        let limiter = self.limiter.iter().map(Limiter::watch);
        limiter.chain(self.io.descriptor().map(watch)).collect()
    }

    fn event_loop(&self) -> Loop {
        if self.limits.read_only { Loop::Shared } else { Loop::Disk }
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let counters = &self.counters;
        vec![
            ("read_requests", counters.reads),
            ("cached_read_requests", counters.cached_reads),
            ("write_requests", counters.writes),
            ("flush_requests", counters.flushes),
            ("discard_requests", counters.discards),
            ("write_zeroes_requests", counters.zeroings),
            ("identify_requests", counters.identifications),
            ("failed_requests", counters.failed),
            ("read_bytes", counters.read_bytes),
            ("written_bytes", counters.written_bytes),
            ("stalls", counters.stalls),
            ("throttled", self.limiter.as_ref().map_or(0, Limiter::throttled)),
            ("uring", self.io.has_ring().into()),
        ]
    }

    fn hurry(&mut self) {
        self.limiter.iter_mut().for_each(Limiter::lift);
    }

    fn flush(&mut self) {
        self.io.drain(DRAIN_MAX);
    }
}

/// `struct virtio_blk_config` (§5.2.4). What belongs to features that are not offered is there, and not looked at.
fn configuration(sectors: u64, queues: u16) -> [u8; SPACE_LENGTH] {
    let mut space = [0; SPACE_LENGTH];
    let mut put = |offset: usize, field: &[u8]| space[offset..offset + field.len()].copy_from_slice(field);
    // Each of these fits: they are constants.
    let in_sectors = |bytes: u64| ((bytes / SECTOR) as u32).to_le_bytes();
    put(0, &sectors.to_le_bytes()); // capacity
    put(12, &SEGMENTS_MAX.to_le_bytes()); // seg_max
    put(20, &(SECTOR as u32).to_le_bytes()); // blk_size
    put(34, &queues.to_le_bytes()); // num_queues
    put(36, &in_sectors(DISCARD_MAX)); // max_discard_sectors
    put(40, &1u32.to_le_bytes()); // max_discard_seg
    put(44, &in_sectors(DISCARD_ALIGNMENT)); // discard_sector_alignment
    put(48, &in_sectors(REQUEST_MAX)); // max_write_zeroes_sectors
    put(52, &1u32.to_le_bytes()); // max_write_zeroes_seg
    put(56, &[1]); // write_zeroes_may_unmap
    space
}
