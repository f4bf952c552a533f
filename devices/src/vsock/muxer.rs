//! All connections of a socket device: from packets to connections and back.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::io::Write as _;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};

use super::callers::{Call, Callers, Wish};
use super::connection::{Asker, Connection, Packet, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::host_end::HostEnd;
use super::incoming::Incoming;
use super::outgoing::{Header, Room};
use super::ports::{HostPorts, NO_PORT};
use super::{GUEST_CID, HOST_CID};

/// The most connections at a time: what a guest can make the monitor hold in descriptors and, times the credit, memory.
const CONNECTIONS_MAX: usize = 2048;
/// The most resets owed for packets that belong to no connection. A guest that sends more without taking its answers
/// loses answers.
const RESETS_MAX: usize = 256;
/// The most callers let in at once, so that a crowd of them does not keep the guest waiting.
const ADMITTED_MAX: usize = 64;
/// How many ends are heard of in one call.
const BATCH: usize = 64;
/// The ports that connections opened by the host have there.
const OWN_PORTS: Range<u32> = 1 << 30..1 << 31;

/// Packet types and operations (§5.10.6, `struct virtio_vsock_hdr`).
const TYPE_STREAM: u16 = 1;
const OP_REQUEST: u16 = 1;
const OP_RESPONSE: u16 = 2;
const OP_RST: u16 = 3;
const OP_SHUTDOWN: u16 = 4;
const OP_RW: u16 = 5;
const OP_CREDIT_UPDATE: u16 = 6;
const OP_CREDIT_REQUEST: u16 = 7;

/// Both ports of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// What something is ready of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Listener,
    Caller(u32),
    Connection(Key),
}

impl Token {
    const LISTENER: u32 = u32::MAX;

    fn to_number(self) -> u64 {
        // No connection has that port, and no caller that number.
        let (high, low) = match self {
            Self::Listener => (NO_PORT, Self::LISTENER),
            Self::Caller(id) => (NO_PORT, id),
            Self::Connection(Key { host, guest }) => (host, guest),
        };
        u64::from(high) << 32 | u64::from(low)
    }

    fn from_number(number: u64) -> Self {
        // Both halves fit: the token was made of two 32-bit numbers.
        match ((number >> 32) as u32, (number & u64::from(u32::MAX)) as u32) {
            (NO_PORT, Self::LISTENER) => Self::Listener,
            (NO_PORT, id) => Self::Caller(id),
            (host, guest) => Self::Connection(Key { host, guest }),
        }
    }
}

/// A packet that belongs to no connection, as its answer names it.
#[derive(Debug, Clone, Copy)]
struct Reset {
    key: Key,
    /// Whom the guest took for the host.
    host_cid: u64,
    kind: u16,
}

/// The connections and what is to be told of them.
#[derive(Debug)]
pub(super) struct Muxer {
    ports: HostPorts,
    epoll: Arc<OwnedFd>,
    callers: Callers,
    next_port: u32,
    /// Ordered, so that no choice of ports makes one hard to find, which is done for each packet.
    connections: BTreeMap<Key, Connection>,
    /// Connections that have something to tell, each at most once.
    listed: VecDeque<Key>,
    resets: VecDeque<Reset>,
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
    /// The host asked for them, and got them.
    pub(super) host_opened: u64,
    /// The host asked for something, and did not get it.
    pub(super) host_refused: u64,
    /// The host offered its end of one.
    pub(super) host_offered: u64,
}

impl Muxer {
    pub(super) fn new(ports: HostPorts, listener: Option<UnixListener>) -> io::Result<Self> {
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        let callers = Callers::new(listener, &epoll, Token::Listener.to_number())?;
        let (connections, listed, resets) = (BTreeMap::new(), VecDeque::new(), VecDeque::new());
        let (next_port, counters) = (OWN_PORTS.start, Counters::default());
        Ok(Self { ports, epoll, callers, next_port, connections, listed, resets, counters })
    }

    /// What became of connections since the device was made.
    pub(super) fn counters(&self) -> Counters {
        let host_refused = self.counters.host_refused + self.callers.refused;
        Counters { host_refused, ..self.counters }
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

    /// Delivers what the guest sent on all connections, and ends them. Waits for the receivers, but not longer than `most` for
    /// all of them together: each gets what it takes meanwhile, and none that does not read keeps the monitor.
    pub(super) fn flush(&mut self, most: Duration) {
        let deadline = Instant::now() + most;
        self.connections.values_mut().for_each(Connection::finish);
        let mut events = no_events();
        while self.connections.values().any(Connection::has_backlog) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            for event in self.wait(&mut events, left) {
                // Callers are too late.
                if let token @ Token::Connection(_) = Token::from_number(event.data.u64()) {
                    self.note(token, event.flags);
                }
            }
        }
        self.connections.values_mut().for_each(Connection::give_up);
        self.reset();
    }

    /// The next ends that are ready, for which it waits no longer than `most`.
    fn wait<'a>(&self, events: &'a mut [epoll::Event; BATCH], most: Duration) -> &'a [epoll::Event] {
        let most = Timespec::try_from(most).unwrap_or_default();
        // None are ready when it was interrupted.
        let count = epoll::wait(&*self.epoll, &mut events[..], Some(&most)).unwrap_or(0);
        &events[..count]
    }

    /// Whether there may be a packet for the guest.
    pub(super) fn has_packets(&self) -> bool {
        !self.listed.is_empty() || !self.resets.is_empty()
    }

    /// Notes which ends are ready, and answers callers. Whoever watches the descriptor hears of each change once, so that all
    /// are looked at. Says whether there may be more than are looked at or let in at once.
    pub(super) fn poll(&mut self) -> bool {
        let (mut events, mut more) = (no_events(), true);
        // An end that changes again after its turn is another change.
        for _ in 0..=CONNECTIONS_MAX / BATCH {
            let ready = self.wait(&mut events, Duration::ZERO);
            for event in ready {
                self.note(Token::from_number(event.data.u64()), event.flags);
            }
            // Callers are watched besides all the connections that there can be.
            more = ready.len() == BATCH;
            if !more {
                break;
            }
        }
        for _ in 0..ADMITTED_MAX {
            match self.callers.admit(&self.epoll, |id| Token::Caller(id).to_number()) {
                Some(call) => self.answer(call),
                None => return more,
            }
        }
        true
    }

    fn note(&mut self, token: Token, flags: epoll::EventFlags) {
        use epoll::EventFlags;
        match token {
            Token::Listener => self.callers.waiting = true,
            Token::Caller(id) => {
                let call = self.callers.hear(id);
                self.answer(call);
            }
            Token::Connection(key) => {
                let Some(connection) = self.connections.get_mut(&key) else { return };
                let gone = flags.intersects(EventFlags::HUP | EventFlags::ERR);
                let readable = gone || flags.intersects(EventFlags::IN | EventFlags::RDHUP);
                connection.ready(readable, gone || flags.contains(EventFlags::OUT), gone);
                list(&mut self.listed, key, connection);
            }
        }
    }

    /// Does what a caller wants, if they have said it.
    fn answer(&mut self, call: Option<Call>) {
        let Some(Call { mut caller, wish, port }) = call else { return };
        let done = match wish {
            Wish::Connect(None) => self.ask(port, caller.into(), Asker::Peer),
            Wish::Connect(Some(end)) => self.ask(port, end, Asker::Other(caller)),
            Wish::Offer(end) => {
                let offered = self.ports.hand(port, end);
                self.counters.host_offered += u64::from(offered);
                // So little always fits, unless the caller is gone, who then wanted no answer.
                offered.then(|| drop(caller.write_all(format!("OK {port}\n").as_bytes())))
            }
        };
        self.counters.host_refused += u64::from(done.is_none());
    }

    /// Begins a connection to a port of the guest.
    fn ask(&mut self, port: u32, mut end: HostEnd, asker: Asker) -> Option<()> {
        if self.connections.len() >= CONNECTIONS_MAX {
            return None;
        }
        let key = self.free_key(port)?;
        end.watch(&self.epoll, Token::Connection(key).to_number()).ok()?;
        let mut connection = Connection::asked_for(end, asker);
        list(&mut self.listed, key, &mut connection);
        self.connections.insert(key, connection);
        Some(())
    }

    /// A port of the host from which there is no connection to this port of the guest.
    fn free_key(&mut self, guest: u32) -> Option<Key> {
        // There are not as many connections, so that one of these is free.
        for _ in 0..=CONNECTIONS_MAX {
            let key = Key { host: self.next_port, guest };
            self.next_port = if key.host + 1 < OWN_PORTS.end { key.host + 1 } else { OWN_PORTS.start };
            if !self.connections.contains_key(&key) {
                return Some(key);
            }
        }
        None
    }

    /// Takes a packet of the guest.
    pub(super) fn receive(&mut self, packet: &Incoming<'_>) {
        let key = Key { host: packet.destination_port, guest: packet.source_port };
        let reset = Reset { key, host_cid: packet.destination_cid, kind: packet.kind };
        if packet.source_cid != GUEST_CID || packet.destination_cid != HOST_CID || packet.kind != TYPE_STREAM {
            // Only a stream packet between the two of us can be of a connection. The answer names whom the guest meant and
            // the type that it meant: its driver finds no socket that waits for any other.
            if packet.op != OP_RST {
                self.owe(reset);
            }
            return;
        }
        if packet.op == OP_REQUEST {
            self.open(key, packet);
            return;
        }
        let Some(connection) = self.connections.get_mut(&key) else {
            if packet.op != OP_RST {
                self.owe(reset);
            }
            return;
        };
        connection.update_credit(packet.credit, packet.forwarded);
        match packet.op {
            OP_RW if connection.is_open() => connection.receive(&packet.data),
            OP_SHUTDOWN if connection.is_open() => {
                connection.shut_down(packet.flags & SHUTDOWN_SEND != 0, packet.flags & SHUTDOWN_RECEIVE != 0);
            }
            // What was sent before is still delivered. Linux resets 8 s after a close that was not answered, and a
            // receiver may be slower than that.
            OP_RST => {
                self.counters.host_refused += u64::from(connection.is_asked_for());
                connection.forget_guest();
            }
            OP_RESPONSE if connection.agree(key.host) => self.counters.host_opened += 1,
            OP_CREDIT_REQUEST if connection.is_open() => connection.request_credit_update(),
            OP_CREDIT_UPDATE => {}
            _ => {
                self.connections.remove(&key);
                self.owe(reset);
                return;
            }
        }
        list(&mut self.listed, key, connection);
    }

    /// Fills the next packet for the guest and gives the length of its payload, or `None` when there is none.
    pub(super) fn next_packet(&mut self, room: &Room<'_>) -> Option<u32> {
        if let Some(Reset { key, host_cid, kind }) = self.resets.pop_front() {
            self.counters.reset += 1;
            Header { key, host_cid, kind, op: OP_RST, flags: 0, forwarded: 0, length: 0 }.write(room);
            return Some(0);
        }
        while let Some(key) = self.listed.pop_front() {
            let Some(connection) = self.connections.get_mut(&key) else { continue };
            connection.listed = false;
            let Some(next) = connection.next_packet(room.data.as_ref()) else { continue };
            let forwarded = connection.announce();
            let header = Header { key, host_cid: HOST_CID, kind: TYPE_STREAM, op: 0, flags: 0, forwarded, length: 0 };
            let (op, flags, length) = match next {
                Packet::Request => (OP_REQUEST, 0, 0),
                Packet::Response => (OP_RESPONSE, 0, 0),
                Packet::Data(length) => (OP_RW, 0, length),
                Packet::Shutdown(what) => (OP_SHUTDOWN, what, 0),
                Packet::CreditUpdate => (OP_CREDIT_UPDATE, 0, 0),
                Packet::CreditRequest => (OP_CREDIT_REQUEST, 0, 0),
                Packet::Reset => {
                    let told = connection.is_forgotten();
                    self.connections.remove(&key);
                    if told {
                        continue;
                    }
                    self.counters.reset += 1;
                    Header { op: OP_RST, ..header }.write(room);
                    return Some(0);
                }
            };
            list(&mut self.listed, key, connection);
            Header { op, flags, length, ..header }.write(room);
            return Some(length);
        }
        None
    }

    fn open(&mut self, key: Key, packet: &Incoming<'_>) {
        match self.connect(key) {
            Some(end) => {
                self.counters.opened += 1;
                let mut connection = Connection::confirmed(end);
                connection.update_credit(packet.credit, packet.forwarded);
                list(&mut self.listed, key, &mut connection);
                self.connections.insert(key, connection);
            }
            None => {
                self.counters.refused += 1;
                self.owe(Reset { key, host_cid: HOST_CID, kind: TYPE_STREAM });
            }
        }
    }

    /// The host's end for a new connection, if there may be one and somebody is there.
    fn connect(&self, key: Key) -> Option<HostEnd> {
        if self.connections.contains_key(&key) || self.connections.len() >= CONNECTIONS_MAX {
            return None;
        }
        let mut end = self.ports.connect(key.host).ok()?;
        end.watch(&self.epoll, Token::Connection(key).to_number()).ok()?;
        Some(end)
    }

    fn owe(&mut self, reset: Reset) {
        if self.resets.len() < RESETS_MAX {
            self.resets.push_back(reset);
        }
    }
}

/// Room for as many as are heard of in one call.
fn no_events() -> [epoll::Event; BATCH] {
    [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; BATCH]
}

/// Puts a connection on the list if it has something to tell and is not on it.
fn list(listed: &mut VecDeque<Key>, key: Key, connection: &mut Connection) {
    if !connection.listed && connection.has_packets() {
        connection.listed = true;
        listed.push_back(key);
    }
}
