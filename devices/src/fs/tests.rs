//! The device as a driver sees it.

use std::fs;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use event_manager::{EventManager, SubscriberOps as _};
use fuse_abi::linux::{self as abi, fuse_opcode};
use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, IntoBytes};

use super::*;
use crate::limit::Rate;
use crate::testing::{BUFFERS, Buffer, Driver};

const REQUESTS: usize = 1;
const ROOM: u64 = BUFFERS + 0x10_0000;
const ROOT: u64 = abi::FUSE_ROOT_ID;

/// A driver with a session, and the directory that it sees.
struct Fixture {
    driver: Driver,
    folder: TempDir,
}

fn device(folder: &TempDir, limiter: Option<Limiter>) -> Box<Fs> {
    let mut device = testing::device_of(folder, 1);
    device.limiter = limiter;
    device
}

impl Fixture {
    /// Has the guest wait for a lock of `file`, which is held by the result.
    fn wait_for_a_lock(&mut self, node: u64, fh: u64) -> fs::File {
        let file = fs::File::open(self.folder.path().join("file")).unwrap();
        file.lock().unwrap();
        let lk = abi::fuse_file_lock { start: 0, end: i64::MAX as u64, type_: 1, pid: 0 };
        let wait = abi::fuse_lk_in { fh, owner: 1, lk, lk_flags: abi::FUSE_LK_FLOCK, padding: 0 };
        self.offer(REQUESTS, fuse_opcode::FUSE_SETLKW, node, wait.as_bytes(), &[40], 16);
        self.driver.device.dispatch(Event::Queue(1));
        file
    }

    fn new(limiter: Option<Limiter>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), "0123456789").unwrap();
        let driver = Driver::new(device(&folder, limiter)).start();
        let mut fixture = Self { driver, folder };
        fixture.ask(fuse_opcode::FUSE_INIT, 0, &testing::init(), 100).unwrap();
        fixture
    }

    /// Makes a request available, its readable bytes cut at `cuts`.
    fn offer(&mut self, queue: usize, opcode: fuse_opcode, node: u64, body: &[u8], cuts: &[u32], room: u32) -> u16 {
        let bytes = testing::message(opcode, node, body);
        self.driver.memory.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
        let (mut chain, mut at) = (Vec::new(), 0);
        for end in cuts.iter().copied().chain([bytes.len() as u32]) {
            chain.push(Buffer { address: BUFFERS + u64::from(at), length: end - at, writable: false });
            at = end;
        }
        if room > 0 {
            let first = room.min(24);
            chain.push(Buffer { address: ROOM, length: first, writable: true });
            if room > first {
                chain.push(Buffer { address: ROOM + u64::from(first), length: room - first, writable: true });
            }
        }
        self.driver.offer(queue, &chain)
    }

    /// The reply of a request that was used.
    fn reply(&mut self, queue: usize, head: u16) -> Result<Vec<u8>, i32> {
        let (used, length) = self.driver.used(queue).expect("the request is not used");
        assert_eq!(used, head);
        let mut reply = vec![0; length as usize];
        self.driver.memory.read_slice(&mut reply, GuestAddress(ROOM)).unwrap();
        let header: abi::fuse_out_header = parse(&reply);
        assert_eq!((header.unique, header.len), (7, length));
        if header.error == 0 { Ok(reply.split_off(16)) } else { Err(-header.error) }
    }

    fn ask(&mut self, opcode: fuse_opcode, node: u64, body: &[u8], room: u32) -> Result<Vec<u8>, i32> {
        let head = self.offer(REQUESTS, opcode, node, body, &[40], room);
        self.driver.device.dispatch(Event::Queue(REQUESTS as u16));
        self.reply(REQUESTS, head)
    }

    fn open(&mut self, name: &str) -> (u64, u64) {
        let name = [name.as_bytes(), b"\0"].concat();
        let entry = self.ask(fuse_opcode::FUSE_LOOKUP, ROOT, &name, 4096).unwrap();
        let node = parse::<abi::fuse_entry_out>(&entry).nodeid;
        let opened = self.ask(fuse_opcode::FUSE_OPEN, node, [2u32, 0].as_bytes(), 4096).unwrap();
        (node, parse::<abi::fuse_open_out>(&opened).fh)
    }

    fn metric(&self, name: &str) -> u64 {
        self.driver.device.metrics().iter().find(|(known, _)| *known == name).expect(name).1
    }
}

fn parse<T: FromBytes>(bytes: &[u8]) -> T {
    T::read_from_prefix(bytes).unwrap().0
}

fn read_in(fh: u64, offset: u64, size: u32) -> abi::fuse_read_in {
    abi::fuse_read_in { fh, offset, size, read_flags: 0, lock_owner: 0, flags: 0, padding: 0 }
}

#[test]
fn the_tag_and_the_number_of_queues_are_in_the_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let mut driver = Driver::new(device(&folder, None));
    let mut tag = [0; 4];
    driver.device.read(0x100, &mut tag);
    assert_eq!((&tag, driver.read(0x100 + 36), driver.read(8)), (b"tag\0", 1, 26));
}

#[test]
fn a_tag_or_a_number_of_queues_that_does_not_fit_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (tag, queues) in [("", 1), (&*"t".repeat(37), 1), ("tag", 0), ("tag", 9)] {
        assert!(Fs::new(device(&folder, None).server, tag, queues, None).is_err(), "{tag} {queues}");
    }
}

#[test]
fn data_moves_between_file_and_memory_however_it_is_cut() {
    let mut fixture = Fixture::new(None);
    let (node, fh) = fixture.open("file");
    let data = fixture.ask(fuse_opcode::FUSE_READ, node, read_in(fh, 2, 100).as_bytes(), 30).unwrap();
    assert_eq!(data, b"23456789");
    let write = abi::fuse_write_in { fh, offset: 3, size: 5, write_flags: 0, lock_owner: 0, flags: 0, padding: 0 };
    let body = [write.as_bytes(), b"abcde"].concat();
    for cuts in [&[40][..], &[40, 80], &[1, 39, 41, 79, 82], &[]] {
        fs::write(fixture.folder.path().join("file"), "0123456789").unwrap();
        let head = fixture.offer(REQUESTS, fuse_opcode::FUSE_WRITE, node, &body, cuts, 100);
        fixture.driver.device.dispatch(Event::Queue(1));
        assert_eq!(fixture.reply(REQUESTS, head).unwrap()[..4], 5u32.to_le_bytes());
        assert_eq!(fs::read(fixture.folder.path().join("file")).unwrap(), b"012abcde89");
    }
    assert_eq!((fixture.metric("read_bytes"), fixture.metric("written_bytes")), (8, 20));
}

#[test]
fn the_high_priority_queue_takes_requests_without_a_reply() {
    let mut fixture = Fixture::new(None);
    let (node, _) = fixture.open("file");
    assert_eq!(fixture.metric("inodes"), 1);
    let head = fixture.offer(HIGH_PRIORITY, fuse_opcode::FUSE_FORGET, node, 1u64.as_bytes(), &[], 0);
    fixture.driver.device.dispatch(Event::Queue(0));
    assert_eq!(fixture.driver.used(HIGH_PRIORITY), Some((head, 0)));
    assert_eq!(fixture.metric("inodes"), 0);
}

#[test]
fn a_request_that_waits_for_a_lock_is_returned_when_the_event_loop_hears_of_it() {
    let mut fixture = Fixture::new(None);
    let (node, fh) = fixture.open("file");
    let file = fixture.wait_for_a_lock(node, fh);
    assert_eq!((fixture.driver.used(REQUESTS), fixture.metric("lock_waits")), (None, 1));
    // Meanwhile others are served.
    fixture.open("file");

    fixture.driver.memory.write_slice(&[0; 16], GuestAddress(ROOM)).unwrap();
    let Fixture { driver: Driver { device, memory, .. }, folder } = fixture;
    let mut events = EventManager::new().unwrap();
    events.add_subscriber(Arc::new(Mutex::new(device)));
    file.unlock().unwrap();
    let header = loop {
        events.run().unwrap();
        let header: [u8; 16] = memory.read_obj(GuestAddress(ROOM)).unwrap();
        if header != [0; 16] {
            break parse::<abi::fuse_out_header>(&header);
        }
    };
    assert_eq!((header.unique, header.error), (7, 0));
    let other = fs::File::open(folder.path().join("file")).unwrap();
    assert!(other.try_lock_shared().is_err());
}

#[test]
fn a_reset_forgets_what_waits() {
    let mut fixture = Fixture::new(None);
    let (node, fh) = fixture.open("file");
    let _file = fixture.wait_for_a_lock(node, fh);
    fixture.driver.write(0x70, 0);
    assert_eq!((fixture.metric("inodes"), fixture.metric("handles")), (0, 0));
}

#[test]
fn a_driver_that_waits_for_a_lock_or_has_it_is_not_saved() {
    let mut fixture = Fixture::new(None);
    let (node, fh) = fixture.open("file");
    let file = fs::File::open(fixture.folder.path().join("file")).unwrap();
    file.lock().unwrap();
    let lk = abi::fuse_file_lock { start: 0, end: i64::MAX as u64, type_: 1, pid: 0 };
    let wait = abi::fuse_lk_in { fh, owner: 1, lk, lk_flags: abi::FUSE_LK_FLOCK, padding: 0 };
    let head = fixture.offer(REQUESTS, fuse_opcode::FUSE_SETLKW, node, wait.as_bytes(), &[40], 16);
    fixture.driver.device.dispatch(Event::Queue(1));
    assert!(matches!(fixture.driver.device.save(), Err(StateError::Busy { operations: 1 })));
    file.unlock().unwrap();
    // It is over as soon as that is known, which saving asks for.
    while matches!(fixture.driver.device.save(), Err(StateError::Busy { .. })) {
        fixture.driver.turn();
    }
    assert!(matches!(fixture.driver.device.save(), Err(StateError::Session(fuse::SessionError::Locked(1)))));
    assert_eq!(fixture.driver.used(REQUESTS), Some((head, 16)));
    // It goes on.
    fixture.open("file");
}

#[test]
fn what_moves_is_limited_and_goes_on_when_the_time_has_come() {
    let rate = Rate { size: 4, refill: Duration::from_secs(3600), burst: 0 };
    let limiter = Limiter::new(None, Some(rate)).unwrap();
    // One of four is the beginning of the session.
    let mut fixture = Fixture::new(Some(limiter));
    for _ in 0..6 {
        fixture.offer(REQUESTS, fuse_opcode::FUSE_GETATTR, ROOT, &[0; 16], &[], 16);
    }
    fixture.driver.device.dispatch(Event::Queue(1));
    let served = std::iter::from_fn(|| fixture.driver.used(REQUESTS)).count();
    assert_eq!((served, fixture.metric("throttled")), (3, 1));
    // Forgetting is not limited: it gives back.
    let head = fixture.offer(HIGH_PRIORITY, fuse_opcode::FUSE_FORGET, 5, 1u64.as_bytes(), &[], 0);
    fixture.driver.device.dispatch(Event::Queue(0));
    assert_eq!(fixture.driver.used(HIGH_PRIORITY), Some((head, 0)));
}

#[test]
fn what_is_copied_from_file_to_file_is_limited_too() {
    let rate = Rate { size: 64 << 10, refill: Duration::from_secs(3600), burst: 0 };
    let mut fixture = Fixture::new(Some(Limiter::new(Some(rate), None).unwrap()));
    fs::write(fixture.folder.path().join("large"), vec![1; 1 << 20]).unwrap();
    let ((from, fh_in), (to, fh_out)) = (fixture.open("large"), fixture.open("file"));
    let copy =
        abi::fuse_copy_file_range_in { fh_in, off_in: 0, nodeid_out: to, fh_out, off_out: 0, len: 1 << 20, flags: 0 };
    let reply = fixture.ask(fuse_opcode::FUSE_COPY_FILE_RANGE, from, copy.as_bytes(), 4096).unwrap();
    assert_eq!(parse::<abi::fuse_write_out>(&reply).size, 1 << 20);
    fixture.offer(REQUESTS, fuse_opcode::FUSE_GETATTR, ROOT, &[0; 16], &[], 200);
    fixture.driver.device.dispatch(Event::Queue(1));
    assert_eq!((fixture.driver.used(REQUESTS), fixture.metric("throttled")), (None, 1));
}

#[test]
fn a_reply_that_has_no_room_is_not_written() {
    let mut fixture = Fixture::new(None);
    let head = fixture.offer(REQUESTS, fuse_opcode::FUSE_GETATTR, ROOT, &[0; 16], &[], 8);
    fixture.driver.device.dispatch(Event::Queue(1));
    assert_eq!(fixture.driver.used(REQUESTS), Some((head, 0)));
}

#[test]
fn a_chain_without_a_message_breaks_the_device() {
    let mut fixture = Fixture::new(None);
    fixture.driver.offer(REQUESTS, &[Buffer { address: BUFFERS, length: 39, writable: false }]);
    fixture.driver.device.dispatch(Event::Queue(1));
    assert_eq!(fixture.driver.device.driver_status(), "broken");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Chains of any shape over bytes of any kind: neither panic nor hang, and nothing is written beside the room.
    #[test]
    fn chains_of_any_shape_do_no_harm(
        filling in proptest::collection::vec(any::<u8>(), 200),
        opcode in 0u32..60,
        length in 0u32..300,
        chains in proptest::collection::vec(
            proptest::collection::vec((0u64..1 << 22, prop_oneof![0u32..300, Just(u32::MAX)], any::<bool>()), 1..5),
            1..4,
        ),
    ) {
        let mut fixture = Fixture::new(None);
        let mut bytes = filling;
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        bytes[4..8].copy_from_slice(&opcode.to_le_bytes());
        fixture.driver.memory.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
        for (index, chain) in chains.into_iter().enumerate() {
            let message = Buffer { address: BUFFERS, length: 150, writable: false };
            let rest = chain.into_iter().map(|(address, length, writable)| Buffer { address, length, writable });
            let chain: Vec<_> = [message].into_iter().chain(rest).collect();
            fixture.driver.offer(index % 2, &chain);
            fixture.driver.device.dispatch(Event::Queue((index % 2) as u16));
            fixture.driver.device.dispatch(Event::Backend(LOCKS));
            fixture.driver.device.dispatch(Event::Backend(LIMITS));
        }
    }
}
