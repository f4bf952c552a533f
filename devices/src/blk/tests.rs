//! The block device as its driver sees it.

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::time::Duration;

use proptest::prelude::*;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::GuestMemory;
use crate::limit::Rate;
use crate::ring_io::Operation;
use crate::testing::{BUFFERS, Buffer, Driver};

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;
/// The size of the disk in sectors.
const SECTORS: u64 = 32;
const NEEDS_RESET: u32 = 0x40;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

struct Disk {
    driver: Driver,
    file: File,
}

fn room(at: u64, length: u32) -> Buffer {
    Buffer { address: at, length, writable: true }
}

fn data(at: u64, length: u32) -> Buffer {
    Buffer { address: at, length, writable: false }
}

fn disk_file(mut file: File) -> File {
    file.write_all(&[7; SECTORS as usize * 512]).unwrap();
    file
}

fn temporary() -> File {
    disk_file(tempfile::tempfile().unwrap())
}

impl Disk {
    fn of(device: Blk, file: File, ring: bool, features: u32) -> Self {
        let device = Box::new(device);
        let driver = if ring { Driver::new(device) } else { Driver::unprepared(device) };
        Self { driver: driver.start_with(features), file }
    }

    fn with(file: File, ring: bool, options: Options, features: u32) -> Self {
        let other = file.try_clone().unwrap();
        Self::of(Blk::new(file, options).unwrap(), other, ring, features)
    }

    fn new(read_only: bool) -> Self {
        let features = if read_only { 1 << VIRTIO_BLK_F_RO } else { 1 << VIRTIO_BLK_F_FLUSH };
        Self::with(temporary(), true, Options { read_only, ..Options::default() }, features)
    }

    /// With and without a ring.
    fn both() -> [Self; 2] {
        [true, false].map(|ring| Self::with(temporary(), ring, Options::default(), 1 << VIRTIO_BLK_F_FLUSH))
    }

    /// Makes a request available on a queue.
    fn offer(&mut self, queue: usize, kind: u32, sector: u64, buffers: &[Buffer]) -> u16 {
        self.driver.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.driver.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        self.driver.memory.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
        let chain = [&[data(HEADER, 16)], buffers, &[room(STATUS, 1)]].concat();
        self.driver.offer(queue, &chain)
    }

    /// Runs a request to its end, and gives its status and how much was written besides.
    fn run(&mut self, kind: u32, sector: u64, buffers: &[Buffer]) -> (u8, u32) {
        let head = self.offer(0, kind, sector, buffers);
        self.driver.device.dispatch(Event::Queue(0));
        let (used, written) = self.driver.wait_used(0);
        assert_eq!(used, head);
        (self.driver.memory.read_obj(GuestAddress(STATUS)).unwrap(), written - 1)
    }

    /// Runs a request whose data is a segment.
    fn segment(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        self.put_segment(0, sector, sectors, flags);
        self.run(kind, 0, &[data(DATA, 16)]).0
    }

    fn put_segment(&self, index: u64, sector: u64, sectors: u32, flags: u32) {
        let at = DATA + index * 16;
        self.driver.memory.write_obj(sector, GuestAddress(at)).unwrap();
        self.driver.memory.write_obj([sectors, flags], GuestAddress(at + 8)).unwrap();
    }

    fn memory<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.driver.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// The sectors that do not read as when the disk was made.
    fn changed(&mut self) -> Vec<u64> {
        let mut content = Vec::new();
        self.file.seek(SeekFrom::Start(0)).unwrap();
        self.file.read_to_end(&mut content).unwrap();
        assert_eq!(content.len() as u64, SECTORS * 512);
        let sectors = (0..).zip(content.chunks(512));
        sectors.filter(|(_, sector)| sector.iter().any(|byte| *byte != 7)).map(|(index, _)| index).collect()
    }

    fn space<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut field = [0; N];
        self.driver.device.read(0x100 + offset, &mut field);
        field
    }
}

#[test]
fn the_configuration_space_tells_the_size_and_the_limits() {
    let options = Options { queues: 3, ..Options::default() };
    let mut disk = Disk::with(temporary(), true, options, 1 << VIRTIO_BLK_F_MQ);
    assert_eq!(u64::from_le_bytes(disk.space(0)), SECTORS);
    assert_eq!(u32::from_le_bytes(disk.space(12)), 254);
    assert_eq!(u32::from_le_bytes(disk.space(20)), 512);
    assert_eq!(u16::from_le_bytes(disk.space(34)), 3);
    let limits = [36, 40, 44, 48, 52].map(|offset| u32::from_le_bytes(disk.space(offset)));
    assert_eq!(limits, [1 << 21, 1, 8, 1 << 13, 1]);
    assert_eq!(disk.space::<4>(56), [1, 0, 0, 0]);
    assert_eq!(disk.space::<8>(60), [0; 8]);
}

#[test]
fn a_read_only_device_offers_no_change_and_one_with_one_queue_not_several() {
    let features = |read_only, queues| {
        let options = Options { read_only, queues, ..Options::default() };
        Blk::new(temporary(), options).unwrap().features()
    };
    let always = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
    let changes = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
    assert_eq!(features(true, 1), always | 1 << VIRTIO_BLK_F_RO);
    assert_eq!(features(false, 0), always | changes);
    assert_eq!(features(false, 2), always | changes | 1 << VIRTIO_BLK_F_MQ);
}

#[test]
fn a_read_fills_the_buffers_and_what_is_cached_needs_no_ring() {
    for mut disk in Disk::both() {
        let buffers = [room(DATA, 100), room(DATA + 0x1000, 924)];
        let head = disk.offer(0, VIRTIO_BLK_T_IN, SECTORS - 2, &buffers);
        disk.driver.device.dispatch(Event::Queue(0));
        assert_eq!((disk.driver.used(0), disk.memory(STATUS)), (Some((head, 1025)), [OK]));
        // Without a ring it is not asked what is cached.
        assert_eq!(disk.driver.metric("cached_read_requests"), disk.driver.metric("uring"));
        assert_eq!((disk.memory::<100>(DATA), disk.memory::<924>(DATA + 0x1000)), ([7; 100], [7; 924]));
        assert_eq!((disk.driver.metric("read_bytes"), disk.driver.metric("read_requests")), (1024, 1));
    }
}

#[test]
fn a_read_past_the_end_and_a_position_that_overflows_are_errors() {
    for mut disk in Disk::both() {
        for sector in [SECTORS - 1, SECTORS, u64::MAX, u64::MAX / 512] {
            assert_eq!(disk.run(VIRTIO_BLK_T_IN, sector, &[room(DATA, 1024)]), (IO_ERROR, 0));
        }
        assert_eq!(disk.run(VIRTIO_BLK_T_IN, 0, &[room(DATA, 1023)]), (IO_ERROR, 0));
        assert_eq!(disk.run(VIRTIO_BLK_T_IN, SECTORS, &[]), (OK, 0));
        assert_eq!(disk.driver.metric("failed_requests"), 5);
    }
}

#[test]
fn a_request_of_more_than_the_most_is_an_error() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(REQUEST_MAX * 2).unwrap();
    let mut disk = Disk::with(file, true, Options::default(), 0);
    // The same buffer several times: there is not as much memory.
    let buffers = [room(DATA, 1 << 20); 4];
    assert_eq!(disk.run(VIRTIO_BLK_T_IN, 1, &buffers), (OK, 4 << 20));
    assert_eq!(disk.run(VIRTIO_BLK_T_IN, 1, &[&buffers[..], &[room(DATA, 512)]].concat()), (IO_ERROR, 0));
    assert_eq!(disk.segment(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8193, 0), IO_ERROR);
    assert_eq!(disk.segment(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8192, 0), OK);
}

#[test]
fn a_file_that_became_shorter_is_an_error() {
    for mut disk in Disk::both() {
        disk.file.set_len(512).unwrap();
        assert_eq!(disk.run(VIRTIO_BLK_T_IN, 0, &[room(DATA, 1024)]), (IO_ERROR, 0));
        assert_eq!(disk.run(VIRTIO_BLK_T_IN, 0, &[room(DATA, 512)]), (OK, 512));
    }
}

#[test]
fn a_write_reaches_the_file_and_a_flush_succeeds() {
    for mut disk in Disk::both() {
        assert_eq!(disk.run(VIRTIO_BLK_T_OUT, 1, &[data(DATA, 512)]), (OK, 0));
        assert_eq!(disk.run(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 0));
        assert_eq!(disk.changed(), [1]);
        assert_eq!((disk.driver.metric("written_bytes"), disk.driver.metric("flush_requests")), (512, 1));
    }
}

#[test]
fn what_the_page_cache_takes_is_written_at_once_and_may_hold_up_nobody_else() {
    for mut disk in Disk::both() {
        let head = disk.offer(0, VIRTIO_BLK_T_OUT, 2, &[data(DATA, 512)]);
        disk.driver.device.dispatch(Event::Queue(0));
        assert_eq!((disk.driver.used(0), disk.driver.device.event_loop()), (Some((head, 1)), Loop::Disk));
        assert_eq!(disk.changed(), [2]);
    }
    assert_eq!(Disk::new(true).driver.device.event_loop(), Loop::Shared);
}

#[test]
fn a_write_that_the_file_does_not_take_is_an_error() {
    let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
    std::fs::write(&path, [7; SECTORS as usize * 512]).unwrap();
    let mut disk = Disk::with(File::open(&path).unwrap(), true, Options::default(), 1 << VIRTIO_BLK_F_FLUSH);
    assert_eq!(disk.run(VIRTIO_BLK_T_OUT, 0, &[data(DATA, 512)]), (IO_ERROR, 0));
    assert_eq!((disk.driver.metric("failed_requests"), disk.driver.metric("written_bytes")), (1, 0));
}

#[test]
fn a_driver_without_flushes_gets_its_writes_to_the_disk() {
    for ring in [true, false] {
        let mut device = Blk::new(temporary(), Options::default()).unwrap();
        device.start(1 << VIRTIO_BLK_F_FLUSH);
        assert!(!device.write_through);
        device.start(0);
        assert!(device.write_through);
        let mut disk = Disk::with(temporary(), ring, Options::default(), 0);
        assert_eq!(disk.run(VIRTIO_BLK_T_OUT, 3, &[data(DATA, 1024)]), (OK, 0));
        assert_eq!(disk.segment(VIRTIO_BLK_T_WRITE_ZEROES, 8, 2, 0), OK);
        assert_eq!(disk.changed(), [3, 4, 8, 9]);
    }
}

#[test]
fn a_read_only_device_refuses_every_change_whatever_was_negotiated() {
    let mut disk = Disk::new(true);
    assert_eq!(disk.run(VIRTIO_BLK_T_OUT, 0, &[data(DATA, 512)]), (IO_ERROR, 0));
    assert_eq!(disk.segment(VIRTIO_BLK_T_DISCARD, 0, 8, 0), IO_ERROR);
    assert_eq!(disk.segment(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 0), IO_ERROR);
    assert_eq!(disk.segment(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 1), IO_ERROR);
    assert_eq!(disk.run(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 0));
    assert_eq!(disk.run(VIRTIO_BLK_T_IN, 0, &[room(DATA, 512)]), (OK, 512));
    assert_eq!(disk.changed(), [0u64; 0]);
}

#[test]
fn zeroing_and_discarding_change_their_range_and_nothing_else() {
    for mut disk in Disk::both() {
        for (first, unmap) in [(1, 0), (9, 1)] {
            assert_eq!(disk.segment(VIRTIO_BLK_T_WRITE_ZEROES, first, 3, unmap), OK);
        }
        assert_eq!(disk.segment(VIRTIO_BLK_T_DISCARD, 16, 8, 0), OK);
        assert_eq!(disk.changed(), [1, 2, 3, 9, 10, 11, 16, 17, 18, 19, 20, 21, 22, 23]);
        assert_eq!(disk.driver.metric("write_zeroes_requests"), 2);
    }
}

#[test]
fn ranges_that_are_not_of_the_device_are_errors() {
    let mut disk = Disk::new(false);
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        for (sector, sectors) in [(SECTORS - 1, 2), (SECTORS, 1), (u64::MAX, 1), (u64::MAX / 512, 512), (0, u32::MAX)] {
            assert_eq!(disk.segment(kind, sector, sectors, 0), IO_ERROR, "{sector} {sectors}");
        }
        assert_eq!(disk.segment(kind, SECTORS, 0, 0), OK);
        // One segment and nothing else.
        disk.put_segment(0, 0, 1, 0);
        disk.put_segment(1, 2, 1, 0);
        for length in [0, 8, 15, 17, 32] {
            assert_eq!(disk.run(kind, 0, &[data(DATA, length)]).0, IO_ERROR, "{length}");
        }
    }
    assert_eq!(disk.changed(), [0u64; 0]);
}

#[test]
fn flags_that_a_request_cannot_have_are_unsupported() {
    let mut disk = Disk::new(false);
    assert_eq!(disk.segment(VIRTIO_BLK_T_DISCARD, 0, 8, 1), UNSUPPORTED);
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(disk.segment(kind, 0, 8, 2), UNSUPPORTED);
    }
    assert_eq!(disk.run(99, 0, &[]), (UNSUPPORTED, 0));
    assert_eq!(disk.changed(), [0u64; 0]);
}

/// A file in memory: it can have holes, but no ranges that are allocated and zero.
fn in_memory() -> File {
    disk_file(rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into())
}

#[test]
fn zeros_are_written_where_a_file_has_no_such_ranges() {
    for (ring, features) in [(true, 0), (false, 0), (true, 1 << VIRTIO_BLK_F_FLUSH), (false, 1 << VIRTIO_BLK_F_FLUSH)] {
        let mut disk = Disk::with(in_memory(), ring, Options::default(), features);
        assert_eq!(disk.segment(VIRTIO_BLK_T_WRITE_ZEROES, 5, 2, 0), OK);
        assert_eq!(disk.changed(), [5, 6]);
    }
}

#[test]
fn zeros_that_have_to_be_written_count_as_bytes() {
    let rate = Rate { size: 1, refill: Duration::from_secs(3600), burst: 0 };
    let limiter = Some(Limiter::new(Some(rate), None).unwrap());
    let options = Options { limiter, ..Options::default() };
    let mut disk = Disk::with(in_memory(), true, options, 1 << VIRTIO_BLK_F_FLUSH);
    assert_eq!(disk.segment(VIRTIO_BLK_T_WRITE_ZEROES, 5, 2, 1), OK);
    assert_eq!((disk.changed(), disk.driver.metric("throttled")), (vec![5, 6], 0));
    assert_eq!(disk.segment(VIRTIO_BLK_T_WRITE_ZEROES, 7, 2, 0), OK);
    disk.offer(0, VIRTIO_BLK_T_FLUSH, 0, &[]);
    disk.driver.device.dispatch(Event::Queue(0));
    assert_eq!((disk.driver.used(0), disk.driver.metric("throttled")), (None, 1));
}

#[test]
fn what_can_let_go_of_nothing_does_not_discard() {
    for ring in [true, false] {
        let file = File::options().read(true).write(true).open("/dev/zero").unwrap();
        let other = file.try_clone().unwrap();
        let mut device = Blk::new(file, Options::default()).unwrap();
        device.limits.sectors = 8;
        let mut disk = Disk::of(device, other, ring, 1 << VIRTIO_BLK_F_FLUSH);
        assert_eq!(disk.segment(VIRTIO_BLK_T_DISCARD, 0, 8, 0), UNSUPPORTED);
        assert_eq!(disk.segment(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 1), OK);
    }
}

#[test]
fn the_serial_number_needs_its_whole_field_in_however_many_buffers() {
    let options = || Options { id: "disk-with-a-name-that-is-too-long".to_owned(), ..Options::default() };
    let mut disk = Disk::with(temporary(), true, options(), 0);
    assert_eq!(disk.run(VIRTIO_BLK_T_GET_ID, 0, &[room(DATA, 19)]), (IO_ERROR, 0));
    assert_eq!(disk.run(VIRTIO_BLK_T_GET_ID, 0, &[room(DATA, 4), room(DATA + 8, 17)]), (OK, 20));
    assert_eq!((disk.memory(DATA), disk.memory(DATA + 8)), (*b"disk", *b"-with-a-name-tha"));
}

#[test]
fn a_request_may_be_cut_anywhere() {
    let features = 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
    let mut disk = Disk::with(temporary(), true, Options::default(), features);
    disk.driver.memory.write_obj(VIRTIO_BLK_T_IN, GuestAddress(HEADER)).unwrap();
    disk.driver.memory.write_obj(4u64, GuestAddress(HEADER + 8)).unwrap();
    // The header in three pieces, a sector in two, and the status at the end of the data.
    let header = [data(HEADER, 1), data(HEADER + 1, 9), data(HEADER + 10, 6)];
    let chain = [&header[..], &[room(DATA, 511), room(DATA + 0x1000, 2), room(0, 0)]].concat();
    for indirect in [false, true] {
        disk.driver.memory.write_slice(&[0xff; 0x1100], GuestAddress(DATA)).unwrap();
        disk.driver.set_used_event(0, u16::from(indirect));
        let head = if indirect { disk.driver.offer_indirect(0, &chain) } else { disk.driver.offer(0, &chain) };
        disk.driver.device.dispatch(Event::Queue(0));
        assert_eq!(disk.driver.wait_used(0), (head, 513));
        assert_eq!((disk.memory::<511>(DATA), disk.memory::<3>(DATA + 0x1000)), ([7; 511], [7, OK, 0xff]));
        assert!(disk.driver.interrupted());
    }
}

#[test]
fn chains_without_header_status_or_memory_break_the_device() {
    let outside = room(u64::MAX - 4096, 4096);
    for chain in [
        &[room(STATUS, 1)][..],
        &[data(HEADER, 16)],
        &[data(HEADER, 16), room(STATUS, 0)],
        &[data(HEADER, 15), room(STATUS, 1)],
        &[data(HEADER, 16), outside, room(STATUS, 1)],
    ] {
        let mut disk = Disk::new(false);
        disk.driver.offer(0, chain);
        disk.driver.device.dispatch(Event::Queue(0));
        assert_eq!(disk.driver.read(0x70) & NEEDS_RESET, NEEDS_RESET, "{chain:?}");
        assert_eq!((disk.driver.used(0), disk.driver.metric("broken")), (None, 1));
    }
}

#[test]
fn every_queue_is_served_and_answered_on_itself() {
    let options = Options { queues: 9, ..Options::default() };
    let mut disk = Disk::with(temporary(), true, options, 1 << VIRTIO_BLK_F_MQ | 1 << VIRTIO_BLK_F_FLUSH);
    assert_eq!(disk.driver.device.queues().len(), 4);
    for queue in [3, 1, 2, 0] {
        let head = disk.offer(queue, VIRTIO_BLK_T_OUT, queue as u64, &[data(DATA, 512)]);
        disk.driver.device.dispatch(Event::Queue(queue as u16));
        assert_eq!(disk.driver.wait_used(queue), (head, 1));
        assert!((0..4).all(|other| disk.driver.used(other).is_none()));
    }
    assert_eq!(disk.changed(), [0, 1, 2, 3]);
}

#[test]
fn who_moves_too_much_waits_for_the_timer() {
    let rate = |size, refill_ms| Some(Rate { size, refill: Duration::from_millis(refill_ms), burst: 0 });
    for (bytes, operations) in [(rate(64, 10), None), (None, rate(1, 50))] {
        let limiter = Some(Limiter::new(bytes, operations).unwrap());
        let options = Options { queues: 2, limiter, ..Options::default() };
        let mut disk = Disk::with(temporary(), true, options, 1 << VIRTIO_BLK_F_MQ);
        for queue in [0, 1, 0, 1] {
            disk.offer(queue, VIRTIO_BLK_T_IN, 0, &[room(DATA, 512)]);
        }
        disk.driver.device.dispatch(Event::Queue(0));
        disk.driver.device.dispatch(Event::Queue(1));
        for queue in [0, 1, 0, 1] {
            assert_eq!(disk.driver.wait_used(queue).1, 513);
        }
        assert!(disk.driver.metric("throttled") >= 1);
    }
}

#[test]
fn what_is_left_in_the_queue_for_want_of_room_is_served_when_there_is() {
    for ring in [true, false] {
        let mut device = Blk::new(temporary(), Options::default()).unwrap();
        if ring {
            device.prepare();
        }
        // Of a driver that is gone: nobody waits for them.
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        for _ in 0..DEPTH - 1 {
            device.io.start(&memory, Operation::Sync).unwrap();
        }
        let mut disk = Disk::of(device, temporary(), ring, 1 << VIRTIO_BLK_F_FLUSH);
        let heads = [(); 4].map(|()| disk.offer(0, VIRTIO_BLK_T_FLUSH, 0, &[]));
        disk.driver.device.dispatch(Event::Queue(0));
        let mut used = [(); 4].map(|()| disk.driver.wait_used(0).0);
        used.sort_unstable();
        assert_eq!(used, heads);
        assert!(disk.driver.metric("stalls") >= 1);
    }
}

/// A device whose reads wait until something is written to the other end of a pipe.
fn slow() -> Option<(Disk, io::PipeWriter)> {
    let (reader, writer) = io::pipe().unwrap();
    let mut device = Blk::new(temporary(), Options::default()).unwrap();
    device.io = RingIo::new(File::from(OwnedFd::from(reader)));
    device.prepare();
    // Without a ring nothing can be under way.
    device.io.has_ring().then(|| (Disk::of(device, temporary(), true, 1 << VIRTIO_BLK_F_FLUSH), writer))
}

#[test]
fn what_is_under_way_at_a_reset_is_completed_and_told_no_new_driver() {
    let Some((mut disk, mut pipe)) = slow() else { return };
    disk.offer(0, VIRTIO_BLK_T_IN, 0, &[room(DATA, 512)]);
    disk.driver.device.dispatch(Event::Queue(0));
    assert_eq!(disk.driver.used(0), None);
    disk.driver.write(0x70, 0);
    disk.driver = disk.driver.start_with(1 << VIRTIO_BLK_F_FLUSH);
    disk.driver.device.dispatch(Event::Queue(0));
    pipe.write_all(&[1; 512]).unwrap();
    while disk.memory(DATA) != [1; 512] {
        disk.driver.turn();
    }
    let head = disk.offer(0, VIRTIO_BLK_T_IN, 0, &[room(DATA + 0x1000, 512)]);
    disk.driver.device.dispatch(Event::Queue(0));
    assert_eq!(disk.driver.used(0), None);
    pipe.write_all(&[2; 512]).unwrap();
    assert_eq!(disk.driver.wait_used(0), (head, 513));
    assert_eq!((disk.memory(DATA), disk.memory(DATA + 0x1000)), ([1; 512], [2; 512]));
    assert_eq!(disk.driver.used(0), None);
}

/// Nobody takes what the ring has completed while the device has no driver, or one that broke it.
#[test]
fn a_device_out_of_service_can_be_saved_once_its_disk_is_done() {
    for broken in [true, false] {
        let Some((mut disk, mut pipe)) = slow() else { return };
        disk.offer(0, VIRTIO_BLK_T_IN, 0, &[room(DATA, 512)]);
        disk.driver.device.dispatch(Event::Queue(0));
        if broken {
            disk.driver.set_available(0, 5000);
            disk.driver.device.dispatch(Event::Queue(0));
            assert_eq!(disk.driver.metric("broken"), 1);
        } else {
            disk.driver.write(0x70, 0);
        }
        pipe.write_all(&[1; 512]).unwrap();
        disk.driver.device.save().unwrap();
        assert_eq!((disk.memory(DATA), disk.driver.used(0)), ([1; 512], None));
    }
}

#[test]
fn a_request_that_comes_in_pieces_is_completed_when_it_is_whole() {
    let Some((mut disk, mut pipe)) = slow() else { return };
    let head = disk.offer(0, VIRTIO_BLK_T_IN, 0, &[room(DATA, 100), room(DATA + 0x1000, 412)]);
    disk.driver.device.dispatch(Event::Queue(0));
    for piece in 0..4u8 {
        assert_eq!(disk.driver.used(0), None);
        pipe.write_all(&[piece + 1; 128]).unwrap();
        let at = if piece == 0 { DATA } else { DATA + 0x1000 + u64::from(piece) * 128 - 100 };
        while disk.memory(at) != [piece + 1; 100] {
            disk.driver.turn();
        }
    }
    assert_eq!(disk.driver.wait_used(0), (head, 513));
    assert_eq!(disk.memory(DATA + 0x1000 + 412 - 128), [4; 128]);
}

#[test]
fn the_end_of_the_vm_waits_for_what_is_under_way() {
    let Some((mut disk, mut pipe)) = slow() else { return };
    disk.offer(0, VIRTIO_BLK_T_IN, 0, &[room(DATA, 512)]);
    disk.driver.device.dispatch(Event::Queue(0));
    let writer = std::thread::spawn(move || pipe.write_all(&[1; 512]).unwrap());
    disk.driver.device.flush();
    assert_eq!(disk.memory(DATA), [1; 512]);
    writer.join().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// However a write and the read after it are cut, and whichever way they go: what was written is read.
    #[test]
    fn what_is_written_is_read(
        ring in any::<bool>(),
        indirect in any::<bool>(),
        sector in 0u64..8,
        content in proptest::collection::vec(any::<u8>(), 2048),
        cuts in proptest::collection::vec(0usize..2048, 0..8),
        other_cuts in proptest::collection::vec(0usize..2048, 0..8),
    ) {
        let features = 1 << VIRTIO_RING_F_INDIRECT_DESC;
        let mut disk = Disk::with(temporary(), ring, Options::default(), features);
        disk.driver.memory.write_slice(&content, GuestAddress(DATA)).unwrap();
        for (kind, base, mut cuts) in [(VIRTIO_BLK_T_OUT, DATA, cuts), (VIRTIO_BLK_T_IN, DATA + 0x1000, other_cuts)] {
            let writable = kind == VIRTIO_BLK_T_IN;
            cuts.extend([0, 2048]);
            cuts.sort_unstable();
            let pieces = cuts.windows(2).map(|ends| {
                Buffer { address: base + ends[0] as u64, length: (ends[1] - ends[0]) as u32, writable }
            });
            disk.driver.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
            disk.driver.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
            let chain: Vec<_> = [data(HEADER, 16)].into_iter().chain(pieces).chain([room(STATUS, 1)]).collect();
            if indirect { disk.driver.offer_indirect(0, &chain) } else { disk.driver.offer(0, &chain) };
            disk.driver.device.dispatch(Event::Queue(0));
            disk.driver.wait_used(0);
            prop_assert_eq!(disk.memory(STATUS), [OK]);
        }
        prop_assert_eq!(disk.memory::<2048>(DATA + 0x1000).to_vec(), content);
    }
}
