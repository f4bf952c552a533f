//! One stream connection (VIRTIO 1.2 §5.10.6): opened by either side, credit both ways, a bounded backlog, half-close.

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::num::Wrapping;
use std::os::unix::net::UnixStream;

use vm_memory::{VolatileMemoryError, VolatileSlice};

use super::host_end::HostEnd;

/// How much the guest may send before the host's end of the connection has taken it: what a connection costs the
/// monitor at most.
pub(super) const CREDIT: u32 = 128 << 10;

/// What a shutdown is of (§5.10.6.5): what its sender receives, and what it sends.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// What is to be told the guest, each once, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packet {
    /// The connection is over.
    Reset,
    /// The host asks for the connection.
    Request,
    /// The connection is open.
    Response,
    /// This much data was put into the packet.
    Data(u32),
    /// The host's end does no more of this ([`SHUTDOWN_RECEIVE`], [`SHUTDOWN_SEND`]).
    Shutdown(u32),
    /// How much was taken.
    CreditUpdate,
    /// The host's end has data, and the guest has no room.
    CreditRequest,
}

/// What came of moving bytes.
enum Moved {
    Bytes(usize),
    WouldBlock,
    /// Nobody reads any more.
    Gone,
    Failed,
}

/// How far a connection is.
#[derive(Debug)]
enum Stage {
    /// The guest asked for it, and is to be told that it is open.
    Confirm,
    /// The guest is to be asked for it, and then the host is to be told.
    Ask(Asker),
    /// The guest was asked.
    Asked(Asker),
    Open,
}

/// Who in the host asked for a connection.
#[derive(Debug)]
pub(super) enum Asker {
    /// Who is at its end.
    Peer,
    /// Somebody who handed that end over.
    Other(UnixStream),
}

/// A connection between the guest and the host's end.
#[derive(Debug)]
pub(super) struct Connection {
    stage: Stage,
    end: HostEnd,
    /// Bytes from the guest that the end did not take yet; at most [`CREDIT`].
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
    host_receives: bool,
    /// What is to be told of what the host's end does no more.
    shutdown_due: u32,
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
    pub(super) fn confirmed(end: HostEnd) -> Self {
        Self::new(end, Stage::Confirm)
    }

    /// A connection that the guest is to be asked for.
    pub(super) fn asked_for(end: HostEnd, asker: Asker) -> Self {
        Self::new(end, Stage::Ask(asker))
    }

    fn new(end: HostEnd, stage: Stage) -> Self {
        // An end that goes one way only says so as soon as the connection is open.
        let (host_sends, host_receives) = (end.sends(), end.receives());
        let receive = if host_receives { 0 } else { SHUTDOWN_RECEIVE };
        let send = if host_sends { 0 } else { SHUTDOWN_SEND };
        Self {
            stage,
            end,
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
            host_sends,
            host_receives,
            shutdown_due: receive | send,
            credit_update_due: false,
            credit_request_due: false,
            waits_for_credit: false,
            over: false,
            forgotten: false,
            listed: false,
        }
    }

    /// The guest agrees to a connection that it was asked for. `port` is the host's. Says whether it was asked.
    pub(super) fn agree(&mut self, port: u32) -> bool {
        let Stage::Asked(asker) = std::mem::replace(&mut self.stage, Stage::Open) else {
            self.over = true;
            return false;
        };
        // So little always fits; who is gone already is found out like everybody who goes.
        let told = format!("OK {port}\n");
        let _ = match asker {
            Asker::Peer => self.end.write_all(told.as_bytes()),
            Asker::Other(mut asker) => asker.write_all(told.as_bytes()),
        };
        true
    }

    /// Whether the host asked for it, and the guest has not answered.
    pub(super) fn is_asked_for(&self) -> bool {
        matches!(self.stage, Stage::Ask(_) | Stage::Asked(_))
    }

    /// Whether it is open, as far as the guest was told.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.stage, Stage::Open)
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
            if !self.host_receives {
                self.took(piece.len());
                continue;
            }
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
        match moved(self.end.write_from(piece)) {
            Moved::Bytes(count) => {
                self.writable = count == piece.len();
                count
            }
            Moved::WouldBlock => {
                self.writable = false;
                0
            }
            Moved::Gone => {
                self.stop_receiving();
                piece.len()
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
            self.end.stop_reading();
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

    /// The host's end is ready again, or its peer is gone altogether.
    pub(super) fn ready(&mut self, readable: bool, writable: bool, gone: bool) {
        self.readable |= readable;
        if gone && self.is_asked_for() {
            // Whoever asked has given up, and nothing was sent. Where the guest asked, the peer may have sent all that it
            // wanted to before it went.
            self.over = true;
        } else if gone && self.guest_sends {
            self.stop_receiving();
        } else if writable {
            self.writable = true;
            self.drain();
        }
    }

    /// The guest has ended: what it sent is all, and the receiver hears of its end once it has taken it.
    pub(super) fn finish(&mut self) {
        self.guest_sends = false;
        self.writable = true;
        self.drain();
    }

    /// Whether the receiver has still to take something, and may yet.
    pub(super) fn has_backlog(&self) -> bool {
        !self.over && !self.backlog.is_empty()
    }

    /// The receiver took too long: it gets no more.
    pub(super) fn give_up(&mut self) {
        self.stop_receiving();
        self.finish_sending();
    }

    /// Whether there is something to tell the guest.
    pub(super) fn has_packets(&self) -> bool {
        if self.forgotten {
            return self.is_over();
        }
        self.is_over()
            || matches!(self.stage, Stage::Confirm | Stage::Ask(_))
            || (self.shutdown_due != 0 && self.is_open())
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
        match std::mem::replace(&mut self.stage, Stage::Open) {
            Stage::Confirm => return Some(Packet::Response),
            Stage::Ask(asker) => {
                self.stage = Stage::Asked(asker);
                return Some(Packet::Request);
            }
            asked @ Stage::Asked(_) => {
                self.stage = asked;
                return None;
            }
            Stage::Open => {}
        }
        if self.can_send()
            && let Some(packet) = self.send(room)
        {
            return Some(packet);
        }
        if self.shutdown_due != 0 {
            return Some(Packet::Shutdown(std::mem::take(&mut self.shutdown_due)));
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
        self.readable && self.host_sends && self.guest_receives && !self.waits_for_credit && self.is_open()
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
        match moved(self.end.read(&mut room)) {
            Moved::Bytes(0) => {
                self.host_sends = false;
                self.shutdown_due |= SHUTDOWN_SEND;
                if !self.host_receives {
                    self.shutdown_due |= SHUTDOWN_RECEIVE;
                }
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
            Moved::Gone | Moved::Failed => {
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
            let result = self.end.write(self.backlog.as_slices().0);
            match moved(result.map_err(VolatileMemoryError::IOError)) {
                Moved::Bytes(count) => {
                    self.backlog.drain(..count);
                    self.took(count);
                }
                Moved::WouldBlock => self.writable = false,
                Moved::Gone => self.stop_receiving(),
                Moved::Failed => {
                    self.over = true;
                    return;
                }
            }
        }
        self.finish_sending();
    }

    /// The host's end takes nothing any more, which the guest is told: what it sends all the same is dropped, and counts as
    /// taken.
    fn stop_receiving(&mut self) {
        if std::mem::replace(&mut self.host_receives, false) {
            // Not only with the end of what the peer sent: a guest that takes nothing, or has no room, never gets to that.
            self.shutdown_due |= SHUTDOWN_RECEIVE;
        }
        let dropped = std::mem::take(&mut self.backlog).len();
        self.took(dropped);
    }

    /// Passes the guest's end of file on, once everything before it was.
    fn finish_sending(&mut self) {
        if !self.guest_sends && self.backlog.is_empty() {
            self.end.stop_writing();
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
        Err(VolatileMemoryError::IOError(error)) if error.kind() == io::ErrorKind::BrokenPipe => Moved::Gone,
        Err(_) => Moved::Failed,
    }
}
