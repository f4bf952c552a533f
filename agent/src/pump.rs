//! Moves bytes from one descriptor to another without ever holding more than a fixed amount: where one of the two is a
//! pipe the kernel moves them (splice(2)) and the pipe is the only buffer; between a terminal and a socket there is a
//! small buffer here. A source is not read while its sink has no room, so a slow reader slows the writer down.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{self, Errno};
use rustix::net::{Shutdown, shutdown};
use rustix::pipe::{SpliceFlags, splice};

/// How much one call moves at most. Linux allocates a vsock packet of up to 32 KiB with its headers in one piece, and a
/// larger one page by page, each a descriptor of its own for the monitor to look at.
const CHUNK: usize = 28 << 10;

/// How often a pump moves before others get a turn.
const ROUNDS: usize = 16;

/// The buffer of a terminal, which itself holds 4 KiB.
const BUFFER: usize = 4096;

/// More than a terminal holds of what was written to it (Linux `TTYB_DEFAULT_MEM_LIMIT` and its line buffer).
const TERMINAL_HELD: u64 = (64 << 10) + (4 << 10);

/// Which side a pump waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Sink,
}

/// What became of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// More may come.
    Open,
    /// The source ended or the sink takes no more. The sink was told, if it is a socket.
    Ended,
}

/// One direction of one stream. Both descriptors must be non-blocking.
#[derive(Debug)]
pub struct Pump {
    source: Rc<OwnedFd>,
    sink: Rc<OwnedFd>,
    sink_is_socket: bool,
    buffer: Option<Buffer>,
    waiting: Side,
    /// How much of the source is still to be moved, once its end is settled.
    remaining: Option<u64>,
}

#[derive(Debug)]
struct Buffer {
    bytes: Box<[u8; BUFFER]>,
    start: usize,
    end: usize,
}

impl Pump {
    /// From a socket into a pipe. The pipe closes when the pump is dropped.
    pub fn into_pipe(socket: OwnedFd, pipe: OwnedFd) -> Self {
        Self::new(Rc::new(socket), Rc::new(pipe), false, None)
    }

    /// From a pipe into a socket, whose sending direction is shut down at the end.
    pub fn from_pipe(pipe: OwnedFd, socket: OwnedFd) -> Self {
        Self::new(Rc::new(pipe), Rc::new(socket), true, None)
    }

    /// The two directions between a socket and the master side of a terminal: input, then output.
    pub fn terminal(socket: OwnedFd, master: &Rc<OwnedFd>) -> [Self; 2] {
        let socket = Rc::new(socket);
        let buffer = || Some(Buffer { bytes: Box::new([0; BUFFER]), start: 0, end: 0 });
        [
            Self::new(Rc::clone(&socket), Rc::clone(master), false, buffer()),
            Self::new(Rc::clone(master), socket, true, buffer()),
        ]
    }

    fn new(source: Rc<OwnedFd>, sink: Rc<OwnedFd>, sink_is_socket: bool, buffer: Option<Buffer>) -> Self {
        Self { source, sink, sink_is_socket, buffer, waiting: Side::Source, remaining: None }
    }

    /// Whether it carries what the container writes.
    pub fn is_output(&self) -> bool {
        self.sink_is_socket
    }

    /// Its connection to the host.
    pub fn connection(&self) -> BorrowedFd<'_> {
        if self.sink_is_socket { self.sink.as_fd() } else { self.source.as_fd() }
    }

    /// What to poll for before the next [`Pump::run`].
    pub fn interest(&self) -> (BorrowedFd<'_>, PollFlags) {
        match self.waiting {
            Side::Source => (self.source.as_fd(), PollFlags::IN),
            Side::Sink => (self.sink.as_fd(), PollFlags::OUT),
        }
    }

    /// Settles the end: the stream has ended once what is in the source now was moved, whoever still has it open and
    /// may write more.
    pub fn finish(&mut self) {
        let held = match self.buffer {
            // A terminal does not count what is still on its way to the master side.
            Some(_) => TERMINAL_HELD,
            // What does not tell is empty.
            None => io::ioctl_fionread(&*self.source).unwrap_or(0),
        };
        self.remaining.get_or_insert(held);
    }

    /// Moves what can be moved now.
    pub fn run(&mut self) -> Flow {
        for _ in 0..ROUNDS {
            match self.step() {
                Ok(0) => return self.end(),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.waiting = if self.has_more() { Side::Sink } else { Side::Source };
                    let ended = self.remaining.is_some() && self.waiting == Side::Source;
                    return if ended { self.end() } else { Flow::Open };
                }
                // The source was a terminal that nobody has open any more, or one of the two connections broke:
                // either way nothing more can pass.
                Err(_) => return self.end(),
            }
        }
        Flow::Open
    }

    /// Moves once: the number of bytes, 0 at the end of the source.
    fn step(&mut self) -> Result<usize, Errno> {
        let remaining = self.remaining.map_or(usize::MAX, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
        let Some(buffer) = &mut self.buffer else {
            let (flags, length) = (SpliceFlags::NONBLOCK | SpliceFlags::MOVE, CHUNK.min(remaining));
            if length == 0 {
                return Ok(0);
            }
            let moved = splice(&self.source, None, &self.sink, None, length, flags)?;
            self.take_off(moved);
            return Ok(moved);
        };
        if buffer.start == buffer.end {
            let length = BUFFER.min(remaining);
            (buffer.start, buffer.end) = (0, io::read(&self.source, &mut buffer.bytes[..length])?);
            let read = buffer.end;
            self.take_off(read);
            if read == 0 {
                return Ok(0);
            }
        }
        self.write_buffer()
    }

    fn take_off(&mut self, moved: usize) {
        self.remaining = self.remaining.map(|bytes| bytes.saturating_sub(moved as u64));
    }

    fn write_buffer(&mut self) -> Result<usize, Errno> {
        let Some(buffer) = &mut self.buffer else { return Ok(0) };
        let written = io::write(&self.sink, &buffer.bytes[buffer.start..buffer.end])?;
        buffer.start += written;
        Ok(written)
    }

    /// Whether there is something that the sink had no room for.
    fn has_more(&self) -> bool {
        if self.buffer.as_ref().is_some_and(|buffer| buffer.start < buffer.end) {
            return true;
        }
        let mut source = [PollFd::new(&*self.source, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(poll(&mut source, Some(&now)), Ok(1..)) && source[0].revents().contains(PollFlags::IN)
    }

    fn end(&self) -> Flow {
        if self.sink_is_socket {
            // A connection that the host has closed already needs no end.
            let _ = shutdown(&*self.sink, Shutdown::Write);
        }
        Flow::Ended
    }
}
