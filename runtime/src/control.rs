//! What can be done with a container that was made: how it is, to stop it, to kill it, to remove it, whatever state it and its
//! monitor are in.
//!
//! The monitor is asked first, through its API. One that does not answer is found by the lock that it holds, and killed
//! ([`crate::holders`]).

use std::io;
use std::time::{Duration, Instant};

use api::client::{Client, ClientError};
use api::model::{Container, ContainerState, ContainerStatus, Health, Kill};
use api::record::End;
use api::server::problem::ProblemKind;
use hyper::Method;
use thiserror::Error;
use tokio::time::timeout;

use crate::holders::{self, Holder, Outcome};
use crate::launch::last_error;
use crate::lock::{is_free, wait_free};
use crate::record::Record;
use crate::run::{CONFIG, NOTHING};
use crate::state::{Found, RunRoot, StateError};

/// How long a monitor may take to answer what it answers by itself.
pub const ANSWER: Duration = Duration::from_secs(5);
/// How long a monitor whose container has ended may take to end itself. Tests wait for it to pass.
const GOODBYE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 5 });
/// How long another command may take with a container that is to be removed by force.
const OTHERS: Duration = Duration::from_secs(20);
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
    /// Its restart policy is about to start it again.
    #[error("container {name} is restarting: wait until it runs")]
    Restarting {
        /// What people call it.
        name: String,
    },
    /// Something else is done with it.
    #[error("another command is at work on container {name}: try again")]
    Busy {
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
    /// Whether its monitor lives and does not answer.
    pub unresponsive: bool,
    /// Whether its monitor lives on although it has left the record of an end, or let go of what says that it lives.
    pub lingering: bool,
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

    /// Its path in the API, if it lives and is not about to be started again: nobody would answer before that.
    ///
    /// # Errors
    /// [`ControlError::NotRunning`], [`ControlError::Restarting`].
    pub fn living(&self) -> Result<String, ControlError> {
        match self.found.alive {
            true if self.is_restarting() => Err(ControlError::Restarting { name: self.name() }),
            true => Ok(self.path()),
            false => Err(ControlError::NotRunning { name: self.name() }),
        }
    }

    /// How it is: the monitor's word, or without one what it left.
    pub async fn status(&self) -> Status {
        let mut status = self.look().await;
        if let Some(damage) = &status.record.damage {
            status.state.error.get_or_insert_with(|| format!("its record is damaged: {damage}"));
        }
        status
    }

    async fn look(&self) -> Status {
        let told = |state, restarting| {
            let record = self.found.record.clone();
            Status { record, state, health: None, live: None, restarting, unresponsive: false, lingering: false }
        };
        if !self.found.alive {
            return Status { lingering: self.lingers().await, ..told(self.left(), false) };
        }
        // Nobody need be asked of what has ended; what is above it would not answer.
        if self.ended().is_some() {
            let lingering = self.lingers().await;
            // It may have been started again meanwhile.
            if let Some(mut end) = self.ended() {
                let restarting = !lingering && self.restarts(&end);
                if lingering {
                    end.state.error.get_or_insert_with(|| "its monitor lives on".to_owned());
                }
                return Status { lingering, ..told(end.state, restarting) };
            }
        }
        let being = |status| ContainerState { status, ..ContainerState::default() };
        if !self.was_started() {
            return told(being(ContainerStatus::Creating), false);
        }
        match timeout(ANSWER, self.client.get::<Container>(&self.path())).await {
            Ok(Ok(live)) => {
                let (state, health) = (live.state.clone(), live.health.clone());
                // One that says so is about to end.
                let lingering = state.status == ContainerStatus::Exited && self.lingers().await;
                Status { health, live: Some(live), lingering, ..told(state, false) }
            }
            answer => {
                if let Some(end) = self.ended() {
                    let restarting = self.restarts(&end);
                    return told(end.state, restarting);
                }
                // It was killed between two looks.
                if is_free(&self.found.folder) {
                    return told(self.gone().left(), false);
                }
                if matches!(answer, Ok(Err(ClientError::Connect { .. }))) {
                    return told(being(ContainerStatus::Creating), false);
                }
                let error = Some("its monitor does not answer".to_owned());
                let state = ContainerState { error, ..being(ContainerStatus::Running) };
                Status { unresponsive: true, ..told(state, false) }
            }
        }
    }

    /// How it ended, if its monitor has said so. A record says nothing else, whatever stands in it.
    fn ended(&self) -> Option<End> {
        let mut end = api::record::read(&self.found.monitor_folder()).ok().flatten()?;
        end.state.status = ContainerStatus::Exited;
        Some(end)
    }

    /// Whether its monitor lives on with the record of an end, or without its lock, for longer than it takes to end. Both are
    /// its own doing: one that was taken over may have done it to hide.
    async fn lingers(&self) -> bool {
        // Mostly there is none, which costs no thread to see.
        if !holders::is_monitored(&self.found.folder) {
            return false;
        }
        let folder = self.found.folder.clone();
        let waited = tokio::task::spawn_blocking(move || holders::wait_unmonitored(&folder, GOODBYE));
        !waited.await.unwrap_or(false)
    }

    /// Whether one that ended like this and has a lock is about to be started again.
    fn restarts(&self, end: &End) -> bool {
        self.found.record.restart.is_some() && !end.stopped
    }

    /// Whether it waits for its restart policy to start it again: nobody answers for it meanwhile.
    pub fn is_restarting(&self) -> bool {
        self.found.alive && self.ended().is_some_and(|end| self.restarts(&end))
    }

    /// Whether a restart policy given now would be followed: it does not live, or there is a process above its monitor.
    pub fn can_be_restarted(&self) -> bool {
        let supervised = || api::lock::open(&self.found.folder).ok().flatten();
        !self.found.alive
            || self.found.record.restart.is_some()
            || supervised().is_some_and(|lock| api::lock::owner(lock, api::lock::Byte::Supervisor).is_some())
    }

    fn was_started(&self) -> bool {
        self.found.folder.join(CONFIG).exists()
    }

    /// The same one, which does not live any more.
    fn gone(&self) -> Self {
        Self::new(self.root, Found { alive: false, ..self.found.clone() })
    }

    /// What a container that nobody lives in is.
    fn left(&self) -> ContainerState {
        if let Some(end) = self.ended() {
            return end.state;
        }
        if !self.was_started() {
            return ContainerState { status: ContainerStatus::Created, ..ContainerState::default() };
        }
        let error = last_error(&self.found.folder).unwrap_or_else(|| "its monitor was killed".to_owned());
        let (status, exit_code) = (ContainerStatus::Exited, Some(KILLED));
        ContainerState { status, exit_code, error: Some(error), ..ContainerState::default() }
    }

    /// Sends a signal to its first process. SIGKILL reaches it even where its monitor does not answer.
    ///
    /// # Errors
    /// It does not live, or the guest refuses.
    pub async fn kill(&self, signal: u8) -> Result<(), ControlError> {
        if signal == SIGKILL && !self.found.alive && self.lingers().await {
            return self.uncover();
        }
        let not_running = || ControlError::NotRunning { name: self.name() };
        if !self.found.alive {
            return Err(not_running());
        }
        if let Some(end) = self.ended() {
            // The record is its monitor's word: what lives on with it has not ended.
            if signal == SIGKILL && (self.restarts(&end) || !self.settle_now().await?) {
                return self.force();
            }
            return Err(not_running());
        }
        let stop = ENDING.contains(&signal) || signal == self.found.record.stop_signal;
        let monitor = holders::monitor(&self.found.folder);
        match self.signal(signal, stop).await {
            Ok(()) if signal == SIGKILL => self.see_off(monitor).await,
            Err(_) if signal == SIGKILL => self.end().await,
            sent => sent,
        }
    }

    /// Sees to it that a container has ended that was killed: that it was is the guest's word, and that it has ended the monitor's.
    async fn see_off(&self, monitor: Option<Holder>) -> Result<(), ControlError> {
        if self.told_end(ANSWER).await {
            // What is there later may be another one, which was started meanwhile.
            let gone = match monitor {
                Some(monitor) => monitor.has_ended(GOODBYE),
                None => self.settle_now().await?,
            };
            // With the record of an end and its lock it has something to deliver, or shows as lingering.
            let delivers = || self.ended().is_some_and(|end| !self.restarts(&end)) && !is_free(&self.found.folder);
            if gone || delivers() {
                return Ok(());
            }
        }
        self.end().await
    }

    /// Sends a signal; `stop` says that the container is meant to end of it.
    async fn signal(&self, signal: u8, stop: bool) -> Result<(), ControlError> {
        let (path, kill) = (format!("{}/kill", self.path()), Kill { signal, all: false, stop });
        match timeout(ANSWER, self.client.act(Method::POST, &path, Some(&kill))).await {
            Ok(Err(error)) if error.kind() == Some(ProblemKind::WrongState) => {
                Err(ControlError::NotRunning { name: self.name() })
            }
            Ok(sent) => Ok(sent?),
            Err(_) => Err(ControlError::Client(ClientError::Answer("it did not come in time".to_owned()))),
        }
    }

    /// Asks it to stop, and kills it when it has not after `grace`. One that does not live has stopped.
    ///
    /// # Errors
    /// Nothing ends it.
    pub async fn stop(&self, signal: u8, grace: Option<Duration>) -> Result<(), ControlError> {
        if !self.found.alive {
            return if self.lingers().await { self.uncover() } else { Ok(()) };
        }
        let status = self.status().await;
        if status.lingering {
            return self.force();
        }
        let has_ended = status.state.status == ContainerStatus::Exited;
        let asked = match status.live.map(|live| live.state.status) {
            Some(ContainerStatus::Running) => self.ask(signal, false).await,
            Some(ContainerStatus::Paused) => self.ask(signal, true).await,
            _ => false,
        };
        let stopped = has_ended || (asked && self.stopped(grace).await);
        // What was started again meanwhile, or before it could be asked, is ended too.
        if stopped && self.settle().await? { Ok(()) } else { self.end().await }
    }

    /// Asks one that runs to end; whether it was asked, or has ended meanwhile.
    async fn ask(&self, signal: u8, paused: bool) -> bool {
        if paused {
            // What stands still cannot be asked.
            let resume = format!("{}/resume", self.path());
            let _ = timeout(ANSWER, self.client.act(Method::POST, &resume, NOTHING)).await;
        }
        matches!(self.signal(signal, true).await, Ok(()) | Err(ControlError::NotRunning { .. }))
    }

    /// Waits for its end, and kills it when that takes too long; whether it has ended.
    async fn stopped(&self, grace: Option<Duration>) -> bool {
        let ended = match grace {
            Some(grace) => self.told_end(grace).await,
            None => self.wait().await.is_ok(),
        };
        ended || (self.signal(SIGKILL, true).await.is_ok() && self.told_end(ANSWER).await)
    }

    /// Whether its monitor tells its end in time.
    async fn told_end(&self, patience: Duration) -> bool {
        timeout(patience, self.wait()).await.is_ok_and(|ended| ended.is_ok())
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
            Err(ClientError::Gone(_) | ClientError::Connect { .. }) if self.settle_now().await? => {
                Ok(self.gone().left())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Ends its VM, and what would start it again: by asking, or else by force.
    ///
    /// # Errors
    /// Nothing ends it, or another command is at work on it.
    pub async fn end(&self) -> Result<(), ControlError> {
        if !self.found.alive {
            return Ok(());
        }
        let ending = match self.ended() {
            Some(end) => !self.restarts(&end),
            None => {
                matches!(timeout(ANSWER, self.client.act(Method::POST, "/v1/vm/shutdown", NOTHING)).await, Ok(Ok(())))
            }
        };
        if ending && self.settle_now().await? {
            return Ok(());
        }
        self.force()
    }

    /// Kills its monitor, and what would start it again.
    fn force(&self) -> Result<(), ControlError> {
        let ended = holders::end(&self.found.folder);
        match ended.map_err(|source| ControlError::System { step: "end a monitor", source })? {
            Outcome::Ended if holders::is_monitored(&self.found.folder) => self.uncover(),
            Outcome::Ended => Ok(()),
            Outcome::Undying(pid) => Err(ControlError::Undying { name: self.name(), pid: pid.as_raw_nonzero().get() }),
            Outcome::Busy => Err(ControlError::Busy { name: self.name() }),
        }
    }

    /// Kills whoever lives in its cgroup although nobody holds it: so does whoever takes it, to start or to remove it.
    fn uncover(&self) -> Result<(), ControlError> {
        match self.root.take(&self.found) {
            Ok(_) => Ok(()),
            Err(StateError::Alive { .. }) => Err(ControlError::Busy { name: self.name() }),
            Err(error) => Err(error.into()),
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
        let Status { state, restarting, lingering, .. } = self.status().await;
        if restarting || lingering || state.status != ContainerStatus::Exited {
            return Ok(false);
        }
        self.settle_now().await
    }

    /// As [`Control::settle`], of one that has said so. One that merely let go of its lock is not gone.
    async fn settle_now(&self) -> Result<bool, ControlError> {
        let waited = wait_free(&self.found.folder, GOODBYE);
        let free = waited.map_err(|source| ControlError::System { step: "wait for a monitor's end", source })?;
        Ok(free && !self.lingers().await)
    }

    /// Removes it with everything that is left of it; one that lives only with `force`.
    ///
    /// # Errors
    /// It lives, nothing ends it, or another command was faster.
    pub async fn remove(mut self, force: bool) -> Result<(), ControlError> {
        let deadline = Instant::now() + OTHERS;
        loop {
            if self.found.alive && !self.settle().await? {
                if !force {
                    return Err(StateError::Alive { id: self.name() }.into());
                }
                self.end().await?;
            }
            match self.root.take(&self.found) {
                Ok((state, _)) => return Ok(state.remove()?),
                // Another command has it: it is started, or about to be gone.
                Err(StateError::Alive { .. }) if force && Instant::now() < deadline => self.found.alive = true,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixListener;
    use std::process::Child;
    use std::thread;

    use super::*;
    use crate::directory::tests::Inhabitant;
    use crate::holders::tests::inhabit;
    use crate::spec::ContainerId;

    /// A container whose monitor has left the record of an end, and lives on in a role.
    fn ended(role: &str) -> (tempfile::TempDir, RunRoot, Found, Child) {
        let temporary = tempfile::tempdir().unwrap();
        let root = RunRoot::open_at(&temporary.path().join("run")).unwrap();
        let id = ContainerId::generate().unwrap();
        let mut state = root.create(&id, None).unwrap();
        let record = crate::record::tests::record(id.as_str(), None);
        state.write(crate::record::NAME, &serde_json::to_vec(&record).unwrap()).unwrap();
        state.write(CONFIG, b"{}").unwrap();
        fs::create_dir(state.monitor_folder()).unwrap();
        // It may say anything.
        let said = ContainerState { status: ContainerStatus::Created, exit_code: Some(0), ..ContainerState::default() };
        let end = End { state: said, ..End::default() };
        api::record::write(&api::folder::Folder::open(&state.monitor_folder()).unwrap(), &end).unwrap();
        state.keep(true);
        drop(state);
        let folder = root.path().join(id.as_str());
        let child = inhabit(&folder, role);
        let found = root.find(id.as_str()).unwrap();
        assert!(found.alive);
        (temporary, root, found, child)
    }

    fn wait<T>(future: impl Future<Output = T>) -> T {
        crate::run::runtime().unwrap().block_on(future)
    }

    #[test]
    fn a_monitor_that_lives_on_with_the_record_of_an_end_is_told_and_can_be_killed() {
        let (_temporary, root, found, mut child) = ended("alone");
        let control = Control::new(&root, found);
        let status = wait(control.status());
        assert!(status.lingering && !status.restarting && status.state.status == ContainerStatus::Exited, "{status:?}");
        assert!(matches!(wait(control.kill(15)), Err(ControlError::NotRunning { .. })));
        wait(control.kill(SIGKILL)).unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&child.wait().unwrap()), Some(9));
    }

    /// Says over a container's socket that it has done what it was told to, and has ended.
    fn lie(folder: &std::path::Path) {
        let listener = UnixListener::bind(folder.join(api::client::SOCKET)).unwrap();
        let state = ContainerState { status: ContainerStatus::Exited, exit_code: Some(0), ..ContainerState::default() };
        let id = folder.file_name().unwrap().to_string_lossy().into_owned();
        let (args, processes) = (Vec::new(), Vec::new());
        let container = Container { id, state: state.clone(), args, terminal: false, health: None, processes };
        thread::spawn(move || {
            for client in listener.incoming() {
                let mut client = client.unwrap();
                let mut request = [0; 1024];
                let count = client.read(&mut request).unwrap();
                let request = String::from_utf8_lossy(&request[..count]).into_owned();
                let (code, body) = match request.split_whitespace().nth(1).unwrap() {
                    path if path.ends_with("/wait") => (200, serde_json::to_string(&state).unwrap()),
                    _ if request.starts_with("POST") => (204, String::new()),
                    _ => (200, serde_json::to_string(&container).unwrap()),
                };
                let length = body.len();
                let head = format!("HTTP/1.1 {code} as you say\r\nConnection: close\r\nContent-Length: {length}\r\n");
                client.write_all(format!("{head}\r\n{body}").as_bytes()).unwrap();
            }
        });
    }

    #[test]
    fn a_monitor_that_only_says_that_its_container_has_ended_is_told_and_ended() {
        for stop in [false, true] {
            let (_temporary, root, found, mut child) = ended("alone");
            fs::remove_file(found.monitor_folder().join(api::record::NAME)).unwrap();
            lie(&found.folder);
            let control = Control::new(&root, found);
            let status = wait(control.status());
            assert!(status.lingering && status.live.is_some(), "{status:?}");
            if stop { wait(control.stop(15, None)) } else { wait(control.kill(SIGKILL)) }.unwrap();
            assert_eq!(std::os::unix::process::ExitStatusExt::signal(&child.wait().unwrap()), Some(9));
        }
    }

    #[test]
    fn a_monitor_that_says_that_it_was_killed_is_ended_whatever_it_holds() {
        for role in ["alone", "hidden"] {
            let (_temporary, root, found, mut child) = ended("brief");
            child.wait().unwrap();
            fs::remove_file(found.folder.join(holders::tests::READY)).unwrap();
            let Some(mut ghost) = Inhabitant::with(&found.folder, || inhabit(&found.folder, role)) else { return };
            fs::remove_file(found.monitor_folder().join(api::record::NAME)).unwrap();
            lie(&found.folder);
            wait(Control::new(&root, found).kill(SIGKILL)).unwrap();
            assert!(ghost.has_ended(), "{role}");
        }
    }

    #[test]
    fn a_monitor_that_let_go_of_its_lock_is_told_and_can_be_killed_and_stopped() {
        for stop in [false, true] {
            let (_temporary, root, mut found, mut child) = ended("brief");
            child.wait().unwrap();
            found.alive = false;
            let control = Control::new(&root, found);
            assert!(!wait(control.status()).lingering);
            assert!(matches!(wait(control.kill(SIGKILL)), Err(ControlError::NotRunning { .. })));
            let Some(mut ghost) = Inhabitant::new(&control.found.folder) else { return };
            assert!(wait(control.status()).lingering);
            assert!(matches!(wait(control.kill(15)), Err(ControlError::NotRunning { .. })));
            if stop { wait(control.stop(15, None)) } else { wait(control.kill(SIGKILL)) }.unwrap();
            assert!(ghost.has_ended() && control.found.folder.exists());
        }
    }

    #[test]
    fn a_monitor_that_says_goodbye_is_one_that_has_ended() {
        let (_temporary, root, found, mut child) = ended("brief");
        let control = Control::new(&root, found);
        let status = wait(control.status());
        assert!(!status.lingering && status.state.status == ContainerStatus::Exited, "{status:?}");
        assert!(matches!(wait(control.kill(SIGKILL)), Err(ControlError::NotRunning { .. })));
        child.wait().unwrap();
    }
}
