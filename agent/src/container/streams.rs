//! The standard streams of a process as the agent holds them: connections to the host, and pumps between those and
//! pipes or a terminal.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use protocol::container::{ProcessSpec, WindowSize};
use rustix::event::PollFlags;
use rustix::fs::{self, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};

use super::error::{InStep, SetupError};
use super::terminal;
use crate::pump::{Flow, Pump};
use crate::sys;

/// A process's streams, as the agent gives them to its child: standard input, output and error. One without an end
/// becomes `/dev/null`.
#[derive(Debug, Default)]
pub struct Ends(pub [Option<OwnedFd>; 3]);

/// A connection to the host, which may still be connecting, and its port.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    port: u32,
}

impl Connection {
    /// Begins to connect to a port of the host.
    ///
    /// # Errors
    /// What `dial` says.
    pub fn begin(port: u32, dial: &mut impl FnMut(u32) -> io::Result<OwnedFd>) -> Result<Self, SetupError> {
        let socket = dial(port).map_err(|source| SetupError::Dial { port, source })?;
        Ok(Self { socket, port })
    }

    /// Waits until the connection stands, and gives it.
    ///
    /// # Errors
    /// Why it does not.
    pub fn establish(self) -> Result<OwnedFd, SetupError> {
        sys::wait_connected(self.socket.as_fd()).map_err(|source| SetupError::Dial { port: self.port, source })?;
        Ok(self.socket)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The agent's side of a process's streams.
#[derive(Debug, Default)]
pub struct Streams {
    pumps: Vec<Pump>,
    /// The ports of the pumps' connections, until those were seen to stand.
    ports: Vec<u32>,
    has_terminal: bool,
    /// The connection of the terminal until its master side is there.
    terminal_connection: Option<Connection>,
    master: Option<Rc<OwnedFd>>,
}

impl Streams {
    /// Begins to connect a process's streams to the host, and gives the ends that are for the process.
    ///
    /// # Errors
    /// What `dial` says of a port, or what the kernel says of a pipe.
    pub fn dial(
        process: &ProcessSpec,
        dial: &mut impl FnMut(u32) -> io::Result<OwnedFd>,
    ) -> Result<(Self, Ends), SetupError> {
        let mut connect = |port: Option<u32>| port.map(|port| Connection::begin(port, dial)).transpose();
        let stdio = process.stdio;
        let (mut streams, mut ends) = (Self::default(), Ends::default());
        if process.terminal.is_some() {
            streams.has_terminal = true;
            streams.terminal_connection = connect(stdio.stdin)?;
            return Ok((streams, ends));
        }
        for (number, port) in [stdio.stdin, stdio.stdout, stdio.stderr].into_iter().enumerate() {
            let Some(Connection { socket, port }) = connect(port)? else { continue };
            let (pump, end) = stream(socket, number == 0).in_step("make a pipe")?;
            streams.pumps.push(pump);
            streams.ports.push(port);
            ends.0[number] = Some(end);
        }
        Ok((streams, ends))
    }

    /// Whether the process has a terminal instead of pipes.
    pub fn has_terminal(&self) -> bool {
        self.has_terminal
    }

    /// Sees that every connection to the host stands, and joins the terminal to its own.
    ///
    /// # Errors
    /// The port that could not be connected to.
    pub fn establish(&mut self, master: Option<OwnedFd>) -> Result<(), SetupError> {
        for (pump, &port) in self.pumps.iter().zip(&self.ports) {
            sys::wait_connected(pump.connection()).map_err(|source| SetupError::Dial { port, source })?;
        }
        let Some(master) = master else { return Ok(()) };
        set_nonblocking(&master).in_step("make the terminal non-blocking")?;
        let master = Rc::new(master);
        if let Some(connection) = self.terminal_connection.take() {
            self.pumps.extend(Pump::terminal(connection.establish()?, &master));
        }
        self.master = Some(master);
        Ok(())
    }

    /// Sets the terminal's size, if there is a terminal; what the kernel says.
    pub fn resize(&self, size: WindowSize) -> Option<rustix::io::Result<()>> {
        self.master.as_ref().map(|master| terminal::resize(master, size))
    }

    /// Calls `add` for each descriptor to poll and the index of its stream.
    pub fn interests<'a>(&'a self, mut add: impl FnMut(BorrowedFd<'a>, PollFlags, usize)) {
        for (index, pump) in self.pumps.iter().enumerate() {
            let (fd, flags) = pump.interest();
            add(fd, flags, index);
        }
    }

    /// Moves what can be moved of the stream of an index. The indices behind it change when it ends.
    pub fn run(&mut self, index: usize) {
        if self.pumps.get_mut(index).is_some_and(|pump| pump.run() == Flow::Ended) {
            self.pumps.remove(index);
        }
    }

    /// Ends the input, and the output with what was written so far.
    pub fn finish(&mut self) {
        self.pumps.retain_mut(|pump| {
            pump.finish();
            pump.is_output() && pump.run() == Flow::Open
        });
    }

    /// Whether all of them have ended.
    pub fn have_ended(&self) -> bool {
        self.pumps.is_empty()
    }
}

/// The pump of a stream and the end of its pipe that is for the program. Only the agent's end is non-blocking.
fn stream(socket: OwnedFd, is_input: bool) -> io::Result<(Pump, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    let (ours, theirs) = if is_input { (writer, reader) } else { (reader, writer) };
    set_nonblocking(&ours)?;
    let pump = if is_input { Pump::into_pipe(socket, ours) } else { Pump::from_pipe(ours, socket) };
    Ok((pump, theirs))
}

/// Makes what a descriptor refers to non-blocking.
///
/// # Errors
/// What fcntl(2) says.
pub fn set_nonblocking(fd: &OwnedFd) -> rustix::io::Result<()> {
    fs::fcntl_setfl(fd, fs::fcntl_getfl(fd)? | OFlags::NONBLOCK)
}
