//! What each kind of device is sent, and what it must still answer afterwards. A new kind is a line in [`KINDS`] and the two
//! functions that it names.

mod files;
mod memory;
mod network;
mod plain;
mod storage;

use crate::honest::{Driver, Fault};
use crate::mmio::Device;
use crate::request::Request;

/// A kind of device.
pub struct Kind {
    /// Its number (VIRTIO 1.2 chapter 5).
    pub id: u32,
    /// What it is called.
    pub name: &'static str,
    /// The longest buffer in memory that it is given by chance: what it makes of one may cost others time.
    pub longest: u32,
    /// Makes a request for a queue that a driver could send, with numbers that none would.
    pub compose: fn(&mut Request<'_>, u32),
    /// Has the device serve a request, with a driver that keeps to the rules.
    pub ask: fn(Device) -> Result<(), Fault>,
}

const MOST: u32 = 4 << 20;

/// All kinds that are known.
pub const KINDS: [Kind; 9] = [
    Kind { id: 1, name: "network", longest: MOST, compose: network::frame, ask: network::ask_frame },
    Kind { id: 2, name: "block", longest: MOST, compose: storage::block, ask: storage::ask_block },
    // What is printed costs whoever listens.
    Kind { id: 3, name: "console", longest: 256, compose: plain::console, ask: plain::ask_console },
    Kind { id: 4, name: "entropy", longest: MOST, compose: plain::entropy, ask: plain::ask_entropy },
    Kind { id: 5, name: "balloon", longest: MOST, compose: memory::balloon, ask: memory::ask_balloon },
    Kind { id: 19, name: "vsock", longest: MOST, compose: network::packet, ask: network::ask_packet },
    Kind { id: 24, name: "memory", longest: MOST, compose: memory::plug, ask: memory::ask_plug },
    Kind { id: 26, name: "file system", longest: MOST, compose: files::fuse, ask: ask_nothing },
    Kind { id: 27, name: "pmem", longest: MOST, compose: storage::pmem, ask: storage::ask_pmem },
];

/// A device of which nothing is known but what all have in common.
pub const UNKNOWN: Kind =
    Kind { id: 0, name: "unknown", longest: MOST, compose: |request, _| request.nonsense(), ask: ask_nothing };

/// What is known of a device's kind.
#[must_use]
pub fn kind(id: u32) -> &'static Kind {
    KINDS.iter().find(|kind| kind.id == id).unwrap_or(&UNKNOWN)
}

/// Only brings it up.
fn ask_nothing(device: Device) -> Result<(), Fault> {
    Driver::start(device, 1).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_there_once() {
        for (index, known) in KINDS.iter().enumerate() {
            assert!(KINDS[..index].iter().all(|other| other.id != known.id), "{}", known.name);
            assert_eq!(kind(known.id).name, known.name);
        }
        assert_eq!(kind(1000).name, "unknown");
    }
}
