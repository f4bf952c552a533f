//! All connections of a socket device: from packets to connections and back.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use rustix::event::epoll;
use virtio_vsock::packet::VsockPacket;

use super::connection::{CREDIT, Connection, Packet};
use super::incoming::Incoming;
use super::ports::HostPorts;
use super::{GUEST_CID, HOST_CID};

/// The most connections at a time: what a guest can make the monitor hold in descriptors and, times the credit, memory.
const CONNECTIONS_MAX: usize = 2048;
/// The most resets owed for packets that belong to no connection. A guest that sends more without taking its answers
/// loses answers.
const RESETS_MAX: usize = 256;

/// Packet types and operations (§5.10.6, `struct virtio_vsock_hdr`).
const TYPE_STREAM: u16 = 1;
const OP_REQUEST: u16 = 1;
const OP_RESPONSE: u16 = 2;
const OP_RST: u16 = 3;
const OP_SHUTDOWN: u16 = 4;
const OP_RW: u16 = 5;
const OP_CREDIT_UPDATE: u16 = 6;
const OP_CREDIT_REQUEST: u16 = 7;
const SHUTDOWN_RECEIVE: u32 = 1;
const SHUTDOWN_SEND: u32 = 2;

/// Both ports of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    host: u32,
    guest: u32,
}

impl Key {
    fn to_token(self) -> u64 {
        u64::from(self.host) << 32 | u64::from(self.guest)
    }

    fn from_token(token: u64) -> Self {
        // Both halves fit: the token was made of two 32-bit numbers.
        Self { host: (token >> 32) as u32, guest: (token & u64::from(u32::MAX)) as u32 }
    }
}

/// The connections and what is to be told of them.
#[derive(Debug)]
pub(super) struct Muxer {
    ports: HostPorts,
    epoll: OwnedFd,
    connections: HashMap<Key, Connection>,
    /// Connections that have something to tell, each at most once.
    listed: VecDeque<Key>,
    resets: VecDeque<Key>,
    counters: Counters,
}

/// What became of the guest's connections.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counters {
    /// It asked for them, and got them.
    pub(super) opened: u64,
    /// It asked for them, and did not get them.
    pub(super) refused: u64,
    /// It was told that they are over, or that there is none.
    pub(super) reset: u64,
}

impl Muxer {
    pub(super) fn new(ports: HostPorts) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let (connections, listed, resets) = (HashMap::new(), VecDeque::new(), VecDeque::new());
        Ok(Self { ports, epoll, connections, listed, resets, counters: Counters::default() })
    }

    /// What became of the guest's connections since the device was made.
    pub(super) fn counters(&self) -> Counters {
        self.counters
    }

    /// Readable when a connection's stream is ready.
    pub(super) fn descriptor(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Ends all connections.
    pub(super) fn reset(&mut self) {
        self.connections.clear();
        self.listed.clear();
        self.resets.clear();
    }

    /// Delivers what the guest sent on all connections, waiting for the receivers.
    pub(super) fn flush(&mut self) {
        for connection in self.connections.values_mut() {
            connection.flush();
        }
        self.reset();
    }

    /// Whether there may be a packet for the guest.
    pub(super) fn has_packets(&self) -> bool {
        !self.listed.is_empty() || !self.resets.is_empty()
    }

    /// Notes which streams are ready. Whoever watches the descriptor hears of each change once, so that all are looked at.
    pub(super) fn poll(&mut self) {
        let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 64];
        // A stream that changes again after its turn is another change.
        for _ in 0..=CONNECTIONS_MAX / events.len() {
            let count = epoll::wait(&self.epoll, &mut events[..], Some(&rustix::event::Timespec::default()));
            let ready = &events[..count.unwrap_or(0)];
            for event in ready {
                let key = Key::from_token(event.data.u64());
                let flags = event.flags;
                if let Some(connection) = self.connections.get_mut(&key) {
                    let ended = epoll::EventFlags::HUP | epoll::EventFlags::ERR | epoll::EventFlags::RDHUP;
                    let readable = flags.intersects(epoll::EventFlags::IN | ended);
                    connection.ready(readable, flags.intersects(epoll::EventFlags::OUT | epoll::EventFlags::ERR));
                    list(&mut self.listed, key, connection);
                }
            }
            if ready.len() < events.len() {
                break;
            }
        }
    }

    /// Takes a packet of the guest.
    pub(super) fn receive(&mut self, packet: &Incoming<'_>) {
        let key = Key { host: packet.destination_port, guest: packet.source_port };
        if packet.source_cid != GUEST_CID || packet.destination_cid != HOST_CID || packet.kind != TYPE_STREAM {
            // Only a stream packet between the two of us can be of a connection.
            if packet.op != OP_RST {
                self.owe_reset(key);
            }
            return;
        }
        if packet.op == OP_REQUEST {
            self.open(key, packet);
            return;
        }
        let Some(connection) = self.connections.get_mut(&key) else {
            if packet.op != OP_RST {
                self.owe_reset(key);
            }
            return;
        };
        connection.update_credit(packet.credit, packet.forwarded);
        match packet.op {
            OP_RW => connection.receive(&packet.data),
            OP_SHUTDOWN => {
                connection.shut_down(packet.flags & SHUTDOWN_SEND != 0, packet.flags & SHUTDOWN_RECEIVE != 0);
            }
            // What was sent before is still delivered. Linux resets 8 s after a close that was not answered, and a
            // receiver may be slower than that.
            OP_RST => connection.forget_guest(),
            OP_CREDIT_REQUEST => connection.request_credit_update(),
            OP_CREDIT_UPDATE => {}
            _ => {
                self.connections.remove(&key);
                self.owe_reset(key);
                return;
            }
        }
        list(&mut self.listed, key, connection);
    }

    /// Fills the next packet for the guest and gives the length of its payload, or `None` when there is none.
    pub(super) fn next_packet(&mut self, packet: &mut VsockPacket<'_, ()>) -> Option<u32> {
        if let Some(key) = self.resets.pop_front() {
            self.counters.reset += 1;
            write_header(packet, key, OP_RST, 0, 0, 0);
            return Some(0);
        }
        while let Some(key) = self.listed.pop_front() {
            let Some(connection) = self.connections.get_mut(&key) else { continue };
            connection.listed = false;
            let Some(next) = connection.next_packet(packet.data_slice()) else { continue };
            let forwarded = connection.announce();
            let (op, flags, length) = match next {
                Packet::Response => (OP_RESPONSE, 0, 0),
                Packet::Data(length) => (OP_RW, 0, length),
                Packet::Shutdown => (OP_SHUTDOWN, SHUTDOWN_SEND, 0),
                Packet::CreditUpdate => (OP_CREDIT_UPDATE, 0, 0),
                Packet::CreditRequest => (OP_CREDIT_REQUEST, 0, 0),
                Packet::Reset => {
                    let told = connection.is_forgotten();
                    self.connections.remove(&key);
                    if told {
                        continue;
                    }
                    self.counters.reset += 1;
                    write_header(packet, key, OP_RST, 0, forwarded, 0);
                    return Some(0);
                }
            };
            list(&mut self.listed, key, connection);
            write_header(packet, key, op, flags, forwarded, length);
            return Some(length);
        }
        None
    }

    fn open(&mut self, key: Key, packet: &Incoming<'_>) {
        match self.connect(key) {
            Some(stream) => {
                self.counters.opened += 1;
                let mut connection = Connection::new(stream);
                connection.update_credit(packet.credit, packet.forwarded);
                list(&mut self.listed, key, &mut connection);
                self.connections.insert(key, connection);
            }
            None => {
                self.counters.refused += 1;
                self.owe_reset(key);
            }
        }
    }

    /// The stream for a new connection, if there may be one and somebody is at the other end.
    fn connect(&self, key: Key) -> Option<UnixStream> {
        if self.connections.contains_key(&key) || self.connections.len() >= CONNECTIONS_MAX {
            return None;
        }
        let stream = self.ports.connect(key.host).ok()?;
        // Edge-triggered: the connection remembers what is ready, and the set never has to be changed.
        let interest =
            epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        epoll::add(&self.epoll, &stream, epoll::EventData::new_u64(key.to_token()), interest).ok()?;
        Some(stream)
    }

    fn owe_reset(&mut self, key: Key) {
        if self.resets.len() < RESETS_MAX {
            self.resets.push_back(key);
        }
    }
}

/// Puts a connection on the list if it has something to tell and is not on it.
fn list(listed: &mut VecDeque<Key>, key: Key, connection: &mut Connection) {
    if !connection.listed && connection.has_packets() {
        connection.listed = true;
        listed.push_back(key);
    }
}

fn write_header(packet: &mut VsockPacket<'_, ()>, key: Key, op: u16, flags: u32, forwarded: u32, length: u32) {
    packet
        .set_src_cid(HOST_CID)
        .set_dst_cid(GUEST_CID)
        .set_src_port(key.host)
        .set_dst_port(key.guest)
        .set_len(length)
        .set_type(TYPE_STREAM)
        .set_op(op)
        .set_flags(flags)
        .set_buf_alloc(CREDIT)
        .set_fwd_cnt(forwarded);
}
