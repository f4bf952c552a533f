//! Confines a monitor process and its threads before the guest runs.
//!
//! What is in force today, always, with no flag to forget:
//! - the process gains no privileges by executing anything, leaves no core dump with guest memory in it, and cannot be
//!   traced by others of its user ([`process`]);
//! - each thread may make only the system calls of its kind ([`thread`]), from `resources/seccomp/monitor.json`; any other
//!   one kills the process. None of them can execute a program or start a thread, and only the one that serves the API can
//!   open a file: it reads and writes the container's log.
//!
//! Namespaces, an empty root, cgroup limits and an unprivileged user are not here yet: today the monitor runs as whoever
//! started it.

#![forbid(unsafe_code)]

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::set_no_new_privs;
use seccompiler::{apply_filter, sock_filter};
use thiserror::Error;

include!(concat!(env!("OUT_DIR"), "/monitor.rs"));

/// Why a confinement is not in force. The monitor does not run a guest then.
#[derive(Debug, Error)]
pub enum JailError {
    /// The kernel refused a process-wide setting.
    #[error("cannot {step}")]
    Process {
        /// What was tried.
        step: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
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

/// The kinds of thread in a monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    /// Runs the event loop and all devices.
    EventLoop,
    /// Runs guest code.
    Vcpu,
    /// Serves the API, talks to the agent and moves the container's streams.
    Api,
}

/// Confines the process. Before any other thread starts.
///
/// # Errors
/// [`JailError::Process`].
pub fn process() -> Result<(), JailError> {
    let failed = |step| move |error: rustix::io::Errno| JailError::Process { step, source: error.into() };
    set_no_new_privs(true).map_err(failed("renounce new privileges"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("forbid tracing"))?;
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, none).map_err(failed("forbid core dumps"))?;
    // Each process in a container has a few, and each client one.
    let files = getrlimit(Resource::Nofile);
    let most = Rlimit { current: files.maximum, ..files };
    setrlimit(Resource::Nofile, most).map_err(failed("allow as many open files as there may be"))
}

/// Restricts the calling thread. After it has what it needs: only the API's can open anything any more, which writes the
/// container's log and the record of its end.
///
/// # Errors
/// [`JailError::Filter`].
pub fn thread(kind: Thread) -> Result<(), JailError> {
    let filter = match kind {
        Thread::EventLoop => EVENT_LOOP,
        Thread::Vcpu => VCPU,
        Thread::Api => API,
    };
    apply_filter(filter).map_err(|source| JailError::Filter { kind, source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    /// Runs this test program again as the process that is to be killed: a filter cannot be taken off.
    fn confined(attempt: &str) -> std::process::ExitStatus {
        let program = std::env::current_exe().unwrap();
        let arguments = ["--exact", "tests::attempt_in_a_process_of_its_own", "--include-ignored"];
        let output = Command::new(program).args(arguments).env("JAILER_ATTEMPT", attempt).output().unwrap();
        output.status
    }

    /// Not a test on its own: the other side of [`confined`], which names what to try.
    #[test]
    fn attempt_in_a_process_of_its_own() {
        let Ok(attempt) = std::env::var("JAILER_ATTEMPT") else { return };
        process().unwrap();
        let kind = match attempt.split_once(' ').unwrap().0 {
            "vcpu" => Thread::Vcpu,
            "api" => Thread::Api,
            _ => Thread::EventLoop,
        };
        let (mut pipe, pipe_end) = io::pipe().unwrap();
        thread(kind).unwrap();
        match attempt.split_once(' ').unwrap().1 {
            "open" => drop(std::fs::File::open("/etc/hostname")),
            "exec" => drop(Command::new("/bin/true").spawn()),
            "inet" => drop(std::net::UdpSocket::bind("127.0.0.1:0")),
            "thread" => drop(std::thread::Builder::new().spawn(|| ())),
            _ => {
                use std::io::{Read, Write};
                let mut byte = [0];
                (&pipe_end).write_all(b"x").unwrap();
                pipe.read_exact(&mut byte).unwrap();
            }
        }
        // Not through the test runner, whose own work is not that of any kind of thread.
        std::process::exit(0);
    }

    #[test]
    fn every_kind_of_thread_dies_of_what_it_does_not_need() {
        for kind in ["vcpu", "api", "event_loop"] {
            for attempt in ["open", "exec", "inet", "thread"] {
                // The API's thread reads and writes the log.
                if (kind, attempt) != ("api", "open") {
                    let status = confined(&format!("{kind} {attempt}"));
                    assert_eq!(status.signal(), Some(31), "{kind} {attempt}: {status}");
                }
            }
            assert!(confined(&format!("{kind} copy")).success(), "{kind} cannot copy");
        }
    }
}
