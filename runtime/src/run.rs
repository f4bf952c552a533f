//! From a request to a running container: check everything, make the state directory, start the monitor; and, in the
//! foreground, be its front end until it ends.
//!
//! Nothing here waits but for the container. What can be done while the guest boots (sweeping up after killed runs) is
//! done then.

use std::env::{self, VarError};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::Duration;

use api::client::{Client, ClientError};
use api::config::{ContainerConfig, JailConfig, LaunchConfig};
use api::control::EXIT_FAILED;
use api::model::ContainerState;
use api::record::End;
use image::Image;
use jailer::{JailError, Place, cgroup};
use nix::sys::signal::Signal;
use thiserror::Error;

use crate::attach::{Attach, AttachError, Attached, Followed};
use crate::holders;
use crate::launch::{Ending, Launch, LaunchError, Monitor, last_error};
use crate::lock::wait_free;
use crate::merge::MergeError;
use crate::paths::{self, PathError};
use crate::record::{self, Record, SIGTERM};
use crate::request::{EnvEntry, RequestError, RunRequest, SignalName, Way};
use crate::signals::{self, Signals};
use crate::size::{Host, SizeError, Sizes};
use crate::spec::{self, ContainerId, SpecError};
use crate::state::{RunRoot, StateDirectory, StateError};
use crate::terminal::{self, TerminalError};
use crate::timeline::{self, RunTimeline};

/// The name of the document that a monitor is started with, in its state directory.
pub(crate) const CONFIG: &str = "config.json";
/// How long a monitor may take to end that has said that its container has ended: those who are attached to its other
/// processes may take ten seconds to read the last of their output, and one more for their answers (crate `api`).
const GOODBYE: Duration = Duration::from_secs(15);
/// How long a monitor, or what is above one, may take to give up a container that did not start.
const GIVING_UP: Duration = Duration::from_secs(5);

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
    /// Its cgroup.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// Being its front end.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// Its API.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The system is out of something.
    #[error("cannot {step}")]
    System {
        /// What was tried.
        step: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The image that a container was made from is gone.
    #[error("the image {image} of container {id} is not in the store any more: pull it again")]
    ImageGone {
        /// The image as it was named.
        image: String,
        /// The container.
        id: String,
    },
    /// A word of the image's.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// It did not get as far as running.
    #[error("{message}")]
    Failed {
        /// Why, in one line.
        message: String,
        /// What to tell of it: 126 and 127 when there was nothing to execute, else 125.
        exit_code: u8,
    },
    /// A signal came first.
    #[error("a signal came before it was started: {0}")]
    Cancelled(Signal),
    /// A variable of the caller's cannot be handed on.
    #[error("the value of the environment variable {name} is not UTF-8: give it with -e {name}=VALUE")]
    NotUtf8 {
        /// Its name.
        name: String,
    },
    /// Flags that exclude each other.
    #[error("--rm and --restart exclude each other: leave one of them out")]
    RemovedAndRestarted,
    /// There are no random numbers.
    #[error("cannot choose an id for the container")]
    Id(#[source] io::Error),
    /// The document does not encode.
    #[error("cannot write the monitor's configuration")]
    Encode(#[source] serde_json::Error),
}

/// How a run ended, for whoever asked for it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
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
}

/// A container whose state directory is made.
#[derive(Debug)]
pub struct Container {
    /// What it was made from.
    pub record: Record,
    state: StateDirectory,
    signals: Signals,
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
        if request.remove && request.restart.0.is_some() {
            return Err(RunError::RemovedAndRestarted);
        }
        let sizes = Sizes::new(request.cpus, request.memory, Host::read())?;
        if request.terminal && request.interactive && request.way == Way::Foreground {
            terminal::check()?;
        }
        // That they are there is said before an image is pulled.
        paths::kernel(request.kernel.as_deref())?;
        paths::initramfs()?;
        paths::monitor()?;
        Ok(Self { sizes, request })
    }

    /// Makes the container of an image that was named `name`.
    ///
    /// # Errors
    /// Request and image together make no container, or its name is in use; nothing of it is left.
    pub fn create(self, image: &Image, name: &str) -> Result<Container, RunError> {
        let Self { request, sizes } = self;
        let id = ContainerId::generate().map_err(RunError::Id)?;
        let window = request.terminal.then(terminal::window_size);
        let spec = spec::container(&id, &request, &image.config, sizes, window, |name| env::var(name).ok())?;
        // As docker has it, only what is started and left alone waits for one client's input after another's.
        let stdin_once = request.way != Way::Detached;
        let container = ContainerConfig { spec, stdin: request.interactive, stdin_once, wait_for_attach: false };
        let record = Record {
            id: id.as_str().to_owned(),
            name: request.name.clone(),
            image: name.to_owned(),
            image_id: image.id.clone(),
            created_ns: timeline::wall_clock_ns(),
            auto_remove: request.remove,
            restart: request.restart.0,
            stop_signal: stop_signal(&request, image)?,
            labels: request.labels,
            vcpus: sizes.vcpus,
            memory_mib: sizes.memory_mib,
            kernel: request.kernel,
            waits: request.way == Way::Created,
            container,
            damage: None,
        };
        let root = RunRoot::open()?;
        // From here on signals are read, not delivered, so that whatever comes everything below is undone.
        let signals = block()?;
        let state = root.create(&id, record.name.as_deref())?;
        state.write(record::NAME, &serde_json::to_vec(&record).map_err(RunError::Encode)?)?;
        Ok(Container { record, state, signals })
    }
}

fn block() -> Result<Signals, RunError> {
    Signals::block().map_err(|source| RunError::System { step: "block signals", source })
}

fn stop_signal(request: &RunRequest, image: &Image) -> Result<u8, RunError> {
    match (request.stop_signal, &image.config.stop_signal) {
        (Some(signal), _) => Ok(signal.0),
        (None, Some(name)) if !name.is_empty() => Ok(name.parse::<SignalName>()?.0),
        _ => Ok(SIGTERM),
    }
}

impl Container {
    /// A container that was made before and does not live.
    ///
    /// # Errors
    /// The system is out of something.
    pub fn again(record: Record, state: StateDirectory) -> Result<Self, RunError> {
        Ok(Self { record, state, signals: block()? })
    }

    /// Leaves it as it is, to be started later, and gives its id.
    pub fn keep(mut self) -> String {
        self.state.keep(true);
        self.record.id
    }

    /// Starts its monitor; `attached` says that whoever starts it attaches at once.
    fn launch(&self, image: &Image, attached: bool) -> Result<Monitor, RunError> {
        let record = &self.record;
        let kernel = paths::kernel(record.kernel.as_deref())?;
        let sizes = (record.vcpus, record.memory_mib);
        let vm = spec::vm(sizes, kernel, paths::initramfs()?, image.lease.as_raw_fd());
        let monitor = paths::monitor()?;
        let folder = Some(self.state.path().join(api::folder::NAME));
        let mut container = ContainerConfig { wait_for_attach: attached, ..record.container.clone() };
        if attached && let Some(window) = &mut container.spec.process.terminal {
            // It may have been made on another terminal.
            *window = terminal::window_size();
        }
        let plan = cgroup::Plan::new(&record.id)?;
        let jail = JailConfig { cgroups: plan.folders(), ..JailConfig::default() };
        let bounds = jail.bounds(&vm);
        let restart = record.restart;
        self.state.forget_groups_but(&jail.cgroups);
        let document = LaunchConfig { vm, container: Some(container), folder, restart, jail };
        let document = serde_json::to_vec(&document).map_err(RunError::Encode)?;
        let config = self.state.write(CONFIG, &document)?;
        // It is written down by now, so that whoever removes the container removes it.
        let group = plan.make(&bounds)?;
        let launch = Launch {
            monitor: &monitor,
            state: &self.state,
            config: &config,
            image: image.lease.as_fd(),
            mask: &self.signals.children,
            place: record.restart.is_none().then_some(Place { network: None, cgroup: Some(&group) }),
        };
        // Last, so that what could not be started is what it was.
        self.state.forget_end();
        Ok(launch.spawn()?)
    }

    /// Starts it and leaves it alone as soon as its program runs. Gives its id.
    ///
    /// # Errors
    /// It did not get as far, or a signal came first.
    pub fn start_detached(mut self, image: &Image) -> Result<String, RunError> {
        let mut monitor = self.launch(image, false)?;
        self.state.release_lock();
        // Like one that was run in the foreground, it stays to be looked at.
        self.state.keep(!self.record.auto_remove);
        match runtime().and_then(|runtime| runtime.block_on(self.begin())) {
            Ok(ContainerState { error: Some(message), exit_code, started_ns, .. })
                if started_ns.is_none() || self.record.restart.is_none() =>
            {
                self.see_off(&mut monitor)?;
                Err(RunError::Failed { message, exit_code: exit_code.unwrap_or(EXIT_FAILED) })
            }
            Ok(_) => {
                monitor.release();
                self.state.keep(true);
                Ok(self.record.id.clone())
            }
            Err(RunError::Client(error)) => {
                let message = self.explain(&mut monitor, &error);
                Err(RunError::Failed { message, exit_code: EXIT_FAILED })
            }
            Err(error) => {
                self.end(&monitor);
                Err(error)
            }
        }
    }

    /// Waits until its program runs, or cannot.
    async fn begin(&self) -> Result<ContainerState, RunError> {
        let client = Client::new(self.state.path());
        let waiter = self.signals.wait().map_err(receiving)?;
        let path = format!("/v1/containers/{}/wait?started=true", self.record.id);
        // While the guest boots. What cannot be swept now is left to the next one.
        let sweep = async { _ = RunRoot::open().map(|root| root.sweep()) };
        let started = async { tokio::join!(client.get::<ContainerState>(&path), sweep).0 };
        let started = waiter.unless_cancelled(started).await.map_err(receiving)?;
        Ok(started.map_err(RunError::Cancelled)??)
    }

    /// Starts it and is its front end until it ends; with `stdin`, our standard input is its own, if it takes any. The times
    /// it took are left in `times`.
    ///
    /// # Errors
    /// The container was not run.
    pub fn run(mut self, image: &Image, stdin: bool, times: &mut RunTimeline) -> Result<Finished, RunError> {
        let limit = self.record.container.spec.limits.memory_bytes.unwrap_or(0);
        times.monitor_spawning = timeline::now();
        let mut monitor = self.launch(image, true)?;
        self.state.release_lock();
        times.monitor_spawned = timeline::now();
        // Whatever becomes of us, it is the container's process.
        monitor.release();
        self.state.keep(!self.record.auto_remove);
        let finished = match runtime().and_then(|runtime| runtime.block_on(self.follow(stdin))) {
            Ok(Followed::Ended(state)) => finished(state, limit),
            Ok(Followed::Detached) => {
                self.state.keep(true);
                return Ok(Finished::default());
            }
            Ok(Followed::Lost { message, ended }) => {
                let finished = Finished { exit_code: EXIT_FAILED, failure: Some(message), ..Finished::default() };
                if !ended {
                    self.state.keep(true);
                    return Ok(finished);
                }
                finished
            }
            Ok(Followed::Unheard) => {
                // As a program of one's own would end that nobody listens to.
                self.end(&monitor);
                Finished { exit_code: UNHEARD, ..Finished::default() }
            }
            Ok(Followed::Cancelled(signal)) => {
                self.end(&monitor);
                Finished { exit_code: signals::exit_code(signal), ..Finished::default() }
            }
            Err(RunError::Client(error) | RunError::Attach(AttachError::Client(error))) => {
                let message = self.explain(&mut monitor, &error);
                Finished { exit_code: EXIT_FAILED, failure: Some(message), ..Finished::default() }
            }
            Err(error) => {
                self.end(&monitor);
                return Err(error);
            }
        };
        // Its monitor goes on, unless it was ended.
        if self.record.restart.is_some() {
            return Ok(finished);
        }
        // What it leaves is removed, or can be started again, when it is gone.
        monitor.see_out(&self.signals, GOODBYE).map_err(reaping)?;
        if let Ok(Some(end)) = api::record::read(&self.state.monitor_folder()) {
            times.finish(&end);
        }
        Ok(finished)
    }

    async fn follow(&self, stdin: bool) -> Result<Followed<ContainerState>, RunError> {
        let client = Client::new(self.state.path());
        let path = format!("/v1/containers/{}", self.record.id);
        let waiter = self.signals.wait().map_err(receiving)?;
        let container = &self.record.container;
        let attach = Attach { stdin: stdin && container.stdin, terminal: container.spec.process.terminal.is_some() };
        let attaching = format!("{path}/attach");
        let streams = waiter.unless_cancelled(client.upgrade(&attaching, NOTHING)).await.map_err(receiving)?;
        let streams = match streams {
            Ok(streams) => streams?,
            Err(signal) => return Ok(Followed::Cancelled(signal)),
        };
        // While the guest boots.
        RunRoot::open()?.sweep();
        let attached = Attached::begin(streams, path.clone(), attach)?;
        let end = async { Ok::<_, RunError>(client.get::<ContainerState>(&format!("{path}/wait")).await?) };
        attached.follow(&client, &waiter, end).await
    }

    /// Ends its monitor, and what would start it again.
    fn end(&self, monitor: &Monitor) {
        monitor.kill();
        // Nobody else can be at work on it but those who want its end too.
        _ = holders::end(self.state.path());
    }

    /// Waits for the end of a monitor whose container did not start: it leaves a record.
    fn see_off(&self, monitor: &mut Monitor) -> Result<(), RunError> {
        if self.record.restart.is_none() {
            return monitor.see_out(&self.signals, GIVING_UP).map(drop).map_err(reaping);
        }
        // Without a record, as on a full disk, what is above it would try for ever.
        if !wait_free(self.state.path(), GIVING_UP).map_err(reaping)? {
            self.end(monitor);
        }
        Ok(())
    }

    /// Why a monitor's API broke off or said no, in one line; nothing of it lives on.
    fn explain(&self, monitor: &mut Monitor, error: &ClientError) -> String {
        if let ClientError::Problem(problem) = error {
            self.end(monitor);
            return problem.detail.clone();
        }
        // What is above a monitor does not end by itself, and how it is ended says nothing.
        let ending = if self.record.restart.is_some() {
            self.end(monitor);
            None
        } else {
            monitor.see_out(&self.signals, GIVING_UP).ok().flatten()
        };
        let end = api::record::read(&self.state.monitor_folder());
        if let Ok(Some(End { state: ContainerState { error: Some(error), .. }, .. })) = end {
            return error;
        }
        match (ending, last_error(self.state.path())) {
            (Some(Ending::Killed(signal)), _) => format!("the monitor was killed by signal {signal}"),
            (_, Some(line)) => line,
            (Some(Ending::Exited(code)), None) => format!("the monitor ended with code {code} and without a report"),
            (None, None) => api::session::chain(error),
        }
    }
}

fn receiving(source: io::Error) -> RunError {
    RunError::System { step: "receive signals", source }
}

fn reaping(source: io::Error) -> RunError {
    RunError::System { step: "wait for the monitor", source }
}

/// The exit code of a program that SIGPIPE ends.
pub const UNHEARD: u8 = 128 + 13;

/// No body.
pub const NOTHING: Option<&()> = None;

/// A runtime for one conversation.
///
/// # Errors
/// The system is out of something.
pub fn runtime() -> Result<tokio::runtime::Runtime, RunError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
    runtime.map_err(|source| RunError::System { step: "talk to the VM", source })
}

fn finished(state: ContainerState, memory_limit: u64) -> Finished {
    Finished {
        exit_code: state.exit_code.unwrap_or(EXIT_FAILED),
        failure: state.error,
        console: state.console,
        out_of_memory: state.out_of_memory.then_some(memory_limit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finished_container_has_its_own_code() {
        let state = ContainerState { exit_code: Some(7), out_of_memory: true, ..ContainerState::default() };
        let done = finished(state, 1);
        assert_eq!((done.exit_code, done.out_of_memory, done.failure), (7, Some(1), None));
        let lost = ContainerState { error: Some("the VM died".to_owned()), ..ContainerState::default() };
        assert_eq!(finished(lost, 1).exit_code, EXIT_FAILED);
    }
}
