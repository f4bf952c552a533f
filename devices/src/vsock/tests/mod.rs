//! Connections as a guest's driver sees them.

mod host;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::connection::CREDIT;
use super::ports::HostPorts;
use super::{GUEST_CID, HOST_CID, RECEIVE, TRANSMIT, Vsock};
use crate::device::{DRAIN_MAX, Event};
use crate::testing::{BUFFERS, Buffer, Driver};

const PORT: u32 = 1024;
const GUEST_PORT: u32 = 77;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

const HEADER: u32 = 44;
const ROOM: u32 = 4096;
const TX: u64 = BUFFERS;
const RX: u64 = BUFFERS + 0x8_0000;

/// A packet as far as the tests look at it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Packet {
    op: u16,
    flags: u32,
    credit: u32,
    forwarded: u32,
    data: Vec<u8>,
}

fn packet(op: u16) -> Packet {
    Packet { op, flags: 0, credit: 64 << 10, forwarded: 0, data: Vec::new() }
}

struct Guest {
    driver: Driver,
    ports: HostPorts,
    /// The port of the host that it sends to.
    port: u32,
    /// Whom it takes for the host, and of which type its packets are. What it receives is asserted to match.
    host_cid: u64,
    kind: u16,
    /// The length of the buffers that data is cut into.
    piece: usize,
}

impl Guest {
    fn new() -> Self {
        Self::of(None)
    }

    fn of(listener: Option<UnixListener>) -> Self {
        Self::with(listener, DRAIN_MAX)
    }

    /// One that waits only so long for receivers in the end.
    fn with(listener: Option<UnixListener>, patience: Duration) -> Self {
        let ports = HostPorts::default();
        let mut device = Vsock::new(ports.clone(), listener, None).unwrap();
        device.patience = patience;
        let driver = Driver::new(Box::new(device)).start();
        Self { driver, ports, port: PORT, host_cid: HOST_CID, kind: 1, piece: 64 << 10 }
    }

    /// A guest with one open connection, and the host's end of it.
    fn connected() -> (Self, UnixStream) {
        let mut guest = Self::new();
        let host = guest.connect(PORT);
        (guest, host)
    }

    /// Connects to a port of the host, and goes on with that one; gives the host's end.
    fn connect(&mut self, port: u32) -> UnixStream {
        let (host, offered) = UnixStream::pair().unwrap();
        self.ports.offer(port, offered);
        self.port = port;
        self.send(&packet(REQUEST));
        assert_eq!(self.receive().unwrap().op, RESPONSE);
        host
    }

    /// Sends as much as it has credit for when nobody receives, and says how much that is.
    fn fill(&mut self) -> usize {
        let (mut sent, mut forwarded) = (0, 0);
        while sent - forwarded + (10 << 10) <= CREDIT {
            self.send(&Packet { data: vec![1; 10 << 10], ..packet(DATA) });
            sent += 10 << 10;
            forwarded = self.ask_credit();
        }
        sent as usize
    }

    fn send(&mut self, packet: &Packet) {
        let header = [
            &GUEST_CID.to_le_bytes()[..],
            &self.host_cid.to_le_bytes(),
            &GUEST_PORT.to_le_bytes(),
            &self.port.to_le_bytes(),
            &(packet.data.len() as u32).to_le_bytes(),
            &self.kind.to_le_bytes(),
            &packet.op.to_le_bytes(),
            &packet.flags.to_le_bytes(),
            &packet.credit.to_le_bytes(),
            &packet.forwarded.to_le_bytes(),
        ]
        .concat();
        self.driver.memory.write_slice(&header, GuestAddress(TX)).unwrap();
        self.driver.memory.write_slice(&packet.data, GuestAddress(TX + 0x100)).unwrap();
        let mut chain = vec![Buffer { address: TX, length: HEADER, writable: false }];
        // As Linux does with large packets: a buffer a page, up to what the ring has places for.
        let piece = self.piece.max(packet.data.len().div_ceil(8));
        let mut at = TX + 0x100;
        for part in packet.data.chunks(piece.max(1)) {
            chain.push(Buffer { address: at, length: part.len() as u32, writable: false });
            at += part.len() as u64;
        }
        self.driver.offer(TRANSMIT, &chain);
        self.driver.device.dispatch(Event::Queue(TRANSMIT as u16));
        assert!(self.driver.used(TRANSMIT).is_some(), "the device keeps the buffer");
    }

    /// Asks how much the host's end has taken so far.
    fn ask_credit(&mut self) -> u32 {
        while let Some(answer) = self.receive() {
            assert_eq!(answer.op, CREDIT_UPDATE);
        }
        self.send(&packet(CREDIT_REQUEST));
        self.receive().unwrap().forwarded
    }

    /// Gives the device one buffer and takes what it puts into it.
    fn receive(&mut self) -> Option<Packet> {
        self.receive_at(Event::Backend(0))
    }

    fn receive_at(&mut self, event: Event) -> Option<Packet> {
        self.driver.offer(RECEIVE, &[Buffer { address: RX, length: HEADER + ROOM, writable: true }]);
        self.driver.device.dispatch(event);
        let used = self.driver.used(RECEIVE);
        let Some((_, length)) = used else {
            // Take the unused buffer back, for the next call to offer it again.
            self.driver.retract(RECEIVE);
            return None;
        };
        let mut bytes = vec![0; length as usize];
        self.driver.memory.read_slice(&mut bytes, GuestAddress(RX)).unwrap();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let half = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        assert_eq!((word(0), half(28), word(20)), (self.host_cid as u32, self.kind, GUEST_PORT));
        // A connection that the host opens has a port that the guest is only now told.
        if half(30) == REQUEST {
            self.port = word(16);
        }
        assert!(word(16) >= PORT);
        assert_eq!(word(24) + HEADER, length);
        let data = bytes[HEADER as usize..].to_vec();
        Some(Packet { op: half(30), flags: word(32), credit: word(36), forwarded: word(40), data })
    }
}

#[test]
fn a_port_that_nobody_offers_is_refused() {
    let mut guest = Guest::new();
    guest.send(&packet(REQUEST));
    assert_eq!(guest.receive().unwrap().op, RESET);
}

#[test]
fn an_offer_is_for_one_connection() {
    let (mut guest, _host) = Guest::connected();
    guest.send(&packet(REQUEST));
    assert_eq!(guest.receive().unwrap().op, RESET);
}

#[test]
fn packets_of_another_type_or_to_another_host_are_reset_as_what_they_are() {
    let (mut guest, mut host) = Guest::connected();
    for (cid, kind) in [(HOST_CID, 2), (HOST_CID, 77), (9, 1)] {
        (guest.host_cid, guest.kind) = (cid, kind);
        for op in [REQUEST, DATA] {
            guest.send(&packet(op));
            assert_eq!(guest.receive().unwrap().op, RESET, "{cid} {kind} {op}");
        }
        guest.send(&packet(RESET));
        assert_eq!(guest.receive(), None, "a reset is not answered");
    }
    // The stream between the same ports is another connection.
    (guest.host_cid, guest.kind) = (HOST_CID, 1);
    guest.send(&Packet { data: b"still".to_vec(), ..packet(DATA) });
    let mut bytes = [0; 5];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"still");
}

#[test]
fn bytes_go_both_ways() {
    let (mut guest, mut host) = Guest::connected();
    guest.send(&Packet { data: b"from the guest".to_vec(), ..packet(DATA) });
    let mut bytes = [0; 14];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"from the guest");

    host.write_all(b"from the host").unwrap();
    let received = guest.receive().unwrap();
    assert_eq!((received.op, received.data.as_slice(), received.forwarded), (DATA, &b"from the host"[..], 14));
}

#[test]
fn a_packet_may_come_in_pieces() {
    let (mut guest, mut host) = Guest::connected();
    guest.piece = 4096;
    let data: Vec<u8> = (0..60_000u32).map(|i| (i % 249) as u8).collect();
    guest.send(&Packet { data: data.clone(), ..packet(DATA) });
    let mut bytes = vec![0; data.len()];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, data);
}

#[test]
fn a_packet_that_claims_more_than_it_has_breaks_the_device() {
    let (mut guest, _host) = Guest::connected();
    guest.driver.memory.write_obj(5000u32, GuestAddress(TX + 24)).unwrap();
    guest.driver.offer(TRANSMIT, &[Buffer { address: TX, length: HEADER + 100, writable: false }]);
    guest.driver.device.dispatch(Event::Queue(TRANSMIT as u16));
    assert_ne!(guest.driver.read(0x70) & 0x40, 0);
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let (mut guest, mut host) = Guest::connected();
    guest.send(&Packet { credit: 10, ..packet(CREDIT_UPDATE) });
    host.write_all(&[1; 25]).unwrap();
    assert_eq!(guest.receive().unwrap().data.len(), 10);
    assert_eq!(guest.receive().unwrap().op, CREDIT_REQUEST);
    assert_eq!(guest.receive(), None);
    guest.send(&Packet { credit: 10, forwarded: 10, ..packet(CREDIT_UPDATE) });
    assert_eq!(guest.receive().unwrap().data.len(), 10);
}

#[test]
fn a_guest_that_sends_more_than_its_credit_is_cut_off() {
    let (mut guest, _host) = Guest::connected();
    // The host's end takes its socket buffer's worth; then the backlog fills up to the credit, and no further.
    let mut cut_off = false;
    for _ in 0..64 {
        guest.send(&Packet { data: vec![0; 32 << 10], ..packet(DATA) });
        while let Some(received) = guest.receive() {
            cut_off |= received.op == RESET;
        }
    }
    assert!(cut_off);
}

#[test]
fn a_slow_receiver_gets_everything_and_the_guest_its_credit_back() {
    let (mut guest, mut host) = Guest::connected();
    let (mut sent, mut forwarded, mut received) = (0u32, 0u32, Vec::new());
    let mut piece = vec![0; 50_000];
    while received.len() < 1 << 20 {
        while sent < 1 << 20 && sent - forwarded + 8192 <= CREDIT {
            let data = (sent..sent + 8192).map(|i| (i / 8 % 251) as u8).collect();
            guest.send(&Packet { data, ..packet(DATA) });
            sent += 8192;
        }
        let count = host.read(&mut piece).unwrap();
        received.extend_from_slice(&piece[..count]);
        forwarded = guest.ask_credit();
    }
    assert!(received.iter().enumerate().all(|(i, byte)| *byte == (i / 8 % 251) as u8));
}

#[test]
fn each_side_can_end_its_direction() {
    let (mut guest, mut host) = Guest::connected();
    guest.send(&Packet { data: b"last".to_vec(), ..packet(DATA) });
    guest.send(&Packet { flags: 2, ..packet(SHUTDOWN) });
    let mut bytes = Vec::new();
    host.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"last");

    host.write_all(b"answer").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.receive().unwrap().data, b"answer");
    let end = guest.receive().unwrap();
    assert_eq!((end.op, end.flags), (SHUTDOWN, 2));

    guest.send(&Packet { flags: 3, ..packet(SHUTDOWN) });
    assert_eq!(guest.receive().unwrap().op, RESET);
    guest.send(&packet(DATA));
    assert_eq!(guest.receive().unwrap().op, RESET);
}

/// The end of a direction is a change of the stream itself, of which its own watcher hears.
#[test]
fn an_end_of_a_direction_is_told_once() {
    let (mut guest, mut host) = Guest::connected();
    guest.send(&Packet { flags: 2, ..packet(SHUTDOWN) });
    let mut woken = 0;
    while woken < 10 && guest.driver.is_woken() {
        guest.driver.device.dispatch(Event::Backend(0));
        woken += 1;
    }
    assert!(woken < 10, "the device wakes itself up for ever");
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    host.write_all(b"still here").unwrap();
    assert_eq!(guest.receive().unwrap().data, b"still here");
}

#[test]
fn who_is_gone_on_the_host_neither_sends_nor_receives_more() {
    let (mut guest, mut host) = Guest::connected();
    host.write_all(b"last").unwrap();
    drop(host);
    assert_eq!(guest.receive().unwrap().data, b"last");
    let end = guest.receive().unwrap();
    assert_eq!((end.op, end.flags), (SHUTDOWN, 3));
    // What is sent all the same is dropped, and gives its credit back.
    for _ in 0..5 {
        guest.send(&Packet { data: vec![0; 32 << 10], ..packet(DATA) });
    }
    assert_eq!(guest.ask_credit(), 5 * (32 << 10));
    guest.send(&Packet { flags: 3, ..packet(SHUTDOWN) });
    assert_eq!(guest.receive().unwrap().op, RESET);
}

#[test]
fn who_is_gone_before_the_guest_has_its_answer_is_still_heard() {
    let mut guest = Guest::new();
    let (mut host, offered) = UnixStream::pair().unwrap();
    guest.ports.offer(PORT, offered);
    host.write_all(b"x").unwrap();
    drop(host);
    guest.send(&packet(REQUEST));
    // The device hears of it while the guest has no room for an answer.
    guest.driver.device.dispatch(Event::Backend(0));
    assert_eq!(guest.receive().unwrap().op, RESPONSE);
    assert_eq!(guest.receive().unwrap().data, b"x");
    let end = guest.receive().unwrap();
    assert_eq!((end.op, end.flags), (SHUTDOWN, 3));
}

#[test]
fn a_guest_that_only_sends_is_told_that_nobody_receives() {
    for guest_first in [true, false] {
        let (mut guest, host) = Guest::connected();
        let receives_no_more = Packet { flags: 1, ..packet(SHUTDOWN) };
        if guest_first {
            guest.send(&receives_no_more);
            drop(host);
        } else {
            drop(host);
            guest.driver.device.dispatch(Event::Backend(0));
            guest.send(&receives_no_more);
        }
        let end = guest.receive().unwrap();
        assert_eq!((end.op, end.flags, guest.receive()), (SHUTDOWN, 1, None), "{guest_first}");
    }
}

#[test]
fn a_guest_without_room_is_told_that_nobody_receives_and_then_what_was_sent() {
    let (mut guest, mut host) = Guest::connected();
    guest.send(&Packet { credit: 0, ..packet(CREDIT_UPDATE) });
    host.write_all(b"last").unwrap();
    drop(host);
    let told: Vec<_> = std::iter::from_fn(|| guest.receive()).map(|packet| (packet.op, packet.flags)).collect();
    assert_eq!(told, [(SHUTDOWN, 1), (CREDIT_REQUEST, 0)]);
    guest.send(&packet(CREDIT_UPDATE));
    assert_eq!(guest.receive().unwrap().data, b"last");
    let end = guest.receive().unwrap();
    assert_eq!((end.op, end.flags), (SHUTDOWN, 3));
}

#[test]
fn who_takes_nothing_more_on_the_host_can_still_send() {
    let (mut guest, mut host) = Guest::connected();
    host.shutdown(Shutdown::Read).unwrap();
    guest.send(&Packet { data: b"for nobody".to_vec(), ..packet(DATA) });
    let end = guest.receive().unwrap();
    assert_eq!((end.op, end.flags, end.forwarded), (SHUTDOWN, 1, 10));
    host.write_all(b"still").unwrap();
    assert_eq!(guest.receive().unwrap().data, b"still");
}

#[test]
fn what_was_sent_before_a_reset_arrives() {
    let (mut guest, mut host) = Guest::connected();
    guest.send(&Packet { data: vec![7; 60_000], ..packet(DATA) });
    guest.send(&packet(RESET));
    assert_eq!(guest.receive(), None);
    let mut bytes = Vec::new();
    host.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), 60_000);
}

#[test]
fn a_flush_delivers_the_backlog_to_a_receiver_that_reads_late() {
    let (mut guest, host) = Guest::connected();
    let sent = guest.fill();
    let reader = read_late(host);
    guest.driver.device.flush();
    assert_eq!(reader.join().unwrap(), sent);
}

/// Begins to read when the flush waits, and counts up to the end.
fn read_late(mut host: UnixStream) -> JoinHandle<usize> {
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        let mut bytes = Vec::new();
        host.read_to_end(&mut bytes).unwrap();
        bytes.len()
    })
}

#[test]
fn receivers_that_never_read_keep_neither_the_flush_nor_the_others() {
    // Longer than it takes to read what comes in the meantime, and so short that two of them are soon over.
    let mut guest = Guest::with(None, Duration::from_secs(2));
    let [never, late, nor] = [PORT, PORT + 1, PORT + 2].map(|port| (guest.connect(port), guest.fill()));
    let reader = read_late(late.0);
    // Otherwise the test waits for ever.
    let (done, flushed) = mpsc::channel();
    std::thread::spawn(move || {
        guest.driver.device.flush();
        done.send(())
    });
    flushed.recv_timeout(Duration::from_secs(60)).expect("the flush waits for who never reads");
    assert_eq!(reader.join().unwrap(), late.1);
    // What was in their sockets is still theirs, and then comes the end.
    for (mut host, sent) in [never, nor] {
        let mut bytes = Vec::new();
        host.read_to_end(&mut bytes).unwrap();
        assert!((1..sent).contains(&bytes.len()), "{} of {sent}", bytes.len());
    }
}

#[test]
fn a_device_that_its_driver_broke_is_not_woken_for_what_nobody_takes() {
    let (mut guest, mut host) = Guest::connected();
    guest.driver.set_available(TRANSMIT, 5000);
    guest.driver.device.dispatch(Event::Queue(TRANSMIT as u16));
    assert_eq!(guest.driver.metric("broken"), 1);
    host.write_all(b"anybody there?").unwrap();
    guest.driver.turn();
    assert!(!guest.driver.is_woken());
}

#[test]
fn more_streams_than_are_looked_at_at_once_are_all_heard_of() {
    let mut guest = Guest::new();
    let mut hosts = Vec::new();
    for port in PORT..PORT + 100 {
        let (host, offered) = UnixStream::pair().unwrap();
        guest.ports.offer(port, offered);
        guest.port = port;
        guest.send(&packet(REQUEST));
        assert_eq!(guest.receive().unwrap().op, RESPONSE);
        hosts.push(host);
    }
    while guest.receive().is_some() {}
    for host in &mut hosts {
        host.write_all(b"x").unwrap();
    }
    guest.driver.turn();
    let mut received = 0;
    while let Some(packet) = guest.receive_at(Event::Queue(RECEIVE as u16)) {
        received += usize::from(packet.op == DATA);
    }
    assert_eq!(received, hosts.len());
}
