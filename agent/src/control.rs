//! The agent's one loop: requests from the host, ends of children, reports and streams of containers.

use std::io;
use std::os::fd::OwnedFd;

use protocol::frame::{self, Decoder, FrameError};
use protocol::{Call, Failure, FailureKind, FromAgent, Hello, MAGIC, Request, VERSION};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, WaitStatus, wait};
use thiserror::Error;

use crate::container::{Container, Event};
use crate::{clock, sys};

/// How much of the control connection is read at once.
const READ_MAX: usize = 16 << 10;

/// Why the agent stopped serving.
#[derive(Debug, Error)]
pub enum ServeError {
    /// Something that the loop itself stands on failed.
    #[error("cannot {step}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The control connection carries what is no request, or can't carry an answer.
    #[error("the control connection is unusable")]
    Frame(#[from] FrameError),
}

/// What a descriptor of the poll set belongs to.
#[derive(Debug, Clone, Copy)]
enum Token {
    Control,
    Children,
    Container(usize, Event),
}

struct Agent<D> {
    control: OwnedFd,
    children: OwnedFd,
    decoder: Decoder,
    /// Answers that the control connection has not taken yet.
    unsent: Vec<u8>,
    containers: Vec<Container>,
    dial: D,
}

/// Says hello on a connected, non-blocking control connection and serves it until the host ends it; then every
/// container is killed. `started_us` is when the agent began, `dial` connects to a port of the host.
///
/// Must be called by the only thread of the process, which must be the parent of no other children.
///
/// # Errors
/// When the connection breaks rules or the kernel refuses what the loop stands on.
pub fn serve(
    control: OwnedFd,
    started_us: u64,
    dial: impl FnMut(u32) -> io::Result<OwnedFd>,
) -> Result<(), ServeError> {
    let children = sys::child_signals().map_err(step("watch for children"))?;
    let decoder = Decoder::new(frame::MAX_FROM_HOST);
    let mut agent = Agent { control, children, decoder, unsent: Vec::new(), containers: Vec::new(), dial };
    let hello = Hello { magic: MAGIC, version: VERSION, started_us, ready_us: clock::boot_us() };
    agent.send(&FromAgent::Hello(hello))?;
    let result = agent.run();
    agent.containers.iter().for_each(Container::kill);
    result
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> ServeError {
    move |source| ServeError::Step { step, source: source.into() }
}

impl<D: FnMut(u32) -> io::Result<OwnedFd>> Agent<D> {
    fn run(&mut self) -> Result<(), ServeError> {
        loop {
            for token in self.wait()? {
                match token {
                    Token::Control if !self.unsent.is_empty() => self.flush()?,
                    Token::Control => {
                        if !self.receive()? {
                            return Ok(());
                        }
                    }
                    Token::Children => self.reap()?,
                    Token::Container(index, event) => {
                        if let Some(container) = self.containers.get_mut(index) {
                            container.handle(event);
                        }
                    }
                }
            }
            self.tell()?;
        }
    }

    /// Waits until something can be done. Indices in the tokens hold until a container is added or removed, and both
    /// happen behind all that name one: requests are put last, removals come after the round.
    fn wait(&self) -> Result<Vec<Token>, ServeError> {
        let (mut polled, mut tokens) = (Vec::with_capacity(8), Vec::with_capacity(8));
        for (index, container) in self.containers.iter().enumerate() {
            container.interests(|fd, flags, event| {
                polled.push(PollFd::from_borrowed_fd(fd, flags));
                tokens.push(Token::Container(index, event));
            });
        }
        // One request at a time: while an answer waits to be sent, no more questions are taken.
        let flags = if self.unsent.is_empty() { PollFlags::IN } else { PollFlags::OUT };
        polled.extend([PollFd::new(&self.children, PollFlags::IN), PollFd::new(&self.control, flags)]);
        tokens.extend([Token::Children, Token::Control]);
        match poll(&mut polled, None) {
            Err(Errno::INTR) => return Ok(Vec::new()),
            result => result.map_err(step("wait for events"))?,
        };
        let ready = polled.iter().zip(&tokens).filter(|(fd, _)| !fd.revents().is_empty());
        // From the back, so that the removal of a pump leaves the indices of those still to come alone.
        let mut ready: Vec<Token> = ready.map(|(_, token)| *token).collect();
        let behind = ready.iter().filter(|token| !matches!(token, Token::Container(..))).count();
        let containers = ready.len() - behind;
        ready[..containers].reverse();
        Ok(ready)
    }

    /// Reads what the host sent; whether it may send more.
    fn receive(&mut self) -> Result<bool, ServeError> {
        let mut buffer = [0; READ_MAX];
        match rustix::io::read(&self.control, &mut buffer) {
            Ok(0) | Err(Errno::CONNRESET) => return Ok(false),
            Ok(length) => self.decoder.push(&buffer[..length]),
            Err(Errno::AGAIN | Errno::INTR) => return Ok(true),
            Err(error) => return Err(step("read the control connection")(error)),
        }
        while let Some(Request { id, call }) = self.decoder.take()? {
            if let Some(result) = self.answer(id, call) {
                self.send(&FromAgent::Reply { id, result })?;
            }
        }
        Ok(true)
    }

    /// Does what is asked; `None` when the answer comes later.
    fn answer(&mut self, request: u32, call: Call) -> Option<Result<(), Failure>> {
        match call {
            Call::Create(spec) => {
                if self.containers.iter().any(|container| container.id() == spec.id) {
                    let message = format!("container {} exists already", spec.id);
                    return Some(Err(Failure { kind: FailureKind::WrongState, message }));
                }
                match Container::create(request, &spec, &mut self.dial) {
                    Ok(container) => self.containers.push(container),
                    Err(error) => return Some(Err(error.failure())),
                }
                None
            }
            Call::Start { container } => match self.find(&container) {
                Ok(container) => container.start(request).err().map(Err),
                Err(failure) => Some(Err(failure)),
            },
            Call::Signal { container, signal, all } => {
                Some(self.find(&container).and_then(|container| container.signal(signal, all)))
            }
            Call::Resize { container, size } => {
                Some(self.find(&container).and_then(|container| container.resize(size)))
            }
        }
    }

    fn find(&mut self, id: &str) -> Result<&mut Container, Failure> {
        self.containers.iter_mut().find(|container| container.id() == id).ok_or_else(|| {
            let shown: String = id.chars().take(64).collect();
            Failure { kind: FailureKind::NoSuchContainer, message: format!("no container {shown}") }
        })
    }

    /// Reaps all children that have ended.
    fn reap(&mut self) -> Result<(), ServeError> {
        // The signal is merged with others of its kind; only what wait says counts.
        let mut information = [0; 128];
        let _ = rustix::io::read(&self.children, &mut information);
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => self.reaped(pid, status),
                Ok(None) | Err(Errno::CHILD) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(step("reap children")(error)),
            }
        }
    }

    fn reaped(&mut self, pid: Pid, status: WaitStatus) {
        let code = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => code,
            (None, Some(signal)) => 128 + signal,
            // Stopped or continued: not an end.
            (None, None) => return,
        };
        let code = u8::try_from(code).unwrap_or(u8::MAX);
        self.containers.iter_mut().for_each(|container| container.reaped(pid, code));
    }

    /// Answers what has become due, says the last word about each container that has ended, and forgets it.
    fn tell(&mut self) -> Result<(), ServeError> {
        let mut index = 0;
        while let Some(container) = self.containers.get_mut(index) {
            let done: Vec<u32> = std::iter::from_fn(|| container.take_done()).collect();
            let last_words = container.last_words();
            for id in done {
                self.send(&FromAgent::Reply { id, result: Ok(()) })?;
            }
            match last_words {
                // The cgroup goes with it, so that the id is free when the host hears.
                Some(words) => {
                    drop(self.containers.swap_remove(index));
                    words.iter().try_for_each(|word| self.send(word))?;
                }
                None => index += 1,
            }
        }
        Ok(())
    }

    fn send(&mut self, message: &FromAgent) -> Result<(), ServeError> {
        self.unsent.extend(frame::encode(message, frame::MAX_FROM_AGENT)?);
        self.flush()
    }

    fn flush(&mut self) -> Result<(), ServeError> {
        while !self.unsent.is_empty() {
            match rustix::io::write(&self.control, &self.unsent) {
                Ok(length) => drop(self.unsent.drain(..length)),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(step("write to the control connection")(error)),
            }
        }
        Ok(())
    }
}
