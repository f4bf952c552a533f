//! What can be done with a container that was made: how it is, to stop it, to kill it, to remove it, whatever state it and its
//! monitor are in.
//!
//! The monitor is asked first, through its API. One that does not answer is found by the lock file that it holds open, and
//! killed: the kernel says who lives, not a file with a number in it.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use api::client::{Client, ClientError};
use api::model::{Container, ContainerState, ContainerStatus, Health, Kill};
use api::server::problem::ProblemKind;
use hyper::Method;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use thiserror::Error;
use tokio::time::timeout;

use crate::launch::last_error;
use crate::record::Record;
use crate::run::{CONFIG, NOTHING};
use crate::state::{Found, RunRoot, StateError};

/// How long a monitor may take to answer what it answers by itself.
const ANSWER: Duration = Duration::from_secs(5);
/// How long a monitor whose container has ended may take to end itself.
const GOODBYE: Duration = Duration::from_secs(5);
/// How long a process that was killed for good may take to be gone.
const DEATH: Duration = Duration::from_secs(10);
/// The name that monitors run under (`comm` of proc(5)).
const COMM: &str = "cofferdam-vmm";
/// The exit code of what was killed.
const KILLED: u8 = 137;
const SIGKILL: u8 = 9;
/// The signals that are meant to end a program: SIGINT, SIGQUIT, SIGKILL, SIGTERM.
const ENDING: [u8; 4] = [2, 3, SIGKILL, 15];

/// Why something was not done.
#[derive(Debug, Error)]
pub enum ControlError {
    /// State on disk.
    #[error(transparent)]
    State(#[from] StateError),
    /// The monitor says no, or says nothing.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// It does not live.
    #[error("container {name} is not running")]
    NotRunning {
        /// What people call it.
        name: String,
    },
    /// It is about to live.
    #[error("container {name} is being started by another process: try again")]
    BeingStarted {
        /// What people call it.
        name: String,
    },
    /// Nothing ends it.
    #[error(
        "the monitor of container {name} (process {pid}) does not end, although it was killed: look at its state in /proc"
    )]
    Undying {
        /// What people call it.
        name: String,
        /// Its process id.
        pid: i32,
    },
    /// The system is out of something.
    #[error("cannot {step}")]
    System {
        /// What was tried.
        step: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// A container as it is now.
#[derive(Debug, Clone)]
pub struct Status {
    /// What it was made from.
    pub record: Record,
    /// Where it is in its life.
    pub state: ContainerState,
    /// How well it is, where somebody checks.
    pub health: Option<Health>,
    /// What its monitor says besides, while there is one.
    pub live: Option<Container>,
    /// Whether its restart policy is about to start it again.
    pub restarting: bool,
}

/// A container, and the way to its monitor.
#[derive(Debug)]
pub struct Control<'a> {
    root: &'a RunRoot,
    /// As it was found.
    pub found: Found,
    /// Its API.
    pub client: Client,
}

impl<'a> Control<'a> {
    /// Finds the container of a name, id, or beginning of an id.
    ///
    /// # Errors
    /// There is none, or more than one.
    pub fn find(root: &'a RunRoot, key: &str) -> Result<Self, ControlError> {
        Ok(Self::new(root, root.find(key)?))
    }

    /// Of one that was found.
    pub fn new(root: &'a RunRoot, found: Found) -> Self {
        let client = Client::new(&found.folder);
        Self { root, found, client }
    }

    /// Its path in the API.
    pub fn path(&self) -> String {
        format!("/v1/containers/{}", self.found.record.id)
    }

    fn name(&self) -> String {
        self.found.record.shown_name().to_owned()
    }

    /// Its path in the API, if it lives.
    ///
    /// # Errors
    /// [`ControlError::NotRunning`].
    pub fn living(&self) -> Result<String, ControlError> {
        if self.found.alive { Ok(self.path()) } else { Err(ControlError::NotRunning { name: self.name() }) }
    }

    /// How it is: the monitor's word, or without one what it left.
    pub async fn status(&self) -> Status {
        if self.found.alive
            && let Ok(Ok(live)) = timeout(ANSWER, self.client.get::<Container>(&self.path())).await
        {
            let (state, health) = (live.state.clone(), live.health.clone());
            return Status { record: self.found.record.clone(), state, health, live: Some(live), restarting: false };
        }
        let state = self.left();
        let restarting =
            self.found.alive && self.found.record.restart.is_some() && state.status == ContainerStatus::Exited;
        Status { record: self.found.record.clone(), state, health: None, live: None, restarting }
    }

    /// What a container without a monitor that answers is.
    fn left(&self) -> ContainerState {
        let folder = &self.found.folder;
        if let Ok(Some(end)) = api::record::read(folder) {
            return end.state;
        }
        let was_started = folder.join(CONFIG).exists();
        let status = match (self.found.alive, was_started) {
            (true, _) => ContainerStatus::Creating,
            (false, false) => ContainerStatus::Created,
            (false, true) => ContainerStatus::Exited,
        };
        if status != ContainerStatus::Exited {
            return ContainerState { status, ..ContainerState::default() };
        }
        let error = last_error(folder).unwrap_or_else(|| "its monitor was killed".to_owned());
        ContainerState { status, exit_code: Some(KILLED), error: Some(error), ..ContainerState::default() }
    }

    /// Sends a signal to its first process. SIGKILL reaches it even where its monitor does not answer.
    ///
    /// # Errors
    /// It does not live, or the guest refuses.
    pub async fn kill(&self, signal: u8) -> Result<(), ControlError> {
        let path = self.living()?;
        let stop = ENDING.contains(&signal) || signal == self.found.record.stop_signal;
        let kill = Kill { signal, all: false, stop };
        let sent = timeout(ANSWER, self.client.act(Method::POST, &format!("{path}/kill"), Some(&kill))).await;
        match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) if error.kind() == Some(ProblemKind::WrongState) && signal != SIGKILL => {
                Err(ControlError::NotRunning { name: self.name() })
            }
            Ok(Err(error)) if signal != SIGKILL => Err(error.into()),
            _ if signal == SIGKILL => self.end().await,
            _ => Err(ControlError::Client(ClientError::Answer("it did not come in time".to_owned()))),
        }
    }

    /// Asks it to stop, and kills it when it has not after `grace`. One that does not live has stopped.
    ///
    /// # Errors
    /// Nothing ends it.
    pub async fn stop(&self, signal: u8, grace: Option<Duration>) -> Result<(), ControlError> {
        if !self.found.alive {
            return Ok(());
        }
        let path = self.path();
        let Status { state, restarting, .. } = self.status().await;
        if restarting {
            return self.end().await;
        }
        let status = state.status;
        if status == ContainerStatus::Paused {
            // What stands still cannot be asked.
            let _ = timeout(ANSWER, self.client.act(Method::POST, &format!("{path}/resume"), NOTHING)).await;
        }
        let asked = match status {
            ContainerStatus::Running | ContainerStatus::Paused => self.kill(signal).await.is_ok(),
            ContainerStatus::Exited => true,
            _ => false,
        };
        if asked {
            let wait = self.wait();
            let ended = match grace {
                Some(grace) => timeout(grace, wait).await.is_ok_and(|ended| ended.is_ok()),
                None => wait.await.is_ok(),
            };
            if ended {
                return self.settle().await.map(drop);
            }
            let kill = Kill { signal: SIGKILL, all: false, stop: true };
            let killed = timeout(ANSWER, async {
                self.client.act(Method::POST, &format!("{path}/kill"), Some(&kill)).await?;
                self.wait().await
            });
            if matches!(killed.await, Ok(Ok(_))) {
                return self.settle().await.map(drop);
            }
        }
        self.end().await
    }

    /// Waits until it has ended, and gives how.
    ///
    /// # Errors
    /// Its monitor does not answer.
    pub async fn wait(&self) -> Result<ContainerState, ControlError> {
        if !self.found.alive {
            return Ok(self.left());
        }
        match self.client.get(&format!("{}/wait", self.path())).await {
            Ok(state) => Ok(state),
            // Its monitor has ended between two looks, or was killed.
            Err(ClientError::Gone(_) | ClientError::Connect { .. }) if !self.is_alive()? => {
                Ok(Self::new(self.root, Found { alive: false, ..self.found.clone() }).left())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn is_alive(&self) -> Result<bool, ControlError> {
        self.settle_now(GOODBYE).map(|ended| !ended)
    }

    /// Ends its VM: by asking, or else by force.
    ///
    /// # Errors
    /// Nothing ends it, or it is only about to live.
    pub async fn end(&self) -> Result<(), ControlError> {
        if !self.found.alive {
            return Ok(());
        }
        // Known before it is asked. Of somebody else's, or of one that is only about to live, there is none.
        let holders = holders(&self.found.folder);
        let asked = timeout(ANSWER, self.client.act(Method::POST, "/v1/vm/shutdown", NOTHING)).await;
        if matches!(asked, Ok(Ok(()))) && self.settle_now(GOODBYE)? {
            return Ok(());
        }
        for (_, process) in &holders {
            // It may have ended by itself.
            _ = pidfd_send_signal(process, Signal::KILL);
        }
        match (self.settle_now(if holders.is_empty() { GOODBYE } else { DEATH })?, holders.first()) {
            (true, _) => Ok(()),
            (false, Some((pid, _))) => {
                Err(ControlError::Undying { name: self.name(), pid: pid.as_raw_nonzero().get() })
            }
            (false, None) => Err(ControlError::BeingStarted { name: self.name() }),
        }
    }

    /// Waits for a monitor whose container has ended to be gone; whether it is.
    ///
    /// # Errors
    /// The system is out of something.
    pub async fn settle(&self) -> Result<bool, ControlError> {
        if !self.found.alive {
            return Ok(true);
        }
        if self.status().await.state.status != ContainerStatus::Exited {
            return Ok(false);
        }
        self.settle_now(GOODBYE)
    }

    fn settle_now(&self, patience: Duration) -> Result<bool, ControlError> {
        let waited = self.root.wait_unheld(&self.found, patience);
        waited.map_err(|source| ControlError::System { step: "wait for a monitor's end", source })
    }

    /// Removes it with everything that is left of it; one that lives only with `force`.
    ///
    /// # Errors
    /// It lives, or nothing ends it.
    pub async fn remove(self, force: bool) -> Result<(), ControlError> {
        if self.found.alive && !self.settle().await? {
            if !force {
                return Err(StateError::Alive { id: self.name() }.into());
            }
            self.end().await?;
        }
        match self.root.take(&self.found) {
            Ok(state) => state.remove(),
            // Another one was faster, or it went by itself.
            Err(StateError::NoSuchContainer { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

/// The monitors that hold the lock file of a state directory open. Each is known by a descriptor from before it was looked
/// at, so that its number cannot have become another process's.
fn holders(folder: &Path) -> Vec<(Pid, OwnedFd)> {
    let Ok(lock) = fs::metadata(folder.join(crate::state::LOCK)) else { return Vec::new() };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()).filter_map(Pid::from_raw);
    let is_lock = |entry: fs::DirEntry| {
        fs::metadata(entry.path()).is_ok_and(|file| (file.dev(), file.ino()) == (lock.dev(), lock.ino()))
    };
    let holds = |pid: &Pid| {
        let process = Path::new("/proc").join(pid.as_raw_nonzero().to_string());
        let comm = fs::read_to_string(process.join("comm")).unwrap_or_default();
        // In one that ends, the first thread lets go before the others do.
        let threads = || fs::read_dir(process.join("task")).into_iter().flatten().flatten();
        let files = |thread: fs::DirEntry| fs::read_dir(thread.path().join("fd")).into_iter().flatten().flatten();
        comm.trim_end() == COMM && threads().flat_map(files).any(is_lock)
    };
    numbers
        .filter_map(|pid| pidfd_open(pid, PidfdFlags::empty()).ok().filter(|_| holds(&pid)).map(|fd| (pid, fd)))
        .collect()
}
