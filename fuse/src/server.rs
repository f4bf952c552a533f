//! From a message to an operation and back; the session, and what it counts.

use std::collections::HashMap;
use std::fmt::Debug;

use fuse_abi::linux::{self as abi, fuse_opcode};
use rustix::fd::BorrowedFd;
use rustix::io::Errno;

use crate::export::Export;
use crate::handle::Handles;
use crate::lock::{Locks, Ticket};
use crate::node::Nodes;
use crate::operations::{Call, Done};
use crate::wire::{ARGUMENTS_MAX, Arguments, Message, REPLY_HEADER, REQUEST_HEADER, reply_header};

/// What has become of a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Served<'s> {
    /// It is answered by these bytes; behind them, `data` bytes are in place already.
    Reply {
        /// The header and what follows it.
        reply: &'s [u8],
        /// How many bytes were read into the room behind the header.
        data: usize,
    },
    /// It has no answer.
    Nothing,
    /// It will be answered when this wait is over ([`Server::over`]).
    Waiting(Ticket),
    /// It is no message.
    Malformed,
}

/// What a server counts.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counters {
    /// Requests, those without a reply included.
    pub requests: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
    /// Requests refused because they change something that is read-only.
    pub read_only_refusals: u64,
    /// Requests refused because they would execute.
    pub noexec_refusals: u64,
    /// Requests refused or cut short because the quota is used up.
    pub quota_refusals: u64,
    /// Requests refused because the guest holds as many inodes, handles or locks as it may.
    pub limit_refusals: u64,
    /// Bytes read from files.
    pub read_bytes: u64,
    /// Bytes written to files.
    pub written_bytes: u64,
    /// Locks that had to be waited for.
    pub lock_waits: u64,
}

/// Serves one export to one guest.
#[derive(Debug)]
pub struct Server {
    pub(crate) export: Export,
    /// Whether the guest has begun a session.
    pub(crate) session: bool,
    pub(crate) nodes: Nodes,
    /// Whether the name that was found last was of something that is held. Names come in runs: of what the guest sees for the
    /// first time, and of what it looks at once more.
    pub(crate) expects_held: bool,
    pub(crate) handles: Handles,
    pub(crate) locks: Locks,
    pub(crate) counters: Counters,
    /// The requests that wait, with their own numbers.
    pub(crate) waits: HashMap<Ticket, u64>,
    arguments: Vec<u8>,
    reply: Vec<u8>,
    /// What was held before resets.
    left: Vec<Box<dyn Send + Debug>>,
}

impl Server {
    /// A server that no guest has talked to.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new(export: Export) -> Result<Self, Errno> {
        let limits = export.options.limits;
        Ok(Self {
            nodes: Nodes::new(limits.inodes, export.account.clone()),
            expects_held: false,
            handles: Handles::new(limits.handles),
            locks: Locks::new(limits)?,
            export,
            session: false,
            counters: Counters::default(),
            waits: HashMap::new(),
            arguments: Vec::new(),
            reply: Vec::new(),
            left: Vec::new(),
        })
    }

    /// Serves a message.
    pub fn serve(&mut self, message: &mut dyn Message) -> Served<'_> {
        self.counters.requests += 1;
        let mut header = [0; REQUEST_HEADER];
        if message.take(&mut header).is_none() {
            return Served::Malformed;
        }
        let header: abi::fuse_in_header = zerocopy::transmute!(header);
        let (mut arguments, mut reply) = (std::mem::take(&mut self.arguments), std::mem::take(&mut self.reply));
        reply.clear();
        reply.resize(REPLY_HEADER, 0);
        let taken = take_arguments(&header, message, &mut arguments);
        let done = taken.and_then(|()| {
            let room = message.room();
            let call = Call { header: &header, arguments: Arguments::new(&arguments), message, reply: &mut reply };
            let done = self.dispatch(call)?;
            let fits = !matches!(done, Done::Reply) || reply.len() <= room;
            if fits { Ok(done) } else { Err(Errno::RANGE) }
        });
        (self.arguments, self.reply) = (arguments, reply);
        self.finish(header.unique, done)
    }

    fn finish(&mut self, unique: u64, done: Result<Done, Errno>) -> Served<'_> {
        let data = match done {
            Ok(Done::Reply) => 0,
            Ok(Done::Data(length)) => length,
            Ok(Done::Nothing) => return Served::Nothing,
            Ok(Done::Waiting(ticket)) => {
                self.counters.lock_waits += 1;
                self.waits.insert(ticket, unique);
                return Served::Waiting(ticket);
            }
            Err(error) => {
                self.count(error);
                self.reply.clear();
                self.reply.extend_from_slice(&reply_header(unique, REPLY_HEADER, Some(error)));
                return Served::Reply { reply: &self.reply, data: 0 };
            }
        };
        let header = reply_header(unique, self.reply.len() + data, None);
        self.reply[..REPLY_HEADER].copy_from_slice(&header);
        Served::Reply { reply: &self.reply, data }
    }

    fn count(&mut self, error: Errno) {
        self.counters.errors += 1;
        if matches!(error, Errno::NFILE | Errno::MFILE | Errno::NOLCK) {
            self.counters.limit_refusals += 1;
        }
    }

    /// The waits that are over, each with the reply to its message.
    pub fn over(&mut self) -> Vec<(Ticket, [u8; REPLY_HEADER])> {
        let over = self.locks.over().into_iter();
        let mut replies = Vec::new();
        for (ticket, outcome) in over {
            // What a reset has called off is in nobody's way.
            let Some(unique) = self.waits.remove(&ticket) else { continue };
            if let Err(error) = outcome {
                self.count(error);
            }
            replies.push((ticket, reply_header(unique, REPLY_HEADER, outcome.err())));
        }
        replies
    }

    /// The descriptor that is readable when waits are over.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.locks.event()
    }

    /// Forgets everything about the guest. What it held is kept until [`Server::let_go`], so that any thread may do this: the
    /// only system call is one that makes [`Server::event`] readable.
    pub fn reset(&mut self) {
        self.end_session();
        // Nobody waits for an answer any more. The end of a session alone leaves it to the locks to be had.
        self.waits.clear();
        self.locks.wake();
    }

    /// As [`Server::reset`], for the thread that serves, which lets go at once.
    pub(crate) fn end_session(&mut self) {
        self.session = false;
        self.left.push(Box::new((self.handles.take(), self.nodes.take(), self.locks.take())));
    }

    /// Closes what was held before a reset. To be called by the thread that serves, before it serves anything else.
    pub fn let_go(&mut self) {
        self.left.clear();
    }

    /// How many bytes were written to files so far.
    pub fn written_bytes(&self) -> u64 {
        self.counters.written_bytes
    }

    /// What was counted, and what the guest holds now.
    pub fn metrics(&self) -> Vec<(&'static str, u64)> {
        let counters = self.counters;
        let number = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        vec![
            ("requests", counters.requests),
            ("errors", counters.errors),
            ("read_only_refusals", counters.read_only_refusals),
            ("noexec_refusals", counters.noexec_refusals),
            ("quota_refusals", counters.quota_refusals),
            ("limit_refusals", counters.limit_refusals),
            ("read_bytes", counters.read_bytes),
            ("written_bytes", counters.written_bytes),
            ("lock_waits", counters.lock_waits),
            ("inodes", number(self.nodes.len())),
            ("handles", number(self.handles.len())),
            ("lock_ranges", number(self.locks.ranges())),
            ("lock_waiters", number(self.locks.waiting())),
            ("added_bytes", self.export.account.as_ref().map_or(0, |account| account.bytes())),
        ]
    }
}

/// Takes what follows the header, except for the data of a WRITE, which nobody looks at.
fn take_arguments(
    header: &abi::fuse_in_header,
    message: &mut dyn Message,
    arguments: &mut Vec<u8>,
) -> Result<(), Errno> {
    let length = usize::try_from(header.len).ok().and_then(|length| length.checked_sub(REQUEST_HEADER));
    let length = length.filter(|length| *length <= message.remaining()).ok_or(Errno::INVAL)?;
    let looked_at = if header.opcode == fuse_opcode::FUSE_WRITE as u32 {
        length.min(size_of::<abi::fuse_write_in>())
    } else {
        length
    };
    if looked_at > ARGUMENTS_MAX {
        return Err(Errno::TOOBIG);
    }
    arguments.clear();
    arguments.resize(looked_at, 0);
    message.take(arguments).ok_or(Errno::INVAL)
}
