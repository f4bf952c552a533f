//! Whether a container is well, by its own check: when the check runs and what a result means are docker's rules (Docker
//! reference, "HEALTHCHECK").
//!
//! A run is a further process of the container that nobody but the agent knows of, with its output read here. The agent is
//! woken for a deadline, of which there is one at a time: that of the next run, or of the one under way.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use protocol::Failure;
use protocol::container::{HealthCheck, ProcessSpec, Stdio};
use protocol::report::{HEALTH_OUTPUT_MAX, Health, HealthStatus};
use rustix::io::{self, Errno};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Pid;

use super::child::{Child, Stage};
use super::error::{InStep, SetupError};
use super::streams::{Ends, set_nonblocking};

/// The shortest interval, docker's: a check is no loop.
const INTERVAL_MIN_US: u64 = 1000;

/// How much output is read at once.
const CHUNK: usize = 4096;

/// How often output is read before others get a turn, and at the end of a run: what a pipe holds.
const ROUNDS: usize = 16;

/// When the check runs and what its results mean: without a clock and without a process.
#[derive(Debug)]
struct Schedule {
    check: HealthCheck,
    /// When the container's program was executed.
    started_us: u64,
    status: HealthStatus,
    failing_streak: u32,
}

impl Schedule {
    fn new(check: HealthCheck, started_us: u64) -> Self {
        Self { check, started_us, status: HealthStatus::Starting, failing_streak: 0 }
    }

    /// Whether failures do not count yet at a time.
    fn is_starting(&self, now_us: u64) -> bool {
        self.status == HealthStatus::Starting && now_us.saturating_sub(self.started_us) < self.check.start_period_us
    }

    /// When the next run is due, with nothing under way at a time.
    fn next_us(&self, now_us: u64) -> u64 {
        let starting = self.is_starting(now_us);
        let interval = if starting { self.check.start_interval_us } else { self.check.interval_us };
        now_us.saturating_add(interval.max(INTERVAL_MIN_US))
    }

    /// Takes the result of a run that began at a time.
    fn take(&mut self, began_us: u64, succeeded: bool) {
        if succeeded {
            (self.status, self.failing_streak) = (HealthStatus::Healthy, 0);
        } else if !self.is_starting(began_us) {
            self.failing_streak = self.failing_streak.saturating_add(1);
            if self.failing_streak >= self.check.retries {
                self.status = HealthStatus::Unhealthy;
            }
        }
    }
}

/// A run of the check.
#[derive(Debug)]
struct Run {
    child: Child,
    /// Its output, until that ended.
    pipe: Option<OwnedFd>,
    output: Vec<u8>,
    began_us: u64,
    took_too_long: bool,
}

/// What to poll for on behalf of a health check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Something of the run's.
    Child(super::child::Event),
    /// The run's output can be read.
    Output,
}

/// The health check of a container whose program runs.
#[derive(Debug)]
pub struct Monitor {
    schedule: Schedule,
    process: ProcessSpec,
    /// When the next run is due; `None` while one is under way or the container stands still.
    due_us: Option<u64>,
    run: Option<Run>,
    /// Whether the run under way does not count.
    discarded: bool,
    paused: bool,
}

impl Monitor {
    /// The check of a container whose first process is `first`, executed at `started_us`.
    pub fn new(check: HealthCheck, first: &ProcessSpec, started_us: u64) -> Self {
        let process =
            ProcessSpec { args: check.args.clone(), terminal: None, stdio: Stdio::default(), ..first.clone() };
        let schedule = Schedule::new(check, started_us);
        let due_us = Some(schedule.next_us(started_us));
        Self { schedule, process, due_us, run: None, discarded: false, paused: false }
    }

    /// When [`Monitor::act`] is to be called next; `None` for not before something else happens.
    pub fn deadline_us(&self) -> Option<u64> {
        match &self.run {
            Some(run) if run.took_too_long || self.discarded => None,
            Some(run) => Some(run.began_us.saturating_add(self.schedule.check.timeout_us)),
            None => self.due_us,
        }
    }

    /// Does what is due: begins a run with `fork`, or ends one that takes too long.
    pub fn act(
        &mut self,
        now_us: u64,
        fork: impl FnOnce(&ProcessSpec, Ends) -> Result<Child, Failure>,
    ) -> Option<Health> {
        if self.deadline_us().is_none_or(|deadline| deadline > now_us) {
            return None;
        }
        if let Some(run) = &mut self.run {
            run.took_too_long = true;
            run.child.kill();
            return None;
        }
        self.due_us = None;
        let begun =
            ends().map_err(|error| error.failure()).and_then(|(pipe, ends)| Ok((pipe, fork(&self.process, ends)?)));
        match begun {
            Ok((pipe, child)) => {
                let (output, took_too_long) = (Vec::new(), false);
                self.run = Some(Run { child, pipe: Some(pipe), output, began_us: now_us, took_too_long });
                None
            }
            Err(failure) => Some(self.conclude(now_us, now_us, None, failure.message)),
        }
    }

    /// Stops checking while the container stands still: a run under way does not count.
    pub fn pause(&mut self) {
        (self.paused, self.due_us) = (true, None);
        self.discard();
    }

    /// Goes on checking.
    pub fn resume(&mut self, now_us: u64) {
        if self.paused {
            self.paused = false;
            // A run that still is on its way out sets the next one when it is gone.
            self.due_us = self.run.is_none().then(|| self.schedule.next_us(now_us));
        }
    }

    /// Ends a run that is under way, without a result.
    pub fn discard(&mut self) {
        if let Some(run) = &self.run {
            self.discarded = true;
            run.child.kill();
        }
    }

    /// Whether no run is under way.
    pub fn is_idle(&self) -> bool {
        self.run.is_none()
    }

    /// Calls `add` for each descriptor to poll.
    pub fn interests<'a>(&'a self, mut add: impl FnMut(BorrowedFd<'a>, Event)) {
        let Some(run) = &self.run else { return };
        // It has no streams of the host's.
        run.child.interests(|fd, _, event| add(fd, Event::Child(event)));
        run.pipe.iter().for_each(|pipe| add(pipe.as_fd(), Event::Output));
    }

    /// Reacts to a descriptor of [`Monitor::interests`] being ready.
    pub fn handle(&mut self, event: Event) {
        match (&mut self.run, event) {
            (Some(run), Event::Child(event)) => run.child.handle(event),
            (Some(run), Event::Output) => run.read(),
            (None, _) => {}
        }
    }

    /// Takes note that the run has ended, if it is `pid`; whether it was.
    pub fn reaped(&mut self, pid: Pid, exit_code: u8) -> bool {
        self.run.as_mut().is_some_and(|run| run.child.reaped(pid, exit_code))
    }

    /// Goes on with a run, and gives its result when it has ended.
    pub fn settle(&mut self, now_us: u64) -> Option<Health> {
        let run = self.run.as_mut()?;
        if run.child.stage() == Stage::Ready {
            run.child.go();
        }
        let exit_code = run.child.exit_code()?;
        // What it wrote last; who else holds the pipe is not waited for.
        run.read();
        let run = self.run.take()?;
        if std::mem::take(&mut self.discarded) {
            self.due_us = (!self.paused).then(|| self.schedule.next_us(now_us));
            return None;
        }
        let text = String::from_utf8_lossy(&run.output);
        let (code, output) = match (run.took_too_long, run.child.reason()) {
            (true, _) => (None, self.too_long(&text)),
            (false, Some(reason)) if run.child.has_failed() => (None, reason.message),
            (false, _) if run.child.has_failed() => {
                (None, "the health check was killed before it was executed".to_owned())
            }
            (false, _) => (Some(exit_code), text.into_owned()),
        };
        Some(self.conclude(run.began_us, now_us, code, output))
    }

    /// What docker says of a run that takes too long.
    fn too_long(&self, output: &str) -> String {
        let timeout = std::time::Duration::from_micros(self.schedule.check.timeout_us);
        let colon = if output.is_empty() { "" } else { ": " };
        format!("Health check exceeded timeout ({timeout:?}){colon}{output}")
    }

    fn conclude(&mut self, began_us: u64, now_us: u64, exit_code: Option<u8>, mut output: String) -> Health {
        self.schedule.take(began_us, exit_code == Some(0));
        self.due_us = Some(self.schedule.next_us(now_us));
        output.truncate(output.floor_char_boundary(HEALTH_OUTPUT_MAX));
        let Schedule { status, failing_streak, .. } = self.schedule;
        Health { status, failing_streak, exit_code, output }
    }
}

impl Run {
    /// Reads output, and keeps what is to be told.
    fn read(&mut self) {
        let mut buffer = [0; CHUNK];
        for _ in 0..ROUNDS {
            let Some(pipe) = &self.pipe else { return };
            match io::read(pipe, &mut buffer) {
                Ok(length @ 1..) => {
                    let room = HEALTH_OUTPUT_MAX.saturating_sub(self.output.len());
                    self.output.extend_from_slice(&buffer[..length.min(room)]);
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Ok(0) | Err(_) => self.pipe = None,
            }
        }
    }
}

/// The pipe of a run's output, and the run's ends of it.
fn ends() -> Result<(OwnedFd, Ends), SetupError> {
    let step = "make a pipe for the health check";
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).in_step(step)?;
    set_nonblocking(&reader).in_step(step)?;
    let second = writer.try_clone().in_step(step)?;
    Ok((reader, Ends([None, Some(writer), Some(second)])))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000;

    fn schedule(start_period: u64) -> Schedule {
        let check = HealthCheck {
            args: Vec::new(),
            interval_us: 30 * SECOND,
            timeout_us: 10 * SECOND,
            start_period_us: start_period * SECOND,
            start_interval_us: 5 * SECOND,
            retries: 3,
        };
        Schedule::new(check, 100 * SECOND)
    }

    fn state(schedule: &Schedule) -> (HealthStatus, u32) {
        (schedule.status, schedule.failing_streak)
    }

    #[test]
    fn as_many_failures_in_a_row_as_allowed_make_it_unhealthy() {
        let mut schedule = schedule(0);
        assert_eq!(schedule.next_us(100 * SECOND), 130 * SECOND);
        schedule.take(130 * SECOND, false);
        schedule.take(160 * SECOND, false);
        assert_eq!(state(&schedule), (HealthStatus::Starting, 2));
        schedule.take(190 * SECOND, true);
        assert_eq!(state(&schedule), (HealthStatus::Healthy, 0));
        schedule.take(220 * SECOND, false);
        schedule.take(250 * SECOND, false);
        assert_eq!(state(&schedule), (HealthStatus::Healthy, 2));
        schedule.take(280 * SECOND, false);
        assert_eq!(state(&schedule), (HealthStatus::Unhealthy, 3));
        schedule.take(310 * SECOND, false);
        assert_eq!(state(&schedule), (HealthStatus::Unhealthy, 4));
        schedule.take(340 * SECOND, true);
        assert_eq!(state(&schedule), (HealthStatus::Healthy, 0));
    }

    #[test]
    fn failures_while_it_starts_do_not_count() {
        let mut schedule = schedule(60);
        assert_eq!(schedule.next_us(100 * SECOND), 105 * SECOND);
        (0..10).for_each(|run| schedule.take((105 + 5 * run) * SECOND, false));
        assert_eq!(state(&schedule), (HealthStatus::Starting, 0));
        // Begun within the period, it does not count either; the next one does, at the other interval.
        schedule.take(159 * SECOND, false);
        assert_eq!((schedule.next_us(161 * SECOND), state(&schedule).1), (191 * SECOND, 0));
        schedule.take(191 * SECOND, false);
        assert_eq!(state(&schedule), (HealthStatus::Starting, 1));
    }

    #[test]
    fn a_success_ends_the_start_period() {
        let mut schedule = schedule(60);
        schedule.take(105 * SECOND, true);
        assert_eq!(schedule.next_us(106 * SECOND), 136 * SECOND);
        schedule.take(136 * SECOND, false);
        assert_eq!(state(&schedule), (HealthStatus::Healthy, 1));
    }

    #[test]
    fn an_interval_of_nothing_is_no_loop() {
        let mut schedule = schedule(0);
        schedule.check.interval_us = 0;
        assert_eq!(schedule.next_us(7), 7 + INTERVAL_MIN_US);
    }
}
