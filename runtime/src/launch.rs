//! Starting a monitor: one `clone3`, which neither copies page tables nor needs a helper ([`jailer::birth`]).

use std::ffi::OsStr;
use std::fs::{DirBuilder, File};
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use api::client::SOCKET;
use jailer::{Birth, Born, JailError, Place};
use nix::sys::signal::SigSet;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::retry_on_intr;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};
use thiserror::Error;

use crate::signals::{First, Signals};
use crate::state::StateDirectory;

/// The file in a state directory that takes what the monitor writes to its standard error.
const ERRORS: &str = "monitor.log";
/// How much of it is read.
const ERRORS_MAX: u64 = 256 << 10;
/// How long a monitor that was killed may take to be gone.
const DYING: Duration = Duration::from_secs(5);

/// Why a monitor was not started.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// What it is to have could not be made.
    #[error("cannot start the monitor {}", path.display())]
    Prepare {
        /// The monitor.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// It was not born.
    #[error("cannot start the monitor {}", path.display())]
    Birth {
        /// The monitor.
        path: PathBuf,
        /// Why.
        #[source]
        source: JailError,
    },
}

/// What a monitor is started with.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The executable.
    pub monitor: &'a Path,
    /// The container's state directory.
    pub state: &'a StateDirectory,
    /// The document in it.
    pub config: &'a Path,
    /// A descriptor to hand down under its own number.
    pub image: BorrowedFd<'a>,
    /// The signal mask that it gets.
    pub mask: &'a SigSet,
    /// Where it is born; without, it is a process above the monitor, which has that born.
    pub place: Option<Place<'a>>,
}

/// How a monitor ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// With an exit code.
    Exited(i32),
    /// By a signal.
    Killed(i32),
}

/// A monitor that was started. Dropping it kills it, unless it was [released](Monitor::release).
#[derive(Debug)]
pub struct Monitor {
    /// Readable when it has ended.
    pub process: OwnedFd,
    /// Its process id.
    pub pid: Pid,
    owned: bool,
    /// How it has ended, once it was waited for.
    ended: Option<Ending>,
}

impl Launch<'_> {
    /// Starts it, in a session of its own and without our standard streams: it outlives us. It inherits the lock of the
    /// state directory, and the socket of its API, which can be connected to from now on.
    ///
    /// # Errors
    /// [`LaunchError::Spawn`] names the monitor.
    pub fn spawn(&self) -> Result<Monitor, LaunchError> {
        let path = || self.monitor.to_owned();
        let failed = |source| LaunchError::Prepare { path: path(), source };
        let listener = self.listen().map_err(failed)?;
        let null = File::options().read(true).write(true).open("/dev/null").map_err(failed)?;
        let errors = self.errors().map_err(failed)?;
        // What was left by the last one is in it.
        match DirBuilder::new().mode(0o700).create(self.state.path().join(api::folder::NAME)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
            _ => {}
        }
        let api = listener.as_raw_fd().to_string();
        let mut arguments = vec!["--config".as_ref(), self.config.as_os_str(), "--api-fd".as_ref(), OsStr::new(&api)];
        let mut descriptors = vec![listener.as_fd(), self.image];
        let lock = self.state.lock();
        let number = lock.map(|lock| lock.as_raw_fd().to_string());
        if let (Some(lock), Some(number)) = (lock, &number) {
            descriptors.push(lock);
            arguments.extend([OsStr::new("--lock-fd"), OsStr::new(number)]);
        }
        let birth = Birth {
            program: self.monitor,
            arguments: &arguments,
            streams: [null.as_fd(), null.as_fd(), errors.as_fd()],
            descriptors: &descriptors,
            mask: Some(self.mask.as_ref()),
            jail: self.place,
        };
        let Born { pid, process } = birth.start().map_err(|source| LaunchError::Birth { path: path(), source })?;
        Ok(Monitor { process, pid, owned: true, ended: None })
    }

    /// Opens what takes its standard error.
    fn errors(&self) -> io::Result<File> {
        let path = self.state.path().join(ERRORS);
        // Truncated, and added to by whoever has it: a restart policy's monitors write one after the other.
        File::options().create(true).append(true).mode(0o600).open(&path).and_then(|file| {
            file.set_len(0)?;
            Ok(file)
        })
    }

    /// Binds the API's socket, through the directory's descriptor: an address has room for 107 bytes, a path may be longer.
    fn listen(&self) -> io::Result<UnixListener> {
        self.state.forget(SOCKET);
        let folder = open(self.state.path(), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        // The directory is its owner's alone.
        UnixListener::bind(format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd()))
    }
}

/// What a monitor wrote to its standard error: the last line, which says why it ended.
pub fn last_error(folder: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(folder.join(ERRORS)).ok()?.take(ERRORS_MAX).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().rev().find(|line| !line.trim().is_empty())?;
    Some(line.strip_prefix("error: ").unwrap_or(line).to_owned())
}

impl Monitor {
    /// Kills it.
    pub fn kill(&self) {
        // It may have ended by itself.
        _ = pidfd_send_signal(&self.process, Signal::KILL);
    }

    /// Lets it live on without us.
    pub fn release(&mut self) {
        self.owned = false;
    }

    /// Waits until it has ended, and gives how. One that takes too long is killed, for which there is no ending of its own; and
    /// so it is when a signal comes that ends what we do: it may have been taken over, and does not have to end.
    ///
    /// # Errors
    /// Somebody else has waited for it, or it does not end although it was killed.
    pub fn see_out(&mut self, signals: &Signals, patience: Duration) -> io::Result<Option<Ending>> {
        if self.ended.is_some() {
            return Ok(self.ended);
        }
        let in_time = signals.until_ended(self.process.as_fd(), patience)? == First::End;
        if !in_time {
            self.kill();
        }
        let ending = self.reap()?;
        Ok(in_time.then_some(ending))
    }

    /// Takes the ending of one that has ended, or was killed.
    fn reap(&mut self) -> io::Result<Ending> {
        let ended = {
            let mut ended = [PollFd::new(&self.process, PollFlags::IN)];
            let patience = Timespec::try_from(DYING).ok();
            retry_on_intr(|| poll(&mut ended, patience.as_ref()))?
        };
        if ended == 0 {
            let pid = self.pid.as_raw_nonzero();
            let told = format!("process {pid} does not end, although it was killed: look at its state in /proc/{pid}");
            return Err(io::Error::new(io::ErrorKind::TimedOut, told));
        }
        let status = retry_on_intr(|| waitid(WaitId::PidFd(self.process.as_fd()), WaitIdOptions::EXITED))?;
        let status = status.ok_or(io::ErrorKind::NotFound)?;
        self.owned = false;
        let ending = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Ending::Exited(code),
            (None, Some(signal)) => Ending::Killed(signal),
            (None, None) => return Err(io::ErrorKind::InvalidData.into()),
        };
        self.ended = Some(ending);
        Ok(ending)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if self.owned {
            self.kill();
            _ = self.reap();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Instant;

    use nix::sys::signal::{Signal as Sent, raise};
    use rustix::process::{PidfdFlags, pidfd_open};

    use super::*;

    /// A monitor that does nothing but wait for its end, by itself after so many seconds.
    #[expect(clippy::zombie_processes, reason = "it is waited for by its descriptor")]
    fn monitor(seconds: &str) -> Monitor {
        let child = Command::new("sleep").arg(seconds).spawn().unwrap();
        let pid = Pid::from_child(&child);
        Monitor { process: pidfd_open(pid, PidfdFlags::empty()).unwrap(), pid, owned: true, ended: None }
    }

    #[test]
    fn a_monitor_that_does_not_end_is_killed_after_a_while_or_when_a_signal_comes() {
        let signals = Signals::block().unwrap();
        let began = Instant::now();
        let mut late = monitor("600");
        assert_eq!(late.see_out(&signals, Duration::from_millis(10)).unwrap(), None);
        assert_eq!(late.ended, Some(Ending::Killed(9)));
        raise(Sent::SIGINT).unwrap();
        assert_eq!(monitor("600").see_out(&signals, Duration::from_secs(600)).unwrap(), None);
        assert_eq!(monitor("0").see_out(&signals, Duration::from_secs(600)).unwrap(), Some(Ending::Exited(0)));
        drop(monitor("600"));
        assert!(began.elapsed() < Duration::from_secs(60));
    }
}
