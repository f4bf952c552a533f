//! The record of a container's end, `exit.json` in its state directory: written once, whole or not at all.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::model::{ContainerState, VmBoot};

/// The record's name.
pub const NAME: &str = "exit.json";
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
pub fn write(folder: &Path, end: &End) -> io::Result<()> {
    let staged = folder.join(".exit.json");
    fs::write(&staged, serde_json::to_vec(end)?)?;
    fs::rename(staged, folder.join(NAME))
}

/// Reads the record; `None` when there is none.
///
/// # Errors
/// What the system says, or that it is no record.
pub fn read(folder: &Path) -> io::Result<Option<End>> {
    let file = match File::open(folder.join(NAME)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut bytes = Vec::new();
    file.take(LENGTH_MAX).read_to_end(&mut bytes)?;
    Ok(Some(serde_json::from_slice(&bytes)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()).unwrap(), None);
        let state = ContainerState { exit_code: Some(7), ..ContainerState::default() };
        let boot = VmBoot { agent_ready_ns: 9, ..VmBoot::default() };
        let end = End { state, boot, stopped: true };
        write(folder.path(), &end).unwrap();
        assert_eq!(read(folder.path()).unwrap(), Some(end));
        fs::write(folder.path().join(NAME), b"{").unwrap();
        assert!(read(folder.path()).is_err());
    }
}
