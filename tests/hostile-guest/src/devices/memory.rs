//! The balloon (VIRTIO 1.2 §5.5.6) and the memory device (§5.15.6).

use crate::aim;
use crate::honest::{self, Driver, Fault};
use crate::memory::{self, ram_end};
use crate::mmio::Device;
use crate::request::Request;

const PAGE: u64 = 4096;
const BLOCK: u64 = 2 << 20;

/// Inflate, deflate, statistics, and reports, whose queue is the third or fourth behind them.
pub fn balloon(request: &mut Request<'_>, queue: u32) {
    match queue {
        0 | 1 => {
            let most = request.random.pick(&[4, 256, 1500]);
            let count = request.random.below(most);
            let extra = request.random.pick(&[0, 0, 1, 3]);
            let address = request.say_room(4 * count as u32 + extra);
            for at in (address..).step_by(4).take(count as usize) {
                // Pages of the arena, often next to each other, and none that this program needs.
                let page = match request.random.below(6) {
                    0 => aim::anywhere(request.random) / PAGE,
                    1 => u64::from(u32::MAX) - request.random.below(4),
                    2 => ram_end() / PAGE + request.random.below(4) - 2,
                    3 => aim::BUFFERS / PAGE,
                    _ => aim::BUFFERS / PAGE + request.random.below(64),
                };
                memory::write(at, page as u32);
            }
        }
        2 => {
            let most = request.random.pick(&[10, 100, 3000]);
            let length = request.random.below(most) as u32;
            let address = request.say_room(length);
            (address..address + u64::from(length))
                .step_by(10)
                .for_each(|at| memory::write(at, request.random.half() % 12));
        }
        _ => {
            for _ in 0..1 + request.random.below(8) {
                let length = aim::length(request.random, 4 << 20);
                let address = aim::buffer(request.random);
                request.push(crate::ring::Descriptor::buffer(address, length, true));
            }
        }
    }
}

/// Gives a page up.
pub fn ask_balloon(device: Device) -> Result<(), Fault> {
    let mut driver = Driver::start(device, 2)?;
    let pages = driver.says(&((aim::BUFFERS / PAGE) as u32).to_le_bytes());
    memory::write(aim::BUFFERS, 0x55u8);
    driver.ask(0, &[pages])?;
    if memory::read::<u8>(aim::BUFFERS) == 0 { Ok(()) } else { Err("it does not take a page") }
}

/// `struct virtio_mem_req`: type, address, number of blocks.
fn plug_request(kind: u16, address: u64, count: u16) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    bytes
}

/// Plugs, unplugs and asks, within the region or not.
pub fn plug(request: &mut Request<'_>, _: u32) {
    let random = &mut *request.random;
    let kind = random.pick(&[0, 0, 1, 1, 2, 3, 3, 4, 0xffff]);
    let region = 4 << 30;
    let address = match random.below(4) {
        0 => aim::anywhere(random),
        1 => region + random.below(256 << 20),
        _ => region + BLOCK * random.below(80),
    };
    let count = random.pick(&[1, 1, 2, 64, 65, 0, 0x7fff, 0xffff]);
    let length = if random.one_in(12) { random.pick(&[23, 8, 0]) } else { 24 };
    request.say(&plug_request(kind, address, count)[..length]);
    let room = if request.random.one_in(12) { request.random.pick(&[9, 0, 64]) } else { 10 };
    request.hear(room);
}

/// Asks for the state of the first block.
pub fn ask_plug(device: Device) -> Result<(), Fault> {
    let mut driver = Driver::start(device, 1)?;
    let start = device.read_wide(crate::mmio::CONFIGURATION + 16, 8);
    let (request, answer) = (driver.says(&plug_request(3, start, 1)), driver.hears(16));
    let answer = crate::ring::Descriptor { length: 10, ..answer };
    memory::write(answer.address, 0xffu8);
    driver.ask(0, &[request, answer])?;
    if honest::byte(answer, 0) == 0 { Ok(()) } else { Err("it does not tell the state of a block") }
}
