//! The record of a container's end, `exit.json` in its monitor's folder: written once, whole or not at all.

use std::io::{self, Read, Write as _};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::folder::Folder;
use crate::model::{ContainerState, VmBoot};

/// The record's name.
pub const NAME: &str = "exit.json";
/// Its name while it is written.
const STAGED: &str = ".exit.json";
/// The longest record that is read.
const LENGTH_MAX: u64 = 64 << 10;

/// How a container ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// The container as it was then.
    #[serde(flatten)]
    pub state: ContainerState,
    /// How long its VM had taken to start.
    #[serde(default)]
    pub boot: VmBoot,
    /// Whether somebody wanted it to end.
    #[serde(default)]
    pub stopped: bool,
}

/// Leaves a record.
///
/// # Errors
/// What the system says.
pub fn write(folder: &Folder, end: &End) -> io::Result<()> {
    folder.create(STAGED)?.write_all(&serde_json::to_vec(end)?)?;
    folder.rename(STAGED, NAME)
}

/// Reads the record in the folder of this path; `None` when there is none.
///
/// # Errors
/// What the system says, or that it is no record.
pub fn read(folder: &Path) -> io::Result<Option<End>> {
    let file = match Folder::open(folder).and_then(|folder| folder.read(NAME)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut bytes = Vec::new();
    file.take(LENGTH_MAX).read_to_end(&mut bytes)?;
    Ok(Some(serde_json::from_slice(&bytes)?))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_was_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()).unwrap(), None);
        let state = ContainerState { exit_code: Some(7), ..ContainerState::default() };
        let boot = VmBoot { agent_ready_ns: 9, ..VmBoot::default() };
        let end = End { state, boot, stopped: true };
        write(&Folder::open(folder.path()).unwrap(), &end).unwrap();
        assert_eq!(read(folder.path()).unwrap(), Some(end));
        fs::write(folder.path().join(NAME), b"{").unwrap();
        assert!(read(folder.path()).is_err());
    }
}
