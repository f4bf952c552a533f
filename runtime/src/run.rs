//! One foreground run: check everything, make the state directory, start the monitor, follow it, clean up.
//!
//! Nothing here waits but for the container. What can be done while the guest boots (sweeping up after killed runs) is
//! done then.

use std::env;
use std::os::fd::{AsFd as _, AsRawFd as _};

use api::control::{EXIT_FAILED, Failure};
use image::Image;
use thiserror::Error;

use crate::launch::{Ending, Launch, LaunchError};
use crate::paths::{self, PathError};
use crate::request::RunRequest;
use crate::size::Host;
use crate::spec::{self, ContainerId, Machine, SpecError};
use crate::state::{RunRoot, StateError};
use crate::supervise::{Outcome, Signals, SuperviseError, supervise};
use crate::terminal::{self, RawMode, TerminalError};
use crate::timeline::{self, RunTimeline};

/// Why a container was not run.
#[derive(Debug, Error)]
pub enum RunError {
    /// The request.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A part of the installation.
    #[error(transparent)]
    Path(#[from] PathError),
    /// State on disk.
    #[error(transparent)]
    State(#[from] StateError),
    /// The terminal.
    #[error(transparent)]
    Terminal(#[from] TerminalError),
    /// The monitor's start.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The monitor's life.
    #[error(transparent)]
    Supervise(#[from] SuperviseError),
    /// There are no random numbers.
    #[error("cannot choose an id for the container")]
    Id(#[source] std::io::Error),
    /// The document does not encode.
    #[error("cannot write the monitor's configuration")]
    Encode(#[source] serde_json::Error),
}

/// How a run ended, for whoever asked for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// The exit code to end with: the container's; or 125, 126 and 127 when there was none; or 128 + N after signal N.
    pub exit_code: u8,
    /// Why there is no exit code of the container's, in one line.
    pub failure: Option<String>,
    /// The end of the guest's console, where it may explain the failure. Untrusted text.
    pub console: Option<String>,
    /// Whether memory ran out in the container, and its limit in bytes.
    pub out_of_memory: Option<u64>,
}

/// Runs a container to its end. The times it took are left in `times`.
///
/// # Errors
/// The container was not run, and nothing of it is left.
pub fn run(request: &RunRequest, image: &Image, times: &mut RunTimeline) -> Result<Finished, RunError> {
    let id = ContainerId::generate().map_err(RunError::Id)?;
    if let Some(name) = &request.name {
        spec::check_name(name)?;
    }
    // A terminal that only shows output needs none of ours.
    let takes_keys = request.terminal && request.interactive;
    if takes_keys {
        terminal::check()?;
    }
    let monitor = paths::monitor()?;
    let machine = Machine {
        kernel: paths::kernel(request.kernel.as_deref())?,
        initramfs: paths::initramfs()?,
        image: image.lease.as_raw_fd(),
        window: terminal::window_size(),
        host: Host::read(),
    };
    let config = spec::launch_config(&id, request, &image.config, machine, |name| env::var(name).ok())?;
    let memory_limit = config.container.as_ref().and_then(|container| container.limits.memory_bytes);
    let document = serde_json::to_vec(&config).map_err(RunError::Encode)?;

    // From here on signals are read, not delivered, so that whatever comes everything below is undone.
    let signals = Signals::block()?;
    let root = RunRoot::open()?;
    let state = root.create(&id, request.name.as_deref())?;
    let config = state.write("config.json", &document)?;
    let raw = takes_keys.then(RawMode::enter).transpose()?;
    let launch = Launch {
        monitor: &monitor,
        config: &config,
        image: image.lease.as_fd(),
        stdin: request.interactive,
        mask: &signals.previous,
    };
    times.monitor_spawning = timeline::now();
    let running = launch.spawn()?;
    times.monitor_spawned = timeline::now();
    root.sweep();
    let outcome = supervise(running, &signals, request.terminal, |start| times.start = start);
    drop(raw);
    drop(state);
    let outcome = outcome?;
    times.finish(if let Outcome::Exited(status) = &outcome { Some(status) } else { None });
    Ok(finished(outcome, memory_limit))
}

fn finished(outcome: Outcome, memory_limit: Option<u64>) -> Finished {
    let failed =
        |exit_code, message: String| Finished { exit_code, failure: Some(message), console: None, out_of_memory: None };
    match outcome {
        Outcome::Exited(status) => Finished {
            exit_code: status.code,
            failure: None,
            console: None,
            out_of_memory: memory_limit.filter(|_| status.out_of_memory),
        },
        Outcome::Failed(Failure { exit_code, message, console }) => Finished { console, ..failed(exit_code, message) },
        Outcome::Cancelled(signal) => Finished {
            exit_code: u8::try_from(128 + signal).unwrap_or(EXIT_FAILED),
            failure: None,
            console: None,
            out_of_memory: None,
        },
        Outcome::Lost(Ending::Killed(signal)) => {
            failed(EXIT_FAILED, format!("the monitor was killed by signal {signal}"))
        }
        Outcome::Lost(Ending::Exited(code)) => {
            failed(EXIT_FAILED, format!("the monitor ended with code {code} and without a report"))
        }
    }
}

#[cfg(test)]
mod tests {
    use protocol::ExitStatus;

    use super::*;

    #[test]
    fn exit_codes_are_those_of_docker() {
        let code = |outcome| finished(outcome, Some(1)).exit_code;
        let status = ExitStatus { code: 7, out_of_memory: true, executed_us: 0 };
        assert_eq!(code(Outcome::Exited(status)), 7);
        assert_eq!(finished(Outcome::Exited(status), Some(1)).out_of_memory, Some(1));
        let failure = Failure { exit_code: 127, message: "not found".into(), console: None };
        assert_eq!(code(Outcome::Failed(failure)), 127);
        assert_eq!(code(Outcome::Cancelled(15)), 143);
        assert_eq!(code(Outcome::Lost(Ending::Killed(9))), 125);
        let lost = finished(Outcome::Lost(Ending::Killed(9)), None);
        assert_eq!(lost.failure.as_deref(), Some("the monitor was killed by signal 9"));
    }
}
