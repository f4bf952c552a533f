//! The conversation with the guest's agent: calls and their answers by number, and what the agent reports by itself.
//!
//! One task holds it. What the agent says is untrusted: frames are bounded, an answer that nobody waits for ends the
//! conversation, and nobody waits longer than a deadline. Calls are kept, up to a bound, while the agent does not read.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use protocol::frame::{self, Decoder};
use protocol::{Answer, Call, Failure, FromAgent, Hello, MAGIC, Request, VERSION};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use super::problem::{Problem, ProblemKind};
use crate::session::SessionError;

/// How long a guest may take until its agent speaks. Generous: an emulated machine takes seconds where hardware takes
/// milliseconds, and this only ends guests that never would.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);
/// How long a call may take. As generous: the agent does every one in milliseconds.
const CALL_DEADLINE: Duration = Duration::from_secs(60);
/// The most calls that wait for an answer.
const CALLS_MAX: usize = 1024;
/// The most bytes kept for an agent that does not read: the largest container and as many small calls as may wait.
const UNSENT_MAX: usize = frame::MAX_FROM_HOST + CALLS_MAX * 1024;
/// How much of the conversation is read at once.
const PIECE: usize = 16 << 10;

type Reply = oneshot::Sender<Result<Answer, Failure>>;

/// A way to call the agent. Clones share it.
#[derive(Debug, Clone)]
pub struct Guest {
    calls: mpsc::Sender<(Call, Reply)>,
}

/// The other end of a [`Guest`], to be run by [`converse`].
#[derive(Debug)]
pub struct Calls(mpsc::Receiver<(Call, Reply)>);

impl Guest {
    /// A way to call an agent, and the end that takes the calls.
    pub fn new() -> (Self, Calls) {
        let (calls, receiver) = mpsc::channel(CALLS_MAX);
        (Self { calls }, Calls(receiver))
    }

    /// Sends a call. Calls are sent in the order in which this function was called.
    ///
    /// # Errors
    /// The conversation is over, or too many calls wait.
    pub fn send(&self, call: Call) -> Result<Pending, Problem> {
        let (reply, answer) = oneshot::channel();
        match self.calls.try_send((call, reply)) {
            Ok(()) => Ok(Pending(answer)),
            Err(mpsc::error::TrySendError::Full(_)) => {
                let detail = format!("more than {CALLS_MAX} calls wait for the guest");
                Err(Problem::new(ProblemKind::TooManyRequests, detail))
            }
            Err(mpsc::error::TrySendError::Closed(_)) => Err(gone()),
        }
    }

    /// Sends a call and waits for what comes of it.
    ///
    /// # Errors
    /// As [`Guest::send`] and [`Pending::answer`].
    pub async fn call(&self, call: Call) -> Result<Answer, Problem> {
        self.send(call)?.answer().await
    }
}

/// A call that was sent.
#[derive(Debug)]
pub struct Pending(oneshot::Receiver<Result<Answer, Failure>>);

impl Pending {
    /// Waits for what comes of it.
    ///
    /// # Errors
    /// What the agent says, that it says nothing, or that it is gone.
    pub async fn answer(self) -> Result<Answer, Problem> {
        match timeout(CALL_DEADLINE, self.0).await {
            Ok(Ok(result)) => Ok(result?),
            Ok(Err(_)) => Err(gone()),
            Err(_) => {
                let detail = format!("the guest's agent did not answer within {} s", CALL_DEADLINE.as_secs());
                Err(Problem::new(ProblemKind::GuestTimeout, detail))
            }
        }
    }
}

fn gone() -> Problem {
    Problem::new(ProblemKind::GuestFailed, "the guest has ended")
}

/// What the agent reports by itself.
#[derive(Debug)]
pub enum Report {
    /// Its first words; calls are sent from now on.
    Hello(Hello),
    /// Anything else that is no answer.
    Message(FromAgent),
}

/// Holds the conversation until the guest's end was closed or it breaks a rule. Nothing is sent before the agent's first
/// words are in order.
///
/// # Errors
/// How it ended: it always does.
pub async fn converse(
    agent: UnixStream,
    mut calls: Calls,
    mut hear: impl FnMut(Report) -> Result<(), SessionError>,
) -> SessionError {
    let mut conversation = Conversation {
        agent,
        decoder: Decoder::new(frame::MAX_FROM_AGENT),
        unsent: Vec::new(),
        waiting: HashMap::new(),
        next_id: 1,
        greeted: false,
    };
    let deadline = Instant::now() + BOOT_DEADLINE;
    loop {
        if let Err(error) = conversation.turn(&mut calls, deadline, &mut hear).await {
            return error;
        }
    }
}

struct Conversation {
    agent: UnixStream,
    decoder: Decoder,
    unsent: Vec<u8>,
    waiting: HashMap<u32, Reply>,
    next_id: u32,
    greeted: bool,
}

impl Conversation {
    async fn turn(
        &mut self,
        calls: &mut Calls,
        deadline: Instant,
        hear: &mut impl FnMut(Report) -> Result<(), SessionError>,
    ) -> Result<(), SessionError> {
        tokio::select! {
            ready = self.agent.readable() => {
                ready.map_err(SessionError::Io)?;
                self.read(hear)
            }
            ready = self.agent.writable(), if !self.unsent.is_empty() => {
                ready.map_err(SessionError::Io)?;
                self.write()
            }
            // The sender lives as long as the VM.
            Some((call, reply)) = calls.0.recv(), if self.greeted && self.waiting.len() < CALLS_MAX => {
                self.request(call, reply)
            }
            () = sleep_until(deadline), if !self.greeted => Err(SessionError::Silent),
        }
    }

    fn read(&mut self, hear: &mut impl FnMut(Report) -> Result<(), SessionError>) -> Result<(), SessionError> {
        let mut piece = [0; PIECE];
        match self.agent.try_read(&mut piece) {
            Ok(0) => return Err(SessionError::GuestEnded),
            Ok(count) => self.decoder.push(&piece[..count]),
            Err(error) => {
                return match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
                    io::ErrorKind::ConnectionReset => Err(SessionError::GuestEnded),
                    _ => Err(SessionError::Io(error)),
                };
            }
        }
        while let Some(message) = self.decoder.take().map_err(SessionError::Frame)? {
            self.take(message, hear)?;
        }
        Ok(())
    }

    fn take(
        &mut self,
        message: FromAgent,
        hear: &mut impl FnMut(Report) -> Result<(), SessionError>,
    ) -> Result<(), SessionError> {
        match message {
            FromAgent::Hello(hello) if !self.greeted => {
                if hello.magic != MAGIC {
                    return Err(SessionError::Protocol("its first message is none of an agent's"));
                }
                if hello.version != VERSION {
                    return Err(SessionError::Version(hello.version));
                }
                self.greeted = true;
                hear(Report::Hello(hello))
            }
            _ if !self.greeted => Err(SessionError::Protocol("its first message is none of an agent's")),
            FromAgent::Hello(_) => Err(SessionError::Protocol("it introduces itself twice")),
            FromAgent::Reply { id, result } => match self.waiting.remove(&id) {
                // Whoever asked may have given up.
                Some(reply) => {
                    let _ = reply.send(result);
                    Ok(())
                }
                None => Err(SessionError::Protocol("it answers what was not asked")),
            },
            other => hear(Report::Message(other)),
        }
    }

    fn request(&mut self, call: Call, reply: Reply) -> Result<(), SessionError> {
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        let frame = frame::encode(&Request { id, call }, frame::MAX_FROM_HOST);
        let frame = match frame {
            Ok(frame) => frame,
            // Too long: the caller hears that nothing came of it.
            Err(error) => {
                let message = format!("the request cannot be sent: {error}");
                let _ = reply.send(Err(Failure { kind: protocol::FailureKind::InvalidRequest, message }));
                return Ok(());
            }
        };
        if self.unsent.len() + frame.len() > UNSENT_MAX {
            return Err(SessionError::Protocol("it does not read its requests"));
        }
        self.unsent.extend_from_slice(&frame);
        self.waiting.insert(id, reply);
        self.write()
    }

    fn write(&mut self) -> Result<(), SessionError> {
        while !self.unsent.is_empty() {
            match self.agent.try_write(&self.unsent) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) => {
                    return match error.kind() {
                        io::ErrorKind::WouldBlock => Ok(()),
                        io::ErrorKind::Interrupted => continue,
                        // Its end will be read, with what it said before.
                        io::ErrorKind::BrokenPipe => {
                            self.unsent.clear();
                            Ok(())
                        }
                        _ => Err(SessionError::Io(error)),
                    };
                }
            }
        }
        Ok(())
    }
}
