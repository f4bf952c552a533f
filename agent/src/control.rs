//! The agent's one loop: requests from the host, ends of children, reports and streams of containers.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use protocol::container::{ContainerSpec, ProcessSpec};
use protocol::frame::{self, Decoder, FrameError};
use protocol::{Answer, Call, Failure, FailureKind, FromAgent, Hello, MAGIC, Request, Target, VERSION};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Pid, WaitOptions, WaitStatus, set_dumpable_behavior, wait};
use thiserror::Error;

use crate::container::{Container, Event, Plan, Streams};
use crate::pids::Home;
use crate::{clock, cpus, sys};

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
    /// A stream of a process that has ended.
    Leaving(usize, usize),
}

struct Agent<D> {
    control: OwnedFd,
    children: OwnedFd,
    decoder: Decoder,
    /// Answers that the control connection has not taken yet.
    unsent: Vec<u8>,
    containers: Vec<Container>,
    /// Streams of processes that have ended, until the host has taken all of their output.
    leaving: Vec<Streams>,
    home: Home,
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
    // A child is in a container's pid namespace before it has let go of what the agent may: nobody there may look into it.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("close the agent's memory to others"))?;
    let home = Home::new().map_err(step("refer to the agent's own pid namespace"))?;
    let (unsent, containers, leaving) = (Vec::new(), Vec::new(), Vec::new());
    let mut agent = Agent { control, children, decoder, unsent, containers, leaving, home, dial };
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
                    Token::Leaving(index, stream) => {
                        if let Some(streams) = self.leaving.get_mut(index) {
                            streams.run(stream);
                        }
                    }
                }
            }
            self.leaving.retain(|streams| !streams.have_ended());
            self.act();
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
        for (index, streams) in self.leaving.iter().enumerate() {
            streams.interests(|fd, flags, stream| {
                polled.push(PollFd::from_borrowed_fd(fd, flags));
                tokens.push(Token::Leaving(index, stream));
            });
        }
        // One request at a time: while an answer waits to be sent, no more questions are taken.
        let flags = if self.unsent.is_empty() { PollFlags::IN } else { PollFlags::OUT };
        polled.extend([PollFd::new(&self.children, PollFlags::IN), PollFd::new(&self.control, flags)]);
        tokens.extend([Token::Children, Token::Control]);
        match poll(&mut polled, self.timeout().as_ref()) {
            Err(Errno::INTR) => return Ok(Vec::new()),
            result => result.map_err(step("wait for events"))?,
        };
        let ready = polled.iter().zip(&tokens).filter(|(fd, _)| !fd.revents().is_empty());
        // From the back, so that the removal of a pump leaves the indices of those still to come alone.
        let mut ready: Vec<Token> = ready.map(|(_, token)| *token).collect();
        let behind = ready.iter().filter(|token| matches!(token, Token::Children | Token::Control)).count();
        let front = ready.len() - behind;
        ready[..front].reverse();
        Ok(ready)
    }

    /// How long there is nothing to do unless something happens; `None` for ever. What a host that does not listen would
    /// not hear of is not begun.
    fn timeout(&self) -> Option<Timespec> {
        if !self.unsent.is_empty() {
            return None;
        }
        let deadline = self.containers.iter().filter_map(Container::deadline_us).min()?;
        Timespec::try_from(Duration::from_micros(deadline.saturating_sub(clock::boot_us()))).ok()
    }

    /// Does what is due.
    fn act(&mut self) {
        if !self.unsent.is_empty() {
            return;
        }
        let now_us = clock::boot_us();
        self.containers.iter_mut().for_each(|container| container.act(now_us, &self.home));
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
    fn answer(&mut self, request: u32, call: Call) -> Option<Result<Answer, Failure>> {
        // What is begun is answered by the container, when it is done.
        let begun = |result: Result<(), Failure>| result.err().map(Err);
        let done = |result: Result<(), Failure>| Some(result.map(|()| Answer::Done));
        match call {
            Call::Create(spec) => begun(self.create(request, &spec)),
            Call::Start { container } => begun(self.find(&container).and_then(|found| found.start(request))),
            Call::Exec { container, process, spec } => begun(self.execute(request, &container, &process, &spec)),
            Call::Signal { target: Target { container, process }, signal, all } => {
                done(self.find(&container).and_then(|found| found.signal(process.as_deref(), signal, all)))
            }
            Call::Resize { target: Target { container, process }, size } => {
                done(self.find(&container).and_then(|found| found.resize(process.as_deref(), size)))
            }
            Call::Freeze { container, frozen } => {
                begun(self.find(&container).and_then(|found| found.freeze(request, frozen)))
            }
            Call::Update { container, limits } => done(self.find(&container).and_then(|found| found.update(&limits))),
            Call::Stats { container } => {
                Some(self.find(&container).map(|found| Answer::Stats(Box::new(found.stats()))))
            }
            Call::Processes { container } => begun(self.list(request, &container)),
            Call::CopyOut { container, path, port } => begun(self.copy_out(request, &container, &path, port)),
            Call::CopyIn { container, path, port } => begun(self.copy_in(request, &container, &path, port)),
            Call::SetCpus { online } => Some(cpus::set_online(online).map(Answer::Cpus)),
        }
    }

    fn create(&mut self, request: u32, spec: &ContainerSpec) -> Result<(), Failure> {
        if self.containers.iter().any(|container| container.id() == spec.id) {
            let message = format!("container {} exists already", spec.id);
            return Err(Failure { kind: FailureKind::WrongState, message });
        }
        let running = |id: &str| self.containers.iter().find(|other| other.id() == id).and_then(Container::running);
        let created = Plan::new(&spec.namespaces, running)
            .and_then(|plan| Container::create(request, spec, &plan, &self.home, &mut self.dial));
        self.containers.push(created.map_err(|error| error.failure())?);
        Ok(())
    }

    fn execute(&mut self, request: u32, container: &str, process: &str, spec: &ProcessSpec) -> Result<(), Failure> {
        let container = find(&mut self.containers, container)?;
        container.execute(request, process, spec, &self.home, &mut self.dial)
    }

    fn list(&mut self, request: u32, container: &str) -> Result<(), Failure> {
        find(&mut self.containers, container)?.list(request, &self.home)
    }

    fn copy_out(&mut self, request: u32, container: &str, path: &str, port: u32) -> Result<(), Failure> {
        find(&mut self.containers, container)?.copy_out(request, path, port, &self.home, &mut self.dial)
    }

    fn copy_in(&mut self, request: u32, container: &str, path: &str, port: u32) -> Result<(), Failure> {
        find(&mut self.containers, container)?.copy_in(request, path, port, &self.home, &mut self.dial)
    }

    fn find(&mut self, id: &str) -> Result<&mut Container, Failure> {
        find(&mut self.containers, id)
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
        self.containers.iter_mut().any(|container| container.reaped(pid, code));
    }

    /// Tells the host what has become due, and forgets each container about which it was the last word.
    fn tell(&mut self) -> Result<(), ServeError> {
        let mut index = 0;
        // What the host does not take yet is not piled up here.
        while self.unsent.is_empty()
            && let Some(container) = self.containers.get_mut(index)
        {
            let (words, over) = container.settle();
            self.leaving.extend(container.take_leaving());
            if over {
                // The cgroup goes with it, so that the id is free when the host hears.
                drop(self.containers.swap_remove(index));
            } else {
                index += 1;
            }
            words.iter().try_for_each(|word| self.send(word))?;
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

fn find<'a>(containers: &'a mut [Container], id: &str) -> Result<&'a mut Container, Failure> {
    containers.iter_mut().find(|container| container.id() == id).ok_or_else(|| {
        let shown: String = id.chars().take(64).collect();
        Failure { kind: FailureKind::NoSuchContainer, message: format!("no container {shown}") }
    })
}
