//! The files behind block devices and persistent memory.

use std::fs::File;
use std::path::PathBuf;

use api::config::DriveFile;

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
