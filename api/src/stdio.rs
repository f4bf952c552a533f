//! The streams of a foreground container: between this process's own standard descriptors and the guest.
//!
//! Each stream has a thread that copies. A descriptor of the caller's may be anything, a terminal, a pipe, a file, and is
//! shared with other processes, so it cannot be made non-blocking; a thread may wait on it without anything else waiting.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use protocol::container::ProcessSpec;

/// Bytes copied at once.
const PIECE: usize = 64 << 10;
/// Copying needs its buffer and a few calls.
const STACK: usize = 128 << 10;

/// A port of the host that is offered to the guest for one connection.
#[derive(Debug)]
pub struct Offer {
    /// The vsock port.
    pub port: u32,
    /// The end of the connection that the guest gets.
    pub stream: UnixStream,
}

impl Offer {
    /// An offer at `port`, and our end of it.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new(port: u32) -> io::Result<(Self, UnixStream)> {
        let (ours, stream) = UnixStream::pair()?;
        Ok((Self { port, stream }, ours))
    }
}

/// The running copies.
#[derive(Debug, Default)]
pub struct Streams {
    outputs: Vec<JoinHandle<()>>,
}

impl Streams {
    /// Starts copying for a process whose streams have ports. Each thread begins by calling `confine`.
    ///
    /// # Errors
    /// When the system has no descriptor or thread left.
    pub fn start(process: &ProcessSpec, confine: fn()) -> io::Result<(Self, Vec<Offer>)> {
        let (mut streams, mut offers) = (Self::default(), Vec::new());
        let mut offer = |port: Option<u32>| -> io::Result<Option<UnixStream>> {
            let Some(port) = port else { return Ok(None) };
            let (offer, ours) = Offer::new(port)?;
            offers.push(offer);
            Ok(Some(ours))
        };
        let stdin = offer(process.stdio.stdin)?;
        if let Some(stdin) = &stdin {
            let sink = stdin.try_clone()?;
            // Never joined: it may wait for input that never comes.
            spawn("stdin", confine, move || copy_in(rustix::stdio::stdin(), sink))?;
        }
        if process.terminal.is_some() {
            streams.output("terminal", confine, stdin, rustix::stdio::stdout())?;
        } else {
            streams.output("stdout", confine, offer(process.stdio.stdout)?, rustix::stdio::stdout())?;
            streams.output("stderr", confine, offer(process.stdio.stderr)?, rustix::stdio::stderr())?;
        }
        Ok((streams, offers))
    }

    /// Waits until all output was written; the guest's ends must be closed or about to be.
    pub fn finish(self) {
        for output in self.outputs {
            // A copy that panicked has said so itself.
            let _ = output.join();
        }
    }

    fn output(
        &mut self,
        name: &str,
        confine: fn(),
        source: Option<UnixStream>,
        sink: BorrowedFd<'static>,
    ) -> io::Result<()> {
        if let Some(source) = source {
            self.outputs.push(spawn(name, confine, move || copy_out(source, sink))?);
        }
        Ok(())
    }
}

fn spawn(name: &str, confine: fn(), copy: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.into()).stack_size(STACK).spawn(move || {
        confine();
        copy();
    })
}

fn copy_in(source: BorrowedFd<'_>, mut sink: UnixStream) {
    let mut piece = vec![0; PIECE];
    loop {
        match rustix::io::read(source, &mut piece) {
            Ok(count @ 1..) => {
                // The guest does not read any more: what comes is left to whoever else reads this descriptor.
                if sink.write_all(&piece[..count]).is_err() {
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

fn copy_out(mut source: UnixStream, sink: BorrowedFd<'_>) {
    let mut piece = vec![0; PIECE];
    loop {
        match source.read(&mut piece) {
            Ok(count @ 1..) => {
                if write_all(sink, &piece[..count]).is_err() {
                    break;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            _ => return,
        }
    }
    // Nobody takes the output any more: the process is to know, as with a closed pipe.
    let _ = source.shutdown(Shutdown::Both);
}

fn write_all(sink: BorrowedFd<'_>, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(sink, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(rustix::io::Errno::INTR) => {}
            // Somebody else made the descriptor non-blocking: wait, as a blocking one would.
            Err(rustix::io::Errno::AGAIN) => {
                let mut wanted = [rustix::event::PollFd::new(&sink, rustix::event::PollFlags::OUT)];
                rustix::event::poll(&mut wanted, None)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
