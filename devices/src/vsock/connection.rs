//! One stream connection (VIRTIO 1.2 §5.10.6): credit both ways, a bounded backlog, half-close.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::unix::net::UnixStream;

use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

/// How much the guest may send before the host's end of the connection has taken it: what a connection costs the
/// monitor at most.
pub(super) const CREDIT: u32 = 128 << 10;

/// What is to be told the guest, each once, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packet {
    /// The connection is over.
    Reset,
    /// The connection is open.
    Response,
    /// This much data was put into the packet.
    Data(u32),
    /// The host's end sends no more.
    Shutdown,
    /// How much was taken.
    CreditUpdate,
    /// The host's end has data, and the guest has no room.
    CreditRequest,
}

/// What came of moving bytes.
enum Moved {
    Bytes(usize),
    WouldBlock,
    Failed,
}

/// A connection from the guest to a Unix stream socket.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    /// Bytes from the guest that the stream did not take yet; at most [`CREDIT`].
    backlog: VecDeque<u8>,
    /// Bytes that the stream took, and how many of them the guest was told of.
    forwarded: Wrapping<u32>,
    announced: Wrapping<u32>,
    /// The guest's room, what it took of it, and what was sent to it.
    guest_credit: u32,
    guest_forwarded: Wrapping<u32>,
    sent: Wrapping<u32>,
    readable: bool,
    writable: bool,
    guest_sends: bool,
    guest_receives: bool,
    host_sends: bool,
    response_due: bool,
    shutdown_due: bool,
    credit_update_due: bool,
    credit_request_due: bool,
    waits_for_credit: bool,
    over: bool,
    forgotten: bool,
    /// Whether the muxer has it on its list.
    pub(super) listed: bool,
}

impl Connection {
    /// A connection that the guest asked for and that is to be confirmed.
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            backlog: VecDeque::new(),
            forwarded: Wrapping(0),
            announced: Wrapping(0),
            guest_credit: 0,
            guest_forwarded: Wrapping(0),
            sent: Wrapping(0),
            readable: true,
            writable: true,
            guest_sends: true,
            guest_receives: true,
            host_sends: true,
            response_due: true,
            shutdown_due: false,
            credit_update_due: false,
            credit_request_due: false,
            waits_for_credit: false,
            over: false,
            forgotten: false,
            listed: false,
        }
    }

    /// What a packet header tells of the guest's room.
    pub(super) fn update_credit(&mut self, credit: u32, forwarded: u32) {
        self.guest_credit = credit;
        self.guest_forwarded = Wrapping(forwarded);
        if self.guest_room() > 0 {
            self.waits_for_credit = false;
        }
    }

    /// The bytes taken so far, as packet headers tell them.
    pub(super) fn announce(&mut self) -> u32 {
        self.announced = self.forwarded;
        self.forwarded.0
    }

    /// The guest sends data.
    pub(super) fn receive(&mut self, data: &[VolatileSlice<'_>]) {
        let length: usize = data.iter().map(VolatileSlice::len).sum();
        if !self.guest_sends || self.backlog.len() + length > CREDIT as usize {
            // Data after a shutdown or beyond the credit: the guest does not keep to the protocol.
            self.over = true;
            return;
        }
        for piece in data {
            let taken = self.write(piece);
            if let Ok(rest) = piece.offset(taken) {
                self.keep(&rest);
            }
            self.took(taken);
        }
    }

    /// Gives the stream as much as it takes, unless something else has to go first.
    fn write(&mut self, piece: &VolatileSlice<'_>) -> usize {
        if !self.writable || !self.backlog.is_empty() || piece.is_empty() {
            return 0;
        }
        match moved((&self.stream).write_volatile(piece)) {
            Moved::Bytes(count) => {
                self.writable = count == piece.len();
                count
            }
            Moved::WouldBlock => {
                self.writable = false;
                0
            }
            Moved::Failed => {
                self.over = true;
                0
            }
        }
    }

    /// Puts what the stream did not take at the end of the backlog.
    fn keep(&mut self, piece: &VolatileSlice<'_>) {
        let start = self.backlog.len();
        self.backlog.resize(start + piece.len(), 0);
        let (first, second) = self.backlog.as_mut_slices();
        // The new bytes are at the end: in the second half, or in both.
        let middle = first.len();
        let tail = start.saturating_sub(middle);
        let head = &mut first[start.min(middle)..];
        piece.copy_to(head);
        if let Ok(remaining) = piece.offset(head.len()) {
            remaining.copy_to(&mut second[tail..]);
        }
    }

    /// The guest shuts down.
    pub(super) fn shut_down(&mut self, sends_no_more: bool, receives_no_more: bool) {
        if receives_no_more {
            self.guest_receives = false;
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if sends_no_more {
            self.guest_sends = false;
            self.finish_sending();
        }
    }

    /// The guest ended the connection and wants no answer.
    pub(super) fn forget_guest(&mut self) {
        self.forgotten = true;
        self.shut_down(true, true);
    }

    /// Whether the guest ended the connection.
    pub(super) fn is_forgotten(&self) -> bool {
        self.forgotten
    }

    /// The stream is ready again.
    pub(super) fn ready(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        if writable {
            self.writable = true;
            self.drain();
        }
    }

    /// Writes the backlog, waiting for the receiver.
    pub(super) fn flush(&mut self) {
        if !self.backlog.is_empty() && self.stream.set_nonblocking(false).is_ok() {
            let (first, second) = self.backlog.as_slices();
            // A receiver that is gone wants nothing more.
            let _ = self.stream.write_all(first).and_then(|()| self.stream.write_all(second));
            self.backlog.clear();
        }
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Whether there is something to tell the guest.
    pub(super) fn has_packets(&self) -> bool {
        if self.forgotten {
            return self.is_over();
        }
        self.is_over()
            || self.response_due
            || self.shutdown_due
            || self.credit_update_due
            || self.credit_request_due
            || self.can_send()
    }

    /// Whether nothing is left of the connection but to say so.
    pub(super) fn is_over(&self) -> bool {
        self.over || (!self.guest_sends && !self.guest_receives && self.backlog.is_empty())
    }

    /// The next packet; data goes into `room`.
    pub(super) fn next_packet(&mut self, room: Option<&VolatileSlice<'_>>) -> Option<Packet> {
        if self.is_over() {
            return Some(Packet::Reset);
        }
        if std::mem::take(&mut self.response_due) {
            return Some(Packet::Response);
        }
        if self.can_send()
            && let Some(packet) = self.send(room)
        {
            return Some(packet);
        }
        if std::mem::take(&mut self.shutdown_due) {
            return Some(Packet::Shutdown);
        }
        if std::mem::take(&mut self.credit_update_due) {
            return Some(Packet::CreditUpdate);
        }
        std::mem::take(&mut self.credit_request_due).then_some(Packet::CreditRequest)
    }

    /// Asks for the guest to be told how much was taken.
    pub(super) fn request_credit_update(&mut self) {
        self.credit_update_due = true;
    }

    fn can_send(&self) -> bool {
        self.readable && self.host_sends && self.guest_receives && !self.waits_for_credit && !self.response_due
    }

    fn send(&mut self, room: Option<&VolatileSlice<'_>>) -> Option<Packet> {
        let credit = self.guest_room();
        if credit == 0 {
            self.waits_for_credit = true;
            self.credit_request_due = true;
            return None;
        }
        let room = room?;
        let mut room = room.subslice(0, room.len().min(credit as usize)).ok()?;
        match moved((&self.stream).read_volatile(&mut room)) {
            Moved::Bytes(0) => {
                self.host_sends = false;
                self.shutdown_due = true;
                None
            }
            Moved::Bytes(count) => {
                let count = u32::try_from(count).unwrap_or(u32::MAX);
                self.sent += count;
                Some(Packet::Data(count))
            }
            Moved::WouldBlock => {
                self.readable = false;
                None
            }
            Moved::Failed => {
                self.over = true;
                Some(Packet::Reset)
            }
        }
    }

    fn guest_room(&self) -> u32 {
        self.guest_credit.saturating_sub((self.sent - self.guest_forwarded).0)
    }

    fn drain(&mut self) {
        while self.writable && !self.backlog.is_empty() {
            let result = self.stream.write(self.backlog.as_slices().0);
            match moved(result.map_err(VolatileMemoryError::IOError)) {
                Moved::Bytes(count) => {
                    self.backlog.drain(..count);
                    self.took(count);
                }
                Moved::WouldBlock => self.writable = false,
                Moved::Failed => {
                    self.over = true;
                    return;
                }
            }
        }
        self.finish_sending();
    }

    /// Passes the guest's end of file on, once everything before it was.
    fn finish_sending(&mut self) {
        if !self.guest_sends && self.backlog.is_empty() {
            let _ = self.stream.shutdown(Shutdown::Write);
            if self.backlog.capacity() > 0 {
                self.backlog = VecDeque::new();
            }
        }
    }

    fn took(&mut self, count: usize) {
        self.forwarded += u32::try_from(count).unwrap_or(u32::MAX);
        // Telling the guest at every half keeps it sending without a packet back for each one of its own.
        if (self.forwarded - self.announced).0 >= CREDIT / 2 {
            self.credit_update_due = true;
        }
    }
}

fn moved(result: Result<usize, VolatileMemoryError>) -> Moved {
    match result {
        Ok(count) => Moved::Bytes(count),
        Err(VolatileMemoryError::IOError(error))
            if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) =>
        {
            Moved::WouldBlock
        }
        Err(_) => Moved::Failed,
    }
}
