//! Restart policies: a process above the monitor that starts it again when its container has ended, as docker's
//! `--restart` says. There is one only where a policy asks for it, and it knows nothing but exit records.
//!
//! It holds the same socket and the same lock as the monitor below it, so that the container lives while it waits.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use api::config::{LaunchConfig, RestartPolicy};
use api::record::{self, End};

/// Tells a monitor that it has one of these above it.
pub const SUPERVISED: &str = "--supervised";
/// The wait before the first restart; each later one is twice as long as the one before.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// A container that ran so long starts well: waits begin anew.
const GOOD_RUN: Duration = Duration::from_secs(10);

/// Runs this program with the same arguments until the policy has it no more. Gives the last exit code. The policy is the
/// one that stands in `config` when it is asked for: it can be changed meanwhile.
///
/// # Errors
/// It cannot be executed.
pub fn supervise(config: &Path, folder: &Path, arguments: &[OsString]) -> io::Result<u8> {
    let program = std::env::current_exe()?;
    let (mut restarts, mut wait) = (0, FIRST_WAIT);
    loop {
        let began = Instant::now();
        let status = Command::new(&program).args(arguments).arg(SUPERVISED).status()?;
        let code = status.code().and_then(|code| u8::try_from(code).ok());
        // A record that cannot be read is none: the monitor was killed, or the disk is full.
        let end = record::read(folder).unwrap_or(None);
        // Before they are counted: the policy means failures in a row.
        if began.elapsed() >= GOOD_RUN {
            (restarts, wait) = (0, FIRST_WAIT);
        }
        // A document that cannot be read any more has no policy either.
        let policy = || LaunchConfig::read(config).ok().and_then(|config| config.restart);
        let wanted = || policy().is_some_and(|policy| again(policy, end.as_ref(), code, restarts));
        let stays = wanted() && {
            thread::sleep(wait);
            wanted()
        };
        if !stays {
            return Ok(code.unwrap_or(api::control::EXIT_FAILED));
        }
        (restarts, wait) = (restarts + 1, (wait * 2).min(LONGEST_WAIT));
        // It is running again: how it ended before is not how it is. There may be none.
        let _ = fs::remove_file(folder.join(record::NAME));
    }
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
