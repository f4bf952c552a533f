//! What can go wrong in the store. The cause, if there is one, is the error's source and not repeated in its text.

use std::error::Error as StdError;
use std::io;
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::problem::Problem;
use crate::reference::ReferenceParseError;

/// An error of the image store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text names no image.
    #[error(transparent)]
    Reference(#[from] ReferenceParseError),
    /// There is no such image where it was looked for.
    #[error("no such image `{reference}`: {detail}")]
    NoSuchImage {
        /// What was asked for.
        reference: String,
        /// Where it was looked for, or what is there instead.
        detail: String,
    },
    /// The registry does not answer.
    #[error("the registry {registry} cannot be reached; check its name and the network")]
    Unreachable {
        /// Host and port.
        registry: String,
        /// What the connection said.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The registry wants other credentials.
    #[error(
        "the registry {registry} refuses access to `{repository}`: it does not exist or needs a login in \
         ~/.docker/config.json"
    )]
    Denied {
        /// Host and port.
        registry: String,
        /// The image's name there.
        repository: String,
    },
    /// The registry answered with an error of its own.
    #[error("the registry {registry} answered {status} to the request for {what}")]
    RegistryStatus {
        /// Host and port.
        registry: String,
        /// HTTP status code.
        status: u16,
        /// What was asked for.
        what: String,
    },
    /// Talking with the registry failed midway.
    #[error("cannot fetch {what} from the registry {registry}")]
    Transfer {
        /// Host and port.
        registry: String,
        /// What was asked for.
        what: String,
        /// What failed.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
    /// Content is not what its name promises.
    #[error("{what} has the wrong digest: expected {expected}, got {actual}")]
    WrongDigest {
        /// Which content.
        what: String,
        /// Its name.
        expected: Digest,
        /// The digest of what was there.
        actual: Digest,
    },
    /// Content has another size than announced.
    #[error("{what} is {actual} bytes where {expected} were announced: it is truncated or was replaced")]
    WrongSize {
        /// Which content.
        what: String,
        /// Bytes announced.
        expected: u64,
        /// Bytes found; one more than expected stands for any larger number.
        actual: u64,
    },
    /// Something claims a size beyond the limit.
    #[error("{what} claims {bytes} bytes, more than the limit of {limit}")]
    TooLarge {
        /// Which content.
        what: String,
        /// Bytes claimed.
        bytes: u64,
        /// Bytes allowed.
        limit: u64,
    },
    /// A JSON document can't be read.
    #[error("{what} is malformed")]
    Json {
        /// Which document.
        what: String,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A document contradicts itself or has something that is not supported.
    #[error("{what} is not usable: {reason}")]
    Malformed {
        /// Which document.
        what: String,
        /// Why.
        reason: String,
    },
    /// The image was made for other machines.
    #[error("image `{reference}` is for {found}, this host runs linux/amd64")]
    WrongPlatform {
        /// What was asked for.
        reference: String,
        /// The platforms it exists for.
        found: String,
    },
    /// A layer was refused.
    #[error("layer {layer} cannot be unpacked{}", at(path))]
    Layer {
        /// Digest of the layer.
        layer: Digest,
        /// The entry at hand, escaped; empty if it concerns none.
        path: String,
        /// What is wrong with it.
        #[source]
        source: Problem,
    },
    /// A file operation failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Someone holds the image's lease.
    #[error("image `{name}` is in use by a running container; stop it first, or use force to only untag the image")]
    InUse {
        /// What was asked for.
        name: String,
    },
    /// The identifier fits more than one image, or one image with several names.
    #[error("`{name}` stands for {what}; be more specific, or use force")]
    Ambiguous {
        /// What was asked for.
        name: String,
        /// What it fits.
        what: String,
    },
    /// The asynchronous runtime could not start.
    #[error("cannot start the downloads")]
    Runtime(#[source] io::Error),
}

impl Error {
    /// Whether the same pull may well succeed later: what was fetched so far is worth keeping.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Error::Unreachable { .. } | Error::Transfer { .. } | Error::Io { .. } | Error::Runtime(_) => true,
            Error::RegistryStatus { status, .. } => *status == 429 || *status >= 500,
            _ => false,
        }
    }
}

fn at(path: &str) -> String {
    if path.is_empty() { String::new() } else { format!(" at `{path}`") }
}

/// Names what was done to which file when it failed.
pub(crate) trait IoContext<T> {
    fn during(self, action: &'static str, path: &Path) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> IoContext<T> for Result<T, E> {
    fn during(self, action: &'static str, path: &Path) -> Result<T, Error> {
        self.map_err(|source| Error::Io { action, path: path.to_owned(), source: source.into() })
    }
}
