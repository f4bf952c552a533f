//! Why a jail is not in force.

use std::ffi::NulError;
use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::filters::Thread;

/// Why a confinement is not in force. The monitor does not run a guest then.
#[derive(Debug, Error)]
pub enum JailError {
    /// The kernel refused a step.
    #[error("cannot {step}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A file or folder that a step needs.
    #[error("cannot {step} {}", path.display())]
    Path {
        /// What was tried.
        step: &'static str,
        /// With what.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// Somebody in a group is there although it was killed.
    #[error(
        "process {pid} in the cgroup {} does not end, although it was killed: look at its state in /proc/{pid}",
        path.display()
    )]
    Undying {
        /// Its id.
        pid: i32,
        /// The group.
        path: PathBuf,
    },
    /// The process was not started as the first one of its namespaces.
    #[error("process {pid} is not the first one of a pid namespace: let the monitor be started without --born")]
    NotBorn {
        /// Its id.
        pid: i32,
    },
    /// A word for the monitor has a NUL byte.
    #[error("a word for the monitor has a NUL byte")]
    Nul(#[from] NulError),
    /// Landlock is there and did not take the rules.
    #[error("cannot restrict the monitor to its folder with Landlock")]
    Landlock(#[source] landlock::RulesetError),
    /// The kernel refused a system call filter.
    #[error("cannot restrict the system calls of the {kind:?} thread")]
    Filter {
        /// The thread's kind.
        kind: Thread,
        /// What the system says.
        #[source]
        source: seccompiler::Error,
    },
}

/// Names a step that failed.
pub(crate) fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> JailError {
    move |error| JailError::Step { step, source: error.into() }
}
