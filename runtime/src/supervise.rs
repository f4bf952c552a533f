//! A foreground run, from a started monitor to the container's end: one loop over the control socket, the signals that
//! were sent to us, and the monitor's process.
//!
//! Signals that ask a program to end or to do something are the container's as soon as it runs. Before that, those that
//! end a program end the run; the others wait. Job control (stop, continue) keeps its usual effect on both processes:
//! they are one process group, so the whole container stops and continues with them.

use std::io;

use api::control::{FRAME_MAX, Failure, FromMonitor, Timeline, ToMonitor};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use protocol::ExitStatus;
use protocol::frame::{self, Decoder, FrameError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;

use crate::launch::{Ending, Monitor};
use crate::terminal;

/// How long a monitor that has nothing more to do, or was told to stop, may take to end before it is killed. Closing a
/// VM takes tens of milliseconds; a host that swaps may take seconds.
const END_PATIENCE: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };

/// The signals that are the container's.
const FORWARDED: [Signal; 17] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGABRT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGTERM,
    Signal::SIGSTKFLT,
    Signal::SIGXCPU,
    Signal::SIGXFSZ,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGWINCH,
    Signal::SIGIO,
    Signal::SIGPWR,
    Signal::SIGSYS,
];

/// Those that end the run while there is no container yet.
const CANCELLING: [Signal; 4] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM];

/// Why a run came to no end that could be told.
#[derive(Debug, Error)]
pub enum SuperviseError {
    /// Signals cannot be received.
    #[error("cannot receive signals")]
    Signals(#[source] io::Error),
    /// Waiting failed.
    #[error("cannot wait for the monitor")]
    Wait(#[source] io::Error),
    /// The monitor says something that makes no sense.
    #[error("the monitor's report cannot be read")]
    Report(#[source] FrameError),
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The container ended.
    Exited(ExitStatus),
    /// There is no exit status, and the monitor says why.
    Failed(Failure),
    /// A signal ended the run before the container was started.
    Cancelled(i32),
    /// The monitor ended without a word.
    Lost(Ending),
}

/// The signals sent to this process from now on, to be read instead of delivered.
#[derive(Debug)]
pub struct Signals {
    descriptor: SignalFd,
    /// The mask for a monitor: that of before, with the keys of a terminal blocked too. They reach the whole process
    /// group, and a monitor that has just been started does not ignore them yet.
    pub children: SigSet,
}

impl Signals {
    /// Blocks the signals that are the container's, and opens a descriptor to read them from.
    ///
    /// # Errors
    /// [`SuperviseError::Signals`].
    pub fn block() -> Result<Self, SuperviseError> {
        let set: SigSet = FORWARDED.into_iter().collect();
        let failed = |errno: nix::Error| SuperviseError::Signals(errno.into());
        let mut children = set.thread_swap_mask(SigmaskHow::SIG_BLOCK).map_err(failed)?;
        children.extend([Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT]);
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let descriptor = SignalFd::with_flags(&set, flags).map_err(failed)?;
        Ok(Self { descriptor, children })
    }

    fn next(&self) -> Result<Option<Signal>, SuperviseError> {
        let info = self.descriptor.read_signal().map_err(|errno| SuperviseError::Signals(errno.into()))?;
        Ok(info.and_then(|info| i32::try_from(info.ssi_signo).ok()).and_then(|number| Signal::try_from(number).ok()))
    }
}

/// Follows a run to its end, and leaves no monitor behind.
///
/// # Errors
/// Nothing can be said about the end; the monitor is killed.
pub fn supervise(
    monitor: Monitor,
    signals: &Signals,
    has_terminal: bool,
    started: impl FnOnce(Timeline),
) -> Result<Outcome, SuperviseError> {
    let mut run = Run {
        monitor,
        open: true,
        has_terminal,
        decoder: Decoder::new(FRAME_MAX),
        started: false,
        waiting: Vec::new(),
        outcome: None,
        on_start: Some(started),
    };
    while !run.turn(signals)? {}
    let ending = run.monitor.reap().map_err(SuperviseError::Wait)?;
    Ok(run.outcome.unwrap_or(Outcome::Lost(ending)))
}

struct Run<F> {
    monitor: Monitor,
    /// Whether the control socket may still bring something.
    open: bool,
    has_terminal: bool,
    decoder: Decoder,
    started: bool,
    /// Signals for a container that does not run yet.
    waiting: Vec<Signal>,
    outcome: Option<Outcome>,
    on_start: Option<F>,
}

impl<F: FnOnce(Timeline)> Run<F> {
    /// Waits for something and deals with it; true when the monitor has ended and everything it said was read.
    fn turn(&mut self, signals: &Signals) -> Result<bool, SuperviseError> {
        let events = {
            let control = if self.open { PollFlags::IN } else { PollFlags::empty() };
            let mut waits = [
                PollFd::new(&self.monitor.process, PollFlags::IN),
                PollFd::new(&signals.descriptor, PollFlags::IN),
                PollFd::new(&self.monitor.control, control),
            ];
            // A closed socket is always ready: it is left out.
            let count = if self.open { 3 } else { 2 };
            // A monitor that has said how it ended, or has nothing more to say, is about to end.
            let ending = self.outcome.is_some() || !self.open;
            let patience = ending.then_some(&END_PATIENCE);
            match poll(&mut waits[..count], patience) {
                Ok(0) => None,
                Ok(_) => Some(waits.map(|wait| !wait.revents().is_empty())),
                Err(rustix::io::Errno::INTR) => return Ok(false),
                Err(errno) => return Err(SuperviseError::Wait(errno.into())),
            }
        };
        let Some([ended, signalled, reported]) = events else {
            // The poll after this one sees its end.
            self.monitor.kill();
            return Ok(false);
        };
        if signalled {
            while let Some(signal) = signals.next()? {
                self.signal(signal)?;
            }
        }
        if reported || ended {
            self.read()?;
        }
        Ok(ended)
    }

    /// Reads what the monitor has said so far.
    fn read(&mut self) -> Result<(), SuperviseError> {
        let mut buffer = [0u8; 4096];
        while self.open {
            match rustix::io::read(&self.monitor.control, &mut buffer) {
                Ok(0) | Err(rustix::io::Errno::CONNRESET) => self.open = false,
                Ok(count) => self.decoder.push(&buffer[..count]),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(errno) => return Err(SuperviseError::Wait(errno.into())),
            }
            while let Some(report) = self.decoder.take().map_err(SuperviseError::Report)? {
                self.report(report)?;
            }
        }
        Ok(())
    }

    fn report(&mut self, report: FromMonitor) -> Result<(), SuperviseError> {
        match report {
            FromMonitor::Started(timeline) => {
                self.started = true;
                if let Some(on_start) = self.on_start.take() {
                    on_start(timeline);
                }
                for signal in std::mem::take(&mut self.waiting) {
                    self.signal(signal)?;
                }
            }
            FromMonitor::Exited(status) => self.end(Outcome::Exited(status)),
            FromMonitor::Failed(failure) => self.end(Outcome::Failed(failure)),
        }
        Ok(())
    }

    /// The first end is the one that counts.
    fn end(&mut self, outcome: Outcome) {
        self.outcome.get_or_insert(outcome);
    }

    fn signal(&mut self, signal: Signal) -> Result<(), SuperviseError> {
        if self.outcome.is_some() {
            return Ok(());
        }
        if !self.started {
            if CANCELLING.contains(&signal) {
                self.end(Outcome::Cancelled(signal as i32));
                // The monitor takes the end of the stream as the order to stop.
                _ = rustix::net::shutdown(&self.monitor.control, rustix::net::Shutdown::Write);
            } else if !self.waiting.contains(&signal) {
                self.waiting.push(signal);
            }
            return Ok(());
        }
        let message = if signal == Signal::SIGWINCH {
            if !self.has_terminal {
                return Ok(());
            }
            ToMonitor::Resize(terminal::window_size())
        } else {
            ToMonitor::Signal(signal as u8)
        };
        let bytes = frame::encode(&message, FRAME_MAX).map_err(SuperviseError::Report)?;
        // A monitor that has just ended, or that a flood of signals has filled the socket of, does not get this one:
        // standard signals may be lost when many are sent at once.
        _ = rustix::io::write(&self.monitor.control, &bytes);
        Ok(())
    }
}
