//! What is behind a port of the host.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::host_end::HostEnd;

/// No connection has this port (`VMADDR_PORT_ANY`).
pub(super) const NO_PORT: u32 = u32::MAX;
/// The most offers that were made at the VM's socket and not connected to.
const HANDED_MAX: usize = 256;

/// The ports a guest can connect to. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct HostPorts(Arc<Mutex<BTreeMap<u32, Offer>>>);

#[derive(Debug)]
struct Offer {
    end: HostEnd,
    /// Whether it was handed over at the VM's socket: such an offer never stands in the monitor's own way.
    handed: bool,
}

impl HostPorts {
    /// Offers `end` at `port`, for one connection: whoever in the guest comes second is refused. What was offered there
    /// before is dropped.
    pub fn offer(&self, port: u32, end: impl Into<HostEnd>) {
        self.offered().insert(port, Offer { end: end.into(), handed: false });
    }

    /// Offers what was handed over, instead of what was handed over before. Says whether that could be: the monitor's own
    /// ports stay what they are.
    pub(super) fn hand(&self, port: u32, end: HostEnd) -> bool {
        let mut offered = self.offered();
        let handed = offered.values().filter(|offer| offer.handed).count();
        let free = match offered.get(&port) {
            Some(before) => before.handed,
            None => handed < HANDED_MAX,
        };
        if free && port != NO_PORT {
            offered.insert(port, Offer { end, handed: true });
            return true;
        }
        false
    }

    /// Takes back what was offered at `port` and not connected to.
    pub fn withdraw(&self, port: u32) {
        self.offered().remove(&port);
    }

    /// Takes everything back that was offered and not connected to.
    pub fn withdraw_all(&self) {
        self.offered().clear();
    }

    /// Connects to `port`; the end does not block.
    ///
    /// # Errors
    /// `ConnectionRefused` when nobody is there, or what the system says.
    pub(super) fn connect(&self, port: u32) -> io::Result<HostEnd> {
        let Offer { end, .. } = self.offered().remove(&port).ok_or(io::ErrorKind::ConnectionRefused)?;
        end.set_nonblocking()?;
        Ok(end)
    }

    fn offered(&self) -> MutexGuard<'_, BTreeMap<u32, Offer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
