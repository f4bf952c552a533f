//! The socket device (VIRTIO 1.2 §5.10, "Socket Device", device ID 19).
//!
//! Stream connections between the guest and Unix sockets, other stream sockets or pipes of the host (CID 2). The guest opens
//! them to ports of the host ([`ports`] says what is behind one), and the host, at the VM's socket, to ports that somebody in
//! the guest listens at ([`callers`]). The guest may send any packet at any time: one that fits no connection is answered
//! with RST, one that breaks the rules of its connection ends it. Datagrams and SEQPACKET are not supported: RST.
//!
//! - [`incoming`]: a packet that the guest sends.
//! - [`outgoing`]: a packet for the guest.
//! - [`host_end`]: what is at the host's end of a connection.
//! - [`connection`]: one connection: credit, buffering, half-close.
//! - [`callers`]: what the host asks for.
//! - [`muxer`]: all of them: from packets to connections and back.

mod callers;
mod connection;
pub mod host_end;
mod incoming;
mod muxer;
mod outgoing;
pub mod ports;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use self::incoming::Incoming;
use self::muxer::Muxer;
use self::outgoing::Room;
use self::ports::HostPorts;
use crate::GuestMemory;
use crate::device::{Broken, DRAIN_MAX, Event, Resources, Trigger, VirtioDevice, Watch, read_config_bytes};
use crate::limit::Limiter;
use crate::queue::{Buffers, QUEUE_SIZE_MAX, Served, VirtQueue};
use crate::state::{self, StateError};

/// The guest's address. Each monitor has a socket device of its own, so every guest can have the same.
pub const GUEST_CID: u64 = 3;
/// The host's address (§5.10.4).
pub const HOST_CID: u64 = 2;

/// The length of a packet's header.
const HEADER_LENGTH: usize = 44;
/// The most payload in a packet (§5.10.6; also what Linux sends at most).
const PAYLOAD_MAX: u32 = 64 << 10;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (§5.10.6.7, "Device Events"): all connections are gone.
const TRANSPORT_RESET: u32 = 0;
/// The position of the streams among what is watched; the limiter comes after it.
const STREAMS: usize = 0;
const QUEUE_SIZES: [u16; 3] = [QUEUE_SIZE_MAX, QUEUE_SIZE_MAX, 16];

/// The socket device.
#[derive(Debug)]
pub struct Vsock {
    muxer: Muxer,
    /// Whether to look at the host's side without being told: what became ready before there was a driver, or more than was
    /// looked at.
    poll_due: bool,
    /// Whether the guest is to be told that all connections are gone.
    event_due: bool,
    limiter: Option<Limiter>,
    /// How long the end of the VM waits for those who receive.
    patience: Duration,
    counters: Counters,
}

/// What the device counts, besides what the muxer does.
#[derive(Debug, Default)]
struct Counters {
    sent_packets: u64,
    sent_bytes: u64,
    received_packets: u64,
    received_bytes: u64,
}

impl Vsock {
    /// A device that connects the guest to `ports`, and those who come to `listener` to the guest, and takes as much from the
    /// guest as `limiter` admits.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new(ports: HostPorts, listener: Option<UnixListener>, limiter: Option<Limiter>) -> io::Result<Self> {
        let muxer = Muxer::new(ports, listener)?;
        let (patience, counters) = (DRAIN_MAX, Counters::default());
        Ok(Self { muxer, poll_due: false, event_due: false, limiter, patience, counters })
    }

    /// Takes what the guest sends.
    fn collect(&mut self, memory: &GuestMemory, queue: &mut VirtQueue) -> Result<(), Broken> {
        queue.serve(memory, |chain| {
            if !Limiter::admits(&mut self.limiter) {
                return Ok(Served::Refused);
            }
            let packet = Incoming::parse(memory, chain);
            let packet = packet.map_err(|reason| Broken::Chain { queue: TRANSMIT as u16, reason })?;
            let bytes: u64 = packet.data.iter().map(|slice| slice.len() as u64).sum();
            self.counters.sent_packets += 1;
            self.counters.sent_bytes += bytes;
            if let Some(limiter) = &mut self.limiter {
                limiter.charge(bytes);
            }
            self.muxer.receive(&packet);
            Ok(Served::Used(0))
        })
    }

    /// Gives the guest what there is for it, as far as it has buffers.
    fn deliver(&mut self, memory: &GuestMemory, queue: &mut VirtQueue) -> Result<(), Broken> {
        let mut budget = QUEUE_SIZE_MAX;
        while self.muxer.has_packets() {
            let Some(chain) = queue.pop(memory)? else {
                // Look once more after asking for a notification: a buffer may have come in between.
                if queue.rearm(memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let room = Room::of(memory, chain).map_err(|reason| queue.malformed(reason))?;
            let Some(payload) = self.muxer.next_packet(&room) else {
                queue.unpop();
                break;
            };
            queue.push(memory, head, HEADER_LENGTH as u32 + payload)?;
            self.counters.received_packets += 1;
            self.counters.received_bytes += u64::from(payload);
            budget -= 1;
            if budget == 0 {
                let _ = queue.kick().write(1);
                break;
            }
        }
        queue.signal(memory)
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&GUEST_CID.to_le_bytes(), offset, data);
    }

    fn start(&mut self, _: u64) {
        self.poll_due = true;
        self.event_due = false;
    }

    fn process(&mut self, resources: Resources<'_>, event: Event) -> Result<(), Broken> {
        let Resources { memory, queues, .. } = resources;
        let sends = match event {
            Event::Queue(queue) => usize::from(queue) == TRANSMIT,
            Event::Backend(STREAMS) => {
                self.poll_due = true;
                false
            }
            Event::Backend(_) => {
                self.limiter.iter_mut().for_each(Limiter::wake);
                true
            }
        };
        if sends && let Some(queue) = queues.get_mut(TRANSMIT) {
            self.collect(memory, queue)?;
        }
        if self.event_due
            && let Some(queue) = queues.get_mut(EVENT)
        {
            self.event_due = !tell_reset(memory, queue)?;
        }
        if std::mem::take(&mut self.poll_due) {
            self.poll_due = self.muxer.poll();
        }
        match queues.get_mut(RECEIVE) {
            Some(queue) => {
                if self.poll_due {
                    let _ = queue.kick().write(1);
                }
                self.deliver(memory, queue)
            }
            None => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.muxer.reset();
        self.limiter.iter_mut().for_each(Limiter::reset);
    }

    /// Connections are not kept: their ends on the host are not.
    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(state::encode(&Limiter::save(&self.limiter)))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        Limiter::restore(&mut self.limiter, state::decode("socket device", state)?);
        self.event_due = true;
        Ok(())
    }

    fn watched(&self) -> Vec<Watch> {
        let streams = Watch { descriptor: self.muxer.descriptor(), trigger: Trigger::Readable };
        [streams].into_iter().chain(self.limiter.iter().map(Limiter::watch)).collect()
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let Counters { sent_packets, sent_bytes, received_packets, received_bytes } = self.counters;
        let muxer::Counters { opened, refused, reset, host_opened, host_refused, host_offered } = self.muxer.counters();
        vec![
            ("connections_opened", opened),
            ("connections_refused", refused),
            ("connections_reset", reset),
            ("host_connections_opened", host_opened),
            ("host_calls_refused", host_refused),
            ("host_offers", host_offered),
            ("guest_sent_packets", sent_packets),
            ("guest_sent_bytes", sent_bytes),
            ("guest_received_packets", received_packets),
            ("guest_received_bytes", received_bytes),
            ("throttled", self.limiter.as_ref().map_or(0, Limiter::throttled)),
        ]
    }

    fn hurry(&mut self) {
        self.limiter.iter_mut().for_each(Limiter::lift);
    }

    fn flush(&mut self) {
        self.muxer.flush(self.patience);
    }
}

/// Tells the guest that all connections are gone, and says whether it had a buffer for that.
fn tell_reset(memory: &GuestMemory, queue: &mut VirtQueue) -> Result<bool, Broken> {
    let chain = match queue.pop(memory)? {
        // Look once more after asking for a notification: a buffer may have come in between.
        None if queue.rearm(memory)? => queue.pop(memory)?,
        found => found,
    };
    let Some(chain) = chain else { return Ok(false) };
    let head = chain.head_index();
    let buffers = Buffers::of(memory, chain).map_err(|reason| queue.malformed(reason))?;
    let event = TRANSPORT_RESET.to_le_bytes();
    let room = buffers.writable.first().filter(|room| room.len() >= event.len());
    room.ok_or_else(|| queue.malformed("an event buffer has no room for an event"))?.copy_from(&event);
    queue.push(memory, head, event.len() as u32)?;
    queue.signal(memory)?;
    Ok(true)
}
