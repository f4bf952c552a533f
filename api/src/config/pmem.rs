//! Files that are memory of the guest.

use serde::{Deserialize, Serialize};

use super::{DriveFile, LimitsConfig};

/// The most persistent memory devices a VM can have.
pub const PMEM_MAX: usize = 4;

/// A persistent memory device: a file that the guest uses as memory, without a copy of its own. Nothing else may make the
/// file shorter while the VM runs: that ends the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemConfig {
    /// The file behind it. Unless it is read-only, its length is a multiple of 2 MiB.
    pub file: DriveFile,
    /// Whether the file cannot be changed; enforced by the monitor, whatever the guest does.
    #[serde(default)]
    pub read_only: bool,
    /// How often it may be flushed: each time is an operation, and as many bytes as the file has.
    #[serde(default)]
    pub limits: Option<LimitsConfig>,
}
