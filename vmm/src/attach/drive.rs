//! Block devices.

use std::io;

use api::config::DriveConfig;
use devices::blk::{Options, QUEUES_MAX};

use super::limits;

/// What a drive's device is to be: one queue for each vCPU, as far as a disk has use for them.
///
/// # Errors
/// When the system has no descriptor left.
pub(super) fn options(drive: &DriveConfig, index: usize, vcpus: u8) -> io::Result<Options> {
    let limiter = limits::limiter(drive.limits)?;
    let queues = u16::from(vcpus).min(QUEUES_MAX);
    Ok(Options { read_only: drive.read_only, id: format!("drive{index}"), queues, limiter })
}
