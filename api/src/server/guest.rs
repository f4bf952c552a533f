//! The conversation with the guest's agent: calls and their answers by number, and what the agent reports by itself.
//!
//! One task holds it. What the agent says is untrusted: frames are bounded, an answer that was not asked for ends the
//! conversation, and no client waits longer than a deadline. Calls are kept, up to a bound, while the agent does not read;
//! those that end something have room of their own.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use protocol::frame::{self, Decoder};
use protocol::{Answer, Call, FromAgent, Hello, MAGIC, Request, VERSION};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::consume_budget;
use tokio::time::{Instant, sleep_until};

use super::problem::{Problem, ProblemKind};
use crate::session::{SessionError, chain};

/// How long a guest may take until its agent speaks. Generous: an emulated machine takes seconds where hardware takes
/// milliseconds, and this only ends guests that never would.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);
/// How long a call may take once the agent has spoken. As generous: the agent does every one in milliseconds.
pub const CALL_DEADLINE: Duration = Duration::from_secs(60);
/// The most calls that wait for an answer.
const CALLS_MAX: usize = 1024;
/// The most calls that end something and wait to be sent.
const URGENT_MAX: usize = 64;
/// The most calls without an answer, with those that nobody waits for any more: a guest that is asked in vain so often
/// will not answer.
const UNANSWERED_MAX: usize = 4 * CALLS_MAX;
/// The most bytes kept for an agent that does not read: the largest container and as many small calls as may wait.
const UNSENT_MAX: usize = frame::MAX_FROM_HOST + CALLS_MAX * 1024;
/// How much of the conversation is read at once.
const PIECE: usize = 16 << 10;

type Reply = oneshot::Sender<Result<Answer, Problem>>;
type Asked = (Call, Reply);

/// A way to call the agent. Clones share it.
#[derive(Debug, Clone)]
pub struct Guest {
    calls: mpsc::Sender<Asked>,
    urgent: mpsc::Sender<Asked>,
    greeted: watch::Receiver<bool>,
}

/// The other end of a [`Guest`], to be run by [`converse`].
#[derive(Debug)]
pub struct Calls {
    calls: mpsc::Receiver<Asked>,
    urgent: mpsc::Receiver<Asked>,
    greeted: watch::Sender<bool>,
}

impl Guest {
    /// A way to call an agent, and the end that takes the calls.
    pub fn new() -> (Self, Calls) {
        let (calls, calls_receiver) = mpsc::channel(CALLS_MAX);
        let (urgent, urgent_receiver) = mpsc::channel(URGENT_MAX);
        let (greet, greeted) = watch::channel(false);
        (Self { calls, urgent, greeted }, Calls { calls: calls_receiver, urgent: urgent_receiver, greeted: greet })
    }

    /// Sends a call. Calls are sent in the order in which this function was called, except that signals and thawing pass
    /// those that the agent is too slow to take.
    ///
    /// # Errors
    /// The conversation is over, or too many calls wait.
    pub fn send(&self, call: Call) -> Result<Pending, Problem> {
        let (reply, answer) = oneshot::channel();
        let queue = match call {
            Call::Signal { .. } | Call::Freeze { frozen: false, .. } => &self.urgent,
            _ => &self.calls,
        };
        match queue.try_send((call, reply)) {
            Ok(()) => Ok(Pending { answer, greeted: self.greeted.clone() }),
            Err(mpsc::error::TrySendError::Full(_)) => Err(too_many()),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(gone()),
        }
    }

    /// Sends a call that has nothing to bring, and waits until it was done.
    ///
    /// # Errors
    /// As [`Guest::call`].
    pub async fn act(&self, call: Call) -> Result<(), Problem> {
        self.call(call).await.and_then(done)
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
pub struct Pending {
    answer: oneshot::Receiver<Result<Answer, Problem>>,
    greeted: watch::Receiver<bool>,
}

impl Pending {
    /// Waits for what comes of it. To be used where nothing hangs on an answer that comes too late.
    ///
    /// # Errors
    /// What the agent says, that it says nothing, or that it is gone.
    pub async fn answer(self) -> Result<Answer, Problem> {
        let Self { answer, greeted } = self;
        in_time(greeted, answer).await?.unwrap_or_else(|_| Err(gone()))
    }

    /// Waits for an answer that comes before the guest was given everything that it needs for one. It may be dropped and
    /// called again.
    ///
    /// # Errors
    /// What the agent says, or that it is gone.
    pub async fn early(&mut self) -> Result<Answer, Problem> {
        (&mut self.answer).await.unwrap_or_else(|_| Err(gone()))
    }

    /// Makes of the answer what is to be made of it whenever it comes, also after whoever asked was told that it is late,
    /// or has gone away.
    ///
    /// # Errors
    /// As [`Pending::answer`], or what `make` says.
    pub async fn settle<T: Send + 'static>(
        self,
        make: impl FnOnce(Result<Answer, Problem>) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let Self { answer, greeted } = self;
        let settled = tokio::spawn(async move { make(answer.await.unwrap_or_else(|_| Err(gone()))) });
        // A task of ours is neither cancelled nor does it panic.
        in_time(greeted, settled).await?.unwrap_or_else(|_| Err(gone()))
    }
}

/// Waits for something that the guest does. Before the agent has spoken there is no hurry: the conversation has a deadline
/// for that.
async fn in_time<T>(mut greeted: watch::Receiver<bool>, what: impl Future<Output = T>) -> Result<T, Problem> {
    let deadline = async {
        if greeted.wait_for(|greeted| *greeted).await.is_err() {
            // The conversation is over: what is waited for has come, or is about to.
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(CALL_DEADLINE).await;
    };
    tokio::select! {
        done = what => Ok(done),
        () = deadline => Err(late()),
    }
}

/// An answer that says that something was done.
///
/// # Errors
/// It says something else.
pub fn done(answer: Answer) -> Result<(), Problem> {
    if answer == Answer::Done { Ok(()) } else { Err(unfit()) }
}

/// An answer that is not one to the question.
pub fn unfit() -> Problem {
    Problem::new(ProblemKind::GuestFailed, "the guest's agent answered something else than was asked")
}

/// The guest has not done something in time.
pub fn late() -> Problem {
    let detail = format!("the guest's agent did not answer within {} s", CALL_DEADLINE.as_secs());
    Problem::new(ProblemKind::GuestTimeout, detail)
}

fn too_many() -> Problem {
    Problem::new(ProblemKind::TooManyRequests, format!("more than {CALLS_MAX} calls wait for the guest"))
}

fn gone() -> Problem {
    Problem::new(ProblemKind::GuestEnded, "the guest has ended")
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
        // An agent that never stops talking does not keep others from being served.
        consume_budget().await;
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
        let may_ask = self.greeted && self.may_ask();
        tokio::select! {
            ready = self.agent.readable() => {
                ready.map_err(SessionError::Io)?;
                self.read(hear)?;
                if self.greeted {
                    calls.greeted.send_if_modified(|greeted| !std::mem::replace(greeted, true));
                }
                Ok(())
            }
            ready = self.agent.writable(), if !self.unsent.is_empty() => {
                ready.map_err(SessionError::Io)?;
                self.write()
            }
            // The senders live as long as the VM. In this order, a signal for what was just executed comes after it.
            Some((call, reply)) = async {
                tokio::select! {
                    biased;
                    asked = calls.calls.recv(), if may_ask => asked,
                    asked = calls.urgent.recv() => asked,
                }
            }, if self.greeted => self.request(call, reply),
            () = sleep_until(deadline), if !self.greeted => Err(SessionError::Silent),
        }
    }

    /// Whether one more call may wait for an answer. Calls that nobody waits for any more do not count.
    fn may_ask(&self) -> bool {
        self.waiting.len() < CALLS_MAX || self.waiting.values().filter(|reply| !reply.is_closed()).count() < CALLS_MAX
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
                    let _ = reply.send(result.map_err(Problem::from));
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
        let refused = match frame::encode(&Request { id, call }, frame::MAX_FROM_HOST) {
            Ok(frame) if self.unsent.len() + frame.len() <= UNSENT_MAX => return self.send(id, &frame, reply),
            Ok(_) => Problem::new(ProblemKind::TooManyRequests, "the guest's agent does not read what it is asked"),
            Err(error) => {
                Problem::new(ProblemKind::InvalidRequest, format!("the request cannot be sent: {}", chain(&error)))
            }
        };
        // Whoever asked may have given up.
        let _ = reply.send(Err(refused));
        Ok(())
    }

    fn send(&mut self, id: u32, frame: &[u8], reply: Reply) -> Result<(), SessionError> {
        if self.waiting.len() >= UNANSWERED_MAX {
            return Err(SessionError::Protocol("it does not answer its requests"));
        }
        self.unsent.extend_from_slice(frame);
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
