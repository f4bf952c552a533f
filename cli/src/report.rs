//! What people read: errors in one line, a guest's console made harmless, the version.

use std::fmt::Write as _;
use std::io::Write as _;
use std::ops::ControlFlow;

use api::control::EXIT_FAILED;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tokio::sync::oneshot;

/// The most of a guest's console that is shown.
const CONSOLE_LINES: usize = 40;

/// Writes an error as one line. A standard error that is closed has nobody to tell.
pub fn error(message: &str) {
    _ = writeln!(std::io::stderr(), "error: {}", one_line(message));
}

/// Writes as one line what somebody should know although nothing failed.
pub fn warning(message: &str) {
    _ = writeln!(std::io::stderr(), "warning: {}", one_line(message));
}

/// Writes the end of a guest's console, indented.
pub fn console(text: &str) {
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let mut shown = String::from("the guest's console ended with:\n");
    for line in &lines[lines.len().saturating_sub(CONSOLE_LINES)..] {
        _ = writeln!(shown, "    {}", one_line(line));
    }
    _ = std::io::stderr().write_all(shown.as_bytes());
}

/// A text without what would make a terminal do something: a guest may have written it.
fn one_line(text: &str) -> String {
    text.trim_end().chars().map(|c| if c.is_control() { if c == '\t' { ' ' } else { '\u{fffd}' } } else { c }).collect()
}

/// Shows what clap has to say, and gives the exit code: help is no error; an error is told in a line.
pub fn usage(error: &clap::Error) -> u8 {
    if !error.use_stderr() {
        _ = error.print();
        return 0;
    }
    if error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        _ = error.print();
        return EXIT_FAILED;
    }
    let text = error.render().to_string();
    let first = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<&str> = first.split_whitespace().collect();
    let line = words.join(" ");
    self::error(line.strip_prefix("error: ").unwrap_or(&line));
    EXIT_FAILED
}

/// Shows the version.
pub fn version() -> anyhow::Result<u8> {
    print(concat!("cofferdam ", env!("CARGO_PKG_VERSION"), "\n"))?;
    Ok(0)
}

/// Writes to standard output. A reader that has gone away, as in `| head`, is no error.
pub fn print(text: &str) -> std::io::Result<()> {
    print_part(text).map(|_| ())
}

/// Writes a part of what goes on to standard output: `Break` when its reader has gone away, and nobody would read more.
pub fn print_part(text: &str) -> std::io::Result<ControlFlow<()>> {
    part(&mut std::io::stdout().lock(), text)
}

fn part(to: &mut impl std::io::Write, text: &str) -> std::io::Result<ControlFlow<()>> {
    match to.write_all(text.as_bytes()).and_then(|()| to.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
        written => written.map(ControlFlow::Continue),
    }
}

/// Hears when the reader of standard output has gone away, even while there is nothing to write. The thread that waits for
/// that ends with the process.
pub fn reader_gone() -> std::io::Result<oneshot::Receiver<()>> {
    let (sender, gone) = oneshot::channel();
    let wait = move || {
        let stdout = rustix::stdio::stdout();
        // Errors and hang-ups are told unasked; a file has none.
        while let Err(Errno::INTR) = poll(&mut [PollFd::new(&stdout, PollFlags::empty())], None) {}
        _ = sender.send(());
    };
    std::thread::Builder::new().name("reader".into()).spawn(wait)?;
    Ok(gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_has_gone_away_ends_what_goes_on() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        assert_eq!(part(&mut writer, "one").unwrap(), ControlFlow::Continue(()));
        drop(reader);
        assert_eq!(part(&mut writer, "two").unwrap(), ControlFlow::Break(()));
        assert!(part(&mut &mut [0u8; 1][..], "no pipe").is_err());
    }

    #[test]
    fn a_guest_cannot_drive_the_terminal() {
        assert_eq!(one_line("a\x1b]0;title\x07b\tc\u{9b}2J\n"), "a\u{fffd}]0;title\u{fffd}b c\u{fffd}2J");
    }
}
