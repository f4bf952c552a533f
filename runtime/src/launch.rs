//! Starting a monitor: one `posix_spawn`, which neither copies page tables nor runs anything of ours in the child.

use std::env;
use std::ffi::{CString, NulError, OsString};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::signal::SigSet;
use nix::sys::stat::Mode;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};
use thiserror::Error;

/// Why a monitor was not started.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// A path has a NUL byte.
    #[error("the path {} has a NUL byte", path.display())]
    Nul {
        /// The path.
        path: PathBuf,
        /// Where.
        #[source]
        source: NulError,
    },
    /// No socket or process could be made.
    #[error("cannot start the monitor {}", path.display())]
    Spawn {
        /// The monitor.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// What a monitor is started with.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The executable.
    pub monitor: &'a Path,
    /// The document.
    pub config: &'a Path,
    /// A descriptor to hand down under its own number.
    pub image: BorrowedFd<'a>,
    /// Whether the monitor reads our standard input; otherwise /dev/null is its own.
    pub stdin: bool,
    /// The signal mask that it gets.
    pub mask: &'a SigSet,
}

/// How a monitor ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// With an exit code.
    Exited(i32),
    /// By a signal.
    Killed(i32),
}

/// A monitor that was started. Dropping it before [`Monitor::reap`] kills it, so that none is ever left behind.
#[derive(Debug)]
pub struct Monitor {
    /// Readable when it has ended.
    pub process: OwnedFd,
    /// Our end of the control socket.
    pub control: OwnedFd,
    reaped: bool,
}

impl Launch<'_> {
    /// Starts it. Its standard streams are ours.
    ///
    /// # Errors
    /// [`LaunchError::Spawn`] names the monitor.
    pub fn spawn(&self) -> Result<Monitor, LaunchError> {
        let failed = |source| LaunchError::Spawn { path: self.monitor.to_owned(), source };
        let made =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None);
        let (ours, theirs) = made.map_err(|errno| failed(errno.into()))?;
        // The monitor decides itself how it reads its end.
        rustix::io::ioctl_fionbio(&theirs, false).map_err(|errno| failed(errno.into()))?;
        let arguments = [
            c_string(self.monitor)?,
            c"--config".to_owned(),
            c_string(self.config)?,
            c"--control-fd".to_owned(),
            c_string(Path::new(&theirs.as_raw_fd().to_string()))?,
        ];
        let spawn = || {
            let actions = self.actions(&theirs)?;
            let mut attributes = PosixSpawnAttr::init()?;
            attributes.set_flags(PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK)?;
            attributes.set_sigmask(self.mask)?;
            posix_spawn(self.monitor, &actions, &attributes, &arguments, &environment())
        };
        let pid = spawn().map_err(|errno: Errno| failed(errno.into()))?;
        let pid = Pid::from_raw(pid.as_raw()).ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        // The process is our child and has not been waited for: its id cannot be another one's yet.
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(process) => Ok(Monitor { process, control: ours, reaped: false }),
            Err(errno) => {
                _ = rustix::process::kill_process(pid, Signal::KILL);
                _ = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED);
                Err(failed(errno.into()))
            }
        }
    }

    fn actions(&self, control: &OwnedFd) -> Result<PosixSpawnFileActions, Errno> {
        let mut actions = PosixSpawnFileActions::init()?;
        if !self.stdin {
            actions.add_open(0, c"/dev/null", OFlag::O_RDONLY, Mode::empty())?;
        }
        // A descriptor duplicated onto itself loses its close-on-exec flag in the child alone.
        for descriptor in [control.as_raw_fd(), self.image.as_raw_fd()] {
            actions.add_dup2(descriptor, descriptor)?;
        }
        Ok(actions)
    }
}

impl Monitor {
    /// Kills it.
    pub fn kill(&self) {
        // It may have ended by itself.
        _ = pidfd_send_signal(&self.process, Signal::KILL);
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// Somebody else has waited for it.
    pub fn reap(&mut self) -> io::Result<Ending> {
        use std::os::fd::AsFd as _;

        let status = loop {
            match waitid(WaitId::PidFd(self.process.as_fd()), WaitIdOptions::EXITED) {
                Ok(status) => break status.ok_or(io::ErrorKind::NotFound)?,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        };
        self.reaped = true;
        match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Ok(Ending::Exited(code)),
            (None, Some(signal)) => Ok(Ending::Killed(signal)),
            (None, None) => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if !self.reaped {
            self.kill();
            _ = self.reap();
        }
    }
}

/// The monitor needs nothing of the caller's environment, which may hold secrets, but what is meant for it.
fn environment() -> Vec<CString> {
    let ours = |name: &OsString| name.as_bytes().starts_with(b"COFFERDAM_") || name == "RUST_BACKTRACE";
    let entry = |(mut name, value): (OsString, OsString)| {
        name.push("=");
        name.push(value);
        CString::new(name.into_vec()).ok()
    };
    env::vars_os().filter(|(name, _)| ours(name)).filter_map(entry).collect()
}

fn c_string(path: &Path) -> Result<CString, LaunchError> {
    CString::new(path.as_os_str().as_bytes()).map_err(|source| LaunchError::Nul { path: path.to_owned(), source })
}
