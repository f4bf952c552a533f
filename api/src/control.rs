//! What a front end and a running monitor say to each other.
//!
//! A front end starts the monitor with one end of a Unix stream socket (`--control-fd N`). Both directions carry
//! [frames](protocol::frame). When the front end closes its end, nobody waits for the container any more, and the
//! monitor stops the VM.

use protocol::ExitStatus;
use protocol::container::WindowSize;
use serde::{Deserialize, Serialize};

/// The longest frame in either direction: an error message with the end of a guest's console.
pub const FRAME_MAX: usize = 256 << 10;

/// What a front end asks of a monitor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToMonitor {
    /// Send this signal (1 to 64) to the container's first process.
    Signal(u8),
    /// The front end's terminal has a new size.
    Resize(WindowSize),
}

/// What a monitor reports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromMonitor {
    /// The container's program was executed.
    Started(Timeline),
    /// The container ended; its output has been written.
    Exited(ExitStatus),
    /// The container could not be run, or its VM died.
    Failed(Failure),
}

/// Why there is no exit status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The exit code for a front end: 125 when the VM failed, 126 and 127 as in a shell.
    pub exit_code: u8,
    /// One line with the cause chain.
    pub message: String,
    /// The end of the guest's console, where it may explain the failure; untrusted text, at most 8 KiB.
    pub console: Option<String>,
}

/// The exit code for failures of ours, as docker and podman use it.
pub const EXIT_FAILED: u8 = 125;
/// The exit code for a program that cannot be executed.
pub const EXIT_NOT_EXECUTABLE: u8 = 126;
/// The exit code for a program that does not exist.
pub const EXIT_NOT_FOUND: u8 = 127;

/// When each phase of a start ended, in nanoseconds of the host's CLOCK_MONOTONIC unless stated otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// The monitor's `main` began.
    pub monitor_started: u64,
    /// The VM was built, and its vCPUs were about to run.
    pub vm_created: u64,
    /// The agent's first message came in.
    pub agent_ready: u64,
    /// The container was set up in the guest.
    pub container_created: u64,
    /// The report of the program's `execve` came in.
    pub container_started: u64,
    /// Guest time at which the agent's `main` began, in microseconds.
    pub guest_agent_started_us: u64,
    /// Guest time at which the agent was ready, in microseconds.
    pub guest_agent_ready_us: u64,
}
