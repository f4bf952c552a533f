//! A process's terminal (OCI runtime specification, `process.terminal`): a pair from the container's own devpts, its
//! slave side the controlling terminal, its master side for the agent. That of the first process is `/dev/console`.

use std::os::fd::OwnedFd;

use protocol::container::WindowSize;
use rustix::fs::{self, Mode, OFlags, ResolveFlags};
use rustix::process::ioctl_tiocsctty;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::error::{InStep, SetupError};
use super::filesystem::{attach, bind};

/// How a path below the container's `/dev` is resolved: what is there may be the container's doing.
const STRICT: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// Opens a terminal of the container whose `/dev` is given, makes it the controlling terminal and the standard streams
/// of the caller, which must lead its session, and gives the master side.
///
/// # Errors
/// The step that the kernel refused.
pub fn open(dev: &OwnedFd, size: WindowSize, owner: u32) -> Result<OwnedFd, SetupError> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = fs::openat2(dev, "pts/ptmx", flags, Mode::empty(), STRICT).in_step("open a terminal")?;
    unlockpt(&master).in_step("unlock the terminal")?;
    let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
        .in_step("open the terminal's slave side")?;
    fs::fchown(&slave, Some(fs::Uid::from_raw(owner)), None).in_step("give the terminal to the user")?;
    resize(&master, size).in_step("set the terminal's size")?;
    ioctl_tiocsctty(&slave).in_step("take the terminal as the controlling one")?;
    super::execution::replace_streams([&slave, &slave, &slave])?;
    Ok(master)
}

/// Makes the terminal that is the caller's standard input `/dev/console`.
///
/// # Errors
/// The step that the kernel refused.
pub fn make_console(dev: &OwnedFd) -> Result<(), SetupError> {
    let flags = OFlags::RDONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let console = fs::openat(dev, "console", flags, Mode::from_raw_mode(0o600)).in_step("make /dev/console")?;
    let terminal = bind(rustix::stdio::stdin()).in_step("make a mount of the terminal")?;
    attach(terminal, &console).in_step("mount /dev/console")
}

/// Sets the size of a terminal; its foreground processes get SIGWINCH.
///
/// # Errors
/// What the ioctl says.
pub fn resize(master: &OwnedFd, size: WindowSize) -> rustix::io::Result<()> {
    tcsetwinsize(master, Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 })
}
