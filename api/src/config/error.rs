//! Why a document is refused.

use std::path::PathBuf;

use thiserror::Error;

use super::{DOCUMENT_MAX, PLUGGABLE_MIB};

/// Why a document was refused.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// Its path.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// The file is over the limit.
    #[error("the configuration is over {DOCUMENT_MAX} bytes")]
    TooLong,
    /// The document is not JSON of the right shape.
    #[error("the configuration is not valid")]
    Syntax(#[source] serde_json::Error),
    /// A number is out of its range.
    #[error("{field} is {value}: give {least} to {most}")]
    OutOfRange {
        /// The field.
        field: &'static str,
        /// What it was.
        value: u64,
        /// The least allowed.
        least: u64,
        /// The most allowed.
        most: u64,
    },
    /// A number in a device's limits is out of its range.
    #[error("{tokens}.{field} of the {device} device's limits is {value}: give {least} to {most}")]
    Limit {
        /// The kind of device.
        device: &'static str,
        /// What is limited.
        tokens: &'static str,
        /// The field.
        field: &'static str,
        /// What it was.
        value: u64,
        /// The least allowed.
        least: u64,
        /// The most allowed.
        most: u64,
    },
    /// No interface can have this name.
    #[error("{name:?} is no name of an interface: give 1 to 15 printable ASCII characters without /, : and %")]
    InterfaceName {
        /// The name.
        name: String,
    },
    /// Two file systems have one tag.
    #[error("two file systems have the tag {tag:?}: the guest could not tell them apart")]
    Tag {
        /// The tag.
        tag: String,
    },
    /// A file is to be seen under a name that no file can have.
    #[error("a file cannot be seen as {name:?}: give a name of 1 to 255 bytes without '/'")]
    FileName {
        /// The name.
        name: String,
    },
    /// Memory cannot grow to that.
    #[error("memory_max_mib is {most}: give memory_mib ({now}) plus a multiple of {PLUGGABLE_MIB}, such as {next}")]
    MemoryMax {
        /// What it was.
        most: u32,
        /// What the VM begins with.
        now: u32,
        /// The next one that is possible.
        next: u32,
    },
    /// A text has characters that its place cannot hold.
    #[error("{field} {value:?} has a character other than printable ASCII")]
    NotPrintable {
        /// The field.
        field: &'static str,
        /// What it was.
        value: String,
    },
}
