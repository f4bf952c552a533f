//! Which Unix socket a port of the host is.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The ports a guest can connect to. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct HostPorts(Arc<Mutex<BTreeMap<u32, UnixStream>>>);

impl HostPorts {
    /// Offers the peer of `stream` at `port`, for one connection: whoever in the guest comes second is refused.
    pub fn offer(&self, port: u32, stream: UnixStream) {
        self.offered().insert(port, stream);
    }

    /// Takes back what was offered at `port` and not connected to.
    pub fn withdraw(&self, port: u32) {
        self.offered().remove(&port);
    }

    /// Takes everything back that was offered and not connected to.
    pub fn withdraw_all(&self) {
        self.offered().clear();
    }

    /// Connects to `port`; the stream does not block.
    ///
    /// # Errors
    /// `ConnectionRefused` when nobody is there, or what the system says.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let stream = self.offered().remove(&port).ok_or(io::ErrorKind::ConnectionRefused)?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    fn offered(&self) -> MutexGuard<'_, BTreeMap<u32, UnixStream>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
