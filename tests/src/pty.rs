//! Pseudo-terminals (pty(7)): the side that a person sits at.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};

/// A terminal.
pub struct Terminal {
    screen: OwnedFd,
}

impl Terminal {
    /// Opens a new terminal, and gives the end for programs with it.
    ///
    /// # Errors
    /// The system has no more.
    pub fn open(rows: u16, columns: u16) -> io::Result<(Self, OwnedFd)> {
        let screen = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&screen)?;
        unlockpt(&screen)?;
        let name = ptsname(&screen, Vec::new())?;
        let line = open(name.as_c_str(), OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
        let terminal = Self { screen };
        terminal.resize(rows, columns)?;
        Ok((terminal, line))
    }

    /// The same terminal once more, to look at it after the program on it has ended.
    ///
    /// # Errors
    /// There are no more descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { screen: self.screen.try_clone()? })
    }

    /// Changes the size, of which the programs in the foreground are told by SIGWINCH.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        Ok(tcsetwinsize(&self.screen, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })?)
    }

    /// How the terminal treats keys and output at the moment.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn settings(&self) -> io::Result<Termios> {
        Ok(tcgetattr(&self.screen)?)
    }

    /// What is shown on the terminal, as a stream.
    pub(crate) fn reader(&self) -> File {
        File::from(self.screen.try_clone().expect("cannot duplicate a descriptor"))
    }

    /// Types.
    pub(crate) fn write(&self, mut keys: &[u8]) -> io::Result<()> {
        while !keys.is_empty() {
            let count = rustix::io::write(&self.screen, keys)?;
            keys = &keys[count..];
        }
        Ok(())
    }
}
