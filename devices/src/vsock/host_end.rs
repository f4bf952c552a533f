//! The host's end of a connection: a stream socket, or one end of a pipe.

use std::fs::File;
use std::io::{self, Write as _};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::epoll;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::SocketType;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

/// What the bytes of a connection are read from and written to. It never blocks, but whoever has the other descriptors of
/// the same open file can undo that, and then stalls the VM that it is for.
#[derive(Debug)]
pub struct HostEnd {
    end: End,
    /// What watches it: closing the descriptor is not enough where another process has one of the same open file.
    watched: Option<Arc<OwnedFd>>,
    /// Which directions were ended here. Whoever watches hears of each end, so that a second one would be told for ever.
    read_ended: bool,
    write_ended: bool,
}

#[derive(Debug)]
enum End {
    /// A stream socket of any family: they are all read, written and shut down alike.
    Socket(UnixStream),
    /// An end of a pipe that bytes for the guest come from.
    Source(File),
    /// An end of a pipe that bytes of the guest go to.
    Sink(File),
    /// An end of a pipe that is no longer needed.
    Closed,
}

impl From<UnixStream> for HostEnd {
    fn from(stream: UnixStream) -> Self {
        Self::new(End::Socket(stream))
    }
}

impl TryFrom<OwnedFd> for HostEnd {
    type Error = io::Error;

    /// The end that a descriptor is.
    ///
    /// # Errors
    /// `InvalidInput` when it is neither a stream socket nor open for one direction.
    fn try_from(descriptor: OwnedFd) -> io::Result<Self> {
        let refuse = |reason: &str| {
            let text =
                format!("descriptor {} {reason}: give a stream socket or an end of a pipe", descriptor.as_raw_fd());
            Err(io::Error::new(io::ErrorKind::InvalidInput, text))
        };
        match rustix::net::sockopt::socket_type(&descriptor) {
            Ok(SocketType::STREAM) => return Ok(UnixStream::from(descriptor).into()),
            Ok(_) => return refuse("is a socket that keeps messages apart"),
            Err(Errno::NOTSOCK) => {}
            Err(error) => return Err(error.into()),
        }
        // What cannot be waited for, such as a regular file, is refused when the connection begins.
        let access = rustix::fs::fcntl_getfl(&descriptor)? & OFlags::ACCMODE;
        if access == OFlags::RDONLY {
            Ok(Self::new(End::Source(descriptor.into())))
        } else if access == OFlags::WRONLY {
            Ok(Self::new(End::Sink(descriptor.into())))
        } else {
            refuse("is no socket and open for both directions")
        }
    }
}

impl HostEnd {
    fn new(end: End) -> Self {
        Self { end, watched: None, read_ended: false, write_ended: false }
    }

    /// Has `epoll` tell, with this token, each time that something about it changes.
    pub(super) fn watch(&mut self, epoll: &Arc<OwnedFd>, token: u64) -> io::Result<()> {
        use epoll::EventFlags;
        let Some(descriptor) = self.descriptor() else { return Ok(()) };
        // Edge-triggered: the connection remembers what is ready, and the set never has to be changed.
        let interest = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        let data = epoll::EventData::new_u64(token);
        match epoll::add(epoll, descriptor, data, interest) {
            // It was a caller.
            Err(Errno::EXIST) => epoll::modify(epoll, descriptor, data, interest)?,
            added => added?,
        }
        self.watched = Some(Arc::clone(epoll));
        Ok(())
    }

    fn close(&mut self) {
        if let (Some(epoll), Some(descriptor)) = (self.watched.take(), self.descriptor()) {
            // It is in there.
            let _ = epoll::delete(epoll, descriptor);
        }
        self.end = End::Closed;
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match &self.end {
            End::Socket(stream) => Some(stream.as_fd()),
            End::Source(file) | End::Sink(file) => Some(file.as_fd()),
            End::Closed => None,
        }
    }

    /// Whether bytes for the guest can come from it.
    pub(super) fn sends(&self) -> bool {
        matches!(self.end, End::Socket(_) | End::Source(_))
    }

    /// Whether bytes of the guest can go to it.
    pub(super) fn receives(&self) -> bool {
        matches!(self.end, End::Socket(_) | End::Sink(_))
    }

    /// Has it never wait for its peer.
    pub(super) fn set_nonblocking(&self) -> io::Result<()> {
        let Some(descriptor) = self.descriptor() else { return Ok(()) };
        Ok(rustix::io::ioctl_fionbio(descriptor, true)?)
    }

    /// Moves bytes into guest memory; none at the end of what the peer sends.
    pub(super) fn read(&mut self, room: &mut VolatileSlice<'_>) -> Result<usize, VolatileMemoryError> {
        match &mut self.end {
            End::Socket(stream) => stream.read_volatile(room),
            End::Source(file) => file.read_volatile(room),
            End::Sink(_) | End::Closed => Ok(0),
        }
    }

    /// Moves bytes out of guest memory.
    pub(super) fn write_from(&mut self, data: &VolatileSlice<'_>) -> Result<usize, VolatileMemoryError> {
        match &mut self.end {
            End::Socket(stream) => stream.write_volatile(data),
            End::Sink(file) => file.write_volatile(data),
            End::Source(_) | End::Closed => Err(VolatileMemoryError::IOError(io::ErrorKind::BrokenPipe.into())),
        }
    }

    /// Writes bytes.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.end {
            End::Socket(stream) => stream.write(bytes),
            End::Sink(file) => file.write(bytes),
            End::Source(_) | End::Closed => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Writes all of some bytes, which are so few that they fit.
    pub(super) fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.end {
            End::Socket(stream) => stream.write_all(bytes),
            End::Sink(file) => file.write_all(bytes),
            End::Source(_) | End::Closed => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Nothing more will be read: the peer is told as far as it can be.
    pub(super) fn stop_reading(&mut self) {
        if std::mem::replace(&mut self.read_ended, true) {
            return;
        }
        match &self.end {
            // Fails when the peer is gone.
            End::Socket(stream) => drop(stream.shutdown(Shutdown::Read)),
            End::Source(_) => self.close(),
            End::Sink(_) | End::Closed => {}
        }
    }

    /// Nothing more will be written: what the peer reads ends here.
    pub(super) fn stop_writing(&mut self) {
        if std::mem::replace(&mut self.write_ended, true) {
            return;
        }
        match &self.end {
            // As above.
            End::Socket(stream) => drop(stream.shutdown(Shutdown::Write)),
            End::Sink(_) => self.close(),
            End::Source(_) | End::Closed => {}
        }
    }
}

impl Drop for HostEnd {
    fn drop(&mut self) {
        self.close();
    }
}
