//! Network devices (VIRTIO 1.2 §5.1.6) and the socket device (§5.10.6).

use crate::honest::{self, Driver, Fault};
use crate::mmio::Device;
use crate::random::Random;
use crate::request::Request;

/// `struct virtio_net_hdr` and an Ethernet header.
const HEADERS: usize = 12 + 14;
/// The address that the device has, which others are not heard with.
const OWN: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Receive queues are even, transmit queues are odd; the last one of several may be for commands, which are even as well.
pub fn frame(request: &mut Request<'_>, queue: u32) {
    if queue.is_multiple_of(2) {
        if queue > 0 && request.random.one_in(2) {
            return command(request);
        }
        let room = request.random.pick(&[1526, 0x1_0000, 12, 11, 1, 0]);
        return request.hear(room);
    }
    let random = &mut *request.random;
    let mut bytes = [0; HEADERS];
    // flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers: each may lie.
    bytes[0] = random.pick(&[0, 1, 1, 2, 4, 0xff]);
    bytes[1] = random.pick(&[0, 1, 3, 4, 5, 0x81, 0x84, 0xff]);
    for at in [2, 4, 6, 8, 10] {
        let number = random.pick(&[0, 1, 14, 34, 54, 1448, 0x7fff, 0xffff]);
        bytes[at..at + 2].copy_from_slice(&u16::to_le_bytes(number));
    }
    if random.one_in(4) {
        bytes[..12].fill(0);
    }
    bytes[12..18].copy_from_slice(&random.pick(&[[0xff; 6], [2, 0, 0, 0, 0, 1]]));
    if !random.one_in(8) {
        bytes[18..24].copy_from_slice(&OWN);
    }
    bytes[24..].copy_from_slice(&random.pick(&[0x0800u16, 0x86dd, 0x0806, 0x8100, 0xffff]).to_be_bytes());
    let cut = if random.one_in(3) { random.below(HEADERS as u64 + 1) as usize } else { HEADERS };
    request.say(&bytes[..cut]);
    request.say(&bytes[cut..]);
    for _ in 0..request.random.below(4) {
        let most = request.random.pick(&[64, 1500, 0x1_0000]);
        let length = request.random.below(most) as u32;
        let address = request.say_room(length);
        // An IPv4 header of a TCP segment, or what was there before.
        if request.random.one_in(2) {
            crate::memory::write_bytes(address, &[0x45, 0, 0xff, 0xff, 0, 0, 0, 0, 64, 6]);
        }
    }
}

fn command(request: &mut Request<'_>) {
    let class = request.random.pick(&[0, 1, 4, 4, 4, 5, 0xff]);
    let pairs = request.random.pick(&[0, 1, 2, 3, 0x8000, 0xffff]);
    let [low, high] = u16::to_le_bytes(pairs);
    let length = request.random.pick(&[4, 4, 4, 3, 2, 0]);
    request.say(&[class, 0, low, high][..length]);
    let room = request.random.pick(&[1, 1, 0, 2]);
    request.hear(room);
}

/// Sends a frame to nobody.
pub fn ask_frame(device: Device) -> Result<(), Fault> {
    let mut driver = Driver::start(device, 2)?;
    let mut bytes = [0; HEADERS + 46];
    bytes[18..24].copy_from_slice(&OWN);
    // An EtherType for experiments (RFC 5342).
    bytes[24..26].copy_from_slice(&[0x88, 0xb5]);
    let frame = driver.says(&bytes);
    driver.ask(1, &[frame]).map(drop)
}

/// `struct virtio_vsock_hdr`.
const PACKET: usize = 44;
const HOST: u64 = 2;
const GUEST: u64 = 3;
const STREAM: u16 = 1;
const REQUEST: u16 = 1;
const RESET: u16 = 3;
/// How many of the host's requests for a connection may come before an answer.
const CALLS_MAX: usize = 256;

struct Packet {
    cids: [u64; 2],
    ports: [u32; 2],
    length: u32,
    kind: u16,
    operation: u16,
    /// flags, buf_alloc, fwd_cnt.
    rest: [u32; 3],
}

impl Packet {
    fn encode(&self) -> [u8; PACKET] {
        let mut bytes = [0; PACKET];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        self.cids.iter().for_each(|field| put(&field.to_le_bytes()));
        self.ports.iter().for_each(|field| put(&field.to_le_bytes()));
        put(&self.length.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.operation.to_le_bytes());
        self.rest.iter().for_each(|field| put(&field.to_le_bytes()));
        bytes
    }
}

fn odd(random: &mut Random) -> u32 {
    if random.one_in(2) { random.word() } else { random.pick(&[0, 1, 2, 3, 0x1_0000, 0x7fff_ffff, u32::MAX]) }
}

/// Receive, transmit, events.
pub fn packet(request: &mut Request<'_>, queue: u32) {
    if queue != 1 {
        let room = request.random.pick(&[PACKET as u32, 4096, 0x1_0000 + 44, 43, 8, 0]);
        request.hear(room);
        if request.random.one_in(2) {
            request.hear(4096);
        }
        return;
    }
    let random = &mut *request.random;
    let data = random.pick(&[0, 0, 1, 100, 4096, 0x1_0000]);
    let length = match random.below(24) {
        0 => data + 1,
        1 => odd(random),
        2 => data / 2,
        _ => data,
    };
    let lies = random.one_in(6);
    let packet = Packet {
        cids: if lies {
            [random.pick(&[GUEST, 0, 4, u64::MAX]), random.pick(&[HOST, 0, 1, GUEST, 1 << 32 | HOST])]
        } else {
            [GUEST, HOST]
        },
        ports: [random.below(6) as u32, random.below(20) as u32],
        length,
        kind: if random.one_in(10) { random.half() } else { STREAM },
        operation: if random.one_in(10) {
            random.half()
        } else {
            random.pick(&[REQUEST, REQUEST, 1, 2, 3, 4, 5, 5, 5, 5, 6, 7, 0])
        },
        rest: [odd(random), odd(random), odd(random)],
    };
    request.say(&packet.encode());
    if data > 0 {
        request.say_room(data);
    }
}

/// Asks for a connection to a port that nobody listens at, which is refused.
pub fn ask_packet(device: Device) -> Result<(), Fault> {
    let mut driver = Driver::start(device, 3)?;
    let header = driver.hears(PACKET as u32 + 4);
    driver.offer(0, &[header]);
    let [cids, ports, rest] = [[GUEST, HOST], [1, 9999], [0, 0x1_0000]];
    let packet = Packet {
        cids,
        ports: ports.map(|port| port as u32),
        length: 0,
        kind: STREAM,
        operation: REQUEST,
        rest: [0, rest[1] as u32, 0],
    };
    let request = driver.says(&packet.encode());
    driver.ask(1, &[request])?;
    driver.wait(0)?;
    for _ in 0..CALLS_MAX {
        if honest::byte(header, 30) != REQUEST as u8 {
            break;
        }
        // Somebody on the host asks for a connection, too.
        driver.offer(0, &[header]);
        driver.wait(0)?;
    }
    if honest::byte(header, 30) == RESET as u8 { Ok(()) } else { Err("it does not refuse a connection") }
}
