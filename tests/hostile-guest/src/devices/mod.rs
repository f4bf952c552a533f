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
    /// What its driver begins with, if the device serves nothing without that.
    pub opening: Option<Opening>,
    /// Makes a request for a queue that a driver could send, with numbers that none would.
    pub compose: fn(&mut Request<'_>, u32),
    /// Has the device serve a request, with a driver that keeps to the rules.
    pub ask: fn(Device) -> Result<(), Fault>,
}

/// Requests in order, before which a device serves nothing else.
pub struct Opening {
    /// The queue for them.
    pub queue: usize,
    /// How many there are.
    pub count: u32,
    /// Makes the request of this number. The reply to the one before it, if it was answered, is at this address.
    pub compose: fn(&mut Request<'_>, u32, u64),
}

const MOST: u32 = 4 << 20;

/// All kinds that are known.
pub const KINDS: [Kind; 9] = [
    known(1, "network", network::frame, network::ask_frame),
    known(2, "block", storage::block, storage::ask_block),
    // What is printed costs whoever listens.
    Kind { longest: 256, ..known(3, "console", plain::console, plain::ask_console) },
    known(4, "entropy", plain::entropy, plain::ask_entropy),
    known(5, "balloon", memory::balloon, memory::ask_balloon),
    known(19, "vsock", network::packet, network::ask_packet),
    known(24, "memory", memory::plug, memory::ask_plug),
    Kind { opening: Some(files::OPENING), ..known(26, "file system", files::fuse, files::ask_file) },
    known(27, "pmem", storage::pmem, storage::ask_pmem),
];

/// A kind that is as most are.
const fn known(
    id: u32,
    name: &'static str,
    compose: fn(&mut Request<'_>, u32),
    ask: fn(Device) -> Result<(), Fault>,
) -> Kind {
    Kind { id, name, longest: MOST, opening: None, compose, ask }
}

/// A device of which nothing is known but what all have in common.
pub const UNKNOWN: Kind = known(0, "unknown", |request, _| request.nonsense(), ask_nothing);

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
