//! The memory device as its driver and the host see it. Its region is in the middle of the driver's 4 MiB, so that blocks
//! have memory behind them: one in it, one that is not there.

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::interrupt::Interrupt;
use crate::testing::{BUFFERS, Buffer, Driver};

/// Where the region begins: behind the rings and in front of the end of memory.
const START: u64 = 2 << 20;
const REQUEST: u64 = 0x1000;
const RESPONSE: u64 = 0x2000;

/// A device with two blocks, of which the first has memory behind it.
fn device() -> (Driver, HostMem) {
    let host = HostMem::new(2 * BLOCK + 4096).unwrap();
    let driver = Driver::new(Box::new(Mem::new(host.clone(), START)));
    (driver.start_with(UNPLUGGED_INACCESSIBLE as u32), host)
}

fn metric(driver: &Driver, name: &str) -> u64 {
    driver.device.metrics().into_iter().find(|(found, _)| *found == name).unwrap().1
}

/// Sends a request and gives the type of the response and the state in it.
fn ask(driver: &mut Driver, kind: u16, address: u64, count: u16) -> (u16, u16) {
    let mut request = [0xff; REQUEST_LENGTH];
    request[..2].copy_from_slice(&kind.to_le_bytes());
    request[8..16].copy_from_slice(&address.to_le_bytes());
    request[16..18].copy_from_slice(&count.to_le_bytes());
    driver.memory.write_slice(&request, GuestAddress(REQUEST)).unwrap();
    driver.memory.write_slice(&[0xee; 10], GuestAddress(RESPONSE)).unwrap();
    let buffer = |address, length, writable| Buffer { address, length, writable };
    // Cut anywhere.
    let chain = [buffer(REQUEST, 5, false), buffer(REQUEST + 5, 19, false), buffer(RESPONSE, 10, true)];
    let head = driver.offer(0, &chain);
    driver.device.dispatch(Event::Queue(0));
    assert_eq!(driver.used(0), Some((head, RESPONSE_LENGTH)));
    let field = |offset| driver.memory.read_obj::<u16>(GuestAddress(RESPONSE + offset)).unwrap();
    (field(0), field(8))
}

fn config(driver: &mut Driver, offset: u64) -> u64 {
    u64::from(driver.read(0x100 + offset)) | u64::from(driver.read(0x104 + offset)) << 32
}

const ACK: (u16, u16) = (0, 0);
const NACK: (u16, u16) = (1, 0);
const BUSY: (u16, u16) = (2, 0);
const ERROR: (u16, u16) = (3, 0);

#[test]
fn the_region_is_described_in_whole_blocks() {
    let (mut driver, _) = device();
    let fields = [0, 8, 16, 24, 32, 40, 48].map(|offset| config(&mut driver, offset));
    assert_eq!(fields, [BLOCK, 0, START, 2 * BLOCK, 2 * BLOCK, 0, 0]);
}

#[test]
fn as_much_is_plugged_as_was_asked_for() {
    let (mut driver, host) = device();
    assert_eq!(ask(&mut driver, PLUG, START, 1), NACK);
    host.request(1);
    driver.device.dispatch(Event::Backend(0));
    assert_eq!((driver.read(0x60) & Interrupt::CONFIGURATION, config(&mut driver, 48)), (2, BLOCK));
    assert_eq!(ask(&mut driver, PLUG, START, 2), NACK);
    assert_eq!(ask(&mut driver, PLUG, START, 1), ACK);
    assert_eq!((host.plugged(), config(&mut driver, 40)), (BLOCK, BLOCK));
    assert_eq!(ask(&mut driver, PLUG, START + BLOCK, 1), NACK);
    assert_eq!((metric(&driver, "plugged_blocks"), metric(&driver, "refused_requests")), (1, 3));
}

#[test]
fn what_is_unplugged_is_the_hosts() {
    let (mut driver, host) = device();
    host.request(BLOCK);
    assert_eq!(ask(&mut driver, PLUG, START, 1), ACK);
    driver.memory.write_obj(0x55u8, GuestAddress(START + 0x18_0000)).unwrap();
    host.request(0);
    assert_eq!(ask(&mut driver, UNPLUG, START, 1), ACK);
    assert_eq!(driver.memory.read_obj::<u8>(GuestAddress(START + 0x18_0000)).unwrap(), 0);
    assert_eq!((host.plugged(), metric(&driver, "unplugged_blocks")), (0, 1));
}

#[test]
fn what_makes_no_sense_is_an_error() {
    let (mut driver, host) = device();
    host.request(u64::MAX);
    assert_eq!(host.requested(), 2 * BLOCK);
    for (address, count) in [
        (START - BLOCK, 1),
        (START + 4096, 1),
        (START, 0),
        (START, 3),
        (START + 2 * BLOCK, 1),
        (u64::MAX - BLOCK + 1, u16::MAX),
        (0, u16::MAX),
    ] {
        for kind in [PLUG, UNPLUG, STATE] {
            assert_eq!(ask(&mut driver, kind, address, count), ERROR, "{kind} {address:#x} {count}");
        }
    }
    assert_eq!(ask(&mut driver, 4, START, 1), ERROR);
    assert_eq!(ask(&mut driver, UNPLUG, START, 1), ERROR);
    assert_eq!(ask(&mut driver, PLUG, START, 1), ACK);
    assert_eq!(ask(&mut driver, PLUG, START, 2), ERROR);
    assert_eq!(host.plugged(), BLOCK);
}

#[test]
fn the_state_of_blocks_is_told() {
    let (mut driver, host) = device();
    host.request(2 * BLOCK);
    assert_eq!(ask(&mut driver, STATE, START, 2), (0, 1));
    assert_eq!(ask(&mut driver, PLUG, START, 1), ACK);
    assert_eq!(ask(&mut driver, STATE, START, 1), (0, 0));
    assert_eq!(ask(&mut driver, STATE, START, 2), (0, 2));
    assert_eq!(ask(&mut driver, STATE, START + BLOCK, 1), (0, 1));
}

#[test]
fn memory_that_the_host_does_not_take_stays_plugged() {
    let (mut driver, host) = device();
    host.request(2 * BLOCK);
    // The second block is not there.
    assert_eq!(ask(&mut driver, PLUG, START, 2), ACK);
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), BUSY);
    assert_eq!(host.plugged(), 2 * BLOCK);
}

#[test]
fn all_of_it_can_be_unplugged_at_once() {
    let host = HostMem::new(BLOCK).unwrap();
    let mut driver = Driver::new(Box::new(Mem::new(host.clone(), START))).start();
    host.request(BLOCK);
    assert_eq!(ask(&mut driver, PLUG, START, 1), ACK);
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 77, 77), ACK);
    assert_eq!((host.plugged(), ask(&mut driver, STATE, START, 1)), (0, (0, 1)));
}

#[test]
fn plugged_blocks_survive_a_reset() {
    let (mut driver, host) = device();
    host.request(BLOCK);
    assert_eq!(ask(&mut driver, PLUG, START, 1), ACK);
    driver.write(0x70, 0);
    assert_eq!((host.plugged(), config(&mut driver, 40)), (BLOCK, BLOCK));
}

#[test]
fn requests_without_their_parts_break_the_device() {
    let buffer = |length, writable| Buffer { address: BUFFERS, length, writable };
    let chains = [
        vec![buffer(23, false), buffer(10, true)],
        vec![buffer(24, false), buffer(9, true)],
        vec![buffer(24, false)],
        vec![buffer(10, true)],
    ];
    for chain in chains {
        let (mut driver, _) = device();
        driver.offer(0, &chain);
        driver.device.dispatch(Event::Queue(0));
        assert_eq!(driver.read(0x70) & 0x40, 0x40, "{chain:?}");
    }
}
