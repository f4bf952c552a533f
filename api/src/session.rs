//! What can go wrong between a monitor and its guest's agent, and how the guest's words are shown.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use protocol::VERSION;
use protocol::frame::FrameError;
use thiserror::Error;

/// The most of a message of the guest's that is shown, in characters.
const MESSAGE_MAX: usize = 1024;
/// The most of a text of several lines that is shown, in characters.
const TEXT_MAX: usize = 8 << 10;

/// Why a conversation with an agent ended.
#[derive(Debug, Error)]
pub enum SessionError {
    /// The guest never got as far.
    #[error("the guest's agent did not report in time")]
    Silent,
    /// The agent is of another build.
    #[error("the guest's agent speaks version {0} of the protocol, not {VERSION}: rebuild the initial RAM file system")]
    Version(u32),
    /// The agent said something that does not fit.
    #[error("the guest's agent broke the protocol: {0}")]
    Protocol(&'static str),
    /// A frame of the agent's is none.
    #[error("the guest's agent broke the protocol")]
    Frame(#[source] FrameError),
    /// The connection failed.
    #[error("cannot talk to the guest's agent")]
    Io(#[source] io::Error),
    /// The guest ended.
    #[error("the guest ended")]
    GuestEnded,
}

/// A message of the guest's, or of a client's, fit for a line on a terminal.
pub fn shown(message: &str) -> String {
    message.chars().take(MESSAGE_MAX).map(harmless).collect()
}

/// As [`shown`], and whole, with its lines: for whoever asks for this text alone.
pub fn shown_whole(text: &str) -> String {
    text.chars().map(|c| if matches!(c, '\n' | '\t') { c } else { harmless(c) }).collect()
}

/// A character that does nothing to a terminal but to be seen.
fn harmless(c: char) -> char {
    if c.is_control() { '\u{fffd}' } else { c }
}

/// The end of a text of the guest's, with its lines, otherwise fit for a terminal.
pub fn shown_lines(text: &str) -> String {
    let skipped = text.chars().count().saturating_sub(TEXT_MAX);
    let harmless = |c: char| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c };
    text.chars().filter(|c| *c != '\r').skip(skipped).map(harmless).collect()
}

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// The time on CLOCK_MONOTONIC in nanoseconds.
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// The time in nanoseconds since 1970.
pub fn wall_clock_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_drive_a_terminal() {
        assert_eq!(shown("no\nway\u{1b}[2J"), "no\u{fffd}way\u{fffd}[2J");
        assert_eq!(shown_whole(&"\u{9b}\n".repeat(MESSAGE_MAX)), "\u{fffd}\n".repeat(MESSAGE_MAX));
        assert_eq!(shown_lines("a\r\nb\u{1b}c\n"), "a\nb\u{fffd}c\n");
    }
}
