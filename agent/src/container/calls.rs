//! What the host can ask of a container that was created, besides its start.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use protocol::container::{Limits, ProcessSpec, WindowSize};
use protocol::report::Stats;
use protocol::{Answer, Failure, FailureKind};

use super::child::{Birthplace, Child};
use super::error::InStep;
use super::helper::{Helper, Outlet};
use super::process::Process;
use super::streams::{Ends, Streams};
use super::{Container, HealthState, Phase, SetupError, check_id, further, listing};
use crate::clock;
use crate::pids::Home;

/// The highest signal number on Linux x86-64.
const SIGNAL_MAX: u8 = 64;

impl Container {
    /// Begins to execute another process; the outcome is the answer to the request `request`, in time.
    ///
    /// # Errors
    /// What can be said at once.
    pub fn execute(
        &mut self,
        request: u32,
        process: &str,
        spec: &ProcessSpec,
        home: &Home,
        dial: &mut impl FnMut(u32) -> io::Result<OwnedFd>,
    ) -> Result<(), Failure> {
        check_id(process).map_err(|error| error.failure())?;
        self.check_running()?;
        if self.freezer.is_frozen() {
            return Err(self.wrong_state("is paused"));
        }
        if self.processes.iter().any(|other| other.id == process) {
            return Err(self.wrong_state(&format!("has a process {process} already")));
        }
        let streams = Streams::dial(spec, dial).map_err(|error| error.failure())?;
        let child = self.fork(spec, streams, home)?;
        self.processes.push(Process::new(process.to_owned(), request, child));
        Ok(())
    }

    /// Forks a child that becomes a further process.
    pub(super) fn fork(&self, spec: &ProcessSpec, streams: (Streams, Ends), home: &Home) -> Result<Child, Failure> {
        let Some(standard) = &self.standard else { return Err(self.wrong_state("is not running")) };
        let first = self.first_process.as_fd();
        let birthplace = Birthplace { home, member: Some(first), cgroup: self.cgroup.directory(), namespaces: 0 };
        let others = further::kept(first, standard);
        Child::fork(streams, birthplace, &others, |ends, others| further::prepare(spec, ends, others)).map_err(
            |error| match error {
                SetupError::Ended => self.wrong_state("has ended"),
                error => error.failure(),
            },
        )
    }

    /// Refuses what only a container can do whose program runs.
    pub(super) fn check_running(&self) -> Result<(), Failure> {
        match (self.phase, self.first.exit_code()) {
            (_, Some(_)) => Err(self.wrong_state("has ended")),
            (Phase::Running, None) => Ok(()),
            (Phase::Preparing { .. } | Phase::Created | Phase::Starting(_), None) => {
                Err(self.wrong_state("is not running"))
            }
        }
    }

    /// The process of an id, or the first one.
    fn child(&self, process: Option<&str>) -> Result<&Child, Failure> {
        let Some(id) = process else { return Ok(&self.first) };
        let found = self.processes.iter().find(|process| process.id == id);
        found.map(|process| &process.child).ok_or_else(|| {
            let shown: String = id.chars().take(super::ID_MAX).collect();
            self.wrong_state(&format!("has no process {shown}"))
        })
    }

    /// Sends a signal to a process or to all.
    ///
    /// # Errors
    /// When there is no such signal or no process any more.
    pub fn signal(&self, process: Option<&str>, number: u8, all: bool) -> Result<(), Failure> {
        let invalid = |message| Err(Failure { kind: FailureKind::InvalidRequest, message });
        if !(1..=SIGNAL_MAX).contains(&number) {
            return invalid(format!("signal {number} does not exist: they go from 1 to {SIGNAL_MAX}"));
        }
        if let (Some(_), true) = (process, all) {
            return invalid("a signal goes to one further process or to all of the container, not both".to_owned());
        }
        let child = self.child(process)?;
        if child.exit_code().is_some() {
            return Err(match process {
                Some(id) => self.wrong_state(&format!("has no process {id} any more: it has ended")),
                None => self.wrong_state("has ended"),
            });
        }
        let sent = if all { self.cgroup.signal(number) } else { child.signal(number) };
        sent.in_step("send the signal").map_err(|error: SetupError| error.failure())
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// When it has none.
    pub fn resize(&self, process: Option<&str>, size: WindowSize) -> Result<(), Failure> {
        match self.child(process)?.streams().resize(size) {
            Some(result) => result.in_step("set the terminal's size").map_err(|error| error.failure()),
            None => Err(self.wrong_state("has no terminal")),
        }
    }

    /// Begins to stop all processes where they are, or lets them go on; the outcome is the answer to the request
    /// `request`, in time.
    ///
    /// # Errors
    /// What can be said at once.
    pub fn freeze(&mut self, request: u32, frozen: bool) -> Result<(), Failure> {
        self.check_running()?;
        self.cgroup.freeze(frozen).in_step("freeze or thaw the container").map_err(|error| error.failure())?;
        for contradicted in self.freezer.ask(request, frozen) {
            self.reply(contradicted, Err(self.wrong_state("was asked for the opposite meanwhile")));
        }
        if let HealthState::Watched(monitor) = &mut self.health {
            if frozen {
                monitor.pause();
            } else {
                monitor.resume(clock::boot_us());
            }
        }
        // Perhaps it is so already, and there is no change to wait for.
        self.look_at_cgroup();
        Ok(())
    }

    /// Changes limits.
    ///
    /// # Errors
    /// What the cgroup says.
    pub fn update(&self, limits: &Limits) -> Result<(), Failure> {
        self.cgroup.limit(limits).in_step("set the container's limits").map_err(|error| error.failure())
    }

    /// What the container uses.
    pub fn stats(&self) -> Stats {
        self.cgroup.stats()
    }

    /// Begins to list the processes; the outcome is the answer to the request `request`, in time.
    ///
    /// # Errors
    /// What can be said at once.
    pub fn list(&mut self, request: u32, home: &Home) -> Result<(), Failure> {
        self.check_running()?;
        let work = |kept: Vec<OwnedFd>, _: &Outlet| {
            let listed = kept.first().map_or(Ok(Vec::new()), |cgroup| listing::list(cgroup.as_fd()));
            listed.map(Answer::Processes).map_err(|error| error.failure())
        };
        let helper = Helper::fork((request, "the list"), home, &[self.cgroup.directory()], work);
        self.helpers.push(helper.map_err(|error| error.failure())?);
        Ok(())
    }
}
