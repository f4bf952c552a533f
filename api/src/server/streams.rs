//! The streams of one process: from the guest to the log and to everybody who is attached, and from who is attached to
//! its standard input.
//!
//! While the process lives, nothing is kept for a slow reader but a few pieces: when one does not take them, the stream is
//! not read, and the guest's own buffers fill up, as with a pipe. When it has ended, what is left in those is read at once,
//! so that its end waits for no reader; and because a guest may lie about the end, only so much is read, and only so long.

use std::cell::RefCell;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::consume_budget;

use super::log::Log;
use crate::model::{HEADER_LENGTH, StreamKind, TROUBLE};

/// Bytes read at once.
const PIECE: usize = 64 << 10;
/// Pieces that wait for a reader while the process lives.
const QUEUE: usize = 4;
/// How long output is held for whoever said that they would attach.
const HOLD_LIMIT: Duration = Duration::from_secs(30);
/// The most that is read of a process that has ended: far more than the buffers on the way hold.
const TAIL_MAX: usize = 8 << 20;
/// How long a stream of a process that has ended may stay open without bringing anything.
const QUIET_MAX: Duration = Duration::from_secs(5);
/// How long it may stay open, whatever it brings.
const TAIL_TIME: Duration = Duration::from_secs(30);

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
    /// Whether the process has ended.
    ending: watch::Sender<bool>,
    /// How many readers are to get all output, whatever that takes, and have not got it yet.
    promised: watch::Sender<usize>,
    /// Whether more came of a process that has ended than was read.
    cut: AtomicBool,
    stdin: Mutex<Option<Arc<UnixStream>>>,
    terminal: bool,
    /// Whether standard input ends with the first attached client's.
    stdin_once: bool,
    log: Option<Arc<Log>>,
}

#[derive(Debug, Default)]
struct Readers {
    all: Vec<Reader>,
    ended: bool,
}

/// Somebody who is attached.
#[derive(Debug, Clone)]
struct Reader {
    queue: mpsc::UnboundedSender<Piece>,
    /// Room in the queue, as long as the process lives.
    room: Arc<Semaphore>,
}

/// Somebody who is about to attach. No output is held for them any more when they are gone, whether they have attached or not.
#[derive(Debug)]
pub struct Attachment(Arc<Streams>);

/// The host's ends of a process's streams, none of which blocks.
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
        let asynchronous = |stream: StdStream| UnixStream::from_std(stream).map(Arc::new);
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
            ending: watch::Sender::new(false),
            promised: watch::Sender::new(0),
            cut: AtomicBool::new(false),
            stdin: Mutex::new(stdin),
            terminal: usage.terminal,
            stdin_once: usage.stdin_once,
            log: usage.log,
        });
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

    /// Waits until all output of a process that has ended was read, which takes no longer than its guest makes it take and
    /// that only so long.
    pub async fn finish(&self) {
        self.ending.send_replace(true);
        // The sender is ours: it cannot be gone.
        let _ = self.open.subscribe().wait_for(|open| *open == 0).await;
        // What is remembered of the process holds no descriptor.
        self.stdin().take();
    }

    /// Waits until whoever was promised all output has it, or has gone away.
    pub async fn delivered(&self) {
        let _ = self.promised.subscribe().wait_for(|promised| *promised == 0).await;
    }

    /// Lets go of output that nobody attaches to for [`HOLD_LIMIT`].
    pub fn release_in_time(self: &Arc<Self>) {
        if !*self.held.borrow() {
            return;
        }
        let streams = Arc::clone(self);
        tokio::spawn(async move {
            let mut held = streams.held.subscribe();
            let released = held.wait_for(|held| !held);
            if tokio::time::timeout(HOLD_LIMIT, released).await.is_err() {
                streams.held.send_replace(false);
            }
        });
    }

    /// Reads one stream to its end.
    async fn carry(self: Arc<Self>, kind: StreamKind, stream: Arc<UnixStream>) {
        let _ = self.held.subscribe().wait_for(|held| !held).await;
        let (mut ending, mut last) = (self.ending.subscribe(), self.ending.subscribe());
        let late = async {
            let _ = last.wait_for(|ending| *ending).await;
            tokio::time::sleep(TAIL_TIME).await;
        };
        tokio::pin!(late);
        let mut tail = 0;
        loop {
            // A stream that never runs dry does not keep others from being served.
            consume_budget().await;
            let quiet = async {
                let _ = ending.wait_for(|ending| *ending).await;
                tokio::time::sleep(QUIET_MAX).await;
            };
            tokio::select! {
                biased;
                () = &mut late => tail = usize::MAX,
                ready = stream.readable() => if ready.is_err() { break },
                () = quiet => break,
            }
            if tail > TAIL_MAX {
                self.cut.store(true, Ordering::Relaxed);
                break;
            }
            match self.read(kind, &stream) {
                Ok((0, _)) => break,
                Ok((count, piece)) => {
                    if *self.ending.borrow() {
                        tail += count;
                    }
                    if let Some(piece) = piece {
                        self.give(kind, piece).await;
                    }
                }
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(_) => break,
            }
        }
        self.open.send_modify(|open| {
            *open = open.saturating_sub(1);
            if *open == 0 {
                let mut readers = self.readers();
                readers.ended = true;
                readers.all.clear();
            }
        });
    }

    /// Reads a piece into the log; gives its length, and the piece if somebody is attached.
    fn read(&self, kind: StreamKind, stream: &UnixStream) -> io::Result<(usize, Option<Bytes>)> {
        SCRATCH.with_borrow_mut(|scratch| {
            let count = stream.try_read(scratch)?;
            if let Some(log) = &self.log {
                log.write(kind, &scratch[..count]);
            }
            let wanted = !self.readers().all.is_empty();
            Ok((count, wanted.then(|| Bytes::copy_from_slice(&scratch[..count]))))
        })
    }

    async fn give(&self, kind: StreamKind, piece: Bytes) {
        let readers = self.readers().all.clone();
        let mut ending = self.ending.subscribe();
        let mut gone = false;
        for Reader { queue, room } in &readers {
            tokio::select! {
                biased;
                () = queue.closed() => {}
                room = room.acquire() => if let Ok(room) = room { room.forget() },
                _ = ending.wait_for(|ending| *ending) => {}
            }
            gone |= queue.send((kind, piece.clone())).is_err();
        }
        if gone {
            self.readers().all.retain(|reader| !reader.queue.is_closed());
        }
    }

    /// Attaches a client: it gets all output from now on until the process ends, and what it sends is the process's input,
    /// beginning with what it has sent already. Returns when the output has ended or the client is gone.
    pub async fn attach(&self, client: UnixStream, early: Bytes) {
        let (queue, receiver) = mpsc::unbounded_channel();
        let room = Arc::new(Semaphore::new(QUEUE));
        {
            let mut readers = self.readers();
            if !readers.ended {
                readers.all.push(Reader { queue, room: Arc::clone(&room) });
            }
        }
        // Whoever was waited for is to have everything.
        let _promise = self.held.send_if_modified(std::mem::take).then(|| Promise::new(&self.promised));
        let Ok(presence) = client.as_fd().try_clone_to_owned().and_then(|fd| UnixStream::from_std(fd.into())) else {
            return;
        };
        let (from, to) = client.into_split();
        let input = async {
            self.take_input((&early[..]).chain(from)).await;
            // A client that has nothing more to say still listens.
            hang_up(&presence).await;
        };
        tokio::select! {
            () = self.send_output(receiver, &room, to) => {}
            () = input => {}
        }
    }

    async fn send_output(
        &self,
        mut receiver: mpsc::UnboundedReceiver<Piece>,
        room: &Semaphore,
        mut to: impl AsyncWrite + Unpin,
    ) {
        while let Some((kind, piece)) = receiver.recv().await {
            let framed = async {
                if !self.terminal {
                    to.write_all(&header(kind as u8, piece.len())).await?;
                }
                to.write_all(&piece).await
            };
            if framed.await.is_err() {
                return;
            }
            room.add_permits(1);
        }
        if self.cut.load(Ordering::Relaxed) && !self.terminal {
            let told = format!(
                "the guest went on to write after the process had ended: {TAIL_MAX} bytes at most, and no more than came in \
                 {TAIL_TIME:?}, were read"
            );
            // A client that is gone needs no explanation.
            let _ = to.write_all(&[&header(TROUBLE, told.len())[..], told.as_bytes()].concat()).await;
        }
        let _ = to.shutdown().await;
    }

    async fn take_input(&self, mut from: impl AsyncRead + Unpin) {
        let stdin = self.stdin().clone();
        let mut piece = vec![0; 4096];
        loop {
            match from.read(&mut piece).await {
                Ok(0) | Err(_) => break,
                Ok(count) => {
                    // Input for a process that takes none is dropped, and that of one that has ended.
                    if let Some(stdin) = &stdin
                        && write_all(stdin, &piece[..count]).await.is_err()
                    {
                        break;
                    }
                }
            }
        }
        if self.stdin_once
            && !self.terminal
            && let Some(stdin) = stdin
        {
            shut_down(&stdin);
        }
    }

    fn stdin(&self) -> MutexGuard<'_, Option<Arc<UnixStream>>> {
        self.stdin.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn readers(&self) -> MutexGuard<'_, Readers> {
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Attachment {
    /// Of whoever is about to attach to these.
    pub fn new(streams: Arc<Streams>) -> Self {
        Self(streams)
    }

    /// What they attach to.
    pub fn streams(&self) -> &Streams {
        &self.0
    }
}

impl Drop for Attachment {
    /// If output is still held for them they were not attached: it is read, and no input comes of them.
    fn drop(&mut self) {
        let Self(streams) = self;
        if streams.held.send_if_modified(std::mem::take)
            && streams.stdin_once
            && !streams.terminal
            && let Some(stdin) = &*streams.stdin()
        {
            shut_down(stdin);
        }
    }
}

/// A reader's right to all output.
struct Promise<'a>(&'a watch::Sender<usize>);

impl<'a> Promise<'a> {
    fn new(promised: &'a watch::Sender<usize>) -> Self {
        promised.send_modify(|promised| *promised += 1);
        Self(promised)
    }
}

impl Drop for Promise<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|promised| *promised -= 1);
    }
}

/// Waits until the other end of a connection is closed in both directions. `presence` is a descriptor of its own, since what
/// is ready is forgotten here.
async fn hang_up(presence: &UnixStream) {
    while let Ok(ready) = presence.ready(Interest::WRITABLE).await {
        if ready.is_write_closed() {
            return;
        }
        // Readiness comes by edges: the next one may be the end.
        let _ = presence.try_io(Interest::WRITABLE, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
    }
}

/// The header of a frame.
pub fn header(kind: u8, length: usize) -> [u8; HEADER_LENGTH] {
    let [a, b, c, d] = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
    [kind, 0, 0, 0, a, b, c, d]
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

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    /// The streams of a process that has standard input and output, and the guest's ends of both.
    fn begin(hold: bool) -> (Arc<Streams>, UnixStream, UnixStream) {
        let pair = || {
            let (ours, theirs) = StdStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            theirs.set_nonblocking(true).unwrap();
            (Some(ours), UnixStream::from_std(theirs).unwrap())
        };
        let ((stdin, input), (stdout, output)) = (pair(), pair());
        let ends = Ends { stdin, stdout, stderr: None };
        let streams = Streams::start(ends, Use { hold, stdin_once: true, ..Use::default() }).unwrap();
        (streams, input, output)
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_goes_on_a_little_at_a_time_is_listened_to_only_so_long() {
        let (streams, _input, mut output) = begin(false);
        let (client, mut screen) = UnixStream::pair().unwrap();
        let attached = tokio::spawn({
            let streams = Arc::clone(&streams);
            async move { streams.attach(client, Bytes::new()).await }
        });
        let dripping = tokio::spawn(async move {
            while output.write_all(b".").await.is_ok() {
                tokio::time::sleep(QUIET_MAX / 2).await;
            }
        });
        let mut shown = [0; 9];
        screen.read_exact(&mut shown).await.unwrap();
        let ended = Instant::now();
        streams.finish().await;
        assert!(ended.elapsed() <= TAIL_TIME, "{:?}", ended.elapsed());
        let mut rest = String::new();
        screen.read_to_string(&mut rest).await.unwrap();
        assert!(rest.ends_with("no more than came in 30s, were read"), "{rest:?}");
        attached.await.unwrap();
        dripping.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_does_not_come_is_waited_for_only_so_long_and_whoever_leaves_not_at_all() {
        for waits in [false, true] {
            let (streams, mut input, mut output) = begin(true);
            let began = Instant::now();
            if waits {
                streams.release_in_time();
            } else {
                drop(Attachment::new(Arc::clone(&streams)));
                assert_eq!(input.read(&mut [0]).await.unwrap(), 0);
            }
            output.write_all(b"unheard").await.unwrap();
            drop(output);
            streams.finish().await;
            assert_eq!(began.elapsed().as_secs(), if waits { HOLD_LIMIT.as_secs() } else { 0 });
        }
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_does_not_get_attached_ends_no_input_but_his_own() {
        let (streams, mut input, _output) = begin(false);
        drop(Attachment::new(Arc::clone(&streams)));
        let read = tokio::time::timeout(HOLD_LIMIT, input.read(&mut [0])).await;
        assert!(read.is_err(), "{read:?}");
    }
}
