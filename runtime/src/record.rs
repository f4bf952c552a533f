//! What a container was made from: `container.json` in its state directory, written when it is made and hardly ever
//! changed. How it is, its monitor says; how it ended, `exit.json` (crate `api`).

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use api::config::{ContainerConfig, LaunchConfig, RestartPolicy};
use serde::{Deserialize, Serialize};

use crate::run::CONFIG;
use crate::spec;
use crate::state::StateError;

/// Its name.
pub const NAME: &str = "container.json";
/// The longest one that is read: a program's arguments and environment, 2 MiB at most.
const LENGTH_MAX: u64 = 8 << 20;
/// The signal that asks a program to end, unless the request or the image says otherwise.
pub(crate) const SIGTERM: u8 = 15;

/// A container, as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its id.
    pub id: String,
    /// Its name, if it has one.
    pub name: Option<String>,
    /// The image as it was named.
    pub image: String,
    /// The image's id, which names it for ever.
    pub image_id: String,
    /// When it was made, in nanoseconds since 1970.
    pub created_ns: u64,
    /// Whether it goes when it ends.
    pub auto_remove: bool,
    /// The signal that asks it to stop.
    pub stop_signal: u8,
    /// Whether it is started again when it has ended.
    #[serde(default)]
    pub restart: Option<RestartPolicy>,
    /// Labels, in order.
    pub labels: Vec<(String, String)>,
    /// The number of vCPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// The guest kernel, where it is not the usual one.
    pub kernel: Option<PathBuf>,
    /// Whether it was made to be started later: until then it stays, even if it goes when it ends.
    #[serde(default)]
    pub waits: bool,
    /// What its monitor runs.
    pub container: ContainerConfig,
    /// Why nothing of this can be believed but the id.
    #[serde(skip)]
    pub damage: Option<String>,
}

impl Record {
    /// Reads a container's record.
    ///
    /// # Errors
    /// There is none, or it does not decode.
    pub fn read(folder: &Path) -> io::Result<Self> {
        let mut bytes = Vec::new();
        File::open(folder.join(NAME))?.take(LENGTH_MAX).read_to_end(&mut bytes)?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// The record of the container of this id; of one whose record cannot be believed, one that says so. `None` where there
    /// is none: it is being made, or is rubbish.
    pub(crate) fn load(folder: &Path, id: &str) -> Option<Self> {
        match Self::read(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => Some(Self::damaged(folder, id, error.to_string())),
            Ok(record) => Some(match record.misfit(id) {
                Some(damage) => Self::damaged(folder, id, damage),
                None => record,
            }),
        }
    }

    /// What does not fit in the record of a container of this id: it says which files are its own.
    fn misfit(&self, id: &str) -> Option<String> {
        if self.id != id || self.container.spec.id != id {
            return Some("it is another container's".to_owned());
        }
        let name = self.name.as_deref()?;
        spec::check_name(name).err().map(|error| error.to_string())
    }

    fn damaged(folder: &Path, id: &str, damage: String) -> Self {
        let made = folder.metadata().and_then(|folder| folder.modified()).ok();
        let age = made.and_then(|made| made.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
        // What it was started with says whether something is above its monitor.
        let restart = LaunchConfig::read(&folder.join(CONFIG)).ok().and_then(|config| config.restart);
        Self {
            id: id.to_owned(),
            name: None,
            image: "<unreadable>".to_owned(),
            image_id: String::new(),
            created_ns: u64::try_from(age.as_nanos()).unwrap_or(u64::MAX),
            auto_remove: false,
            stop_signal: SIGTERM,
            restart,
            labels: Vec::new(),
            vcpus: 0,
            memory_mib: 0,
            kernel: None,
            waits: false,
            container: spec::nothing(id),
            damage: Some(damage),
        }
    }

    /// The record, if it can be believed.
    ///
    /// # Errors
    /// [`StateError::Damaged`].
    pub fn usable(self) -> Result<Self, StateError> {
        match self.damage {
            Some(damage) => Err(StateError::Damaged { id: self.id, damage }),
            None => Ok(self),
        }
    }

    /// Whether its directory stays when nobody lives in it.
    pub(crate) fn is_kept(&self, folder: &Path) -> bool {
        !self.auto_remove || (self.waits && !folder.join(CONFIG).exists())
    }

    /// Its name, or the beginning of its id where it has none.
    pub fn shown_name(&self) -> &str {
        self.name.as_deref().unwrap_or_else(|| self.short_id())
    }

    /// The beginning of its id, as people are shown it.
    pub fn short_id(&self) -> &str {
        short_id(&self.id)
    }
}

/// The beginning of a container's id, as people are shown it.
pub fn short_id(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;

    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef";

    /// A record that can be believed.
    pub(crate) fn record(id: &str, name: Option<&str>) -> Record {
        let record = Record::damaged(Path::new("/nowhere"), id, String::new());
        Record { image: "busybox".to_owned(), name: name.map(str::to_owned), damage: None, ..record }
    }

    fn sound() -> Record {
        record(ID, Some("web"))
    }

    fn loaded(bytes: &[u8]) -> Option<Record> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(NAME), bytes).unwrap();
        Record::load(folder.path(), ID)
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Record::load(folder.path(), ID), None);
        assert_eq!(loaded(&serde_json::to_vec(&sound()).unwrap()), Some(sound()));
        assert_eq!(sound().usable().unwrap(), sound());
    }

    #[test]
    fn what_cannot_be_believed_has_an_id_and_a_reason() {
        let named = |name: &str| serde_json::to_vec(&Record { name: Some(name.to_owned()), ..sound() }).unwrap();
        let stranger = serde_json::to_vec(&Record { id: "f".repeat(32), ..sound() }).unwrap();
        for bytes in [b"".to_vec(), b"{".to_vec(), named("../../etc/passwd"), named("a/b"), stranger] {
            let record = loaded(&bytes).unwrap();
            assert_eq!((record.id.as_str(), record.name.as_deref(), record.auto_remove), (ID, None, false));
            let error = record.usable().unwrap_err().to_string();
            assert!(error.contains(ID) && error.ends_with("remove it with rm"), "{error}");
        }
    }

    #[test]
    fn one_that_waits_to_be_started_stays_until_then() {
        let folder = tempfile::tempdir().unwrap();
        let passing = Record { auto_remove: true, ..sound() };
        assert!(sound().is_kept(folder.path()) && !passing.is_kept(folder.path()));
        let waiting = Record { waits: true, ..passing };
        assert!(waiting.is_kept(folder.path()));
        fs::write(folder.path().join(CONFIG), b"{}").unwrap();
        assert!(!waiting.is_kept(folder.path()));
    }
}
