//! The socket device: what is behind ports of the host, and where the host can ask for connections to the guest.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The most ports of the host.
pub const PORTS_MAX: usize = 64;
/// No connection has this port (`VMADDR_PORT_ANY`).
pub(super) const NO_PORT: u32 = u32::MAX;

/// A port of the host's, for one connection of the guest's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortConfig {
    /// The port: any but 4,294,967,295.
    pub port: u32,
    /// What is behind it. To a path, at which somebody listens, the monitor connects when it starts, since it can reach none
    /// later; a descriptor is that of a connected stream socket, or of an end of a pipe.
    pub socket: SocketConfig,
}

/// How the monitor gets at a socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SocketConfig {
    /// The path of a Unix socket.
    Path(PathBuf),
    /// The number of a descriptor that the monitor inherits.
    Descriptor(i32),
}
