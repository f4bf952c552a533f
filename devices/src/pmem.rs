//! The persistent memory device (VIRTIO 1.2 §5.19, "PMEM Device", device ID 27).
//!
//! A file as a range of guest-physical memory, which the guest uses without a copy of its own. The device tells where the
//! range is and takes requests to flush it; it is for whoever maps the file to see that a read-only one cannot be changed,
//! and flushing such a one has nothing to do.
//!
//! A flush takes as long as the disk behind the file. It may write all of that: it counts as one operation and as so many bytes.

use std::fs::File;
use std::ops::Range;

use crate::GuestMemory;
use crate::device::{Broken, Event, Loop, Resources, VirtioDevice, Watch, read_config_bytes};
use crate::limit::Limiter;
use crate::queue::{Buffers, Chain, Served};
use crate::state::{self, StateError};

/// The one type of request (§5.19.6): `struct virtio_pmem_req`, whose answer is a `struct virtio_pmem_resp`.
const FLUSH: u32 = 0;
const OK: u32 = 0;
const FAILED: u32 = 1;
const QUEUE_SIZES: [u16; 1] = [64];

/// A persistent memory device.
#[derive(Debug)]
pub struct Pmem {
    /// The file to flush, unless nothing can change it.
    file: Option<File>,
    range: Range<u64>,
    limiter: Option<Limiter>,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Counters {
    flushes: u64,
    failed_requests: u64,
}

impl Pmem {
    /// A device whose file is mapped at `range` of guest-physical memory; `file` is `None` if it is read-only. It is flushed as
    /// often as `limiter` admits.
    pub fn new(file: Option<File>, range: Range<u64>, limiter: Option<Limiter>) -> Self {
        Self { file, range, limiter, counters: Counters::default() }
    }

    /// Serves one request and returns how many bytes were written into its buffers.
    fn serve(&mut self, memory: &GuestMemory, chain: Chain<'_>) -> Result<u32, &'static str> {
        let mut kind = [0; 4];
        let mut buffers = Buffers::of(memory, chain)?;
        buffers.take(&mut kind).ok_or("a request is too short")?;
        if let Some(limiter) = &mut self.limiter {
            limiter.charge(self.range.end - self.range.start);
        }
        let answer = match (u32::from_le_bytes(kind), &self.file) {
            (FLUSH, Some(file)) if file.sync_data().is_err() => FAILED,
            (FLUSH, _) => OK,
            _ => FAILED,
        };
        let counter = if answer == OK { &mut self.counters.flushes } else { &mut self.counters.failed_requests };
        *counter += 1;
        let answer = answer.to_le_bytes();
        buffers.put(&answer).ok_or("a request has no room for the response")?;
        Ok(answer.len() as u32)
    }
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_PMEM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_pmem_config` (§5.19.4): start, size.
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let fields = [self.range.start, self.range.end - self.range.start];
        read_config_bytes(fields.map(u64::to_le_bytes).as_flattened(), offset, data);
    }

    fn start(&mut self, _: u64) {}

    fn process(&mut self, resources: Resources<'_>, event: Event) -> Result<(), Broken> {
        let Resources { memory, queues: [queue], .. } = resources else { return Ok(()) };
        if let (Event::Backend(_), Some(limiter)) = (event, &mut self.limiter) {
            limiter.wake();
        }
        queue.serve_each(memory, |chain| {
            if !Limiter::admits(&mut self.limiter) {
                return Ok(Served::Refused);
            }
            self.serve(memory, chain).map(Served::Used).map_err(|reason| Broken::Chain { queue: 0, reason })
        })
    }

    fn reset(&mut self) {
        self.limiter.iter_mut().for_each(Limiter::reset);
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(state::encode(&Limiter::save(&self.limiter)))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        Limiter::restore(&mut self.limiter, state::decode("persistent memory device", state)?);
        Ok(())
    }

    fn watched(&self) -> Vec<Watch> {
        self.limiter.iter().map(Limiter::watch).collect()
    }

    /// A flush waits for the disk.
    fn event_loop(&self) -> Loop {
        if self.file.is_some() { Loop::Disk } else { Loop::Shared }
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let Counters { flushes, failed_requests } = self.counters;
        let throttled = self.limiter.as_ref().map_or(0, Limiter::throttled);
        vec![("flushes", flushes), ("failed_requests", failed_requests), ("throttled", throttled)]
    }

    fn hurry(&mut self) {
        self.limiter.iter_mut().for_each(Limiter::lift);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::time::Duration;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::limit::Rate;
    use crate::testing::{BUFFERS, Buffer, Driver};

    const RANGE: Range<u64> = 0x1_8000_0000..0x1_8060_0000;

    /// Sends a request and gives its head.
    fn offer(driver: &mut Driver, kind: u32) -> u16 {
        driver.memory.write_obj(kind, GuestAddress(BUFFERS)).unwrap();
        driver.memory.write_obj(u32::MAX, GuestAddress(BUFFERS + 64)).unwrap();
        let buffer = |address, writable| Buffer { address, length: 4, writable };
        driver.offer(0, &[buffer(BUFFERS, false), buffer(BUFFERS + 64, true)])
    }

    /// Sends a request and gives the answer.
    fn ask(driver: &mut Driver, kind: u32) -> u32 {
        let head = offer(driver, kind);
        driver.device.dispatch(Event::Queue(0));
        assert_eq!(driver.used(0), Some((head, 4)));
        driver.memory.read_obj(GuestAddress(BUFFERS + 64)).unwrap()
    }

    fn metrics(driver: &Driver) -> (u64, u64) {
        let metric = |name| driver.device.metrics().into_iter().find(|(found, _)| *found == name).unwrap().1;
        (metric("flushes"), metric("failed_requests"))
    }

    #[test]
    fn the_range_is_told() {
        let mut driver = Driver::new(Box::new(Pmem::new(None, RANGE, None)));
        let words = [0x100, 0x104, 0x108, 0x10c].map(|offset| driver.read(offset));
        assert_eq!(words, [0x8000_0000, 1, 0x60_0000, 0]);
    }

    #[test]
    fn a_flush_is_answered_whether_or_not_there_is_something_to_do() {
        for file in [None, Some(tempfile::tempfile().unwrap())] {
            let mut driver = Driver::new(Box::new(Pmem::new(file, RANGE, None))).start();
            assert_eq!(ask(&mut driver, FLUSH), OK);
            assert_eq!(metrics(&driver), (1, 0));
        }
    }

    #[test]
    fn what_fails_or_is_not_known_is_told() {
        // A pipe cannot be flushed.
        let (reader, _) = std::io::pipe().unwrap();
        let mut driver = Driver::new(Box::new(Pmem::new(Some(OwnedFd::from(reader).into()), RANGE, None))).start();
        assert_eq!(ask(&mut driver, FLUSH), FAILED);
        assert_eq!(ask(&mut driver, 9), FAILED);
        assert_eq!(metrics(&driver), (0, 2));
    }

    #[test]
    fn a_flush_waits_for_its_disk_in_a_loop_of_its_own() {
        let event_loop = |file| Pmem::new(file, RANGE, None).event_loop();
        assert_eq!(event_loop(Some(tempfile::tempfile().unwrap())), Loop::Disk);
        assert_eq!(event_loop(None), Loop::Shared);
    }

    #[test]
    fn who_flushes_too_often_waits_for_the_timer() {
        let rate = Rate { size: 1, refill: Duration::from_millis(1), burst: 0 };
        let limiter = Limiter::new(None, Some(rate)).unwrap();
        let mut driver = Driver::new(Box::new(Pmem::new(None, RANGE, Some(limiter)))).start();
        let (first, second) = (offer(&mut driver, FLUSH), offer(&mut driver, FLUSH));
        driver.device.dispatch(Event::Queue(0));
        assert_eq!((driver.used(0), driver.used(0)), (Some((first, 4)), None));
        assert_eq!((driver.wait_used(0), driver.metric("throttled")), ((second, 4), 1));
    }

    #[test]
    fn a_flush_counts_as_all_that_it_may_write() {
        let rate = Rate { size: RANGE.end - RANGE.start, refill: Duration::from_secs(3600), burst: 0 };
        let limiter = Limiter::new(Some(rate), None).unwrap();
        let mut driver = Driver::new(Box::new(Pmem::new(None, RANGE, Some(limiter)))).start();
        assert_eq!(ask(&mut driver, FLUSH), OK);
        offer(&mut driver, FLUSH);
        driver.device.dispatch(Event::Queue(0));
        assert_eq!(driver.used(0), None);
        // The guest's end lifts the limit.
        driver.device.flush();
        assert!(driver.used(0).is_some());
    }

    #[test]
    fn requests_without_their_parts_break_the_device() {
        let buffer = |length, writable| Buffer { address: BUFFERS, length, writable };
        for chain in [vec![buffer(3, false), buffer(4, true)], vec![buffer(4, false), buffer(3, true)]] {
            let mut driver = Driver::new(Box::new(Pmem::new(None, RANGE, None))).start();
            driver.offer(0, &chain);
            driver.device.dispatch(Event::Queue(0));
            assert_eq!(driver.read(0x70) & 0x40, 0x40, "{chain:?}");
        }
    }
}
