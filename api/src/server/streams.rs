//! The streams of one process: from the guest to the log and to everybody who is attached, and from who is attached to
//! its standard input.
//!
//! Nothing is kept for a slow reader but a few pieces: while one does not take them, the stream is not read, and the
//! guest's own buffers fill up, as with a pipe. Readers and all other requests do not wait for each other.

use std::cell::RefCell;
use std::io;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};

use super::log::Log;
use crate::model::StreamKind;

/// Bytes read at once.
const PIECE: usize = 64 << 10;
/// Pieces that wait for a reader.
const QUEUE: usize = 4;
/// How long output is held for whoever said that they would attach.
const HOLD_LIMIT: Duration = Duration::from_secs(30);
/// How long a reader may take for the last output of a process that has ended, before others stop waiting for it.
const READER_PATIENCE: Duration = Duration::from_secs(2);
/// The length of a frame's header: the stream, three zeroes, the length of what follows in big-endian.
pub const HEADER_LENGTH: usize = 8;

thread_local! {
    /// Where pieces are read: one for all streams, since only one is read at a time.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; PIECE]);
}

/// A piece of output.
type Piece = (StreamKind, Bytes);

/// The streams of a process, for whoever wants to attach.
#[derive(Debug)]
pub struct Streams {
    readers: Mutex<Readers>,
    /// Output is not read before this is false.
    held: watch::Sender<bool>,
    /// How many output streams have not ended.
    open: watch::Sender<usize>,
    stdin: Option<Arc<UnixStream>>,
    terminal: bool,
    /// Whether standard input ends with the first attached client's.
    stdin_once: bool,
    /// Readers are not waited for any more.
    abandoned: watch::Sender<bool>,
    log: Option<Arc<Log>>,
}

#[derive(Debug, Default)]
struct Readers {
    queues: Vec<mpsc::Sender<Piece>>,
    ended: bool,
}

/// The host's ends of a process's streams.
#[derive(Debug, Default)]
pub struct Ends {
    /// Standard input, or both directions of a terminal.
    pub stdin: Option<StdStream>,
    /// Standard output.
    pub stdout: Option<StdStream>,
    /// Standard error.
    pub stderr: Option<StdStream>,
}

/// How a process's streams are used.
#[derive(Debug, Clone, Default)]
pub struct Use {
    /// Where output is kept.
    pub log: Option<Arc<Log>>,
    /// Whether the process has a terminal.
    pub terminal: bool,
    /// Whether to read no output before somebody is attached.
    pub hold: bool,
    /// Whether standard input ends with that of the first client that is attached.
    pub stdin_once: bool,
}

impl Streams {
    /// Begins to move the output of a process. Must be called in the runtime.
    ///
    /// # Errors
    /// What the system says of a stream.
    pub fn start(ends: Ends, usage: Use) -> io::Result<Arc<Self>> {
        let asynchronous = |stream: StdStream| {
            stream.set_nonblocking(true)?;
            UnixStream::from_std(stream).map(Arc::new)
        };
        let stdin = ends.stdin.map(asynchronous).transpose()?;
        let mut outputs = Vec::new();
        if usage.terminal {
            outputs.extend(stdin.clone().map(|stream| (StreamKind::Stdout, stream)));
        }
        for (kind, end) in [(StreamKind::Stdout, ends.stdout), (StreamKind::Stderr, ends.stderr)] {
            outputs.extend(end.map(asynchronous).transpose()?.map(|stream| (kind, stream)));
        }
        let streams = Arc::new(Self {
            readers: Mutex::default(),
            held: watch::Sender::new(usage.hold),
            open: watch::Sender::new(outputs.len()),
            stdin,
            terminal: usage.terminal,
            stdin_once: usage.stdin_once,
            abandoned: watch::Sender::new(false),
            log: usage.log,
        });
        if usage.hold {
            tokio::spawn(release_in_time(Arc::clone(&streams)));
        }
        for (kind, stream) in outputs {
            tokio::spawn(Arc::clone(&streams).carry(kind, stream));
        }
        Ok(streams)
    }

    /// Where output is kept.
    pub fn log(&self) -> Option<Arc<Log>> {
        self.log.clone()
    }

    /// Whether output goes to readers without frames.
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Waits until all output was read and given to the log and to every reader.
    pub async fn ended(&self) {
        // The sender is ours: it cannot be gone.
        let _ = self.open.subscribe().wait_for(|open| *open == 0).await;
    }

    /// Waits as [`Streams::ended`] does, but for a short time only for readers that do not take what they are given: then
    /// the rest goes to the log alone. For a process that has ended.
    pub async fn finish(&self) {
        self.held.send_replace(false);
        if tokio::time::timeout(READER_PATIENCE, self.ended()).await.is_err() {
            self.abandoned.send_replace(true);
            self.ended().await;
        }
    }

    /// Ends standard input, as nobody will attach.
    pub fn close_stdin(&self) {
        if let Some(stdin) = &self.stdin {
            shut_down(stdin);
        }
    }

    /// Reads one stream to its end.
    async fn carry(self: Arc<Self>, kind: StreamKind, stream: Arc<UnixStream>) {
        let _ = self.held.subscribe().wait_for(|held| !held).await;
        while stream.readable().await.is_ok() {
            let read = SCRATCH.with_borrow_mut(|scratch| {
                let count = stream.try_read(scratch)?;
                if let Some(log) = &self.log {
                    log.write(kind, &scratch[..count]);
                }
                let wanted = !self.readers().queues.is_empty();
                Ok::<_, io::Error>((count, wanted.then(|| Bytes::copy_from_slice(&scratch[..count]))))
            });
            match read {
                Ok((0, _)) => break,
                Ok((_, Some(piece))) => self.give(kind, piece).await,
                Ok((_, None)) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(_) => break,
            }
        }
        self.open.send_modify(|open| {
            *open = open.saturating_sub(1);
            if *open == 0 {
                let mut readers = self.readers();
                readers.ended = true;
                readers.queues.clear();
            }
        });
    }

    async fn give(&self, kind: StreamKind, piece: Bytes) {
        let queues = self.readers().queues.clone();
        let mut gone = false;
        let mut abandoned = self.abandoned.subscribe();
        for queue in &queues {
            tokio::select! {
                sent = queue.send((kind, piece.clone())) => gone |= sent.is_err(),
                _ = abandoned.wait_for(|abandoned| *abandoned) => return,
            }
        }
        if gone {
            self.readers().queues.retain(|queue| !queue.is_closed());
        }
    }

    /// Attaches a client: it gets all output from now on until the process ends, and what it sends is the process's
    /// input. Returns when the output has ended or the client is gone.
    pub async fn attach(&self, client: impl AsyncRead + AsyncWrite) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        {
            let mut readers = self.readers();
            if !readers.ended {
                readers.queues.push(sender);
            }
        }
        self.held.send_if_modified(std::mem::take);
        let (from, to) = tokio::io::split(client);
        tokio::pin!(from);
        let output = self.send_output(receiver, to);
        let input = async {
            self.take_input(&mut from).await;
            // A client that has nothing more to say still listens.
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = output => {}
            () = input => {}
        }
    }

    async fn send_output(&self, mut receiver: mpsc::Receiver<Piece>, mut to: impl AsyncWrite + Unpin) {
        while let Some((kind, piece)) = receiver.recv().await {
            let framed = async {
                if !self.terminal {
                    to.write_all(&header(kind, piece.len())).await?;
                }
                to.write_all(&piece).await?;
                to.flush().await
            };
            if framed.await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    }

    async fn take_input(&self, from: &mut (impl AsyncRead + Unpin)) {
        let mut piece = vec![0; 4096];
        loop {
            match from.read(&mut piece).await {
                Ok(0) | Err(_) => break,
                Ok(count) => {
                    // Input for a process that takes none is dropped, and that of one that has ended.
                    if let Some(stdin) = &self.stdin
                        && write_all(stdin, &piece[..count]).await.is_err()
                    {
                        break;
                    }
                }
            }
        }
        if self.stdin_once && !self.terminal {
            self.close_stdin();
        }
    }

    fn readers(&self) -> MutexGuard<'_, Readers> {
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn release_in_time(streams: Arc<Streams>) {
    let mut held = streams.held.subscribe();
    let released = held.wait_for(|held| !held);
    if tokio::time::timeout(HOLD_LIMIT, released).await.is_err() {
        streams.held.send_replace(false);
    }
}

/// The header of a frame.
pub fn header(kind: StreamKind, length: usize) -> [u8; HEADER_LENGTH] {
    let [a, b, c, d] = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
    [kind as u8, 0, 0, 0, a, b, c, d]
}

async fn write_all(stream: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn shut_down(stream: &UnixStream) {
    // The other end may be gone.
    let _ = rustix::net::shutdown(stream, rustix::net::Shutdown::Write);
}
