//! Starting a monitor: one `posix_spawn`, which neither copies page tables nor runs anything of ours in the child.

use std::env;
use std::ffi::{CStr, CString, NulError, OsString};
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use api::client::SOCKET;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::signal::SigSet;
use nix::sys::stat::Mode;
use rustix::fs::{Mode as FileMode, OFlags, open};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};
use thiserror::Error;

use crate::state::StateDirectory;

/// The file in a state directory that takes what the monitor writes to its standard error.
const ERRORS: &str = "monitor.log";
/// How much of it is read.
const ERRORS_MAX: u64 = 256 << 10;

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
    /// The container's state directory.
    pub state: &'a StateDirectory,
    /// The document in it.
    pub config: &'a Path,
    /// A descriptor to hand down under its own number.
    pub image: BorrowedFd<'a>,
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
        let failed = |source| LaunchError::Spawn { path: self.monitor.to_owned(), source };
        let listener = self.listen().map_err(failed)?;
        let arguments = [
            c_string(self.monitor)?,
            c"--config".to_owned(),
            c_string(self.config)?,
            c"--api-fd".to_owned(),
            c_string(Path::new(&listener.as_raw_fd().to_string()))?,
        ];
        let errors = c_string(&self.state.path().join(ERRORS))?;
        let spawn = || {
            let actions = self.actions(&listener, &errors)?;
            let mut attributes = PosixSpawnAttr::init()?;
            let flags = PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK.bits() | i32::from(libc::POSIX_SPAWN_SETSID);
            attributes.set_flags(PosixSpawnFlags::from_bits_retain(flags))?;
            attributes.set_sigmask(self.mask)?;
            posix_spawn(self.monitor, &actions, &attributes, &arguments, &environment())
        };
        let pid = spawn().map_err(|errno: Errno| failed(errno.into()))?;
        let pid = Pid::from_raw(pid.as_raw()).ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        // The process is our child and has not been waited for: its id cannot be another one's yet.
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(process) => Ok(Monitor { process, pid, owned: true, ended: None }),
            Err(errno) => {
                _ = rustix::process::kill_process(pid, Signal::KILL);
                _ = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED);
                Err(failed(errno.into()))
            }
        }
    }

    /// Binds the API's socket, through the directory's descriptor: an address has room for 107 bytes, a path may be longer.
    fn listen(&self) -> io::Result<UnixListener> {
        self.state.forget(SOCKET);
        let folder = open(self.state.path(), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, FileMode::empty())?;
        // The directory is its owner's alone.
        UnixListener::bind(format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd()))
    }

    fn actions(&self, listener: &UnixListener, errors: &CStr) -> Result<PosixSpawnFileActions, Errno> {
        let mut actions = PosixSpawnFileActions::init()?;
        actions.add_open(0, c"/dev/null", OFlag::O_RDWR, Mode::empty())?;
        actions.add_dup2(0, 1)?;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_APPEND;
        actions.add_open(2, errors, flags, Mode::from_bits_retain(0o600))?;
        // A descriptor duplicated onto itself loses its close-on-exec flag in the child alone.
        let lock = self.state.lock().map(|lock| lock.as_raw_fd());
        for descriptor in [listener.as_raw_fd(), self.image.as_raw_fd()].into_iter().chain(lock) {
            actions.add_dup2(descriptor, descriptor)?;
        }
        Ok(actions)
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

    /// Waits until it has ended.
    ///
    /// # Errors
    /// Somebody else has waited for it.
    pub fn reap(&mut self) -> io::Result<Ending> {
        use std::os::fd::AsFd as _;

        if let Some(ending) = self.ended {
            return Ok(ending);
        }
        let status = loop {
            match waitid(WaitId::PidFd(self.process.as_fd()), WaitIdOptions::EXITED) {
                Ok(status) => break status.ok_or(io::ErrorKind::NotFound)?,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        };
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
