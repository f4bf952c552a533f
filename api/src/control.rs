//! The exit codes of everything that runs a container.

/// The exit code for failures of ours, as docker and podman use it.
pub const EXIT_FAILED: u8 = 125;
/// The exit code for a program that cannot be executed.
pub const EXIT_NOT_EXECUTABLE: u8 = 126;
/// The exit code for a program that does not exist.
pub const EXIT_NOT_FOUND: u8 = 127;
