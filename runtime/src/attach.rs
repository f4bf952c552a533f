//! Being a process's front end: its output to our standard streams, our standard input, signals and terminal sizes to it,
//! until it ends.
//!
//! Two threads copy, since our standard descriptors may be anything and cannot be made non-blocking: one that waits makes
//! nothing else wait. Signals, sizes and the end are the caller's thread's.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::thread;
use std::time::{Duration, Instant};

use api::client::{Client, ClientError, Streams};
use api::model::{Kill, Size, StreamKind};
use hyper::Method;
use nix::sys::signal::Signal;
use thiserror::Error;
use tokio::sync::oneshot;

use crate::multiplexed::{Frames, Stop};
use crate::signals::{self, Waiter};
use crate::terminal::{self, RawMode, TerminalError};

/// Bytes copied at once.
const PIECE: usize = 64 << 10;
/// How long the end of a process may take to be told after its output has broken off.
const END: Duration = Duration::from_secs(2);
/// How long a signal or a size may take to reach a process before nobody waits for it.
const SENT: Duration = Duration::from_secs(5);

/// Why we cannot be a front end any more.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The API.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The terminal.
    #[error(transparent)]
    Terminal(#[from] TerminalError),
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

fn system(step: &'static str) -> impl FnOnce(io::Error) -> AttachError {
    move |source| AttachError::System { step, source }
}

/// What to attach, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attach {
    /// Whether our standard input is the process's.
    pub stdin: bool,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

/// A process whose streams are ours.
#[derive(Debug)]
pub struct Attached {
    output: oneshot::Receiver<Output>,
    detached: oneshot::Receiver<()>,
    raw: Option<RawMode>,
    /// The path of the process in the API.
    path: String,
    terminal: bool,
}

impl Attached {
    /// Begins to copy. `path` is the process's path in the API.
    ///
    /// # Errors
    /// The terminal does not go along, or there is no thread left.
    pub fn begin(streams: Streams, path: String, attach: Attach) -> Result<Self, AttachError> {
        let connection = streams.connection.into_std().map_err(system("use the connection"))?;
        connection.set_nonblocking(false).map_err(system("use the connection"))?;
        let raw = (attach.terminal && attach.stdin).then(RawMode::enter).transpose()?;
        let input = connection.try_clone().map_err(system("use the connection"))?;
        let (done, output) = oneshot::channel();
        let (detach, detached) = oneshot::channel();
        let terminal = attach.terminal;
        let copy = move || {
            let output = copy_out((&streams.early[..]).chain(&connection), terminal);
            let _ = connection.shutdown(Shutdown::Both);
            // Nobody waits for it where the front end is about to end.
            let _ = done.send(output.unwrap_or(Output::Unwritten));
        };
        thread::Builder::new().name("output".into()).spawn(copy).map_err(system("start a thread"))?;
        if attach.stdin {
            // Never joined: it may wait for input that never comes.
            let detach = terminal.then_some(detach);
            let copy = move || copy_in(&input, detach);
            thread::Builder::new().name("input".into()).spawn(copy).map_err(system("start a thread"))?;
        }
        // Otherwise our direction stays open: its end would be that of the process's standard input.
        Ok(Self { output, detached, raw, path, terminal })
    }

    /// Passes signals and sizes on until `end` is there and all output was written.
    ///
    /// # Errors
    /// As `end` says.
    pub async fn follow<T, E: From<AttachError>>(
        mut self,
        client: &Client,
        signals: &Waiter<'_>,
        end: impl Future<Output = Result<T, E>>,
    ) -> Result<Followed<T>, E> {
        tokio::pin!(end);
        let mut passing = Passing::default();
        let ended = loop {
            tokio::select! {
                ended = &mut end => break ended?,
                Ok(output) = &mut self.output, if !self.output.is_terminated() => match output {
                    Output::Whole => {}
                    Output::Unwritten => return Ok(Followed::Unheard),
                    Output::Lost(message) => {
                        // It may be because the process has ended, or the VM.
                        let ended = tokio::time::timeout(END, &mut end).await.ok().transpose()?.is_some();
                        return Ok(Followed::Lost { message, ended });
                    }
                },
                Ok(()) = &mut self.detached, if !self.detached.is_terminated() => return Ok(Followed::Detached),
                signal = signals.next() => {
                    let signal = signal.map_err(system("receive signals"))?;
                    if signals::cancels(signal) && passing.is_late() {
                        return Ok(Followed::Cancelled(signal));
                    }
                    passing.add(client, &self.path, self.terminal, signal);
                }
                refused = passing.next(), if !passing.0.is_empty() => if let Some(signal) = refused {
                    return Ok(Followed::Cancelled(signal));
                }
            }
        };
        // Our standard output may not take what is left of it, and its monitor may say that there is more for ever.
        let output = loop {
            if self.output.is_terminated() {
                break None;
            }
            tokio::select! {
                output = &mut self.output => break output.ok(),
                Ok(()) = &mut self.detached, if !self.detached.is_terminated() => return Ok(Followed::Detached),
                signal = signals.next() => {
                    let signal = signal.map_err(system("receive signals"))?;
                    if signals::cancels(signal) {
                        return Ok(Followed::Cancelled(signal));
                    }
                }
            }
        };
        drop(self.raw.take());
        match output {
            Some(Output::Lost(message)) => Ok(Followed::Lost { message, ended: true }),
            _ => Ok(Followed::Ended(ended)),
        }
    }

    /// Gives the process's terminal the size of ours, if that can be done soon.
    pub async fn resize(&self, client: &Client) {
        if self.terminal {
            let _ = tokio::time::timeout(SENT, resize(client, &self.path)).await;
        }
    }
}

/// Gives a process's terminal the size of ours.
async fn resize(client: &Client, path: &str) {
    let terminal = terminal::window_size();
    let size = Size { rows: terminal.rows, columns: terminal.columns };
    // A process that has just ended needs no size.
    let _ = client.act(Method::POST, &format!("{path}/resize"), Some(&size)).await;
}

/// The signals that are on their way to the process, in order.
#[derive(Default)]
struct Passing<'a>(VecDeque<Sending<'a>>);

/// One of them.
struct Sending<'a> {
    signal: Signal,
    since: Instant,
    /// Gives whether it arrived.
    arrival: Pin<Box<dyn Future<Output = bool> + 'a>>,
}

impl<'a> Passing<'a> {
    /// Whether one that is to end the process takes too long: whoever sends another one then does not want to wait for it.
    fn is_late(&self) -> bool {
        self.0.iter().any(|sending| signals::cancels(sending.signal) && sending.since.elapsed() > SENT)
    }

    /// Passes a signal on, after those that came before. What waits of the same kind already comes once, as the kernel has it.
    fn add(&mut self, client: &'a Client, path: &str, terminal: bool, signal: Signal) {
        if self.0.iter().skip(1).any(|waiting| waiting.signal == signal) {
            return;
        }
        let path = path.to_owned();
        let arrival = async move {
            if signal == Signal::SIGWINCH {
                if terminal {
                    resize(client, &path).await;
                }
                return true;
            }
            let kill = Kill { signal: signal as u8, all: false, stop: signals::cancels(signal) };
            client.act(Method::POST, &format!("{path}/kill"), Some(&kill)).await.is_ok()
        };
        self.0.push_back(Sending { signal, since: Instant::now(), arrival: Box::pin(arrival) });
    }

    /// Waits until the first one has arrived, or has not; gives one that has not and was to end the process.
    async fn next(&mut self) -> Option<Signal> {
        let first = self.0.front_mut()?;
        let (signal, arrived) = (first.signal, first.arrival.as_mut().await);
        self.0.pop_front();
        (!arrived && signals::cancels(signal)).then_some(signal)
    }
}

/// Sends a signal to the process of a path in the API; whether it arrived in time.
pub async fn send(client: &Client, path: &str, kill: Kill) -> bool {
    let path = format!("{path}/kill");
    matches!(tokio::time::timeout(SENT, client.act(Method::POST, &path, Some(&kill))).await, Ok(Ok(())))
}

/// How following ended.
#[derive(Debug)]
pub enum Followed<T> {
    /// The process ended.
    Ended(T),
    /// Whoever sits at the terminal wants to leave the process alone.
    Detached,
    /// Nobody reads our output any more.
    Unheard,
    /// Some of the output did not get here.
    Lost {
        /// What is known of it, in one line.
        message: String,
        /// Whether the process has ended.
        ended: bool,
    },
    /// A signal came that the process could not be sent, and that ends what we do.
    Cancelled(Signal),
}

/// How the output of a process ended.
#[derive(Debug, PartialEq, Eq)]
enum Output {
    /// There is no more.
    Whole,
    /// Our standard streams took no more.
    Unwritten,
    /// There was more, and this is known of it.
    Lost(String),
}

/// Copies a multiplexed stream, or a terminal's, to our standard streams, to its end. Fails when those take no more.
fn copy_out(mut from: impl Read, terminal: bool) -> io::Result<Output> {
    let mut piece = vec![0; PIECE];
    let mut frames = Frames::default();
    loop {
        let count = match from.read(&mut piece) {
            Ok(count @ 1..) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // A connection that breaks off ends like one that is closed.
            _ => return Ok(frames.lost().map_or(Output::Whole, Output::Lost)),
        };
        if terminal {
            write_all(StreamKind::Stdout, &piece[..count])?;
            continue;
        }
        match frames.push(&piece[..count], write_all) {
            Ok(()) => {}
            Err(Stop::Lost(line)) => return Ok(Output::Lost(line)),
            Err(Stop::Unwritten(error)) => return Err(error),
        }
    }
}

/// Writes to one of our standard streams, whatever others have made of its descriptor.
///
/// # Errors
/// It takes no more.
pub fn write_all(kind: StreamKind, mut bytes: &[u8]) -> io::Result<()> {
    use rustix::event::{PollFd, PollFlags, poll};
    let sink = match kind {
        StreamKind::Stdout => rustix::stdio::stdout(),
        StreamKind::Stderr => rustix::stdio::stderr(),
    };
    while !bytes.is_empty() {
        match rustix::io::write(sink, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(rustix::io::Errno::INTR) => {}
            // Somebody else made the descriptor non-blocking: wait, as a blocking one would.
            Err(rustix::io::Errno::AGAIN) => {
                poll(&mut [PollFd::new(&sink, PollFlags::OUT)], None)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Copies our standard input; from a terminal, until the [`DETACH`] keys are pressed.
fn copy_in(mut sink: &UnixStream, mut detach: Option<oneshot::Sender<()>>) {
    let mut piece = vec![0; PIECE];
    let mut held = false;
    loop {
        match rustix::io::read(rustix::stdio::stdin(), &mut piece) {
            Ok(count @ 1..) => {
                let mut bytes = piece[..count].to_vec();
                if let Some(sender) = detach.take() {
                    let (keys, leave) = detach_keys(&mut held, &bytes);
                    if leave {
                        _ = sink.write_all(&keys);
                        // Nobody waits where the process has ended.
                        _ = sender.send(());
                        return;
                    }
                    (bytes, detach) = (keys, Some(sender));
                }
                // The process does not read any more: what comes is left to whoever else reads this descriptor.
                if sink.write_all(&bytes).is_err() {
                    return;
                }
            }
            Err(rustix::io::Errno::INTR) => {}
            // The end, or a descriptor that cannot be read, which is the end too.
            _ => break,
        }
    }
    let _ = sink.shutdown(Shutdown::Write);
}

/// The keys that leave a process alone: control-p, control-q, as docker has them.
const DETACH: [u8; 2] = [0x10, 0x11];

/// What of the keys that were pressed is the process's, and whether to leave. `held` says that the first key of the
/// sequence was pressed and not passed on yet.
fn detach_keys(held: &mut bool, bytes: &[u8]) -> (Vec<u8>, bool) {
    let mut keys = Vec::with_capacity(bytes.len() + 1);
    for byte in bytes {
        if *held {
            *held = false;
            if *byte == DETACH[1] {
                return (keys, true);
            }
            keys.push(DETACH[0]);
        }
        if *byte == DETACH[0] {
            *held = true;
        } else {
            keys.push(*byte);
        }
    }
    (keys, false)
}

/// Copies a multiplexed stream that an answer's body carries to our standard streams.
///
/// # Errors
/// Our streams take no more, or it breaks off.
pub async fn copy_body(mut body: hyper::body::Incoming) -> io::Result<()> {
    use http_body_util::BodyExt as _;
    let mut frames = Frames::default();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(io::Error::other)?;
        let Ok(data) = frame.into_data() else { continue };
        frames.push(&data, write_all).map_err(|stop| match stop {
            Stop::Lost(line) => io::Error::other(line),
            Stop::Unwritten(error) => error,
        })?;
    }
    frames.lost().map_or(Ok(()), |line| Err(io::Error::new(io::ErrorKind::UnexpectedEof, line)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::multiplexed::CUT;

    #[test]
    fn the_detach_keys_leave_and_others_pass() {
        let mut held = false;
        assert_eq!(detach_keys(&mut held, b"ab\x10c"), (b"ab\x10c".to_vec(), false));
        assert_eq!(detach_keys(&mut held, b"x\x10"), (b"x".to_vec(), false));
        assert_eq!(detach_keys(&mut held, b"\x10\x11y"), (b"\x10".to_vec(), true));
        let mut held = false;
        assert_eq!(detach_keys(&mut held, b"\x11"), (b"\x11".to_vec(), false));
    }

    #[test]
    fn output_that_breaks_off_is_told_of() {
        let end = |bytes: &[u8]| copy_out(bytes, false).unwrap();
        assert_eq!(end(b""), Output::Whole);
        assert_eq!(end(b"\x01\0\0\0\0\0\0\0"), Output::Whole);
        let cut = Output::Lost(CUT.to_owned());
        for bytes in [&b"\x01\0\0"[..], b"\x01\0\0\0\0\0\0\x05", b"\x07\0\0\0\0\0\0\x01x"] {
            assert_eq!(end(bytes), cut, "{bytes:?}");
        }
        assert_eq!(end(b"\x03\0\0\0\0\0\0\x08too\x1bslow\n"), Output::Lost("too\u{fffd}slow".to_owned()));
        assert_eq!(end(b"\x03\0\0\0\0\0\0\0"), cut);
    }
}
