//! Block devices (VIRTIO 1.2 §5.2.6) and persistent memory (§5.19.6).

use crate::honest::{self, Driver, Fault};
use crate::memory;
use crate::mmio::Device;
use crate::random::Random;
use crate::request::Request;

/// VIRTIO_BLK_T_IN, _OUT, _FLUSH, _GET_ID, _DISCARD, _WRITE_ZEROES, and some that no device of ours knows.
const TYPES: [u32; 12] = [0, 0, 1, 1, 4, 8, 11, 11, 13, 13, 2, 0x8000_0000];

fn sector(random: &mut Random) -> u64 {
    match random.below(8) {
        0 => u64::MAX - random.below(16),
        // Times 512 it is about 2^64, or 2^63.
        1 => (1 << 55) - random.below(2),
        2 => (1 << 54) - random.below(2),
        3 => random.long(),
        // About the end of a device of 1, 2, 4, … MiB.
        4 => (2048 << random.below(5)) - random.below(3),
        _ => random.below(2048),
    }
}

/// A request whose numbers lie.
pub fn block(request: &mut Request<'_>, _: u32) {
    let kind = if request.random.one_in(16) { request.random.word() } else { request.random.pick(&TYPES) };
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[4..8].copy_from_slice(&request.random.word().to_le_bytes());
    header[8..].copy_from_slice(&sector(request.random).to_le_bytes());
    // In one piece, or in pieces as the specification allows.
    let cut = if request.random.one_in(4) { request.random.below(17) as usize } else { 16 };
    request.say(&header[..cut]);
    if cut < 16 {
        request.say(&header[cut..]);
    }
    match kind {
        11 | 13 => segments(request),
        4 => {}
        _ => {
            for _ in 0..request.random.below(5) {
                let length = request.random.pick(&[512, 512, 1024, 4096, 0x1_0000, 0x10_0000, 20, 1, 0, 513]);
                if kind == 1 {
                    request.say_room(length);
                } else {
                    request.hear(length);
                }
            }
        }
    }
    let room = if request.random.one_in(12) { request.random.pick(&[0, 2, 512]) } else { 1 };
    request.hear(room);
}

/// `struct virtio_blk_discard_write_zeroes`, as many as nobody wants.
fn segments(request: &mut Request<'_>) {
    let count = request.random.pick(&[1, 1, 1, 1, 0, 2, 64]);
    let address = request.say_room(16 * count);
    for at in (address..).step_by(16).take(count as usize) {
        memory::write(at, sector(request.random));
        let most = 1 << request.random.below(32);
        let sectors = request.random.below(most) as u32;
        memory::write(at + 8, sectors);
        let flags = request.random.pick(&[0, 0, 1, 2, u32::MAX]);
        memory::write(at + 12, flags);
    }
}

/// Reads the first sector.
pub fn ask_block(device: Device) -> Result<(), Fault> {
    let mut driver = Driver::start(device, 1)?;
    let (header, data, status) = (driver.says(&[0; 16]), driver.hears(512), driver.hears(8));
    let status = crate::ring::Descriptor { length: 1, ..status };
    memory::write(status.address, 0xffu8);
    let length = driver.ask(0, &[header, data, status])?;
    if honest::byte(status, 0) != 0 || length != 513 { Err("it does not read its first sector") } else { Ok(()) }
}

/// A request to flush, or another.
pub fn pmem(request: &mut Request<'_>, _: u32) {
    let kind = request.random.pick(&[0, 0, 1, u32::MAX]);
    let length = if request.random.one_in(12) { request.random.pick(&[3, 0]) } else { 4 };
    request.say(&kind.to_le_bytes()[..length]);
    let room = if request.random.one_in(12) { request.random.pick(&[3, 0, 64]) } else { 4 };
    request.hear(room);
}

/// Flushes.
pub fn ask_pmem(device: Device) -> Result<(), Fault> {
    let mut driver = Driver::start(device, 1)?;
    let (request, answer) = (driver.says(&[0; 4]), driver.hears(4));
    memory::write(answer.address, 0xffu8);
    driver.ask(0, &[request, answer])?;
    if honest::byte(answer, 0) == 0 { Ok(()) } else { Err("it does not flush") }
}
