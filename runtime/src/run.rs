//! One foreground run: check everything, make the state directory, start the monitor, follow it, clean up.
//!
//! Nothing here waits but for the container. What can be done while the guest boots (sweeping up after killed runs) is
//! done then.

use std::env::{self, VarError};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::PathBuf;

use api::config::LaunchConfig;
use api::control::{EXIT_FAILED, Failure};
use image::Image;
use thiserror::Error;

use crate::launch::{Ending, Launch, LaunchError};
use crate::merge::MergeError;
use crate::paths::{self, PathError};
use crate::request::{EnvEntry, RunRequest};
use crate::size::{Host, SizeError, Sizes};
use crate::spec::{self, ContainerId, SpecError};
use crate::state::{RunRoot, StateError};
use crate::supervise::{Outcome, Signals, SuperviseError, supervise};
use crate::terminal::{self, RawMode, TerminalError};
use crate::timeline::{self, RunTimeline};

/// Why a container was not run.
#[derive(Debug, Error)]
pub enum RunError {
    /// Names.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Amounts.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// Request and image together.
    #[error(transparent)]
    Merge(#[from] MergeError),
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
    /// A variable of the caller's cannot be handed on.
    #[error("the value of the environment variable {name} is not UTF-8: give it with -e {name}=VALUE")]
    NotUtf8 {
        /// Its name.
        name: String,
    },
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

/// A request that is in order as far as that can be told without its image.
#[derive(Debug)]
pub struct Plan {
    request: RunRequest,
    sizes: Sizes,
    monitor: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl Plan {
    /// Checks a request against this host: what would fail later fails here, before an image is pulled for it.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn new(request: RunRequest) -> Result<Self, RunError> {
        request.name.as_deref().map_or(Ok(()), spec::check_name)?;
        request.hostname.as_deref().map_or(Ok(()), spec::check_hostname)?;
        for entry in &request.environment {
            if let EnvEntry::Inherit(name) = entry
                && let Err(VarError::NotUnicode(_)) = env::var(name)
            {
                return Err(RunError::NotUtf8 { name: name.clone() });
            }
        }
        let sizes = Sizes::new(request.cpus, request.memory, Host::read())?;
        if takes_keys(&request) {
            terminal::check()?;
        }
        let kernel = paths::kernel(request.kernel.as_deref())?;
        Ok(Self { sizes, monitor: paths::monitor()?, kernel, initramfs: paths::initramfs()?, request })
    }

    /// Runs the container to its end. The times it took are left in `times`.
    ///
    /// # Errors
    /// The container was not run, and nothing of it is left.
    pub fn run(self, image: &Image, times: &mut RunTimeline) -> Result<Finished, RunError> {
        let Self { request, sizes, monitor, kernel, initramfs } = self;
        let id = ContainerId::generate().map_err(RunError::Id)?;
        let window = request.terminal.then(terminal::window_size);
        let container = spec::container(&id, &request, &image.config, sizes, window, |name| env::var(name).ok())?;
        let vm = spec::vm(sizes, kernel, initramfs, image.lease.as_raw_fd());
        let document =
            serde_json::to_vec(&LaunchConfig { vm, container: Some(container) }).map_err(RunError::Encode)?;

        // From here on signals are read, not delivered, so that whatever comes everything below is undone.
        let signals = Signals::block()?;
        let root = RunRoot::open()?;
        let state = root.create(&id, request.name.as_deref())?;
        let config = state.write("config.json", &document)?;
        let raw = takes_keys(&request).then(RawMode::enter).transpose()?;
        let launch = Launch {
            monitor: &monitor,
            config: &config,
            image: image.lease.as_fd(),
            stdin: request.interactive,
            mask: &signals.children,
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
        Ok(finished(outcome, sizes.memory_limit))
    }
}

/// Whether the caller's keys go to the container. A terminal that only shows output needs none of ours.
fn takes_keys(request: &RunRequest) -> bool {
    request.terminal && request.interactive
}

fn finished(outcome: Outcome, memory_limit: u64) -> Finished {
    let failed =
        |exit_code, message: String| Finished { exit_code, failure: Some(message), console: None, out_of_memory: None };
    match outcome {
        Outcome::Exited(status) => Finished {
            exit_code: status.code,
            failure: None,
            console: None,
            out_of_memory: status.out_of_memory.then_some(memory_limit),
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
        let code = |outcome| finished(outcome, 1).exit_code;
        let status = ExitStatus { code: 7, out_of_memory: true, executed_us: 0, agent_resident_kib: 0 };
        assert_eq!(code(Outcome::Exited(status)), 7);
        assert_eq!(finished(Outcome::Exited(status), 1).out_of_memory, Some(1));
        let failure = Failure { exit_code: 127, message: "not found".into(), console: None };
        assert_eq!(code(Outcome::Failed(failure)), 127);
        assert_eq!(code(Outcome::Cancelled(15)), 143);
        assert_eq!(code(Outcome::Lost(Ending::Killed(9))), 125);
        let lost = finished(Outcome::Lost(Ending::Killed(9)), 1);
        assert_eq!(lost.failure.as_deref(), Some("the monitor was killed by signal 9"));
    }
}
