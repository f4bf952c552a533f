//! What each device keeps when it is saved, besides what all of them do.

use std::time::Duration;

use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ};
use vm_memory::{Bytes, GuestAddress};

use crate::balloon::Balloon;
use crate::balloon::host::HostBalloon;
use crate::device::{Event, VirtioDevice};
use crate::interrupt::Interrupt;
use crate::limit::{Limiter, Rate};
use crate::mem::Mem;
use crate::mem::host::{BLOCK, HostMem};
use crate::net::peer;
use crate::rng::Rng;
use crate::state::{self, StateError};
use crate::testing::{BUFFERS, Buffer, Driver, alone};
use crate::vsock::Vsock;
use crate::vsock::ports::HostPorts;

fn room(at: u64, length: u32) -> Buffer {
    Buffer { address: BUFFERS + at, length, writable: true }
}

fn data(driver: &Driver, bytes: &[u8]) -> Buffer {
    driver.memory.write_slice(bytes, GuestAddress(BUFFERS)).unwrap();
    Buffer { address: BUFFERS, length: bytes.len() as u32, writable: false }
}

#[test]
fn who_has_used_up_a_limit_has_still_done_so() {
    let device = || {
        let rate = Rate { size: 1, refill: Duration::from_secs(3600), burst: 0 };
        Box::new(Rng::new(Some(Limiter::new(None, Some(rate)).unwrap())))
    };
    let mut driver = Driver::new(device()).start();
    driver.offer(0, &[room(0, 64)]);
    driver.offer(0, &[room(0, 64)]);
    driver.device.dispatch(Event::Queue(0));
    assert!(driver.used(0).is_some() && driver.used(0).is_none());
    driver.move_to(device());
    driver.heed();
    assert_eq!((driver.used(0), driver.metric("throttled")), (None, 1));
}

#[test]
fn a_balloon_keeps_its_size_and_the_buffer_that_statistics_are_asked_for_with() {
    let host = HostBalloon::new().unwrap();
    let mut driver = Driver::new(Box::new(Balloon::new(host.clone()))).start_with(1 << 1);
    host.set_target_pages(512);
    driver.turn();
    driver.write(0x104, 300);
    let buffer = data(&driver, &[0; 10]);
    let head = driver.offer(2, &[buffer]);
    driver.device.dispatch(Event::Queue(2));
    assert_eq!(driver.used(2), None, "the buffer is held");

    let host = HostBalloon::new().unwrap();
    driver.move_to(Box::new(Balloon::new(host.clone())));
    assert_eq!((host.target_pages(), host.actual_pages()), (512, 300));
    assert_eq!((driver.read(0x100), driver.read(0x104)), (512, 300));
    // The target is the one that the driver knows.
    let generation = driver.read(0xfc);
    driver.turn();
    assert_eq!(driver.read(0xfc), generation);
    host.ask(Box::new(|| {}));
    driver.turn();
    assert_eq!(driver.used(2), Some((head, 0)));
}

#[test]
fn memory_that_was_plugged_stays_plugged() {
    const BLOCKS: u64 = 11;
    let host = || HostMem::new(BLOCKS * BLOCK).unwrap();
    let ask = |driver: &mut Driver, kind: u16, block: u64, count: u16| {
        let words = [u64::from(kind), (64 << 20) + block * BLOCK, count.into()];
        let request = data(driver, words.map(u64::to_le_bytes).as_flattened());
        driver.offer(0, &[request, room(64, 10)]);
        driver.device.dispatch(Event::Queue(0));
        assert_eq!(driver.used(0).unwrap().1, 10);
        let answer: [u8; 10] = driver.memory.read_obj(GuestAddress(BUFFERS + 64)).unwrap();
        (answer[0], answer[8])
    };
    let before = host();
    before.request(4 * BLOCK);
    let mut driver = Driver::new(Box::new(Mem::new(before, 64 << 20))).start();
    for block in [0, 7, 10] {
        assert_eq!(ask(&mut driver, 0, block, 1), (0, 0));
    }
    let after = host();
    driver.move_to(Box::new(Mem::new(after.clone(), 64 << 20)));
    assert_eq!((after.plugged(), after.requested()), (3 * BLOCK, 4 * BLOCK));
    let states: Vec<_> = (0..BLOCKS).map(|block| ask(&mut driver, 3, block, 1).1 == 0).collect();
    let plugged: Vec<_> = (0..BLOCKS).map(|block| [0, 7, 10].contains(&block)).collect();
    assert_eq!(states, plugged);
    assert_eq!((ask(&mut driver, 0, 1, 1).0, ask(&mut driver, 0, 2, 1).0), (0, 1), "one more, and no other");

    let state = driver.device.save().unwrap();
    let smaller = Mem::new(HostMem::new(BLOCK).unwrap(), 64 << 20);
    let mut other = alone(Box::new(smaller), &driver.memory);
    assert!(matches!(other.restore(&state), Err(StateError::Impossible { .. })));
}

#[test]
fn a_network_device_keeps_how_many_queues_are_in_use() {
    let features = 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;
    let mut driver = Driver::new(Box::new(peer::device())).start_with(features);
    let command = data(&driver, &[4, 0, 2, 0]);
    driver.offer(4, &[command, room(64, 1)]);
    driver.device.dispatch(Event::Queue(4));
    assert_eq!(driver.used(4).unwrap().1, 1);
    let pairs = |driver: &mut Driver| state::open(&driver.device.save().unwrap()).unwrap().own[0];
    assert_eq!(pairs(&mut driver), 2);
    driver.move_to(Box::new(peer::device()));
    assert_eq!(pairs(&mut driver), 2);

    let mut saved = state::open(&driver.device.save().unwrap()).unwrap();
    for wrong in [0, 3] {
        saved.own[0] = wrong;
        let mut other = alone(Box::new(peer::device()), &driver.memory);
        assert!(matches!(other.restore(&state::seal(&saved)), Err(StateError::Impossible { .. })), "{wrong}");
    }
}

#[test]
fn a_guest_is_told_once_that_its_connections_are_gone_when_it_has_room_for_that() {
    let device = || Box::new(Vsock::new(HostPorts::default(), None, None).unwrap());
    let mut driver = Driver::new(device()).start();
    driver.heed();
    driver.move_to(device());
    driver.heed();
    driver.interrupted();
    driver.memory.write_obj(77u32, GuestAddress(BUFFERS)).unwrap();
    let head = driver.offer(2, &[room(0, 8)]);
    driver.offer(2, &[room(64, 8)]);
    driver.device.dispatch(Event::Queue(2));
    assert_eq!((driver.used(2), driver.used(2)), (Some((head, 4)), None));
    assert_eq!(driver.memory.read_obj::<u32>(GuestAddress(BUFFERS)).unwrap(), 0);
    assert!(driver.interrupted());
}

#[test]
fn an_event_buffer_without_room_breaks_the_device() {
    let device = || Box::new(Vsock::new(HostPorts::default(), None, None).unwrap());
    let mut driver = Driver::new(device()).start();
    driver.move_to(device());
    driver.offer(2, &[room(0, 3)]);
    driver.heed();
    assert_eq!(driver.metric("broken"), 1);
}

#[test]
fn an_interrupt_that_was_not_acknowledged_is_raised_again() {
    let mut driver = Driver::new(Box::new(Rng::default())).start();
    driver.offer(0, &[room(0, 64)]);
    driver.device.dispatch(Event::Queue(0));
    driver.move_to(Box::new(Rng::default()));
    assert_eq!((driver.read(0x60), driver.interrupted()), (Interrupt::USED, true));
    driver.write(0x64, Interrupt::USED);
    driver.move_to(Box::new(Rng::default()));
    assert!(!driver.interrupted());
}

#[test]
fn states_that_no_driver_can_bring_about_are_refused() {
    let driver = Driver::new(Box::new(Rng::default())).start_with(1 << 29);
    let mut device = driver.device;
    let good = state::open(&device.save().unwrap()).unwrap();
    let refused = |change: &dyn Fn(&mut state::DeviceState)| {
        let mut state = good.clone();
        change(&mut state);
        let mut other = alone(Box::new(Rng::default()), &driver.memory);
        other.restore(&state::seal(&state)).is_err()
    };
    assert!(!refused(&|_| {}));
    for status in [1, 4, 7, 8, 0xc, 0xe, 0x1f, 0x40, 0x4b, 0x100] {
        // With a queue that is ready, or out of order.
        assert!(refused(&|state| state.status = status), "{status:#x}");
    }
    assert!(refused(&|state| state.driver_features |= 1 << 5));
    assert!(refused(&|state| state.driver_features = 0));
    assert!(refused(&|state| state.interrupt = 4));
    assert!(refused(&|state| state.queues[0].size = 15));
    assert!(refused(&|state| state.queues[0].size = 512));
    assert!(refused(&|state| state.queues[0].descriptors = 8));
    assert!(refused(&|state| state.queues[0].used = 1 << 40));
    assert!(refused(&|state| state.queues.clear()));
    assert!(refused(&|state| state.device_type = 2));
    assert!(refused(&|state| state.own.push(0)));
}

#[test]
fn whatever_a_driver_writes_as_its_status_is_restored() {
    for (written, status) in [(0x1f, 0xf), (0x100, 0xf), (0x4f, 0xf), (0x80, 0x8f), (u32::MAX, 0x8f)] {
        let mut driver = Driver::new(Box::new(Rng::default())).start();
        driver.write(0x70, written);
        assert_eq!(driver.read(0x70), status, "{written:#x}");
        driver.move_to(Box::new(Rng::default()));
        assert_eq!(driver.read(0x70), status, "{written:#x}");
    }
    // And before there is a driver.
    for written in [0x1f, 0x100, 0x40, 0x80, 2, u32::MAX] {
        let mut driver = Driver::new(Box::new(Rng::default()));
        driver.write(0x70, written);
        let status = driver.read(0x70);
        driver.move_to(Box::new(Rng::default()));
        assert_eq!(driver.read(0x70), status, "{written:#x}");
    }
}

#[test]
fn a_device_that_does_not_say_what_it_keeps_is_not_saved() {
    struct Silent;
    impl VirtioDevice for Silent {
        fn device_type(&self) -> u32 {
            99
        }
        fn queue_sizes(&self) -> &[u16] {
            &[16]
        }
        fn read_config(&self, _: usize, _: &mut [u8]) {}
        fn start(&mut self, _: u64) {}
        fn process(&mut self, _: crate::device::Resources<'_>, _: Event) -> Result<(), crate::device::Broken> {
            Ok(())
        }
        fn reset(&mut self) {}
    }
    let mut driver = Driver::new(Box::new(Silent)).start();
    assert!(matches!(driver.device.save(), Err(StateError::Unsupported(99))));
}
