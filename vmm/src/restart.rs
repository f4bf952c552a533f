//! The process above a monitor: it has the monitor born in its jail ([`jailer::birth`]), and waits for its end.
//!
//! Where a front end starts a monitor, there is one only where a restart policy asks for it: it starts the monitor again when
//! its container has ended, as docker's `--restart` says, and knows nothing but exit records. It holds the same socket and the
//! same lock as the monitor below it, so that the container lives while it waits.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use api::config::{LaunchConfig, RestartPolicy};
use api::folder::Folder;
use api::lock::{self, Byte};
use api::record::{self, End};
use jailer::cgroup::{self, Group, Plan};
use jailer::{Birth, Born, JailError, Place};
use rustix::process::{PidfdFlags, WaitId, WaitIdOptions, getpid, pidfd_open, waitid};
use thiserror::Error;

/// Names the descriptor of the process that a monitor ends with.
pub const PARENT: &str = "--parent-fd";

/// Says that a container was started before: nobody attaches at its start.
pub const AGAIN: &str = "--again";

/// What groups that are made here are named, with the id of this process.
const GROUP: &str = "vm-";
/// The wait before the first restart; each later one is twice as long as the one before.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// A container that ran so long starts well: waits begin anew.
const GOOD_RUN: Duration = Duration::from_secs(10);

/// Why there is no monitor.
#[derive(Debug, Error)]
pub enum RestartError {
    /// It was not born.
    #[error("cannot start the monitor")]
    Birth(#[from] JailError),
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

fn system<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> RestartError {
    move |error| RestartError::System { step, source: error.into() }
}

/// How monitors are started.
#[derive(Debug)]
pub struct Above {
    program: PathBuf,
    arguments: Vec<OsString>,
    lock: Option<OwnedFd>,
    inherited: Vec<OwnedFd>,
    network: Option<PathBuf>,
    group: Group,
    /// The folders of a group that was made here.
    made: Vec<PathBuf>,
}

impl Above {
    /// Monitors with these arguments, each of which gets the lock file and the other descriptors that were inherited, under
    /// their numbers.
    ///
    /// # Errors
    /// [`RestartError::System`].
    pub fn new(
        arguments: Vec<OsString>,
        lock: Option<OwnedFd>,
        inherited: Vec<OwnedFd>,
        config: &LaunchConfig,
    ) -> Result<Self, RestartError> {
        let program = std::env::current_exe().map_err(system("find its own program"))?;
        let jail = &config.jail;
        let network = jail.network_namespace.clone();
        let mut above =
            Self { program, arguments, lock, inherited, network, group: Group::default(), made: Vec::new() };
        if jail.cgroups.is_empty() {
            let plan = Plan::new(&format!("{GROUP}{}", std::process::id()))?;
            // What was killed before it could remove its own.
            plan.sweep(GROUP);
            // From here on it is removed when this value is dropped.
            above.made = plan.folders();
            above.group = plan.make(&jail.bounds(&config.vm))?;
        } else {
            above.group = Group::open(&jail.cgroups)?;
        }
        Ok(above)
    }

    fn start(&self, flag: Option<&str>, also: Option<&OwnedFd>) -> Result<Born, RestartError> {
        let number = also.map(|descriptor| descriptor.as_raw_fd().to_string());
        let more = flag.iter().map(OsStr::new).chain(number.iter().map(OsStr::new));
        let arguments: Vec<&OsStr> = self.arguments.iter().map(OsString::as_os_str).chain(more).collect();
        let also = also.iter().map(|descriptor| descriptor.as_fd());
        let descriptors: Vec<BorrowedFd<'_>> =
            self.inherited.iter().chain(&self.lock).map(OwnedFd::as_fd).chain(also).collect();
        let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
        let birth = Birth {
            program: &self.program,
            arguments: &arguments,
            streams: [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()],
            descriptors: &descriptors,
            mask: None,
            jail: Some(Place { network: self.network.as_deref(), cgroup: Some(&self.group) }),
        };
        Ok(birth.start()?)
    }

    /// Runs one monitor, which ends with this process, and gives its exit code; `None` when it was killed.
    ///
    /// # Errors
    /// [`RestartError`].
    pub fn once(&self) -> Result<Option<u8>, RestartError> {
        let us = pidfd_open(getpid(), PidfdFlags::empty()).map_err(system("open itself"))?;
        wait(&self.start(Some(PARENT), Some(&us))?)
    }

    /// Runs monitors until the policy has it no more. Gives the last exit code. The policy is the one that stands in `config`
    /// when it is asked for: it can be changed meanwhile.
    ///
    /// # Errors
    /// [`RestartError`].
    pub fn supervise(&self, config: &Path, folder: &Folder) -> Result<u8, RestartError> {
        if let Some(lock) = &self.lock {
            lock::take(lock, Byte::Supervisor).map_err(system("lock the state directory"))?;
        }
        let (mut restarts, mut pause, mut flag) = (0, FIRST_WAIT, None);
        loop {
            let began = Instant::now();
            let code = wait(&self.start(flag, None)?)?;
            // A record that cannot be read is none: the monitor was killed, or the disk is full.
            let end = record::read(folder.path()).unwrap_or(None);
            // Before they are counted: the policy means failures in a row.
            if began.elapsed() >= GOOD_RUN {
                (restarts, pause) = (0, FIRST_WAIT);
            }
            // A document that cannot be read any more has no policy either.
            let policy = || LaunchConfig::read(config).ok().and_then(|config| config.restart);
            let wanted = || policy().is_some_and(|policy| again(policy, end.as_ref(), code, restarts));
            let stays = wanted() && {
                thread::sleep(pause);
                wanted()
            };
            if !stays {
                return Ok(code.unwrap_or(api::control::EXIT_FAILED));
            }
            (restarts, pause, flag) = (restarts + 1, (pause * 2).min(LONGEST_WAIT), Some(AGAIN));
            // It is running again: how it ended before is not how it is. There may be none.
            let _ = folder.remove(record::NAME);
        }
    }
}

impl Drop for Above {
    fn drop(&mut self) {
        // What cannot be removed is left to who made it necessary: there is nobody who could be told.
        _ = cgroup::remove(&self.made);
    }
}

/// Waits for a monitor's end, and gives its exit code.
fn wait(monitor: &Born) -> Result<Option<u8>, RestartError> {
    let wait = || waitid(WaitId::PidFd(monitor.process.as_fd()), WaitIdOptions::EXITED);
    let status = rustix::io::retry_on_intr(wait).map_err(system("wait for the monitor"))?;
    Ok(status.and_then(|status| status.exit_status()).and_then(|code| u8::try_from(code).ok()))
}

/// Whether a container that ended like this, and its monitor with this exit code, is started again.
fn again(policy: RestartPolicy, end: Option<&End>, code: Option<u8>, restarts: u32) -> bool {
    let (failed, may) = match end {
        // Somebody wanted it to end; or it never ran, and would not the next time.
        Some(end) => (end.state.exit_code != Some(0), !end.stopped && end.state.started_ns.is_some()),
        // The monitor's exit code is the container's.
        None => (code != Some(0), true),
    };
    may && match policy {
        RestartPolicy::Always => true,
        RestartPolicy::OnFailure { most } => failed && most.is_none_or(|most| restarts < most),
    }
}

#[cfg(test)]
mod tests {
    use api::model::ContainerState;

    use super::*;

    fn ended(code: u8) -> End {
        let state = ContainerState { exit_code: Some(code), started_ns: Some(1), ..ContainerState::default() };
        End { state, ..End::default() }
    }

    #[test]
    fn policies_say_what_is_started_again() {
        let (always, twice) = (RestartPolicy::Always, RestartPolicy::OnFailure { most: Some(2) });
        let forever = RestartPolicy::OnFailure { most: None };
        let again = |policy, end, restarts| again(policy, end, None, restarts);
        let (well, badly) = (ended(0), ended(1));
        assert!(again(always, Some(&well), 99) && again(always, None, 0));
        assert!(!again(twice, Some(&well), 0) && again(twice, Some(&badly), 1) && !again(twice, Some(&badly), 2));
        assert!(again(forever, Some(&badly), 99) && again(forever, None, 0));
    }

    #[test]
    fn without_a_record_the_exit_code_says_whether_it_failed() {
        let forever = RestartPolicy::OnFailure { most: None };
        assert!(!again(forever, None, Some(0), 0) && again(forever, None, Some(3), 0));
        assert!(again(RestartPolicy::Always, None, Some(0), 0));
        assert!(!again(forever, Some(&ended(0)), Some(3), 0), "the record is not believed over the exit code");
    }

    #[test]
    fn what_was_stopped_or_never_ran_is_left_alone() {
        let stopped = End { stopped: true, ..ended(137) };
        let never =
            End { state: ContainerState { exit_code: Some(127), ..ContainerState::default() }, ..End::default() };
        for end in [stopped, never] {
            assert!(!again(RestartPolicy::Always, Some(&end), Some(137), 0));
        }
    }
}
