//! What happened to a VM and its containers, in order.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::HealthState;

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Its number: one more than that of the event before it. The first one of a VM is 1.
    pub sequence: u64,
    /// When, in nanoseconds since 1970.
    pub time_ns: u64,
    /// What.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum EventKind {
    /// The VM's agent takes requests.
    VmReady,
    /// The VM's vCPUs were stopped.
    VmPaused,
    /// The VM's vCPUs go on.
    VmResumed,
    /// The VM ends: the last event.
    VmStopped,
    /// A container was set up.
    Created {
        /// The container's id.
        container: String,
    },
    /// A container's program was executed.
    Started {
        /// The container's id.
        container: String,
    },
    /// A container was stopped where it is.
    Paused {
        /// The container's id.
        container: String,
    },
    /// A container goes on.
    Resumed {
        /// The container's id.
        container: String,
    },
    /// A container ended.
    Exited {
        /// The container's id.
        container: String,
        /// Its exit code.
        exit_code: u8,
        /// Whether memory ran out in it.
        out_of_memory: bool,
    },
    /// A container could not be created or started.
    Failed {
        /// The container's id.
        container: String,
        /// Why, in one line.
        error: String,
    },
    /// The kernel killed a process of a container because its memory limit was reached.
    OutOfMemory {
        /// The container's id.
        container: String,
    },
    /// A container's health changed.
    Health {
        /// The container's id.
        container: String,
        /// What it is now.
        health: HealthState,
    },
    /// A process was executed in a container.
    ProcessStarted {
        /// The container's id.
        container: String,
        /// The process's id.
        process: String,
    },
    /// A process that was executed in a container ended.
    ProcessExited {
        /// The container's id.
        container: String,
        /// The process's id.
        process: String,
        /// Its exit code.
        exit_code: u8,
    },
    /// A container was deleted.
    Deleted {
        /// The container's id.
        container: String,
    },
}
