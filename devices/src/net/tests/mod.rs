//! Frames as a guest's driver and the host see them, through a real tap.

mod both_ways;
mod hostile;
mod one_way;
mod setup;

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};

use super::peer::{SHORT_HEADER, TAP, Wire, ip, stand_in, tap};
use super::*;
use crate::interrupt::Interrupt;
use crate::limit::Rate;
use crate::testing::{BUFFERS, Buffer, Driver, SIZE};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Where receive buffers are, and how far apart chains of them; transmit buffers come after them.
const ROOM: u64 = BUFFERS;
const ROOM_STEP: u64 = 0x1_0000;
const OUT: u64 = BUFFERS + 0x10_0000;
/// Too few for any chain that is offered twice to overlap with itself.
const ROOMS: u64 = 16;

const MERGEABLE: u32 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const GUEST_TSO4: u32 = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
const MANY: u32 = 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;
const NEEDS_RESET: u32 = 64;
/// Nothing left undone, in one buffer.
const PLAIN: [u8; HEADER] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
const SHORT: [u8; SHORT_HEADER] = [0; SHORT_HEADER];

fn options() -> NetOptions {
    NetOptions { mac: Some(MAC), pinned: true, mtu: Some(1500), receive: None, transmit: None }
}

/// A guest with a network device.
struct Guest {
    driver: Driver,
    offered: u64,
    /// What chain each head stands for.
    rooms: Vec<(u16, Vec<Buffer>)>,
}

impl Guest {
    fn new(taps: Vec<Tap>, options: NetOptions, features: u32) -> Self {
        Self::with_size(taps, options, features, SIZE)
    }

    fn with_size(taps: Vec<Tap>, options: NetOptions, features: u32, size: u16) -> Self {
        let driver = Driver::with_size(Box::new(Net::new(taps, options)), size).start_with(features);
        Self { driver, offered: 0, rooms: Vec::new() }
    }

    fn metric(&self, name: &str) -> u64 {
        self.driver.metric(name)
    }

    /// Offers a chain of buffers of these lengths on a receive queue.
    fn offer(&mut self, queue: usize, lengths: &[u32]) {
        let mut address = ROOM + self.offered % ROOMS * ROOM_STEP;
        self.offered += 1;
        let chain: Vec<_> = lengths
            .iter()
            .map(|length| {
                let buffer = Buffer { address, length: *length, writable: true };
                address += u64::from(*length);
                buffer
            })
            .collect();
        let head = self.driver.offer(queue, &chain);
        self.rooms.retain(|(known, _)| *known != head);
        self.rooms.push((head, chain));
    }

    /// The next used chain of a receive queue, as far as it was filled.
    fn used(&mut self, queue: usize) -> Option<Vec<u8>> {
        let (head, length) = self.driver.used(queue)?;
        let (_, chain) = self.rooms.iter().find(|(known, _)| *known == head).unwrap();
        let mut bytes = Vec::new();
        for buffer in chain {
            let mut part = vec![0; buffer.length as usize];
            self.driver.memory.read_slice(&mut part, GuestAddress(buffer.address)).unwrap();
            bytes.extend(part);
        }
        bytes.truncate(length as usize);
        Some(bytes)
    }

    /// The next frame on a receive queue, and its header.
    fn received(&mut self, queue: usize) -> Option<([u8; HEADER], Vec<u8>)> {
        let mut bytes = self.used(queue)?;
        let header: [u8; HEADER] = bytes[..HEADER].try_into().unwrap();
        for _ in 1..u16::from_le_bytes([header[10], header[11]]) {
            bytes.extend(self.used(queue).expect("all buffers of a frame are used together"));
        }
        Some((header, bytes.split_off(HEADER)))
    }

    fn kick(&mut self, queue: u16) {
        self.driver.device.dispatch(Event::Queue(queue));
    }

    fn tap_is_ready(&mut self) {
        self.driver.device.dispatch(Event::Backend(0));
    }

    /// Sends bytes, cut into buffers of these lengths and the rest, on the transmit queue of the first pair.
    fn send(&mut self, bytes: &[u8], cuts: &[usize]) {
        self.offer_frame(bytes, cuts);
        self.kick(1);
        assert!(self.driver.used(1).is_some());
    }

    fn offer_frame(&mut self, bytes: &[u8], cuts: &[usize]) {
        self.driver.memory.write_slice(bytes, GuestAddress(OUT)).unwrap();
        let mut ends = cuts.to_vec();
        ends.push(bytes.len() - cuts.iter().sum::<usize>());
        let mut address = OUT;
        let chain: Vec<_> = ends
            .into_iter()
            .map(|length| {
                let buffer = Buffer { address, length: length as u32, writable: false };
                address += length as u64;
                buffer
            })
            .collect();
        self.driver.offer(1, &chain);
    }

    fn is_broken(&mut self) -> bool {
        self.driver.read(0x70) & NEEDS_RESET != 0
    }

    /// Executes a command and gives the answer, which is not 0xee unless there is none.
    fn command(&mut self, queue: u16, bytes: &[u8]) -> u8 {
        let answer = Buffer { address: OUT + 0x100, length: 1, writable: true };
        self.driver.memory.write_slice(bytes, GuestAddress(OUT)).unwrap();
        self.driver.memory.write_obj(0xeeu8, GuestAddress(answer.address)).unwrap();
        let (class, rest) = (bytes.len().min(2) as u32, bytes.len().saturating_sub(2) as u32);
        let mut chain = vec![
            Buffer { address: OUT, length: class, writable: false },
            Buffer { address: OUT + u64::from(class), length: rest, writable: false },
        ];
        chain.retain(|buffer| buffer.length > 0);
        chain.push(answer);
        self.driver.offer(queue.into(), &chain);
        self.kick(queue);
        assert_eq!(self.driver.used(queue.into()).map(|(_, length)| length), Some(1));
        self.driver.memory.read_obj(GuestAddress(answer.address)).unwrap()
    }
}

/// A frame of this length that no protocol knows.
fn frame(to: [u8; 6], from: [u8; 6], length: usize) -> Vec<u8> {
    let mut frame = [&to[..], &from, &[0x88, 0xb5]].concat();
    frame.extend((frame.len()..length).map(|at| (at % 251) as u8));
    frame
}

fn incoming(length: usize) -> Vec<u8> {
    frame(MAC, HOST_MAC, length)
}

fn outgoing(length: usize) -> Vec<u8> {
    frame(HOST_MAC, MAC, length)
}

/// A TCP segment of many packets whose checksums and cutting are left to others, and its header.
fn segment(to: [u8; 6], from: [u8; 6], payload: usize) -> ([u8; SHORT_HEADER], Vec<u8>) {
    let total = (40 + payload) as u16;
    let mut frame = [&to[..], &from, &[8, 0]].concat();
    frame.extend([0x45, 0]);
    frame.extend(total.to_be_bytes());
    frame.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let checksum = !sum(&frame[14..34]);
    frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    frame.extend([0x30, 0x39, 0x30, 0x3a, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff]);
    let pseudo = [&frame[26..34], &[0, 6], &(20 + payload as u16).to_be_bytes()].concat();
    frame.extend(sum(&pseudo).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend((0..payload).map(|at| (at % 251) as u8));
    // NEEDS_CSUM, TCPV4, headers of 54 bytes, 1,460 bytes a packet, the checksum 16 bytes after byte 34.
    ([1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0], frame)
}

/// The one's complement sum of IP checksums.
fn sum(bytes: &[u8]) -> u16 {
    let pairs = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = pairs.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
