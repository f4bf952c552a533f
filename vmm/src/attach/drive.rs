//! The files behind block devices and persistent memory.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use api::config::{DriveConfig, DriveFile};
use devices::blk::{Options, QUEUES_MAX};

use super::limits;

use crate::inherited;
use crate::machine::MachineError;

/// Opens what is behind a device: `what` and `inherited` name it.
///
/// # Errors
/// [`MachineError::Open`].
pub(super) fn open(
    what: &'static str,
    inherited: &'static str,
    file: &DriveFile,
    read_only: bool,
) -> Result<File, MachineError> {
    match file {
        DriveFile::Path(path) => {
            let opened = File::options().read(true).write(!read_only).open(path);
            opened.map_err(|source| MachineError::Open { what, path: path.clone(), source })
        }
        DriveFile::Descriptor(number) => {
            let path = || PathBuf::from(format!("/proc/self/fd/{number}"));
            let taken = inherited::take(*number);
            Ok(taken.map_err(|source| MachineError::Open { what: inherited, path: path(), source })?.into())
        }
    }
}

/// What a drive's device is to be: one queue for each vCPU, as far as a disk has use for them.
///
/// # Errors
/// When the system has no descriptor left.
pub(super) fn options(drive: &DriveConfig, index: usize, vcpus: u8) -> io::Result<Options> {
    let limiter = limits::limiter(drive.limits)?;
    let queues = u16::from(vcpus).min(QUEUES_MAX);
    Ok(Options { read_only: drive.read_only, id: format!("drive{index}"), queues, limiter })
}
