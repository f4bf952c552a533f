//! Running one contender: its times and its CPU time.

use std::io::Read as _;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, WaitOptions, pidfd_open, set_child_subreaper, wait};
use rustix::time::{ClockId, clock_gettime};

/// How long a contender may take for a step; the slowest machine needs a part of it.
const PATIENCE: Timespec = Timespec { tv_sec: 120, tv_nsec: 0 };

/// CLOCK_MONOTONIC in nanoseconds.
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    // Neither part of a time since the boot is negative.
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}

/// Makes this process the parent of descendants whose parents have ended, so that all of them can be waited for.
pub fn adopt_orphans() -> Result<()> {
    set_child_subreaper(Some(rustix::process::getpid())).context("cannot become the reaper of orphans")
}

/// The CPU time of all descendants that have been waited for, in microseconds.
fn children_cpu_us() -> Result<u64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).context("cannot ask for the CPU time of children")?;
    let total = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    u64::try_from(total).context("CPU time is negative")
}

/// A contender that runs; killed when it is dropped before its end.
pub struct Running {
    /// Its process.
    pub child: Child,
    /// Just before its `fork`, in nanoseconds of [`now`].
    pub began: u64,
    cpu_before_us: u64,
    name: String,
}

/// How it ended.
pub struct Ended {
    /// When it had been waited for.
    pub at: u64,
    /// The CPU time of it and all its descendants, in microseconds.
    pub cpu_us: u64,
}

/// Starts a contender.
pub fn spawn(command: &mut Command) -> Result<Running> {
    let name = command.get_program().to_string_lossy().into_owned();
    let cpu_before_us = children_cpu_us()?;
    let began = now();
    let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
    Ok(Running { child, began, cpu_before_us, name })
}

impl Running {
    /// Reads one byte from its standard output and gives the time at which it was there.
    pub fn first_byte(&mut self, expected: u8) -> Result<u64> {
        let mut output = self.child.stdout.take().context("the contender's output is not a pipe")?;
        self.wait_readable(&output, "start its program")?;
        let mut byte = [0];
        let count = output.read(&mut byte).context("cannot read the contender's output")?;
        let at = now();
        self.child.stdout = Some(output);
        if count == 0 {
            let status = self.child.wait()?;
            bail!("{} ended without a word: {status}", self.name);
        }
        ensure!(byte[0] == expected, "{} wrote {:?} first", self.name, char::from(byte[0]));
        Ok(at)
    }

    /// Waits until `fd` can be read, which means that the contender did as `what` says; an error when it ends first.
    pub fn wait_readable(&mut self, fd: impl AsFd, what: &str) -> Result<()> {
        let process = self.watch()?;
        let mut watched = [PollFd::new(&fd, PollFlags::IN), PollFd::new(&process, PollFlags::IN)];
        self.wait(&mut watched, what)?;
        if watched[0].revents().is_empty() {
            let status = self.child.wait()?;
            bail!("{} did not {what}: {status}", self.name);
        }
        Ok(())
    }

    /// Waits for its end, which must be a success, and for the ends of all that it left behind.
    pub fn end(mut self) -> Result<Ended> {
        let process = self.watch()?;
        self.wait(&mut [PollFd::new(&process, PollFlags::IN)], "end")?;
        let status = self.child.wait().with_context(|| format!("cannot wait for {}", self.name))?;
        let at = now();
        ensure!(status.success(), "{}: {status}", self.name);
        if let Some(mut output) = self.child.stdout.take() {
            let mut rest = Vec::new();
            output.read_to_end(&mut rest).context("cannot read the contender's output")?;
            ensure!(rest.is_empty(), "{} wrote more than its first byte", self.name);
        }
        while let Ok(Some(_)) = wait(WaitOptions::empty()) {}
        Ok(Ended { at, cpu_us: children_cpu_us()?.saturating_sub(self.cpu_before_us) })
    }

    fn watch(&self) -> Result<OwnedFd> {
        let pid =
            i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("a process id is out of range")?;
        pidfd_open(pid, PidfdFlags::empty()).context("cannot watch the contender")
    }

    fn wait(&self, watched: &mut [PollFd<'_>], what: &str) -> Result<()> {
        let ready =
            rustix::io::retry_on_intr(|| poll(watched, Some(&PATIENCE))).context("cannot wait for the contender")?;
        ensure!(ready > 0, "{} did not {what} within {} s", self.name, PATIENCE.tv_sec);
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both do nothing when its end is known.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
