//! The VM as the API sees it: its containers, where each is in its life, and what happened.
//!
//! ```text
//!            create             agent's answer           start             agent's answer
//!   (none) ---------> creating ---------------> created ---------> starting ------------> running <--> paused
//!                         |                        |                  |                      |           |
//!                         +------------------------+------------------+----------------------+-----------+--> exited
//! ```
//! One lock guards it, never held while anything is waited for; whoever waits for a change is woken by every one and
//! looks again. What the guest says is believed only where it fits the state.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocol::container::ContainerSpec;
use protocol::report::{Health as AgentHealth, HealthStatus};
use protocol::{ExitStatus, FromAgent, Hello};
use tokio::sync::watch;

use super::problem::{Problem, ProblemKind};
use super::streams::Streams;
use crate::model::{
    Container, ContainerState, ContainerStatus, Event, EventKind, Health, HealthState, Process, ProcessState, VmBoot,
    VmState,
};
use crate::session::{SessionError, now, wall_clock_ns};

/// The events that are kept for those who ask late.
const EVENTS_MAX: usize = 1024;
/// The most containers of a VM.
const CONTAINERS_MAX: usize = 64;
/// The most processes of a container that run besides its first one.
const PROCESSES_MAX: usize = 512;
/// The processes that have ended and are remembered, for each container.
const ENDED_PROCESSES_MAX: usize = 512;

/// A container of the VM.
#[derive(Debug)]
pub struct Entry {
    /// What it was created from.
    pub spec: Arc<ContainerSpec>,
    /// Where it is in its life.
    pub state: ContainerState,
    /// The streams of its first process.
    pub streams: Arc<Streams>,
    /// Whether what it wrote last may still be on its way to the log and to readers.
    pub draining: bool,
    health: Option<Health>,
    processes: BTreeMap<String, ProcessEntry>,
    /// The ids of processes that have ended, oldest first.
    ended: VecDeque<String>,
}

/// A process that was executed in a container.
#[derive(Debug)]
pub struct ProcessEntry {
    /// What is told of it.
    pub shown: Process,
    /// Its streams.
    pub streams: Arc<Streams>,
    /// Whether what it wrote last may still be on its way.
    pub draining: bool,
}

/// Everything that changes.
#[derive(Debug)]
pub struct State {
    /// Where the VM is in its life.
    pub vm: VmState,
    /// When each part of its start was over.
    pub boot: VmBoot,
    /// How many vCPUs the guest uses, once it was asked to use less than all.
    pub vcpus: Option<u8>,
    /// Its containers.
    pub containers: BTreeMap<String, Entry>,
    events: VecDeque<Event>,
    next_event: u64,
}

/// The state, and a way to wait for its changes.
#[derive(Debug)]
pub struct Vm {
    state: Mutex<State>,
    changes: watch::Sender<u64>,
}

impl Default for Vm {
    fn default() -> Self {
        let (containers, events) = (BTreeMap::new(), VecDeque::new());
        let boot = VmBoot::default();
        let state = State { vm: VmState::Booting, boot, vcpus: None, containers, events, next_event: 1 };
        Self { state: Mutex::new(state), changes: watch::Sender::new(0) }
    }
}

impl Vm {
    /// The state as it is. Not to be held across anything that waits.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, and wakes everybody who waits for a change.
    pub fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state());
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
        result
    }

    /// Waits until `look` finds what it looks for.
    pub async fn until<T>(&self, mut look: impl FnMut(&mut State) -> Option<T>) -> T {
        let mut changes = self.changes.subscribe();
        loop {
            changes.mark_unchanged();
            if let Some(found) = look(&mut self.state()) {
                return found;
            }
            if changes.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// The agent's first words.
    pub fn ready(&self, hello: &Hello) {
        self.change(|state| {
            state.boot.agent_ready_ns = now();
            state.boot.guest_agent_started_us = hello.started_us;
            state.boot.guest_agent_ready_us = hello.ready_us;
            if state.vm == VmState::Booting {
                state.vm = VmState::Running;
            }
            state.tell(EventKind::VmReady);
        });
    }

    /// What the agent reports of a container. What does not fit its state is a broken rule.
    ///
    /// # Errors
    /// Which rule.
    pub fn hear(&self, message: FromAgent) -> Result<Option<Drained>, SessionError> {
        self.change(|state| match message {
            FromAgent::Exited { container, status } => state.exited(&container, status).map(Some),
            FromAgent::ProcessExited { container, process, code } => {
                state.process_exited(&container, &process, code).map(Some)
            }
            FromAgent::OutOfMemory { container } => {
                state.living(&container)?;
                state.tell(EventKind::OutOfMemory { container });
                Ok(None)
            }
            FromAgent::Health { container, health } => state.health(container, health).map(|()| None),
            FromAgent::Hello(_) | FromAgent::Reply { .. } => Err(UNFIT),
        })
    }
}

const UNFIT: SessionError = SessionError::Protocol("a message does not fit the state of the container");

/// Something whose streams are to be followed to their end.
#[derive(Debug)]
pub struct Drained {
    /// The container.
    pub container: String,
    /// The process, unless it is the container's first one.
    pub process: Option<String>,
    /// Its streams.
    pub streams: Arc<Streams>,
}

impl State {
    /// Notes what happened.
    pub fn tell(&mut self, kind: EventKind) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(Event { sequence: self.next_event, time_ns: wall_clock_ns(), kind });
        self.next_event += 1;
    }

    /// The events from a number on that are still kept.
    pub fn events_from(&self, sequence: u64) -> Vec<Event> {
        self.events.iter().filter(|event| event.sequence >= sequence).cloned().collect()
    }

    /// Adds a container that is being created.
    ///
    /// # Errors
    /// There is one with its id that has not ended, or there are too many.
    pub fn add(&mut self, spec: Arc<ContainerSpec>, streams: Arc<Streams>) -> Result<(), Problem> {
        self.may_add(&spec.id)?;
        let health = spec.health_check.as_ref().map(|_| Health {
            status: HealthState::Starting,
            failing_streak: 0,
            exit_code: None,
            output: String::new(),
        });
        let entry = Entry {
            state: ContainerState::default(),
            streams,
            draining: false,
            health,
            processes: BTreeMap::new(),
            ended: VecDeque::new(),
            spec,
        };
        self.containers.insert(entry.spec.id.clone(), entry);
        Ok(())
    }

    /// Whether a container of this id could be added.
    ///
    /// # Errors
    /// As [`State::add`].
    pub fn may_add(&self, id: &str) -> Result<(), Problem> {
        if self.containers.contains_key(id) {
            return Err(Problem::new(
                ProblemKind::AlreadyExists,
                format!("the VM has a container {id}: delete it first"),
            ));
        }
        if self.containers.len() >= CONTAINERS_MAX {
            let detail = format!("the VM has {CONTAINERS_MAX} containers: delete one first");
            return Err(Problem::new(ProblemKind::TooManyRequests, detail));
        }
        Ok(())
    }

    /// The container of this id.
    ///
    /// # Errors
    /// There is none.
    pub fn container(&mut self, id: &str) -> Result<&mut Entry, Problem> {
        self.containers.get_mut(id).ok_or_else(|| Problem::no_container(id))
    }

    /// The container that something is reported of. Reports may come before whoever asked has noted the answer.
    fn living(&mut self, id: &str) -> Result<&mut Entry, SessionError> {
        let entry = self.containers.get_mut(id).ok_or(UNFIT)?;
        if entry.state.status == ContainerStatus::Exited { Err(UNFIT) } else { Ok(entry) }
    }

    /// The agent has created the container, or says why it has not.
    pub fn created(&mut self, id: &str, result: Result<(), &Problem>) {
        let Some(entry) = self.containers.get_mut(id) else { return };
        match result {
            Ok(()) if entry.state.status == ContainerStatus::Creating => {
                entry.state.status = ContainerStatus::Created;
                self.tell(EventKind::Created { container: id.to_owned() });
            }
            Ok(()) => {}
            Err(problem) => self.failed(id, problem),
        }
    }

    /// The agent has executed the container's program, or says why it has not.
    pub fn started(&mut self, id: &str, result: Result<(), &Problem>) {
        let Some(entry) = self.containers.get_mut(id) else { return };
        match result {
            Ok(()) if matches!(entry.state.status, ContainerStatus::Starting | ContainerStatus::Created) => {
                entry.state.status = ContainerStatus::Running;
                entry.state.started_ns = Some(wall_clock_ns());
                self.tell(EventKind::Started { container: id.to_owned() });
            }
            Ok(()) => {}
            Err(problem) => self.failed(id, problem),
        }
    }

    fn failed(&mut self, id: &str, problem: &Problem) {
        let Some(entry) = self.containers.get_mut(id) else { return };
        // What the end of the guest means is said for all containers at once, with its cause.
        if entry.state.status == ContainerStatus::Exited || problem.kind == ProblemKind::GuestEnded {
            return;
        }
        entry.state.status = ContainerStatus::Exited;
        entry.state.finished_ns = Some(wall_clock_ns());
        entry.state.exit_code = Some(exit_code(problem.kind));
        entry.state.error = Some(problem.detail.clone());
        self.tell(EventKind::Failed { container: id.to_owned(), error: problem.detail.clone() });
    }

    fn exited(&mut self, id: &str, status: ExitStatus) -> Result<Drained, SessionError> {
        // Whoever asked for the start may not have noted the answers yet.
        self.living(id)?;
        self.created(id, Ok(()));
        if status.executed_us != 0 {
            self.started(id, Ok(()));
        }
        let entry = self.living(id)?;
        entry.state.status = ContainerStatus::Exited;
        entry.state.finished_ns = Some(wall_clock_ns());
        entry.state.exit_code = Some(status.code);
        entry.state.out_of_memory = status.out_of_memory;
        entry.state.executed_us = status.executed_us;
        entry.state.agent_resident_kib = status.agent_resident_kib;
        entry.draining = true;
        let drained = Drained { container: id.to_owned(), process: None, streams: Arc::clone(&entry.streams) };
        let (container, out_of_memory) = (id.to_owned(), status.out_of_memory);
        self.tell(EventKind::Exited { container, exit_code: status.code, out_of_memory });
        Ok(drained)
    }

    /// The VM has ended, and with it every container.
    pub fn vm_ended(&mut self, error: &str, exit_code: u8, console: Option<&str>) {
        self.vm = VmState::Stopping;
        let now = wall_clock_ns();
        let mut ended = Vec::new();
        for (id, entry) in &mut self.containers {
            for process in entry.processes.values_mut() {
                process.shown.end(exit_code, Some(error.to_owned()));
                process.draining = false;
            }
            entry.draining = false;
            if entry.state.status != ContainerStatus::Exited {
                entry.state.status = ContainerStatus::Exited;
                entry.state.finished_ns = Some(now);
                entry.state.exit_code = Some(exit_code);
                entry.state.error = Some(error.to_owned());
                entry.state.console = console.map(str::to_owned);
                ended.push(id.clone());
            }
        }
        for container in ended {
            self.tell(EventKind::Failed { container, error: error.to_owned() });
        }
        self.tell(EventKind::VmStopped);
    }

    /// What was on its way has arrived.
    pub fn drained(&mut self, what: &Drained) {
        let Some(entry) = self.containers.get_mut(&what.container) else { return };
        match &what.process {
            None => entry.draining = false,
            Some(process) => {
                if let Some(process) = entry.processes.get_mut(process) {
                    process.draining = false;
                }
                entry.forget_old();
            }
        }
    }

    fn health(&mut self, container: String, health: AgentHealth) -> Result<(), SessionError> {
        let entry = self.living(&container)?;
        let status = match health.status {
            HealthStatus::Starting => HealthState::Starting,
            HealthStatus::Healthy => HealthState::Healthy,
            HealthStatus::Unhealthy => HealthState::Unhealthy,
        };
        let Some(before) = &mut entry.health else { return Err(UNFIT) };
        let changed = before.status != status;
        let output = crate::session::shown_lines(&health.output);
        let (failing_streak, exit_code) = (health.failing_streak, health.exit_code);
        *before = Health { status, failing_streak, exit_code, output };
        if changed {
            self.tell(EventKind::Health { container, health: status });
        }
        Ok(())
    }

    /// Adds a process that is about to be executed.
    ///
    /// # Errors
    /// The container does not run, has one of this id, or has too many.
    pub fn add_process(&mut self, container: &str, shown: Process, streams: Arc<Streams>) -> Result<(), Problem> {
        let entry = self.container(container)?;
        entry.check_running(container)?;
        let id = shown.id.clone();
        if entry.processes.contains_key(&id) {
            let detail = format!("the container has a process {id}: give another id");
            return Err(Problem::new(ProblemKind::AlreadyExists, detail));
        }
        if entry.processes.len() - entry.ended.len() >= PROCESSES_MAX {
            let detail = format!("{PROCESSES_MAX} processes were executed in the container and have not ended");
            return Err(Problem::new(ProblemKind::TooManyRequests, detail));
        }
        entry.processes.insert(id, ProcessEntry { shown, streams, draining: false });
        Ok(())
    }

    /// The agent has executed a process, or says why it has not.
    pub fn process_started(&mut self, container: &str, process: &str, result: Result<(), &Problem>) {
        let Some(entry) = self.containers.get_mut(container) else { return };
        let Some(found) = entry.processes.get_mut(process) else { return };
        if found.shown.state != ProcessState::Starting {
            return;
        }
        match result {
            Ok(()) => {
                found.shown.state = ProcessState::Running;
                let (container, process) = (container.to_owned(), process.to_owned());
                self.tell(EventKind::ProcessStarted { container, process });
            }
            Err(problem) => {
                found.shown.end(exit_code(problem.kind), Some(problem.detail.clone()));
                entry.remember_end(process);
            }
        }
    }

    fn process_exited(&mut self, container: &str, process: &str, code: u8) -> Result<Drained, SessionError> {
        self.living(container)?;
        self.process_started(container, process, Ok(()));
        let entry = self.living(container)?;
        let found = entry.processes.get_mut(process).ok_or(UNFIT)?;
        if found.shown.state == ProcessState::Exited {
            return Err(UNFIT);
        }
        found.shown.end(code, None);
        found.draining = true;
        let streams = Arc::clone(&found.streams);
        entry.remember_end(process);
        let drained = Drained { container: container.to_owned(), process: Some(process.to_owned()), streams };
        let (container, process) = (container.to_owned(), process.to_owned());
        self.tell(EventKind::ProcessExited { container, process, exit_code: code });
        Ok(drained)
    }
}

impl Process {
    fn end(&mut self, code: u8, error: Option<String>) {
        if self.state != ProcessState::Exited {
            (self.state, self.exit_code, self.error) = (ProcessState::Exited, Some(code), error);
        }
    }
}

impl ProcessEntry {
    /// Whether it has ended and its output has arrived.
    pub fn is_over(&self) -> bool {
        self.shown.state == ProcessState::Exited && !self.draining
    }
}

impl Entry {
    /// What is told of it.
    pub fn shown(&self) -> Container {
        Container {
            id: self.spec.id.clone(),
            state: self.state.clone(),
            args: self.spec.process.args.clone(),
            terminal: self.spec.process.terminal.is_some(),
            health: self.health.clone(),
            processes: self.processes.values().map(|process| process.shown.clone()).collect(),
        }
    }

    /// The streams of its first process and of those that were executed in it.
    pub fn all_streams(&self) -> Vec<Arc<Streams>> {
        let others = self.processes.values().map(|process| Arc::clone(&process.streams));
        std::iter::once(Arc::clone(&self.streams)).chain(others).collect()
    }

    /// Checks that its program runs and its processes do not stand still.
    ///
    /// # Errors
    /// What it is instead.
    pub fn check_running(&self, id: &str) -> Result<(), Problem> {
        match self.state.status {
            ContainerStatus::Running => Ok(()),
            ContainerStatus::Paused => Err(Problem::state(format!("container {id} is paused: resume it first"))),
            ContainerStatus::Exited => Err(Problem::state(format!("container {id} has ended"))),
            _ => Err(Problem::state(format!("container {id} is not running"))),
        }
    }

    /// Whether it has ended and its output has arrived.
    pub fn is_over(&self) -> bool {
        self.state.status == ContainerStatus::Exited && !self.draining
    }

    /// The process of this id.
    ///
    /// # Errors
    /// There is none.
    pub fn process(&self, id: &str) -> Result<&ProcessEntry, Problem> {
        let detail = || format!("no process {} in the container", crate::session::shown(id));
        self.processes.get(id).ok_or_else(|| Problem::new(ProblemKind::NoSuchProcess, detail()))
    }

    /// Remembers that a process has ended.
    fn remember_end(&mut self, process: &str) {
        self.ended.push_back(process.to_owned());
        self.forget_old();
    }

    /// Forgets the oldest of too many processes that have ended; one whose end somebody is about to be told stays.
    fn forget_old(&mut self) {
        while self.ended.len() > ENDED_PROCESSES_MAX
            && let Some(oldest) = self.ended.front()
            && !self.processes.get(oldest).is_some_and(|process| process.draining)
        {
            self.processes.remove(oldest);
            self.ended.pop_front();
        }
    }
}

/// The exit code of something that was not executed.
fn exit_code(kind: ProblemKind) -> u8 {
    match kind {
        ProblemKind::CommandNotFound => crate::control::EXIT_NOT_FOUND,
        ProblemKind::CommandNotExecutable => crate::control::EXIT_NOT_EXECUTABLE,
        _ => crate::control::EXIT_FAILED,
    }
}

#[cfg(test)]
mod tests {
    use protocol::container::{Limits, Namespaces, ProcessSpec, Rootfs, Seccomp, Stdio};

    use super::super::streams::{Ends, Use};
    use super::*;

    fn spec(id: &str) -> Arc<ContainerSpec> {
        let process = ProcessSpec {
            args: vec!["sh".to_owned()],
            env: Vec::new(),
            working_directory: "/".to_owned(),
            user: String::new(),
            additional_groups: Vec::new(),
            capabilities: 0,
            rlimits: Vec::new(),
            no_new_privileges: true,
            seccomp: Seccomp::Default,
            oom_score_adj: 0,
            terminal: None,
            stdio: Stdio::default(),
        };
        Arc::new(ContainerSpec {
            id: id.to_owned(),
            hostname: String::new(),
            rootfs: Rootfs { device: "/dev/vda".to_owned(), read_only: false },
            mounts: Vec::new(),
            files: Vec::new(),
            masked_paths: Vec::new(),
            readonly_paths: Vec::new(),
            limits: Limits::default(),
            namespaces: Namespaces::default(),
            shm_bytes: 0,
            process,
            health_check: None,
        })
    }

    fn streams() -> Arc<Streams> {
        Streams::start(Ends::default(), Use::default()).unwrap()
    }

    fn process(id: usize) -> Process {
        let (id, args) = (id.to_string(), vec!["sh".to_owned()]);
        Process { id, args, state: ProcessState::Starting, exit_code: None, error: None, terminal: false }
    }

    #[test]
    fn there_are_no_more_containers_than_there_may_be() {
        let vm = Vm::default();
        let mut state = vm.state();
        for number in 0..CONTAINERS_MAX {
            state.add(spec(&number.to_string()), streams()).unwrap();
        }
        let refused = state.add(spec("one-more"), streams()).unwrap_err();
        assert_eq!((CONTAINERS_MAX, refused.kind, refused.status), (64, ProblemKind::TooManyRequests, 429));
        // One that ends is still one, until it is deleted.
        state.failed("0", &Problem::state("it did not start"));
        assert!(state.may_add("one-more").is_err());
        state.containers.remove("0");
        state.add(spec("one-more"), streams()).unwrap();
    }

    #[test]
    fn there_are_no_more_processes_than_there_may_be() {
        let vm = Vm::default();
        let mut state = vm.state();
        state.add(spec("c"), streams()).unwrap();
        state.created("c", Ok(()));
        state.started("c", Ok(()));
        for number in 0..PROCESSES_MAX {
            state.add_process("c", process(number), streams()).unwrap();
        }
        let refused = state.add_process("c", process(PROCESSES_MAX), streams()).unwrap_err();
        assert_eq!((PROCESSES_MAX, refused.kind, refused.status), (512, ProblemKind::TooManyRequests, 429));
        // One that ends makes room, and is remembered; but only so many are.
        for number in 0..2 * ENDED_PROCESSES_MAX {
            state.process_exited("c", &number.to_string(), 0).unwrap();
            state.drained(&Drained {
                container: "c".to_owned(),
                process: Some(number.to_string()),
                streams: streams(),
            });
            state.add_process("c", process(PROCESSES_MAX + number), streams()).unwrap();
        }
        let entry = state.container("c").unwrap();
        assert_eq!(
            (entry.ended.len(), entry.processes.len()),
            (ENDED_PROCESSES_MAX, PROCESSES_MAX + ENDED_PROCESSES_MAX)
        );
    }
}
