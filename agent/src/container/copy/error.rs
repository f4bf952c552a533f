//! Why a copy failed.

use std::io;

use protocol::{Failure, FailureKind};
use thiserror::Error;

use crate::container::error::{SetupError, failure};

/// Why a copy failed.
#[derive(Debug, Error)]
pub enum CopyError {
    /// The path that was asked for does not do.
    #[error("cannot {action} {path} in the container")]
    Path {
        /// What was tried.
        action: &'static str,
        /// The path as requested.
        path: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// A file of the container can't be put into the archive.
    #[error("cannot {action} {name:?} in the container")]
    File {
        /// What was tried.
        action: &'static str,
        /// Its name in the archive.
        name: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// A file of the container is not fit for an archive.
    #[error("{name:?} in the container {problem}")]
    Source {
        /// Its name in the archive.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// What the host sends is no archive.
    #[error("the archive {problem}")]
    Archive {
        /// What is wrong with it.
        problem: &'static str,
    },
    /// An entry of the archive is not fit to be unpacked.
    #[error("{name:?} in the archive {problem}")]
    Entry {
        /// Its name.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// An entry of the archive can't be unpacked.
    #[error("cannot {action} {name:?} of the archive")]
    Unpack {
        /// What was tried.
        action: &'static str,
        /// Its name.
        name: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// What may fail as well when a container is set up.
    #[error(transparent)]
    Setup(#[from] SetupError),
}

impl CopyError {
    /// The failure as the host is told.
    pub fn failure(&self) -> Failure {
        let kind = match self {
            Self::Path { .. }
            | Self::Source { .. }
            | Self::Archive { .. }
            | Self::Entry { .. }
            | Self::Unpack { .. } => FailureKind::InvalidRequest,
            Self::File { .. } => FailureKind::System,
            Self::Setup(error) => error.kind(),
        };
        failure(kind, self)
    }
}

/// A name as it is shown.
pub fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

/// Names the step that failed, in the manner of `context`.
pub trait InStep<T> {
    /// Turns an error of the kernel into [`SetupError::Step`].
    ///
    /// # Errors
    /// The error that there was, named.
    fn in_step(self, step: &'static str) -> Result<T, CopyError>;

    /// Turns an error of the kernel into [`CopyError::File`].
    ///
    /// # Errors
    /// The error that there was, named.
    fn of_file(self, action: &'static str, name: &[u8]) -> Result<T, CopyError>;

    /// Turns an error of the kernel into [`CopyError::Unpack`].
    ///
    /// # Errors
    /// The error that there was, named.
    fn of_entry(self, action: &'static str, name: &[u8]) -> Result<T, CopyError>;
}

impl<T, E: Into<io::Error>> InStep<T> for Result<T, E> {
    fn in_step(self, step: &'static str) -> Result<T, CopyError> {
        self.map_err(|error| SetupError::Step { step, source: error.into() }.into())
    }

    fn of_file(self, action: &'static str, name: &[u8]) -> Result<T, CopyError> {
        self.map_err(|error| CopyError::File { action, name: shown(name), source: error.into() })
    }

    fn of_entry(self, action: &'static str, name: &[u8]) -> Result<T, CopyError> {
        self.map_err(|error| CopyError::Unpack { action, name: shown(name), source: error.into() })
    }
}
