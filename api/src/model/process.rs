//! Processes in a container.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A process to execute in a running container, besides its first one. What is left out is as it is for that one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProcessCreate {
    /// Its id, unique in the container; one is chosen when it is left out.
    #[serde(default)]
    pub id: Option<String>,
    /// The program and its arguments; the program is looked up in `PATH`.
    pub args: Vec<String>,
    /// Further environment entries, `NAME=value`; a later one replaces an earlier one of the same name.
    #[serde(default)]
    pub env: Vec<String>,
    /// The working directory.
    #[serde(default)]
    pub working_directory: Option<String>,
    /// `USER[:GROUP]` by name or number, as the image has them.
    #[serde(default)]
    pub user: Option<String>,
    /// A terminal of this size instead of three pipes.
    #[serde(default)]
    pub terminal: Option<Size>,
    /// Whether it reads what is attached to it; otherwise `/dev/null`.
    #[serde(default)]
    pub stdin: bool,
    /// Whether it has every capability.
    #[serde(default)]
    pub privileged: bool,
}

/// A process that was executed in a container besides its first one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Process {
    /// Its id.
    pub id: String,
    /// The program and its arguments.
    pub args: Vec<String>,
    /// Where it is in its life.
    pub state: ProcessState,
    /// Its exit code once it has exited: 128 + N after signal N; 126 and 127 when there was nothing to execute.
    pub exit_code: Option<u8>,
    /// Why it was not executed.
    pub error: Option<String>,
    /// Whether it has a terminal.
    pub terminal: bool,
}

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProcessState {
    /// It is being set up.
    Starting,
    /// Its program runs.
    Running,
    /// It has ended, or was not executed.
    Exited,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WaitResult {
    /// Its exit code: 128 + N after signal N; 126 and 127 when there was nothing to execute.
    pub exit_code: u8,
    /// Why it was not executed, in one line.
    pub error: Option<String>,
}

/// The size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// The length of a frame's header: the stream, three zeroes, the length of what follows in big-endian (docker's
/// `multiplexed-stream`).
pub const HEADER_LENGTH: usize = 8;
/// What a header has in a stream's place where the frame holds no output but a line that says what is wrong with it.
pub const TROUBLE: u8 = 3;

/// A stream of a process's output, as the first byte of a frame names it (docker's `multiplexed-stream`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StreamKind {
    /// Standard output, or the terminal.
    Stdout = 1,
    /// Standard error.
    Stderr = 2,
}

impl StreamKind {
    /// The stream of this name in a frame.
    pub fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Stdout),
            2 => Some(Self::Stderr),
            _ => None,
        }
    }
}
