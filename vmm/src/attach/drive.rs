//! The files behind block devices.

use std::fs::File;
use std::path::PathBuf;

use api::config::{DriveConfig, DriveFile};

use crate::inherited;
use crate::machine::MachineError;

/// Opens what is behind a drive.
///
/// # Errors
/// [`MachineError::Open`].
pub(super) fn open(drive: &DriveConfig) -> Result<File, MachineError> {
    match &drive.file {
        DriveFile::Path(path) => {
            let opened = File::options().read(true).write(!drive.read_only).open(path);
            opened.map_err(|source| MachineError::Open { what: "the drive", path: path.clone(), source })
        }
        DriveFile::Descriptor(number) => {
            let path = || PathBuf::from(format!("/proc/self/fd/{number}"));
            let taken = inherited::take(*number);
            Ok(taken.map_err(|source| MachineError::Open { what: "the inherited drive", path: path(), source })?.into())
        }
    }
}
