//! A forked process that does for one request what may take long or block: the agent's loop goes on meanwhile. It says its
//! answer when it has one, and may work on behind that.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use protocol::{Answer, Failure, FailureKind, frame};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};

use super::error::{InStep, SetupError};
use crate::pids::Home;
use crate::sys::{self, Fork};

/// The descriptor that a helper answers on, after the agent's own standard streams.
const CHANNEL: RawFd = 3;

/// What a helper was asked and says.
type Reply = Result<Answer, Failure>;

/// A helper.
#[derive(Debug)]
pub struct Helper {
    /// What it does, for people.
    what: &'static str,
    /// The request that it works for, until that was answered.
    request: Option<u32>,
    /// Its process id, until it was reaped.
    pid: Option<Pid>,
    channel: OwnedFd,
    reply: Option<Reply>,
}

/// Where a helper's work says its answer.
#[derive(Debug)]
pub struct Outlet(OwnedFd);

impl Outlet {
    /// Says the answer; only the first counts.
    pub fn say(&self, reply: &Reply) {
        if let Ok(datagram) = frame::encode(reply, frame::MAX_FROM_AGENT) {
            // An agent that does not hear any more needs none.
            let _ = send(&self.0, &datagram, SendFlags::NOSIGNAL);
        }
    }
}

impl Helper {
    /// Forks one for a request; `what` it does is for people. `work` runs in it with its own copies of `kept` and gives the answer, unless it said one
    /// before.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn fork(
        (request, what): (u32, &'static str),
        home: &Home,
        kept: &[BorrowedFd<'_>],
        work: impl FnOnce(Vec<OwnedFd>, &Outlet) -> Reply,
    ) -> Result<Self, SetupError> {
        let (channel, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .in_step("make a socket pair")?;
        match home.fork(None, None, 0).in_step("fork")? {
            Fork::Parent(pid) => Ok(Self { what, request: Some(request), pid: Some(pid), channel, reply: None }),
            Fork::Child => run(theirs.as_fd(), kept, work),
        }
    }

    /// What to poll (for `POLLIN`), until it has answered.
    pub fn interest(&self) -> Option<BorrowedFd<'_>> {
        (self.reply.is_none() && self.request.is_some()).then_some(self.channel.as_fd())
    }

    /// Reads what it says.
    pub fn hear(&mut self) {
        let mut datagram = vec![0; frame::MAX_FROM_AGENT + 4];
        let length = rustix::io::retry_on_intr(|| recv(&self.channel, &mut datagram[..], RecvFlags::DONTWAIT));
        self.reply = match length {
            Ok((1.., length)) => frame::read(&mut &datagram[..length], frame::MAX_FROM_AGENT).ok(),
            // It has ended without a word.
            _ => None,
        };
        self.reply.get_or_insert_with(|| {
            let message = format!("{} was ended with its container or for want of memory", self.what);
            Err(Failure { kind: FailureKind::System, message })
        });
    }

    /// Takes note that it has ended, if it is `pid`; whether it was.
    pub fn reaped(&mut self, pid: Pid) -> bool {
        if self.pid != Some(pid) {
            return false;
        }
        self.pid = None;
        if self.interest().is_some() {
            self.hear();
        }
        true
    }

    /// The answer to its request, once.
    pub fn take_reply(&mut self) -> Option<(u32, Reply)> {
        let reply = self.reply.take()?;
        Some((self.request.take()?, reply))
    }

    /// Whether it has ended and was heard.
    pub fn is_over(&self) -> bool {
        self.pid.is_none() && self.request.is_none()
    }

    /// Kills it.
    pub fn kill(&self) {
        if let Some(pid) = self.pid {
            // The agent's own child can't be refused.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// Runs a helper; never returns.
fn run(channel: BorrowedFd<'_>, kept: &[BorrowedFd<'_>], work: impl FnOnce(Vec<OwnedFd>, &Outlet) -> Reply) -> ! {
    sys::end_on_panic();
    let mut all: Vec<RawFd> = (0..CHANNEL).chain([channel.as_raw_fd()]).collect();
    all.extend(kept.iter().map(AsRawFd::as_raw_fd));
    let Ok(outlet) = sys::keep_only(&all).and_then(|()| sys::adopt(CHANNEL)).map(Outlet) else { sys::exit(1) };
    outlet.say(&begin(kept.len()).and_then(|kept| work(kept, &outlet)));
    sys::exit(0)
}

fn begin(kept: usize) -> Result<Vec<OwnedFd>, Failure> {
    sys::unblock_signals();
    set_parent_process_death_signal(Some(Signal::KILL)).in_step("end with the agent").map_err(|e| e.failure())?;
    let kept = (CHANNEL + 1..).take(kept).map(sys::adopt).collect::<io::Result<Vec<_>>>();
    kept.in_step("take the agent's descriptors over").map_err(|error| error.failure())
}
