//! Who comes to the VM's socket on the host, and what they ask for: a line, and with it at most one descriptor.
//!
//! - `CONNECT port`: a connection to a port that somebody in the guest listens at. The answer is `OK host-port`, and what
//!   follows is the connection; with a descriptor that is the host's end of it, and what was asked on is closed.
//! - `OFFER port`, with a descriptor: that is the host's end of the next connection that the guest opens to this port. The
//!   answer is `OK port`.
//!
//! Whoever asks for something else, or for what cannot be, is hung up on.

use std::collections::BTreeMap;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags};

use super::host_end::HostEnd;

/// The most callers that have not said what they want. The one that has been silent for longest makes room.
const SILENT_MAX: usize = 64;
/// The longest line: the longest word, a space, a port, and the end of the line in two characters, with some room.
const LINE_MAX: usize = 32;

/// What a caller wants.
#[derive(Debug)]
pub(super) struct Call {
    /// Who is to be told.
    pub(super) caller: UnixStream,
    pub(super) wish: Wish,
    pub(super) port: u32,
}

#[derive(Debug)]
pub(super) enum Wish {
    /// A connection to a port of the guest, and its end on the host if that is not the caller.
    Connect(Option<HostEnd>),
    /// That the guest can connect to a port of the host.
    Offer(HostEnd),
}

/// Somebody who has not yet said all of it.
#[derive(Debug)]
struct Caller {
    stream: UnixStream,
    line: Vec<u8>,
    descriptor: Option<OwnedFd>,
}

/// How far a caller is.
enum Heard {
    /// There is more to come.
    Part,
    /// The end of the line.
    Line,
    /// They are gone, or talk nonsense.
    Nothing,
}

/// The VM's socket and who called there.
#[derive(Debug, Default)]
pub(super) struct Callers {
    listener: Option<UnixListener>,
    /// Whether somebody may wait to be let in.
    pub(super) waiting: bool,
    silent: BTreeMap<u32, Caller>,
    next: u32,
    /// How many were hung up on.
    pub(super) refused: u64,
}

impl Callers {
    /// Those who come to `listener`. It tells `epoll` of them, with `token`.
    pub(super) fn new(listener: Option<UnixListener>, epoll: &impl AsFd, token: u64) -> io::Result<Self> {
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
            let edge = epoll::EventFlags::IN | epoll::EventFlags::ET;
            epoll::add(epoll, listener, epoll::EventData::new_u64(token), edge)?;
        }
        Ok(Self { waiting: listener.is_some(), listener, ..Self::default() })
    }

    /// Lets one in who waits; `None` when nobody does. Gives what they want, if they have said it; each that has not tells
    /// `epoll` when they go on, with the token of their number.
    pub(super) fn admit(&mut self, epoll: &impl AsFd, token: impl Fn(u32) -> u64) -> Option<Option<Call>> {
        let listener = self.listener.as_ref().filter(|_| self.waiting)?;
        let stream = match rustix::net::accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
            Ok(stream) => UnixStream::from(stream),
            // Somebody who hung up already.
            Err(Errno::CONNABORTED | Errno::INTR) => return Some(None),
            Err(Errno::AGAIN) => {
                self.waiting = false;
                return None;
            }
            // No descriptor is left. It is tried again when anything else happens.
            Err(_) => return None,
        };
        let id = self.next;
        // One less than all, which is for the listener.
        self.next = (id + 1) % u32::MAX;
        let edge = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        if epoll::add(epoll, &stream, epoll::EventData::new_u64(token(id)), edge).is_err() {
            self.refused += 1;
            return Some(None);
        }
        if self.silent.len() >= SILENT_MAX && self.silent.pop_first().is_some() {
            self.refused += 1;
        }
        self.silent.insert(id, Caller { stream, line: Vec::new(), descriptor: None });
        Some(self.hear(id))
    }

    /// Takes what a caller says, and gives what they want once they have said it.
    pub(super) fn hear(&mut self, id: u32) -> Option<Call> {
        let heard = self.silent.get_mut(&id)?.hear();
        if matches!(heard, Heard::Part) {
            return None;
        }
        let caller = self.silent.remove(&id)?;
        let call = if matches!(heard, Heard::Line) { caller.understand() } else { None };
        self.refused += u64::from(call.is_none());
        call
    }
}

impl Caller {
    /// Reads up to the end of the line and no further, a byte a time: what follows is for the guest.
    fn hear(&mut self) -> Heard {
        while self.line.len() < LINE_MAX {
            let mut byte = [0];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let received = rustix::net::recvmsg(&self.stream, &mut [IoSliceMut::new(&mut byte)], &mut control, flags);
            for message in control.drain() {
                let RecvAncillaryMessage::ScmRights(descriptors) = message else { continue };
                for descriptor in descriptors {
                    if self.descriptor.replace(descriptor).is_some() {
                        return Heard::Nothing;
                    }
                }
            }
            match received {
                Ok(received) if received.bytes == 0 => return Heard::Nothing,
                Ok(_) if byte == *b"\n" => return Heard::Line,
                Ok(_) => self.line.extend(byte),
                Err(Errno::AGAIN) => return Heard::Part,
                Err(Errno::INTR) => {}
                Err(_) => return Heard::Nothing,
            }
        }
        Heard::Nothing
    }

    fn understand(self) -> Option<Call> {
        let line = str::from_utf8(&self.line).ok()?;
        let (word, port) = line.trim_end().split_once(' ')?;
        let port = port.parse().ok()?;
        let end = self.descriptor.map(HostEnd::try_from).transpose().ok()?;
        if let Some(end) = &end {
            end.set_nonblocking().ok()?;
        }
        let wish = match end {
            end if word.eq_ignore_ascii_case("connect") => Wish::Connect(end),
            Some(end) if word.eq_ignore_ascii_case("offer") => Wish::Offer(end),
            _ => return None,
        };
        Some(Call { caller: self.stream, wish, port })
    }
}
