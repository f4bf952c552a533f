//! One container as the agent sees it: its child process, cgroup and streams, and where it is in its life.
//!
//! ```text
//!            Create             Ready                Start            execve
//!   (nothing) ----> Preparing ---------> Created ------------> Starting ----> Running
//!                       |                   |                     |              |
//!                       v                   v                     v              v
//!                Create is refused       Exited           Start is refused    Exited
//! ```
//! Whatever the phase, a container ends in the same way: its first process was reaped, its cgroup is empty, its output
//! has been written. A request that still waits then is refused; otherwise the host hears [`FromAgent::Exited`].

mod cgroup;
mod error;
pub mod filesystem;
mod mounts;
mod process;
mod program;
mod root;
mod rootfs;
mod terminal;
mod user;

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use protocol::container::{ContainerSpec, WindowSize};
use protocol::{ExitStatus, Failure, FailureKind, FromAgent, frame};
use rustix::event::PollFlags;
use rustix::fs::{self, Mode, OFlags};
use rustix::io::Errno;
use rustix::io::IoSliceMut;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketFlags, SocketType, recvmsg,
    send, socketpair,
};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Pid;

pub use cgroup::{MOUNT_POINT as CGROUP_MOUNT_POINT, enable_controllers};
pub use error::SetupError;
pub use rootfs::make_mount_points;

use cgroup::{Cgroup, SIGKILL};
use error::InStep;
use process::{Report, Streams};

use crate::memory;
use crate::pump::{Flow, Pump};
use crate::sys::{self, Fork};

/// The longest id of a container, in bytes.
const ID_MAX: usize = 64;

/// The highest signal number on Linux x86-64.
const SIGNAL_MAX: u8 = 64;

/// The namespaces that a container is born in. Its cgroup namespace it makes itself, in its cgroup.
const NAMESPACES: libc::c_int = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The child sets itself up; the request of this id waits for it, and perhaps one to start it behind that.
    Preparing {
        /// The request to create it.
        create: u32,
        /// The request to start it, if it came already.
        start: Option<u32>,
    },
    /// The child waits for the word.
    Created,
    /// The word was given; the request of this id waits for the program.
    Starting(u32),
    /// The program runs, or ran.
    Running,
}

/// A stream's connection to the host, which may still be connecting, and its port.
#[derive(Debug)]
struct Connection {
    socket: OwnedFd,
    port: u32,
}

/// A container.
#[derive(Debug)]
pub struct Container {
    id: String,
    phase: Phase,
    /// The requests that were fulfilled and not answered yet, in order.
    done: VecDeque<u32>,
    /// The first process's id, not to be used once `exit_code` is there.
    init: Pid,
    exit_code: Option<u8>,
    cgroup: Cgroup,
    /// Whether the cgroup was seen empty after the first process's end.
    empty: bool,
    /// The channel to the child until it executes the program or ends.
    channel: Option<OwnedFd>,
    failure: Option<Failure>,
    executed_us: u64,
    pumps: Vec<Pump>,
    /// The connection of the terminal until its master side is there.
    terminal_connection: Option<Connection>,
    /// The ports of the pumps' connections, until those were seen to stand.
    ports: Vec<u32>,
    master: Option<Rc<OwnedFd>>,
}

/// What to poll for on behalf of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The child has something to say.
    Report,
    /// The cgroup's state changed.
    Cgroup,
    /// The pump of this index can move.
    Pump(usize),
}

impl Container {
    /// Begins to set a container up; the outcome is the answer to the request `request`, in time. `dial` connects to
    /// a port of the host.
    ///
    /// # Errors
    /// What can be said at once.
    pub fn create(
        request: u32,
        spec: &ContainerSpec,
        dial: &mut impl FnMut(u32) -> io::Result<OwnedFd>,
    ) -> Result<Self, SetupError> {
        check_id(&spec.id)?;
        let mut connect = |port: Option<u32>| {
            port.map(|port| match dial(port) {
                Ok(socket) => Ok(Connection { socket, port }),
                Err(source) => Err(SetupError::Dial { port, source }),
            })
            .transpose()
        };
        let stdio = spec.process.stdio;
        let (mut streams, mut pumps, mut ports) = (Streams::default(), Vec::new(), Vec::new());
        let mut terminal_connection = None;
        if spec.process.terminal.is_some() {
            terminal_connection = connect(stdio.stdin)?;
        } else {
            for (number, port) in [stdio.stdin, stdio.stdout, stdio.stderr].into_iter().enumerate() {
                let Some(Connection { socket, port }) = connect(port)? else { continue };
                let (pump, end) = stream(socket, number == 0).in_step("make a pipe")?;
                pumps.push(pump);
                ports.push(port);
                streams.ends[number] = Some(end);
            }
        }
        let cgroup = Cgroup::create(&spec.id, &spec.limits).in_step("make the container's cgroup")?;
        let null = fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).in_step("open /dev/null")?;
        let (channel, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .in_step("make a socket pair")?;
        let init = match sys::fork_into(cgroup.directory(), NAMESPACES).in_step("fork")? {
            Fork::Parent(pid) => pid,
            Fork::Child => process::run(spec, &streams, null.as_fd(), theirs.as_fd()),
        };
        Ok(Self {
            id: spec.id.clone(),
            phase: Phase::Preparing { create: request, start: None },
            done: VecDeque::new(),
            init,
            exit_code: None,
            cgroup,
            empty: false,
            channel: Some(channel),
            failure: None,
            executed_us: 0,
            pumps,
            terminal_connection,
            ports,
            master: None,
        })
    }

    /// The container's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Gives the word to execute the program; the outcome is the answer to the request `request`, in time.
    ///
    /// # Errors
    /// When the container is not waiting for it.
    pub fn start(&mut self, request: u32) -> Result<(), Failure> {
        match (self.phase, self.exit_code) {
            (Phase::Created, None) => self.go(request),
            // A host that does not wait for the one before the other saves a way there and back.
            (Phase::Preparing { create, start: None }, _) => {
                self.phase = Phase::Preparing { create, start: Some(request) };
            }
            (_, Some(_)) => return Err(self.wrong_state("has ended")),
            _ => return Err(self.wrong_state("was started before")),
        }
        Ok(())
    }

    fn go(&mut self, request: u32) {
        self.phase = Phase::Starting(request);
        if let Some(channel) = &self.channel {
            // When the child is gone, its end will be seen and the request refused.
            let _ = send(channel, &process::GO, SendFlags::NOSIGNAL);
        }
    }

    /// Sends a signal to the first process or to all.
    ///
    /// # Errors
    /// When there is no such signal or no process any more.
    pub fn signal(&self, number: u8, all: bool) -> Result<(), Failure> {
        if !(1..=SIGNAL_MAX).contains(&number) {
            let message = format!("signal {number} does not exist: they go from 1 to {SIGNAL_MAX}");
            return Err(Failure { kind: FailureKind::InvalidRequest, message });
        }
        if self.exit_code.is_some() {
            return Err(self.wrong_state("has ended"));
        }
        let sent = if all { self.cgroup.signal(number) } else { sys::send_signal(self.init, number) };
        sent.in_step("send the signal").map_err(|error| error.failure())
    }

    /// Sets the size of the container's terminal.
    ///
    /// # Errors
    /// When it has none.
    pub fn resize(&self, size: WindowSize) -> Result<(), Failure> {
        match &self.master {
            Some(master) => terminal::resize(master, size).in_step("set the terminal's size").map_err(|e| e.failure()),
            None => Err(self.wrong_state("has no terminal")),
        }
    }

    fn wrong_state(&self, what: &str) -> Failure {
        Failure { kind: FailureKind::WrongState, message: format!("container {} {what}", self.id) }
    }

    /// Kills all its processes, without waiting for their end.
    pub fn kill(&self) {
        if let Err(error) = self.cgroup.signal(SIGKILL) {
            eprintln!("cofferdam-agent: cannot kill container {}: {error}", self.id);
        }
    }

    /// Calls `add` for each descriptor to poll.
    pub fn interests<'a>(&'a self, mut add: impl FnMut(BorrowedFd<'a>, PollFlags, Event)) {
        if let Some(channel) = &self.channel {
            add(channel.as_fd(), PollFlags::IN, Event::Report);
        }
        if self.exit_code.is_some() && !self.empty {
            add(self.cgroup.events(), PollFlags::PRI, Event::Cgroup);
        }
        // Until the child is ready the connections may not be established.
        if !matches!(self.phase, Phase::Preparing { .. }) || self.empty {
            for (index, pump) in self.pumps.iter().enumerate() {
                let (fd, flags) = pump.interest();
                add(fd, flags, Event::Pump(index));
            }
        }
    }

    /// Takes note that the first process has ended, if it is `pid`, with an exit code.
    pub fn reaped(&mut self, pid: Pid, exit_code: u8) {
        if self.exit_code.is_none() && self.init == pid {
            self.exit_code = Some(exit_code);
            // What it said last may be unread; the end of the channel comes behind.
            while self.channel.is_some() && self.hear() {}
            self.look_at_cgroup();
        }
    }

    /// Reacts to a descriptor of [`Container::interests`] being ready.
    pub fn handle(&mut self, event: Event) {
        match event {
            Event::Cgroup => self.look_at_cgroup(),
            Event::Pump(index) => {
                if self.pumps.get_mut(index).is_some_and(|pump| pump.run(self.empty) == Flow::Ended) {
                    self.pumps.remove(index);
                }
            }
            Event::Report => {
                self.hear();
            }
        }
    }

    /// The next request that has become due to be answered with success, each once.
    pub fn take_done(&mut self) -> Option<u32> {
        self.done.pop_front()
    }

    /// Reads one report of the child; whether there may be more.
    fn hear(&mut self) -> bool {
        let Some(channel) = &self.channel else { return false };
        match receive(channel) {
            Ok(Some((Report::Ready, master))) => self.ready(master),
            Ok(Some((Report::Executing { at_us }, _))) => self.executed_us = at_us,
            Ok(Some((Report::Failed(failure), _))) => self.failure = Some(failure),
            Ok(None) => {
                self.channel = None;
                // An execution that fails is reported before the channel closes.
                if let (Phase::Starting(id), None, 1..) = (self.phase, &self.failure, self.executed_us) {
                    self.phase = Phase::Running;
                    self.done.push_back(id);
                }
                return false;
            }
            Err(error) => {
                self.fail(&error);
                self.channel = None;
                return false;
            }
        }
        true
    }

    fn ready(&mut self, master: Option<OwnedFd>) {
        let Phase::Preparing { create, start } = self.phase else { return };
        match self.connect(master) {
            Ok(()) => {
                self.phase = Phase::Created;
                self.done.push_back(create);
                start.into_iter().for_each(|request| self.go(request));
            }
            Err(error) => self.fail(&error),
        }
    }

    /// Sees that every connection to the host stands, and joins the terminal to its own.
    fn connect(&mut self, master: Option<OwnedFd>) -> Result<(), SetupError> {
        for (pump, &port) in self.pumps.iter().zip(&self.ports) {
            sys::wait_connected(pump.connection()).map_err(|source| SetupError::Dial { port, source })?;
        }
        if let Some(master) = master {
            let step = "make the terminal non-blocking";
            let flags = fs::fcntl_getfl(&master).in_step(step)?;
            fs::fcntl_setfl(&master, flags | OFlags::NONBLOCK).in_step(step)?;
            let master = Rc::new(master);
            if let Some(Connection { socket, port }) = self.terminal_connection.take() {
                sys::wait_connected(socket.as_fd()).map_err(|source| SetupError::Dial { port, source })?;
                self.pumps.extend(Pump::terminal(socket, &master));
            }
            self.master = Some(master);
        }
        Ok(())
    }

    /// Gives a container up that is not running yet.
    fn fail(&mut self, error: &SetupError) {
        self.failure.get_or_insert_with(|| error.failure());
        self.kill();
    }

    fn look_at_cgroup(&mut self) {
        // An error of reading it could only be repeated; the first process is gone, and with it its pid namespace.
        if self.exit_code.is_some() && !self.empty && self.cgroup.is_empty().unwrap_or(true) {
            self.empty = true;
            self.pumps.retain_mut(|pump| pump.is_output() && pump.run(true) == Flow::Open);
        }
    }

    /// The last word about the container when all of it has ended: then it is to be dropped.
    pub fn last_words(&self) -> Option<Vec<FromAgent>> {
        let code = self.exit_code?;
        if !self.empty || !self.pumps.is_empty() || self.channel.is_some() {
            return None;
        }
        let refused = match self.phase {
            Phase::Preparing { create, start } => [Some(create), start],
            Phase::Starting(id) => [Some(id), None],
            Phase::Created | Phase::Running => [None, None],
        };
        if refused[0].is_some() {
            let failure = self.failure.clone().unwrap_or_else(|| Failure {
                kind: FailureKind::System,
                message: format!("the set-up of container {} ended with code {code} and no reason", self.id),
            });
            let refuse = |id| FromAgent::Reply { id, result: Err(failure.clone()) };
            return Some(refused.into_iter().flatten().map(refuse).collect());
        }
        let out_of_memory = self.cgroup.ran_out_of_memory();
        let agent_resident_kib = memory::resident_kib().unwrap_or(0);
        let status = ExitStatus { code, out_of_memory, executed_us: self.executed_us, agent_resident_kib };
        Some(vec![FromAgent::Exited { container: self.id.clone(), status }])
    }
}

/// The pump of a stream and the end of its pipe that is for the program. Only the agent's end is non-blocking.
fn stream(socket: OwnedFd, is_input: bool) -> io::Result<(Pump, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    let (ours, theirs) = if is_input { (writer, reader) } else { (reader, writer) };
    fs::fcntl_setfl(&ours, fs::fcntl_getfl(&ours)? | OFlags::NONBLOCK)?;
    let pump = if is_input { Pump::into_pipe(socket, ours) } else { Pump::from_pipe(ours, socket) };
    Ok((pump, theirs))
}

fn check_id(id: &str) -> Result<(), SetupError> {
    let valid = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    if id.is_empty() || id.len() > ID_MAX || id.starts_with('.') || !id.bytes().all(valid) {
        return Err(SetupError::Id { id: id.chars().take(ID_MAX).collect() });
    }
    Ok(())
}

/// Receives one report with the descriptor that may come along; `None` when the child's side is closed.
fn receive(channel: &OwnedFd) -> Result<Option<(Report, Option<OwnedFd>)>, SetupError> {
    let step = "hear from the container's set-up";
    let mut datagram = [0; process::REPORT_MAX + 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
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
    let report = frame::read(&mut &datagram[..length], process::REPORT_MAX)
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
        .in_step(step)?;
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok(Some((report, descriptor)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_a_plain_file_name() {
        for id in ["a", "web-1", "A.b_c", &"x".repeat(64)] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        for id in ["", ".", "..", ".a", "a/b", "a b", "ä", "a\0", &"x".repeat(65)] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }
}
