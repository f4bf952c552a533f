//! The conversation with the guest agent: one container, from its creation to its exit.
//!
//! ```text
//!   waiting --Hello--> creating --Reply--> starting --Reply--> running --Exited--> over
//!      |                  |                   |                   |
//!      +------------------+-------------------+-------------------+--> failed, or abandoned by the front end
//! ```
//!
//! Creation and start are sent at once; the agent works through them in order. Everything the agent says is untrusted: it
//! is bounded by the frame limit, answers are taken only in the state that they belong to, and whatever else it says ends
//! the session. The session never waits for the agent to read: what it does not take is kept, up to a bound.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use protocol::container::ContainerSpec;
use protocol::frame::{self, Decoder, FrameError};
use protocol::{
    Answer, CONTROL_PORT, Call, ExitStatus, Failure, FailureKind, FromAgent, Hello, MAGIC, Request, Target, VERSION,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;

use crate::control::{EXIT_FAILED, EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, FRAME_MAX, FromMonitor, Timeline, ToMonitor};
use crate::stdio::Offer;

/// The port of the container's standard input, or of its terminal.
pub const STDIN_PORT: u32 = 1025;
/// The port of the container's standard output.
pub const STDOUT_PORT: u32 = 1026;
/// The port of the container's standard error.
pub const STDERR_PORT: u32 = 1027;

/// How long a guest may take until its agent speaks. Generous: an emulated machine takes seconds where hardware takes
/// milliseconds, and this only ends guests that never would.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);
/// The most bytes kept for an agent that does not read: the largest container and some signals.
const UNSENT_MAX: usize = frame::MAX_FROM_HOST + (64 << 10);
/// The most of a message of the agent's that is shown.
const MESSAGE_MAX: usize = 1024;

const CREATE: u32 = 1;
const START: u32 = 2;
const FIRST_FREE: u32 = 3;

/// How a session ended.
#[derive(Debug)]
pub enum Outcome {
    /// The container ran and ended.
    Exited(ExitStatus),
    /// The container could not be run.
    Failed(SessionError),
    /// The front end went away.
    Abandoned,
}

/// Why a container could not be run.
#[derive(Debug, Error)]
pub enum SessionError {
    /// The agent refused.
    #[error("{}", shown(&.0.message))]
    Refused(Failure),
    /// The guest never got as far.
    #[error("the guest's agent did not report within {} s", BOOT_DEADLINE.as_secs())]
    Silent,
    /// The agent is of another build.
    #[error("the guest's agent speaks version {0} of the protocol, not {VERSION}: rebuild the initial RAM file system")]
    Version(u32),
    /// The agent said something that does not fit.
    #[error("the guest's agent broke the protocol: {0}")]
    Protocol(&'static str),
    /// A frame of the agent's is none.
    #[error("the guest's agent broke the protocol")]
    Frame(#[source] FrameError),
    /// The connection failed.
    #[error("cannot talk to the guest's agent")]
    Io(#[source] io::Error),
    /// The guest ended before the container did.
    #[error("the guest ended before {0}")]
    GuestEnded(&'static str),
}

impl SessionError {
    /// The exit code of a front end.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Refused(Failure { kind: FailureKind::CommandNotFound, .. }) => EXIT_NOT_FOUND,
            Self::Refused(Failure { kind: FailureKind::CommandNotExecutable, .. }) => EXIT_NOT_EXECUTABLE,
            _ => EXIT_FAILED,
        }
    }
}

/// A message of the guest's, fit for a line on a terminal.
fn shown(message: &str) -> String {
    message.chars().take(MESSAGE_MAX).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting,
    Creating,
    Starting,
    Running,
}

/// A conversation that is to be held.
#[derive(Debug)]
pub struct Session {
    container: ContainerSpec,
    agent: UnixStream,
    front_end: Option<UnixStream>,
    unsent: Vec<u8>,
    state: State,
    next_id: u32,
    timeline: Timeline,
}

impl Session {
    /// A session about `container`, on behalf of a front end, and the port to offer to the guest for it.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new(container: ContainerSpec, front_end: Option<UnixStream>) -> io::Result<(Self, Offer)> {
        let (offer, agent) = Offer::new(CONTROL_PORT)?;
        agent.set_nonblocking(true)?;
        let (unsent, state, timeline) = (Vec::new(), State::Waiting, Timeline::default());
        Ok((Self { container, agent, front_end, unsent, state, next_id: FIRST_FREE, timeline }, offer))
    }

    /// Holds the conversation until the container ended, or the guest's end of the connection was closed. `timeline`
    /// says what came before.
    pub fn run(mut self, timeline: Timeline) -> Outcome {
        self.timeline = timeline;
        self.converse().unwrap_or_else(Outcome::Failed)
    }

    fn converse(&mut self) -> Result<Outcome, SessionError> {
        let deadline = Instant::now() + BOOT_DEADLINE;
        let mut from_agent = Decoder::new(frame::MAX_FROM_AGENT);
        let mut from_front_end = Decoder::new(FRAME_MAX);
        loop {
            let (agent, front_end) = self.wait(deadline)?;
            // The agent first: a container that ended is not one that was abandoned.
            if agent && let Some(outcome) = self.read_agent(&mut from_agent)? {
                return Ok(outcome);
            }
            if front_end && !self.read_front_end(&mut from_front_end)? {
                return Ok(Outcome::Abandoned);
            }
            self.send_unsent()?;
        }
    }

    /// Waits for something to do: says whether the agent and the front end are readable.
    fn wait(&self, deadline: Instant) -> Result<(bool, bool), SessionError> {
        let to_agent = if self.unsent.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT };
        let mut wanted = vec![PollFd::new(&self.agent, to_agent)];
        if let Some(front_end) = &self.front_end {
            wanted.push(PollFd::new(front_end, PollFlags::IN));
        }
        let timeout = (self.state == State::Waiting).then(|| deadline.saturating_duration_since(Instant::now()));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match poll(&mut wanted, timeout.as_ref()) {
            Ok(0) => return Err(SessionError::Silent),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(SessionError::Io(error.into())),
        }
        let readable = |index: usize| {
            wanted.get(index).is_some_and(|fd| fd.revents().intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR))
        };
        Ok((readable(0), readable(1)))
    }

    /// Takes what the agent sent.
    fn read_agent(&mut self, decoder: &mut Decoder) -> Result<Option<Outcome>, SessionError> {
        let mut bytes = [0; 4096];
        match self.agent.read(&mut bytes) {
            Ok(0) => return Err(self.guest_ended()),
            Ok(count) => decoder.push(&bytes[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(self.guest_ended()),
            Err(error) => return Err(SessionError::Io(error)),
        }
        while let Some(message) = decoder.take().map_err(SessionError::Frame)? {
            if let Some(outcome) = self.hear(message)? {
                return Ok(Some(outcome));
            }
        }
        Ok(None)
    }

    fn guest_ended(&self) -> SessionError {
        SessionError::GuestEnded(match self.state {
            State::Waiting => "its agent reported",
            State::Creating => "the container was created",
            State::Starting => "the container was started",
            State::Running => "the container did",
        })
    }

    fn hear(&mut self, message: FromAgent) -> Result<Option<Outcome>, SessionError> {
        match (self.state, message) {
            (State::Waiting, FromAgent::Hello(hello)) => self.greet(&hello)?,
            (_, FromAgent::Reply { id: CREATE | START, result: Err(failure) }) => {
                return Err(SessionError::Refused(failure));
            }
            (State::Creating, FromAgent::Reply { id: CREATE, result: Ok(Answer::Done) }) => {
                self.timeline.container_created = now();
                self.state = State::Starting;
            }
            (State::Starting, FromAgent::Reply { id: START, result: Ok(Answer::Done) }) => {
                self.timeline.container_started = now();
                self.state = State::Running;
                self.tell(&FromMonitor::Started(self.timeline));
            }
            // A signal or a resize that came too late fails, and that is nobody's fault.
            (
                State::Starting | State::Running,
                FromAgent::Reply { id: FIRST_FREE.., result: Ok(Answer::Done) | Err(_) },
            ) => {}
            // Nobody asks for them yet. The first may come while the container is still being set up.
            (
                State::Starting | State::Running,
                FromAgent::OutOfMemory { container } | FromAgent::Health { container, .. },
            ) if container == self.container.id => {}
            (State::Running, FromAgent::Exited { container, status }) if container == self.container.id => {
                return Ok(Some(Outcome::Exited(status)));
            }
            _ => return Err(SessionError::Protocol("a message does not fit the state of the container")),
        }
        Ok(None)
    }

    fn greet(&mut self, hello: &Hello) -> Result<(), SessionError> {
        if hello.magic != MAGIC {
            return Err(SessionError::Protocol("its first message is none of an agent's"));
        }
        if hello.version != VERSION {
            return Err(SessionError::Version(hello.version));
        }
        self.timeline.agent_ready = now();
        self.timeline.guest_agent_started_us = hello.started_us;
        self.timeline.guest_agent_ready_us = hello.ready_us;
        self.state = State::Creating;
        let create = Call::Create(Box::new(self.container.clone()));
        self.request(CREATE, create)?;
        self.request(START, Call::Start { container: self.container.id.clone() })?;
        self.send_unsent()
    }

    /// Takes what the front end sent; says whether it is still there.
    fn read_front_end(&mut self, decoder: &mut Decoder) -> Result<bool, SessionError> {
        let Some(mut front_end) = self.front_end.as_ref() else { return Ok(true) };
        let mut bytes = [0; 4096];
        match front_end.read(&mut bytes) {
            Ok(0) => return Ok(false),
            Ok(count) => decoder.push(&bytes[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(true),
            Err(_) => return Ok(false),
        }
        let target = || Target { container: self.container.id.clone(), process: None };
        let mut calls = Vec::new();
        loop {
            match decoder.take() {
                Ok(Some(ToMonitor::Signal(signal))) => {
                    calls.push(Call::Signal { target: target(), signal, all: false });
                }
                Ok(Some(ToMonitor::Resize(size))) => calls.push(Call::Resize { target: target(), size }),
                Ok(None) => break,
                // A front end that does not keep to the protocol is as good as gone.
                Err(_) => return Ok(false),
            }
        }
        for call in calls {
            if self.state == State::Waiting {
                // There is no container that could take a signal; the front end is told by what it does next.
                if matches!(call, Call::Signal { .. }) {
                    return Ok(false);
                }
                continue;
            }
            let id = self.next_id;
            self.next_id = self.next_id.checked_add(1).unwrap_or(FIRST_FREE);
            self.request(id, call)?;
        }
        Ok(true)
    }

    fn request(&mut self, id: u32, call: Call) -> Result<(), SessionError> {
        let frame = frame::encode(&Request { id, call }, frame::MAX_FROM_HOST).map_err(SessionError::Frame)?;
        if self.unsent.len() + frame.len() > UNSENT_MAX {
            return Err(SessionError::Protocol("it does not read its requests"));
        }
        self.unsent.extend_from_slice(&frame);
        Ok(())
    }

    fn send_unsent(&mut self) -> Result<(), SessionError> {
        while !self.unsent.is_empty() {
            match self.agent.write(&self.unsent) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Its end will be read, with what it said before.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.unsent.clear(),
                Err(error) => return Err(SessionError::Io(error)),
            }
        }
        Ok(())
    }

    fn tell(&self, event: &FromMonitor) {
        if let Some(front_end) = &self.front_end {
            tell(front_end, event);
        }
    }
}

/// Tells the front end something. One that is gone is noticed where its messages are read.
pub fn tell(mut front_end: &UnixStream, event: &FromMonitor) {
    let _ = frame::write(&mut front_end, event, FRAME_MAX);
}

/// The time on CLOCK_MONOTONIC in nanoseconds.
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use protocol::container::WindowSize;
    use protocol::report::{Health, HealthStatus};

    use super::*;

    const TIMELINE: Timeline = Timeline {
        monitor_started: 0,
        vm_created: 0,
        agent_ready: 0,
        container_created: 0,
        container_started: 0,
        guest_agent_started_us: 0,
        guest_agent_ready_us: 0,
    };

    fn container() -> ContainerSpec {
        let json = r#"{"id":"c1","hostname":"h","rootfs":{"device":"/dev/vda","read_only":false},"mounts":[],"files":[],
            "masked_paths":[],"readonly_paths":[],"limits":{"memory_bytes":null,"pids":null,"cpu_quota_us":null},
            "namespaces":{"pid":"Own","ipc":"Own","network":"Vm"},"health_check":null,"shm_bytes":0,"process":{"args":["true"],"env":[],"working_directory":"/","user":"","additional_groups":[],
            "capabilities":0,"rlimits":[],"no_new_privileges":false,"seccomp":"Default","oom_score_adj":0,"terminal":null,
            "stdio":{"stdin":null,"stdout":null,"stderr":null}}}"#;
        serde_json::from_str(json).unwrap()
    }

    fn hello() -> FromAgent {
        FromAgent::Hello(Hello { magic: MAGIC, version: VERSION, started_us: 1, ready_us: 2 })
    }

    fn reply(id: u32) -> FromAgent {
        FromAgent::Reply { id, result: Ok(Answer::Done) }
    }

    fn exited(id: &str, code: u8) -> FromAgent {
        let status = ExitStatus { code, out_of_memory: false, executed_us: 9, agent_resident_kib: 800 };
        FromAgent::Exited { container: id.into(), status }
    }

    /// The outcome of a session whose agent says this and hangs up.
    fn outcome(words: &[FromAgent]) -> Outcome {
        let bytes: Vec<u8> =
            words.iter().flat_map(|word| frame::encode(word, frame::MAX_FROM_AGENT).unwrap()).collect();
        outcome_of_bytes(bytes)
    }

    fn outcome_of_bytes(bytes: Vec<u8>) -> Outcome {
        let (session, offer) = Session::new(container(), None).unwrap();
        let mut agent = offer.stream;
        let talk = thread::spawn(move || {
            let _ = agent.write_all(&bytes);
            let _ = agent.shutdown(std::net::Shutdown::Write);
            let mut rest = Vec::new();
            let _ = agent.read_to_end(&mut rest);
        });
        let outcome = session.run(TIMELINE);
        talk.join().unwrap();
        outcome
    }

    fn failure(outcome: Outcome) -> SessionError {
        match outcome {
            Outcome::Failed(error) => error,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_container_runs_to_its_end() {
        let outcome = outcome(&[hello(), reply(CREATE), reply(START), exited("c1", 7)]);
        assert!(matches!(outcome, Outcome::Exited(ExitStatus { code: 7, .. })), "{outcome:?}");
    }

    #[test]
    fn news_of_the_container_is_taken_and_of_another_is_not() {
        let health =
            Health { status: HealthStatus::Healthy, failing_streak: 0, exit_code: Some(0), output: "ok".into() };
        let news = |id: &str| {
            [
                FromAgent::OutOfMemory { container: id.into() },
                FromAgent::Health { container: id.into(), health: health.clone() },
            ]
        };
        let [memory, well] = news("c1");
        let ended = outcome(&[hello(), reply(CREATE), memory, reply(START), well, exited("c1", 0)]);
        assert!(matches!(ended, Outcome::Exited(_)), "{ended:?}");
        for strange in news("c2") {
            let words = [hello(), reply(CREATE), reply(START), strange];
            assert!(matches!(failure(outcome(&words)), SessionError::Protocol(_)), "{words:?}");
        }
    }

    #[test]
    fn a_command_that_is_not_there_has_the_exit_code_of_a_shell() {
        for (kind, code) in
            [(FailureKind::CommandNotFound, 127), (FailureKind::CommandNotExecutable, 126), (FailureKind::System, 125)]
        {
            let refused = Failure { kind, message: "no\nway\u{1b}[2J".into() };
            let error =
                failure(outcome(&[hello(), reply(CREATE), FromAgent::Reply { id: START, result: Err(refused) }]));
            assert_eq!(error.exit_code(), code);
            assert_eq!(error.to_string(), "no\u{fffd}way\u{fffd}[2J");
        }
    }

    #[test]
    fn an_agent_of_another_build_is_refused() {
        let other = FromAgent::Hello(Hello { magic: MAGIC, version: VERSION + 1, started_us: 0, ready_us: 0 });
        assert!(matches!(failure(outcome(&[other])), SessionError::Version(_)));
    }

    #[test]
    fn a_workload_that_found_the_port_is_no_agent() {
        let other = FromAgent::Hello(Hello { magic: *b"GET / HT", version: VERSION, started_us: 0, ready_us: 0 });
        assert!(matches!(failure(outcome(&[other])), SessionError::Protocol(_)));
    }

    #[test]
    fn messages_out_of_order_end_the_session() {
        let hostile: [&[FromAgent]; 6] = [
            &[reply(CREATE)],
            &[hello(), hello()],
            &[hello(), reply(START)],
            &[hello(), reply(CREATE), exited("c1", 0)],
            &[hello(), reply(CREATE), reply(START), exited("c2", 0)],
            &[hello(), reply(CREATE), reply(START), reply(CREATE)],
        ];
        for words in hostile {
            assert!(matches!(failure(outcome(words)), SessionError::Protocol(_)), "{words:?}");
        }
    }

    #[test]
    fn garbage_and_claims_of_length_end_the_session() {
        for bytes in [vec![0xff; 64], vec![3, 0, 0, 0, 0xff, 0xff, 0xff], vec![0, 0, 0, 0]] {
            assert!(matches!(failure(outcome_of_bytes(bytes)), SessionError::Frame(_)));
        }
    }

    #[test]
    fn a_guest_that_ends_early_is_told_from_a_container_that_does() {
        assert!(matches!(failure(outcome(&[])), SessionError::GuestEnded(_)));
        assert!(matches!(failure(outcome(&[hello(), reply(CREATE)])), SessionError::GuestEnded(_)));
    }

    /// A session with a front end, and both other ends.
    fn attended() -> (thread::JoinHandle<Outcome>, UnixStream, UnixStream) {
        let (front_end, theirs) = UnixStream::pair().unwrap();
        let (session, offer) = Session::new(container(), Some(theirs)).unwrap();
        (thread::spawn(move || session.run(TIMELINE)), offer.stream, front_end)
    }

    #[test]
    fn a_front_end_that_goes_away_ends_the_session() {
        let (session, _agent, front_end) = attended();
        drop(front_end);
        assert!(matches!(session.join().unwrap(), Outcome::Abandoned));
    }

    #[test]
    fn signals_and_resizes_reach_the_agent_in_order() {
        let (session, mut agent, mut front_end) = attended();
        for word in [hello(), reply(CREATE), reply(START)] {
            frame::write(&mut agent, &word, frame::MAX_FROM_AGENT).unwrap();
        }
        assert!(matches!(frame::read(&mut front_end, FRAME_MAX), Ok(FromMonitor::Started(_))));
        let size = WindowSize { rows: 5, columns: 6 };
        frame::write(&mut front_end, &ToMonitor::Resize(size), FRAME_MAX).unwrap();
        frame::write(&mut front_end, &ToMonitor::Signal(15), FRAME_MAX).unwrap();
        let calls: Vec<Call> =
            (0..4).map(|_| frame::read::<Request>(&mut agent, frame::MAX_FROM_HOST).unwrap().call).collect();
        let target = || Target { container: "c1".to_owned(), process: None };
        assert!(matches!(calls[..2], [Call::Create(_), Call::Start { .. }]));
        assert_eq!(
            calls[2..],
            [Call::Resize { target: target(), size }, Call::Signal { target: target(), signal: 15, all: false }]
        );
        frame::write(&mut agent, &exited("c1", 143), frame::MAX_FROM_AGENT).unwrap();
        assert!(matches!(session.join().unwrap(), Outcome::Exited(ExitStatus { code: 143, .. })));
    }

    #[test]
    fn an_agent_that_never_reads_cannot_make_the_monitor_wait_or_grow() {
        let (session, mut agent, mut front_end) = attended();
        for word in [hello(), reply(CREATE), reply(START)] {
            frame::write(&mut agent, &word, frame::MAX_FROM_AGENT).unwrap();
        }
        let signal = frame::encode(&ToMonitor::Signal(10), FRAME_MAX).unwrap().repeat(1000);
        let flood = thread::spawn(move || while front_end.write_all(&signal).is_ok() {});
        assert!(matches!(failure(session.join().unwrap()), SessionError::Protocol("it does not read its requests")));
        flood.join().unwrap();
    }
}
