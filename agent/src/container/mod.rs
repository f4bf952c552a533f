//! One container as the agent sees it: its processes, its cgroup, and where it is in its life.
//!
//! ```text
//!            Create             Ready                Start            execve
//!   (nothing) ----> Preparing ---------> Created ------------> Starting ----> Running
//!                       |                   |                     |              |
//!                       v                   v                     v              v
//!                Create is refused       Exited           Start is refused    Exited
//! ```
//! Whatever the phase, a container ends in the same way: its first process was reaped, its cgroup is empty and its further
//! processes were reported. A request that still waits then is refused; otherwise the host hears [`FromAgent::Exited`].
//! Output that the host has not taken yet is left to the agent, which goes on writing it.

mod calls;
mod cgroup;
mod child;
mod copy;
mod error;
mod execution;
pub mod filesystem;
mod first;
mod freezer;
mod further;
mod health;
mod helper;
mod listing;
mod mounts;
mod namespaces;
mod privileges;
mod process;
mod program;
mod root;
mod rootfs;
mod streams;
mod terminal;
mod user;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use protocol::container::{ContainerSpec, HealthCheck, ProcessSpec};
use protocol::report::Health;
use protocol::{Answer, ExitStatus, Failure, FailureKind, FromAgent};
use rustix::event::PollFlags;
use rustix::process::Pid;

#[cfg(feature = "fuzzing")]
pub use {copy::read_archive, user::resolve_user};

pub use cgroup::{MOUNT_POINT as CGROUP_MOUNT_POINT, enable_controllers};
pub use error::SetupError;
pub use namespaces::{Plan, Running};
pub use rootfs::make_mount_points;
pub use streams::Streams;

use cgroup::{Cgroup, SIGKILL};
use child::{Birthplace, Child, Stage};
use error::InStep;
use freezer::Freezer;
use health::Monitor;
use helper::Helper;
use mounts::Standard;
use namespaces::Join;
use process::Process;

use crate::pids::{self, Home};
use crate::{clock, memory};

/// The longest id of a container or a process, in bytes.
const ID_MAX: usize = 64;

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The child sets itself up; the request of this id waits for it, and perhaps one to start it behind that.
    Preparing {
        /// The request to create it.
        create: u32,
        /// The request to start it, if it came already.
        start: Option<u32>,
    },
    /// The child waits for the word.
    Created,
    /// The word was given; the request of this id waits for the program.
    Starting(u32),
    /// The program runs, or ran.
    Running,
}

/// A container.
#[derive(Debug)]
pub struct Container {
    id: String,
    phase: Phase,
    /// What the host is to hear, in order.
    outbox: Vec<FromAgent>,
    first: Child,
    /// The same process, for others to join its namespaces.
    first_process: OwnedFd,
    /// Whether its end is the end of all that it started.
    owns_pids: bool,
    cgroup: Cgroup,
    /// Whether the cgroup was seen empty after the first process's end.
    empty: bool,
    /// Its `/proc` and `/dev`, from when its set-up is done.
    standard: Option<Standard>,
    /// The further processes, until their ends were told.
    processes: Vec<Process>,
    /// What is being done for a request by a process that is none of the container's.
    helpers: Vec<Helper>,
    /// Streams of processes that have ended and were not taken yet.
    leaving: Vec<Streams>,
    freezer: Freezer,
    /// How many processes the kernel had killed for want of memory when it was looked, and when it was told.
    oom_kills: [u64; 2],
    health: HealthState,
}

/// The health check of a container.
#[derive(Debug)]
enum HealthState {
    /// There is none, or its time is over.
    None,
    /// It begins with the program.
    Planned(Box<(HealthCheck, ProcessSpec)>),
    /// It goes on.
    Watched(Box<Monitor>),
}

/// What to poll for on behalf of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The cgroup's state changed.
    Cgroup,
    /// Memory ran out, or nearly.
    Memory,
    /// The helper of this index has something to say.
    Helper(usize),
    /// Something of the health check's.
    Health(health::Event),
    /// Something of the first process's.
    First(child::Event),
    /// Something of the further process of this index.
    Further(usize, child::Event),
}

impl Container {
    /// Begins to set a container up; the outcome is the answer to the request `request`, in time. `dial` connects to
    /// a port of the host.
    ///
    /// # Errors
    /// What can be said at once.
    pub fn create(
        request: u32,
        spec: &ContainerSpec,
        plan: &Plan<'_>,
        home: &Home,
        dial: &mut impl FnMut(u32) -> io::Result<OwnedFd>,
    ) -> Result<Self, SetupError> {
        check_id(&spec.id)?;
        let streams = Streams::dial(&spec.process, dial)?;
        let cgroup = Cgroup::create(&spec.id, &spec.limits).in_step("make the container's cgroup")?;
        let birthplace = Birthplace { home, member: plan.pids_of, cgroup: cgroup.directory(), namespaces: plan.new };
        let others: Vec<BorrowedFd<'_>> = plan.joins.iter().flat_map(Join::kept).collect();
        let prepare = |ends: &_, others| first::prepare(spec, ends, &plan.joins, others);
        let first = Child::fork(streams, birthplace, &others, prepare)?;
        let first_process = first.open().in_step("refer to the container's first process")?;
        Ok(Self {
            id: spec.id.clone(),
            phase: Phase::Preparing { create: request, start: None },
            outbox: Vec::new(),
            first,
            first_process,
            owns_pids: plan.pids_of.is_none(),
            cgroup,
            empty: false,
            standard: None,
            processes: Vec::new(),
            helpers: Vec::new(),
            leaving: Vec::new(),
            freezer: Freezer::default(),
            oom_kills: [0; 2],
            health: spec
                .health_check
                .clone()
                .map_or(HealthState::None, |check| HealthState::Planned(Box::new((check, spec.process.clone())))),
        })
    }

    /// The container's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What others can join, while its program runs.
    pub fn running(&self) -> Option<Running<'_>> {
        let process = self.first_process.as_fd();
        let standard = self.standard.as_ref().filter(|_| self.phase == Phase::Running && !pids::has_ended(process))?;
        Some(Running { process, dev: standard.dev.as_fd() })
    }

    /// Gives the word to execute the program; the outcome is the answer to the request `request`, in time.
    ///
    /// # Errors
    /// When the container is not waiting for it.
    pub fn start(&mut self, request: u32) -> Result<(), Failure> {
        match (self.phase, self.first.exit_code()) {
            (Phase::Created, None) => self.go(request),
            // A host that does not wait for the one before the other saves a way there and back.
            (Phase::Preparing { create, start: None }, _) => {
                self.phase = Phase::Preparing { create, start: Some(request) };
            }
            (_, Some(_)) => return Err(self.wrong_state("has ended")),
            _ => return Err(self.wrong_state("was started before")),
        }
        Ok(())
    }

    fn go(&mut self, request: u32) {
        self.phase = Phase::Starting(request);
        self.first.go();
    }

    fn wrong_state(&self, what: &str) -> Failure {
        Failure { kind: FailureKind::WrongState, message: format!("container {} {what}", self.id) }
    }

    fn reply(&mut self, id: u32, result: Result<Answer, Failure>) {
        self.outbox.push(FromAgent::Reply { id, result });
    }

    /// Kills all its processes and what works on it, without waiting for their end.
    pub fn kill(&self) {
        self.helpers.iter().for_each(Helper::kill);
        if let Err(error) = self.cgroup.signal(SIGKILL) {
            eprintln!("cofferdam-agent: cannot kill container {}: {error}", self.id);
        }
    }

    /// Calls `add` for each descriptor to poll.
    pub fn interests<'a>(&'a self, mut add: impl FnMut(BorrowedFd<'a>, PollFlags, Event)) {
        if (self.first.exit_code().is_some() && !self.empty) || self.freezer.is_waiting() {
            add(self.cgroup.events(), PollFlags::PRI, Event::Cgroup);
        }
        if let Some(events) = self.cgroup.memory_events() {
            add(events, PollFlags::PRI, Event::Memory);
        }
        for (index, helper) in self.helpers.iter().enumerate() {
            helper.interest().into_iter().for_each(|fd| add(fd, PollFlags::IN, Event::Helper(index)));
        }
        self.first.interests(|fd, flags, event| add(fd, flags, Event::First(event)));
        if let HealthState::Watched(monitor) = &self.health {
            monitor.interests(|fd, event| add(fd, PollFlags::IN, Event::Health(event)));
        }
        for (index, process) in self.processes.iter().enumerate() {
            process.child.interests(|fd, flags, event| add(fd, flags, Event::Further(index, event)));
        }
    }

    /// Reacts to a descriptor of [`Container::interests`] being ready.
    pub fn handle(&mut self, event: Event) {
        match event {
            Event::Cgroup => self.look_at_cgroup(),
            Event::Memory => self.oom_kills[0] = self.cgroup.oom_kills(),
            Event::Helper(index) => {
                if let Some(helper) = self.helpers.get_mut(index) {
                    helper.hear();
                }
            }
            Event::Health(event) => {
                if let HealthState::Watched(monitor) = &mut self.health {
                    monitor.handle(event);
                }
            }
            Event::First(event) => self.first.handle(event),
            Event::Further(index, event) => {
                if let Some(process) = self.processes.get_mut(index) {
                    process.child.handle(event);
                }
            }
        }
    }

    /// Takes note that a child has ended with an exit code, if it is one of the container's; whether it was.
    pub fn reaped(&mut self, pid: Pid, exit_code: u8) -> bool {
        if self.first.reaped(pid, exit_code) {
            if self.owns_pids {
                self.helpers.iter().for_each(Helper::kill);
            } else {
                self.kill();
            }
            if let HealthState::Watched(monitor) = &mut self.health {
                monitor.discard();
            }
            for request in self.freezer.give_up() {
                self.reply(request, Err(self.wrong_state("has ended")));
            }
            self.look_at_cgroup();
            return true;
        }
        self.processes.iter_mut().any(|process| process.reaped(pid, exit_code))
            || self.helpers.iter_mut().any(|helper| helper.reaped(pid))
            || match &mut self.health {
                HealthState::Watched(monitor) => monitor.reaped(pid, exit_code),
                HealthState::None | HealthState::Planned(_) => false,
            }
    }

    fn look_at_cgroup(&mut self) {
        // An error could only be repeated; of a container that has ended the kernel has ended all that it started.
        let state = self.cgroup.state().ok();
        if self.first.exit_code().is_some() && !self.empty && !state.is_some_and(|state| state.populated) {
            self.empty = true;
            self.first.finish_streams();
            // Nor does what is copied outlive it: whoever takes it may be slow.
            self.helpers.iter().for_each(Helper::kill);
        }
        for request in state.map_or(Vec::new(), |state| self.freezer.observe(state.frozen)) {
            self.reply(request, Ok(Answer::Done));
        }
    }

    /// When [`Container::act`] is to be called next, on CLOCK_BOOTTIME; `None` for not before something else happens.
    pub fn deadline_us(&self) -> Option<u64> {
        match &self.health {
            HealthState::Watched(monitor) if self.first.exit_code().is_none() => monitor.deadline_us(),
            _ => None,
        }
    }

    /// Does what is due at a time.
    pub fn act(&mut self, now_us: u64, home: &Home) {
        if self.deadline_us().is_none_or(|deadline| deadline > now_us) {
            return;
        }
        let HealthState::Watched(mut monitor) = std::mem::replace(&mut self.health, HealthState::None) else { return };
        let fork = |process: &ProcessSpec, ends| self.fork(process, (Streams::default(), ends), home);
        let health = monitor.act(now_us, fork);
        self.tell_health(health);
        self.health = HealthState::Watched(monitor);
    }

    fn tell_health(&mut self, health: Option<Health>) {
        let Some(health) = health else { return };
        // A run that ends with the container says nothing about it, and its own processes are gone before its first is.
        if self.first.pid().is_none_or(|pid| health.exit_code != Some(0) && listing::is_ending(pid)) {
            return;
        }
        self.outbox.push(FromAgent::Health { container: self.id.clone(), health });
    }

    /// Begins the health check with the program, and goes on with a run of it.
    fn settle_health(&mut self) {
        self.health = match std::mem::replace(&mut self.health, HealthState::None) {
            HealthState::Planned(planned) if self.phase == Phase::Running => {
                let (check, process) = *planned;
                HealthState::Watched(Box::new(Monitor::new(check, &process, self.first.executed_us())))
            }
            HealthState::Watched(mut monitor) => {
                self.tell_health(monitor.settle(clock::boot_us()));
                // It ends with the container, whose last word waits for the run.
                if self.first.exit_code().is_some() && monitor.is_idle() {
                    HealthState::None
                } else {
                    HealthState::Watched(monitor)
                }
            }
            other => other,
        };
    }

    /// Whether nothing is left of what goes on beside the first process.
    fn is_alone(&self) -> bool {
        let unwatched = !matches!(self.health, HealthState::Watched(_));
        self.processes.is_empty() && self.helpers.is_empty() && unwatched
    }

    /// The streams of processes that have ended, with output that the host has not taken yet. Its reader may be slow, and
    /// the end of the process is told all the same.
    pub fn take_leaving(&mut self) -> impl Iterator<Item = Streams> {
        self.leaving.drain(..).filter(|streams| !streams.have_ended())
    }

    /// What the host is to hear now, and whether it is the last word: then the container is to be dropped.
    pub fn settle(&mut self) -> (Vec<FromAgent>, bool) {
        match (self.phase, self.first.stage()) {
            (Phase::Preparing { create, start }, Stage::Ready) => {
                self.standard = Standard::from_descriptors(self.first.take_kept());
                self.phase = Phase::Created;
                self.reply(create, Ok(Answer::Done));
                start.into_iter().for_each(|request| self.go(request));
            }
            (Phase::Starting(request), Stage::Executed) => {
                self.phase = Phase::Running;
                self.reply(request, Ok(Answer::Done));
            }
            _ => {}
        }
        self.settle_processes();
        self.settle_health();
        let over = self.empty && self.first.exit_code().is_some() && self.is_alone();
        if over {
            self.oom_kills[0] = self.cgroup.oom_kills();
        }
        self.tell_of_memory();
        if over {
            self.leaving.push(self.first.take_streams());
            self.say_last_words();
        }
        (std::mem::take(&mut self.outbox), over)
    }

    fn settle_processes(&mut self) {
        let (id, ended) = (&self.id, self.first.exit_code().is_some());
        self.processes.retain_mut(|process| {
            let stays = process.settle(id, ended, &mut self.outbox);
            if !stays {
                self.leaving.push(process.child.take_streams());
            }
            stays
        });
        let replies = self.helpers.iter_mut().filter_map(Helper::take_reply);
        self.outbox.extend(replies.map(|(id, result)| FromAgent::Reply { id, result }));
        self.helpers.retain(|helper| !helper.is_over());
    }

    /// Tells of processes that the kernel killed for want of memory, once however many they are meanwhile. A container
    /// that is not running yet says why with its failure.
    fn tell_of_memory(&mut self) {
        let [seen, told] = self.oom_kills;
        if seen > told && self.phase == Phase::Running {
            self.oom_kills[1] = seen;
            self.outbox.push(FromAgent::OutOfMemory { container: self.id.clone() });
        }
    }

    fn say_last_words(&mut self) {
        let waiting = match self.phase {
            Phase::Preparing { create, start } => [Some(create), start],
            Phase::Starting(id) => [Some(id), None],
            Phase::Created | Phase::Running => [None, None],
        };
        if let [Some(_), _] = waiting {
            let failure = self.first.reason().unwrap_or_else(|| Failure {
                kind: FailureKind::System,
                message: format!("container {} was killed before its program was executed", self.id),
            });
            waiting.into_iter().flatten().for_each(|request| self.reply(request, Err(failure.clone())));
            return;
        }
        let status = ExitStatus {
            code: self.first.exit_code().unwrap_or(u8::MAX),
            out_of_memory: self.oom_kills[0] > 0,
            executed_us: self.first.executed_us(),
            agent_resident_kib: memory::resident_kib().unwrap_or(0),
        };
        self.outbox.push(FromAgent::Exited { container: self.id.clone(), status });
    }
}

/// Checks the id of a container or a process.
fn check_id(id: &str) -> Result<(), SetupError> {
    let valid = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    if id.is_empty() || id.len() > ID_MAX || id.starts_with('.') || !id.bytes().all(valid) {
        return Err(SetupError::Id { id: id.chars().take(ID_MAX).collect() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_a_plain_file_name() {
        for id in ["a", "web-1", "A.b_c", &"x".repeat(64)] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        for id in ["", ".", "..", ".a", "a/b", "a b", "ä", "a\0", &"x".repeat(65)] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }
}
