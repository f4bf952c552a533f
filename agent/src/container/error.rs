//! Why a container could not be set up or its program not be executed, and which kind of failure the host is told.

use std::io;

use protocol::{Failure, FailureKind};
use rustix::io::Errno;
use thiserror::Error;

/// The longest text of a failure in bytes: names in it come from the request, which may be much longer.
const MESSAGE_MAX: usize = 2048;

/// Why a container could not be set up or its program not be executed.
#[derive(Debug, Error)]
pub enum SetupError {
    /// The id of a container or a process is not one that can name a directory.
    #[error("id {id:?} is not 1 to 64 of a-z, A-Z, 0-9, '_', '.' and '-' without a leading '.'")]
    Id {
        /// The id as requested.
        id: String,
    },
    /// The arguments are empty.
    #[error("the process has no program to execute: name one")]
    NoProgram,
    /// A string for the kernel has a zero byte in it.
    #[error("{what} has a zero byte in it")]
    ZeroByte {
        /// Which string.
        what: &'static str,
    },
    /// A resource limit of an unknown number.
    #[error("resource limit {resource} does not exist")]
    UnknownResource {
        /// The number as requested.
        resource: u8,
    },
    /// No such user in the image.
    #[error("unable to find user {user}: no matching entries in passwd file")]
    UnknownUser {
        /// The user as requested.
        user: String,
    },
    /// No such group in the image.
    #[error("unable to find group {group}: no matching entries in group file")]
    UnknownGroup {
        /// The group as requested.
        group: String,
    },
    /// A user or group number that the kernel has no room for.
    #[error("user or group number {number} is out of range: it goes from 0 to 2147483647")]
    IdOutOfRange {
        /// The number as requested or as the image has it.
        number: String,
    },
    /// The image's `/etc/passwd` or `/etc/group` can't be read.
    #[error("cannot read {path} of the image")]
    Database {
        /// The path in the image.
        path: &'static str,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The image's `/etc/passwd` or `/etc/group` is no regular file or too long.
    #[error("{path} of the image is not a regular file of at most {limit} bytes")]
    DatabaseShape {
        /// The path in the image.
        path: &'static str,
        /// The most that is read.
        limit: u64,
    },
    /// A path of the container can't be made or entered.
    #[error("cannot {action} {path} in the container")]
    Path {
        /// What was tried.
        action: &'static str,
        /// The path in the container.
        path: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// A container whose namespaces are to be joined does not run.
    #[error("container {container} is not running, so its namespaces cannot be joined")]
    NotRunning {
        /// The id as requested.
        container: String,
    },
    /// The container that a process is to join is ending.
    #[error("the container has ended")]
    Ended,
    /// A namespace of another container can't be joined.
    #[error("cannot join the {namespace} namespace of container {container}")]
    Join {
        /// Which one.
        namespace: &'static str,
        /// The other container's id.
        container: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The block device of the image can't be mounted.
    #[error("cannot mount the image on {device}")]
    Image {
        /// The device in the guest.
        device: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// A bare program name is nowhere in the search path.
    #[error("exec: {program:?}: executable file not found in $PATH")]
    NotInPath {
        /// The program as requested.
        program: String,
    },
    /// The program's path can't be looked at.
    #[error("exec: {program:?}: stat {program}")]
    NoSuchProgram {
        /// The program as requested.
        program: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The program's path names a directory.
    #[error("exec: {program:?}: is a directory")]
    ProgramIsDirectory {
        /// The program as requested.
        program: String,
    },
    /// The program is not executable by the process's user.
    #[error("exec: {program:?}")]
    ProgramNotExecutable {
        /// The program as requested.
        program: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// execve(2) refused.
    #[error("exec {path}")]
    Execute {
        /// The path found for the program.
        path: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The host does not take a stream's connection.
    #[error("cannot connect to port {port} of the host")]
    Dial {
        /// The vsock port.
        port: u32,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// Any other step that only the kernel can refuse.
    #[error("cannot {step}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
}

impl SetupError {
    /// What the host decides by.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::NotInPath { .. } => FailureKind::CommandNotFound,
            Self::NoSuchProgram { source, .. } | Self::Execute { source, .. } if is_absent(source) => {
                FailureKind::CommandNotFound
            }
            Self::NoSuchProgram { .. }
            | Self::ProgramIsDirectory { .. }
            | Self::ProgramNotExecutable { .. }
            | Self::Execute { .. } => FailureKind::CommandNotExecutable,
            Self::Id { .. }
            | Self::NoProgram
            | Self::ZeroByte { .. }
            | Self::UnknownResource { .. }
            | Self::UnknownUser { .. }
            | Self::UnknownGroup { .. }
            | Self::IdOutOfRange { .. }
            | Self::Database { .. }
            | Self::DatabaseShape { .. }
            | Self::Path { .. }
            | Self::NotRunning { .. }
            | Self::Join { .. }
            | Self::Image { .. } => FailureKind::InvalidRequest,
            Self::Ended => FailureKind::WrongState,
            Self::Dial { .. } | Self::Step { .. } => FailureKind::System,
        }
    }

    /// The failure as the host is told.
    pub fn failure(&self) -> Failure {
        failure(self.kind(), self)
    }
}

/// A failure as the host is told: one line with the cause chain.
pub fn failure(kind: FailureKind, error: &dyn std::error::Error) -> Failure {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        message.push_str(": ");
        match error.downcast_ref::<io::Error>().and_then(Errno::from_io_error) {
            Some(errno) => message.push_str(&describe(errno)),
            None => message.push_str(&error.to_string()),
        }
        cause = error.source();
    }
    message.truncate(message.floor_char_boundary(MESSAGE_MAX));
    Failure { kind, message }
}

/// What people know an error as: the kernel's words, in lower case as Go programs print them.
fn describe(errno: Errno) -> String {
    let text = errno.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    text.to_lowercase()
}

fn is_absent(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NOENT | Errno::NOTDIR))
}

/// Names the step that failed, in the manner of `context`.
pub trait InStep<T> {
    /// Turns an error of the kernel into [`SetupError::Step`]; `step` completes "cannot …".
    ///
    /// # Errors
    /// The error that there was, named.
    fn in_step(self, step: &'static str) -> Result<T, SetupError>;

    /// Turns an error of the kernel into [`SetupError::Path`].
    ///
    /// # Errors
    /// The error that there was, named.
    fn at_path(self, action: &'static str, path: &str) -> Result<T, SetupError>;
}

impl<T, E: Into<io::Error>> InStep<T> for Result<T, E> {
    fn in_step(self, step: &'static str) -> Result<T, SetupError> {
        self.map_err(|error| SetupError::Step { step, source: error.into() })
    }

    fn at_path(self, action: &'static str, path: &str) -> Result<T, SetupError> {
        self.map_err(|error| SetupError::Path { action, path: path.to_owned(), source: error.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_reads_as_docker_says_it() {
        let error = SetupError::NotInPath { program: "nope".into() };
        assert_eq!(error.failure().message, "exec: \"nope\": executable file not found in $PATH");
        let source = io::Error::from_raw_os_error(libc::ENOENT);
        let error = SetupError::NoSuchProgram { program: "/nope".into(), source };
        assert_eq!(error.failure().message, "exec: \"/nope\": stat /nope: no such file or directory");
        assert_eq!(error.kind(), FailureKind::CommandNotFound);
    }

    #[test]
    fn a_message_is_cut_at_a_character() {
        let failure = SetupError::UnknownUser { user: "é".repeat(3000) }.failure();
        assert!(failure.message.len() <= MESSAGE_MAX && failure.message.ends_with('é'));
    }
}
