//! What the host and the guest agent say to each other.
//!
//! # Shape
//! The agent has no listening socket. As soon as it can, it dials the host (vsock CID 2) on [`CONTROL_PORT`] and sends
//! [`FromAgent::Hello`]; from then on both sides exchange [frames](frame): a little-endian `u32` length and a postcard
//! body. Requests carry an id that their reply repeats, so several can be under way and answers may come in any order.
//! Each stdio stream of a process is a vsock connection of its own, dialled by the agent to the port that the request
//! named, and carries raw bytes; closing one direction is that stream's end of file.
//!
//! # Trust
//! The host believes nothing the agent says: frames from the guest are bounded by [`frame::MAX_FROM_AGENT`], text in
//! them is shown but never interpreted. The agent trusts the host, which could replace it at any time.
//!
//! # Versions
//! [`VERSION`] names the whole format. postcard is not self-describing, so any change of a type in this crate is a new
//! version, and the host refuses an agent of another one before it sends anything.

#![forbid(unsafe_code)]

pub mod container;
pub mod frame;
pub mod report;

use container::{ContainerSpec, Limits, ProcessSpec, WindowSize};
use report::{Health, PathInfo, ProcessInfo, Stats};
use serde::{Deserialize, Serialize};

/// The version of everything in this crate.
pub const VERSION: u32 = 4;

/// The vsock port on the host that the agent dials for its control connection.
pub const CONTROL_PORT: u32 = 1024;

/// What the agent says first, so that a host tells an agent from a workload that found the port.
pub const MAGIC: [u8; 8] = *b"COFFERDM";

/// One message from the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the host; the reply repeats it.
    pub id: u32,
    /// What to do.
    pub call: Call,
}

/// What the host can ask of the agent. Unless said otherwise a success is answered with [`Answer::Done`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Call {
    /// Set a container up to the point where its program could be executed. Its stdio streams are dialled before the reply.
    Create(Box<ContainerSpec>),
    /// Execute the program of a created container. The reply follows a successful `execve`, or says why there was none.
    Start {
        /// The container's id.
        container: String,
    },
    /// Execute another process in a running container: in its namespaces, root and cgroup, as a child of nobody in it.
    /// The streams are dialled, and the reply follows the `execve`, or says why there was none.
    Exec {
        /// The container's id.
        container: String,
        /// The new process's id: as a container's, and unique among the container's processes.
        process: String,
        /// What is executed.
        spec: Box<ProcessSpec>,
    },
    /// Send a signal to a process.
    Signal {
        /// The process.
        target: Target,
        /// The signal's number on Linux x86-64, 1 to 64.
        signal: u8,
        /// Whether every process of the container gets it; only with its first process as the target.
        all: bool,
    },
    /// Set the window size of a process's terminal.
    Resize {
        /// The process.
        target: Target,
        /// The new size.
        size: WindowSize,
    },
    /// Stop all processes of a container where they are, or let them go on (`cgroup.freeze`). The reply comes when it is
    /// so.
    Freeze {
        /// The container's id.
        container: String,
        /// Whether they are to stand still.
        frozen: bool,
    },
    /// Change the limits of a container's cgroup. What is `None` stays as it is.
    Update {
        /// The container's id.
        container: String,
        /// The new limits.
        limits: Limits,
    },
    /// What a container uses: answered with [`Answer::Stats`].
    Stats {
        /// The container's id.
        container: String,
    },
    /// The processes in a container: answered with [`Answer::Processes`].
    Processes {
        /// The container's id.
        container: String,
    },
    /// Write what is at a path of a running container to a port of the host, as one tar archive. Its entries begin with
    /// the path's last component, or with `.` where the path ends with `/.` or is the root: then a directory's contents
    /// are meant. The path is cleaned as text, without regard to symbolic links, and resolved in the container's root;
    /// its last component is followed only where it ends with `/` or `/.`. Answered with [`Answer::Path`] before
    /// anything is written; an archive that ends without tar's two blocks of zeroes is not whole.
    CopyOut {
        /// The container's id.
        container: String,
        /// The absolute path.
        path: String,
        /// The port to dial.
        port: u32,
    },
    /// Unpack the tar archive that a port of the host sends into a directory of a running container. No entry leaves that
    /// directory, by name or by a symbolic link that was there or came along. Answered at the end of the archive.
    CopyIn {
        /// The container's id.
        container: String,
        /// The absolute path of the directory, which must exist.
        path: String,
        /// The port to dial.
        port: u32,
    },
    /// Use so many of the guest's CPUs, as far as its kernel goes along: answered with [`Answer::Cpus`].
    SetCpus {
        /// How many, 1 to what the machine has.
        online: u8,
    },
}

/// A process of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// The container's id.
    pub container: String,
    /// The id that an [`Call::Exec`] gave it; `None` for the container's first process.
    pub process: Option<String>,
}

/// What a call brings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It was done, and there is nothing to say.
    Done,
    /// What a container uses.
    Stats(Box<Stats>),
    /// The processes in a container, at most [`report::PROCESSES_MAX`].
    Processes(Vec<ProcessInfo>),
    /// What is at a path.
    Path(PathInfo),
    /// How many CPUs the guest uses.
    Cpus(u8),
}

/// One message from the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromAgent {
    /// The first frame of a control connection.
    Hello(Hello),
    /// The answer to the request of the same id.
    Reply {
        /// The request's id.
        id: u32,
        /// What became of it.
        result: Result<Answer, Failure>,
    },
    /// A container's first process ended, and all its other processes are gone. Output that the host has not taken yet goes
    /// on arriving until its stream ends. A container whose `Create` or `Start` failed is gone with that reply, and this
    /// does not follow.
    Exited {
        /// The container's id.
        container: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// A process that [`Call::Exec`] executed ended; for its output, see there. Comes before the container's
    /// [`FromAgent::Exited`].
    ProcessExited {
        /// The container's id.
        container: String,
        /// The process's id.
        process: String,
        /// The exit code; 128 + N after signal N.
        code: u8,
    },
    /// The kernel killed a process of a container because its memory limit was reached.
    OutOfMemory {
        /// The container's id.
        container: String,
    },
    /// A health check of a running container gave a result.
    Health {
        /// The container's id.
        container: String,
        /// The result.
        health: Health,
    },
}

/// Who the agent is and when it was ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Always [`MAGIC`].
    pub magic: [u8; 8],
    /// The agent's [`VERSION`].
    pub version: u32,
    /// Guest time since kernel entry (CLOCK_BOOTTIME) when the agent's `main` began, in microseconds.
    pub started_us: u64,
    /// The same clock when this message was written, in microseconds.
    pub ready_us: u64,
}

/// How a container ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitStatus {
    /// The exit code; 128 + N after signal N.
    pub code: u8,
    /// Whether the kernel killed a process of the container because its memory limit was reached.
    pub out_of_memory: bool,
    /// Guest time (CLOCK_BOOTTIME) just before the program's `execve`, in microseconds: the end of the start path.
    pub executed_us: u64,
    /// The agent's own resident memory at that end, in KiB; 0 when it cannot be told.
    pub agent_resident_kib: u32,
}

/// Why the agent did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What callers decide by.
    pub kind: FailureKind,
    /// One line, lower case, with the cause chain, for people.
    pub message: String,
}

/// The failures that callers tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The program is not in the container (exit code 127).
    CommandNotFound,
    /// The program is there but cannot be executed (exit code 126).
    CommandNotExecutable,
    /// No container of that id.
    NoSuchContainer,
    /// The container is not in a state that allows the call.
    WrongState,
    /// The request names something that the image or the guest does not have (a user, a directory, a device).
    InvalidRequest,
    /// The guest's kernel refused a step of the set-up.
    System,
}
