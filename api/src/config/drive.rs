//! Block devices.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::LimitsConfig;

/// The most block devices a VM can have.
pub const DRIVES_MAX: usize = 16;

/// A block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveConfig {
    /// The file behind it.
    pub file: DriveFile,
    /// Whether writes are refused; enforced by the monitor, whatever the guest does.
    #[serde(default)]
    pub read_only: bool,
    /// How much may be moved; discarding and zeroing count as operations.
    #[serde(default)]
    pub limits: Option<LimitsConfig>,
}

/// How the monitor gets at the file behind a block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DriveFile {
    /// A path.
    Path(PathBuf),
    /// The number of a file descriptor that the monitor inherits.
    Descriptor(i32),
}
