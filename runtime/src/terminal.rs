//! The caller's terminal: its size, and raw mode for as long as a container has it.

use std::io::{self, IsTerminal as _};
use std::os::fd::AsFd;
use std::panic;
use std::sync::Mutex;

use protocol::container::WindowSize;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use thiserror::Error;

/// What a terminal is taken to be that does not know its size, as over a serial line.
const UNKNOWN_SIZE: WindowSize = WindowSize { rows: 24, columns: 80 };

/// The mode to go back to, for the panic hook: it runs whatever the panic strategy is, and no destructor has to.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Why there is no terminal for the container.
#[derive(Debug, Error)]
pub enum TerminalError {
    /// Standard input is something else.
    #[error("the input device is not a TTY: leave out -t, or run it on a terminal")]
    NotATerminal,
    /// Its mode cannot be changed.
    #[error("cannot change the mode of the terminal")]
    Mode(#[source] io::Error),
}

/// The size of the terminal that one of the standard streams is.
pub fn window_size() -> WindowSize {
    let sizes = [tcgetwinsize(io::stdin()), tcgetwinsize(io::stdout()), tcgetwinsize(io::stderr())];
    let known = sizes.into_iter().flatten().find(|size| size.ws_row > 0 && size.ws_col > 0);
    known.map_or(UNKNOWN_SIZE, |size| WindowSize { rows: size.ws_row, columns: size.ws_col })
}

/// Checks that `-it` has a terminal to work on.
///
/// # Errors
/// [`TerminalError::NotATerminal`].
pub fn check() -> Result<(), TerminalError> {
    if io::stdin().is_terminal() { Ok(()) } else { Err(TerminalError::NotATerminal) }
}

/// Standard input in raw mode: every key goes to the container. Dropping it, or a panic, restores the mode.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Switches to raw mode.
    ///
    /// # Errors
    /// Standard input is not a terminal, or does not do it.
    pub fn enter() -> Result<Self, TerminalError> {
        let stdin = io::stdin();
        let saved = tcgetattr(stdin.as_fd()).map_err(|_| TerminalError::NotATerminal)?;
        let mut raw = saved.clone();
        raw.make_raw();
        if let Ok(mut slot) = SAVED.lock()
            && slot.replace(saved).is_none()
        {
            let previous = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                restore();
                previous(info);
            }));
        }
        // Drain: what the caller printed before is shown under the old mode.
        let mode = Self(());
        tcsetattr(stdin.as_fd(), OptionalActions::Drain, &raw).map_err(|errno| TerminalError::Mode(errno.into()))?;
        Ok(mode)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Restores the mode, once. A terminal that has gone away needs none.
fn restore() {
    if let Ok(mut slot) = SAVED.try_lock()
        && let Some(saved) = slot.take()
    {
        _ = tcsetattr(io::stdin(), OptionalActions::Drain, &saved);
    }
}
