//! Which Unix socket a port of the host is.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// The ports a guest can connect to. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct HostPorts {
    offered: Arc<Mutex<BTreeMap<u32, UnixStream>>>,
    path: Option<PathBuf>,
}

impl HostPorts {
    /// Ports that, unless offered, are the Unix sockets `PATH_PORT`.
    pub fn new(path: Option<PathBuf>) -> Self {
        Self { offered: Arc::default(), path }
    }

    /// Offers the peer of `stream` at `port`, for one connection: whoever in the guest comes second is refused.
    pub fn offer(&self, port: u32, stream: UnixStream) {
        self.offered.lock().unwrap_or_else(PoisonError::into_inner).insert(port, stream);
    }

    /// Takes back what was offered at `port` and not connected to.
    pub fn withdraw(&self, port: u32) {
        self.offered.lock().unwrap_or_else(PoisonError::into_inner).remove(&port);
    }

    /// Takes everything back that was offered and not connected to.
    pub fn withdraw_all(&self) {
        self.offered.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Connects to `port`; the stream does not block.
    ///
    /// # Errors
    /// `ConnectionRefused` when nobody is there, or what the system says.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let offered = self.offered.lock().unwrap_or_else(PoisonError::into_inner).remove(&port);
        let stream = match (offered, &self.path) {
            (Some(stream), _) => stream,
            (None, Some(path)) => {
                let mut path = path.clone().into_os_string();
                path.push(format!("_{port}"));
                // A stream socket of the same host connects at once or fails: with EAGAIN when the listener's backlog
                // is full, which ends as a refused connection and not as a wait.
                connect_without_waiting(path.as_ref())?
            }
            (None, None) => return Err(io::ErrorKind::ConnectionRefused.into()),
        };
        stream.set_nonblocking(true)?;
        Ok(stream)
    }
}

fn connect_without_waiting(path: &std::path::Path) -> io::Result<UnixStream> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}
