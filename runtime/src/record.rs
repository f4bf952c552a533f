//! What a container was made from: `container.json` in its state directory, written when it is made and hardly ever
//! changed. How it is, its monitor says; how it ended, `exit.json` (crate `api`).

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use api::config::{ContainerConfig, RestartPolicy};
use serde::{Deserialize, Serialize};

/// Its name.
pub const NAME: &str = "container.json";
/// The longest one that is read: a program's arguments and environment, 2 MiB at most.
const LENGTH_MAX: u64 = 8 << 20;

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
    /// What its monitor runs.
    pub container: ContainerConfig,
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

    /// Its name, or the beginning of its id where it has none.
    pub fn shown_name(&self) -> &str {
        self.name.as_deref().unwrap_or_else(|| self.short_id())
    }

    /// The beginning of its id, as people are shown it.
    pub fn short_id(&self) -> &str {
        self.id.get(..12).unwrap_or(&self.id)
    }
}
