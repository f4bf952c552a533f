//! A child of the agent that becomes a process of a container: the first one or a further one.
//!
//! ```text
//!          Ready           go            execve
//!   SettingUp ----> Ready ----> Told --------------> Executed
//!       |             |           |                     |
//!       +-------------+-----------+---------------------+----> ended: reaped
//! ```
//! One that ends before it has executed its program says why ([`Child::reason`]), unless it was killed.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use protocol::{Failure, frame};
use rustix::event::PollFlags;
use rustix::fs::{self, Mode, OFlags};
use rustix::io::{Errno, IoSliceMut};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketFlags, SocketType, recvmsg,
    send, socketpair,
};
use rustix::process::{Pid, WaitOptions, waitpid};

use super::cgroup::SIGKILL;
use super::error::{InStep, SetupError};
use super::execution::{self, DESCRIPTORS_MAX, GO, Inherited, Prepared, REPORT_MAX, Report};
use super::streams::{Ends, Streams};
use crate::pids::{self, Home};
use crate::sys::{self, Fork};

/// How far a child has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// It sets itself up.
    SettingUp,
    /// It waits for the word.
    Ready,
    /// The word was given.
    Told,
    /// It executes its program, or did.
    Executed,
}

/// Where a child is born.
#[derive(Debug, Clone, Copy)]
pub struct Birthplace<'a> {
    /// The agent's own pid namespace.
    pub home: &'a Home,
    /// A process in whose pid namespace it is born instead.
    pub member: Option<BorrowedFd<'a>>,
    /// Its cgroup.
    pub cgroup: BorrowedFd<'a>,
    /// New namespaces that it is born in (`CLONE_NEW*` flags).
    pub namespaces: libc::c_int,
}

/// What to poll for on behalf of a child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// It has something to say.
    Report,
    /// The stream of this index can move.
    Stream(usize),
}

/// A child.
#[derive(Debug)]
pub struct Child {
    /// Its id, not to be used once `exit_code` is there.
    pid: Pid,
    exit_code: Option<u8>,
    stage: Stage,
    /// The channel to it until it executes the program or ends.
    channel: Option<OwnedFd>,
    failure: Option<Failure>,
    executed_us: u64,
    streams: Streams,
    /// What its set-up gave to the agent.
    kept: Vec<OwnedFd>,
}

impl Child {
    /// Forks one with these streams. `prepare` runs in it, with its own copies of `others`, and sets it up.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn fork(
        (streams, ends): (Streams, Ends),
        birthplace: Birthplace<'_>,
        others: &[BorrowedFd<'_>],
        prepare: impl FnOnce(&Ends, Vec<OwnedFd>) -> Result<Prepared, SetupError>,
    ) -> Result<Self, SetupError> {
        let null = fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).in_step("open /dev/null")?;
        let (channel, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .in_step("make a socket pair")?;
        let Birthplace { home, member, cgroup, namespaces } = birthplace;
        let pid = match home.fork(member, Some(cgroup), namespaces) {
            // What a pid namespace says whose first process is on its way out (alloc_pid in Linux: "not the most obvious
            // choice").
            Err(error) if member.is_some() && is_end_of_pids(&error) => return Err(SetupError::Ended),
            Err(error) => return Err(error).in_step("fork"),
            Ok(Fork::Parent(pid)) => pid,
            Ok(Fork::Child) => {
                let inherited = Inherited { ends: &ends, null: null.as_fd(), channel: theirs.as_fd(), others };
                execution::run(&inherited, |others| prepare(&ends, others))
            }
        };
        let (exit_code, failure, kept) = (None, None, Vec::new());
        let channel = Some(channel);
        Ok(Self { pid, exit_code, stage: Stage::SettingUp, channel, failure, executed_us: 0, streams, kept })
    }

    /// Its process id, as long as it was not reaped.
    pub fn pid(&self) -> Option<Pid> {
        self.exit_code.is_none().then_some(self.pid)
    }

    /// A descriptor that means it. When there is none to be had, the child is gone.
    ///
    /// # Errors
    /// What pidfd_open(2) says.
    pub fn open(&self) -> io::Result<OwnedFd> {
        pids::open(self.pid).inspect_err(|_| {
            // It has begun nothing that it would have to wait for, and its cgroup is to be removed.
            self.kill();
            let _ = waitpid(Some(self.pid), WaitOptions::empty());
        })
    }

    /// The exit code, when it has ended.
    pub fn exit_code(&self) -> Option<u8> {
        self.exit_code
    }

    /// How far it has come.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Guest time just before the execve(2), or 0.
    pub fn executed_us(&self) -> u64 {
        self.executed_us
    }

    /// Its streams.
    pub fn streams(&self) -> &Streams {
        &self.streams
    }

    /// What its set-up gave to the agent, once it is ready.
    pub fn take_kept(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.kept)
    }

    /// Gives the word to execute the program.
    pub fn go(&mut self) {
        self.stage = Stage::Told;
        if let Some(channel) = &self.channel {
            // When the child is gone, its end will be seen.
            let _ = send(channel, &GO, SendFlags::NOSIGNAL);
        }
    }

    /// Sends it a signal; one that has ended does not mind.
    ///
    /// # Errors
    /// What kill(2) says.
    pub fn signal(&self, number: u8) -> io::Result<()> {
        self.pid().map_or(Ok(()), |pid| sys::send_signal(pid, number))
    }

    /// Kills it and what it has started, as far as that did not leave its process group.
    pub fn kill(&self) {
        let Some(pid) = self.pid() else { return };
        // Before its setsid(2) there is no such group; a child of the agent can't be refused the signal.
        let _ = sys::send_signal_to_group(pid, SIGKILL);
        let _ = sys::send_signal(pid, SIGKILL);
    }

    /// Calls `add` for each descriptor to poll.
    pub fn interests<'a>(&'a self, mut add: impl FnMut(BorrowedFd<'a>, PollFlags, Event)) {
        if let Some(channel) = &self.channel {
            add(channel.as_fd(), PollFlags::IN, Event::Report);
        }
        // Until the child is ready the connections may not be established.
        if self.stage != Stage::SettingUp {
            self.streams.interests(|fd, flags, index| add(fd, flags, Event::Stream(index)));
        }
    }

    /// Reacts to a descriptor of [`Child::interests`] being ready.
    pub fn handle(&mut self, event: Event) {
        match event {
            Event::Stream(index) => self.streams.run(index),
            Event::Report => {
                self.hear();
            }
        }
    }

    /// Takes note that it has ended, if it is `pid`; whether it was.
    pub fn reaped(&mut self, pid: Pid, exit_code: u8) -> bool {
        if self.pid() != Some(pid) {
            return false;
        }
        self.exit_code = Some(exit_code);
        // What it said last may be unread; the end of the channel comes behind.
        while self.hear() {}
        self.channel = None;
        true
    }

    /// Ends its streams with what was written so far. For one that was reaped.
    pub fn finish_streams(&mut self) {
        self.streams.finish();
    }

    /// Its streams, which may have output left to write. For one that was reaped.
    pub fn take_streams(&mut self) -> Streams {
        std::mem::take(&mut self.streams)
    }

    /// Whether it has ended without having executed its program.
    pub fn has_failed(&self) -> bool {
        self.exit_code.is_some() && self.stage != Stage::Executed
    }

    /// Why it did not execute its program, if it could say so.
    pub fn reason(&self) -> Option<Failure> {
        self.failure.clone()
    }

    /// Reads one report of the child; whether there may be more.
    fn hear(&mut self) -> bool {
        let Some(channel) = &self.channel else { return false };
        match receive(channel) {
            Ok(Some((Report::Ready, descriptors))) => self.ready(descriptors),
            Ok(Some((Report::Executing { at_us }, _))) => self.executed_us = at_us,
            Ok(Some((Report::Failed(failure), _))) => self.failure = Some(failure),
            Ok(None) => {
                self.channel = None;
                // An execution that fails is reported before the channel closes.
                if self.failure.is_none() && self.executed_us > 0 {
                    self.stage = Stage::Executed;
                }
                return false;
            }
            Err(error) => {
                self.give_up(&error);
                self.channel = None;
                return false;
            }
        }
        true
    }

    fn ready(&mut self, descriptors: Vec<OwnedFd>) {
        let mut descriptors = descriptors.into_iter();
        let master = if self.streams.has_terminal() { descriptors.next() } else { None };
        self.kept = descriptors.collect();
        match self.streams.establish(master) {
            Ok(()) => self.stage = Stage::Ready,
            Err(error) => self.give_up(&error),
        }
    }

    fn give_up(&mut self, error: &SetupError) {
        self.failure.get_or_insert_with(|| error.failure());
        self.kill();
    }
}

fn is_end_of_pids(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::SRCH | Errno::NOMEM))
}

/// Receives one report with the descriptors that came along; `None` when the child's side is closed.
fn receive(channel: &OwnedFd) -> Result<Option<(Report, Vec<OwnedFd>)>, SetupError> {
    let step = "hear from the container's set-up";
    let mut datagram = [0; REPORT_MAX + 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let length = rustix::io::retry_on_intr(|| {
        recvmsg(channel, &mut [IoSliceMut::new(&mut datagram)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    });
    let length = match length {
        Ok(message) => message.bytes,
        // The child ended with something of ours unread: that is its end, too.
        Err(Errno::CONNRESET) => 0,
        Err(error) => return Err(error).in_step(step),
    };
    if length == 0 {
        return Ok(None);
    }
    let report = frame::read(&mut &datagram[..length], REPORT_MAX)
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
        .in_step(step)?;
    let descriptors = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    Ok(Some((report, descriptors.flatten().collect())))
}
