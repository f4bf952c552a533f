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

use container::{ContainerSpec, WindowSize};
use serde::{Deserialize, Serialize};

/// The version of everything in this crate.
pub const VERSION: u32 = 2;

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

/// What the host can ask of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Call {
    /// Set a container up to the point where its program could be executed. Its stdio streams are dialled before the reply.
    Create(Box<ContainerSpec>),
    /// Execute the program of a created container. The reply follows a successful `execve`, or says why there was none.
    Start {
        /// The container's id.
        container: String,
    },
    /// Send a signal to the container's first process, or to all of them.
    Signal {
        /// The container's id.
        container: String,
        /// The signal's number on Linux x86-64, 1 to 64.
        signal: u8,
        /// Whether every process of the container gets it.
        all: bool,
    },
    /// Set the window size of the container's terminal.
    Resize {
        /// The container's id.
        container: String,
        /// The new size.
        size: WindowSize,
    },
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
        result: Result<(), Failure>,
    },
    /// A container's first process ended, all its other processes are gone, and its output was written. A container
    /// whose `Create` or `Start` failed is gone with that reply, and this does not follow.
    Exited {
        /// The container's id.
        container: String,
        /// How it ended.
        status: ExitStatus,
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
