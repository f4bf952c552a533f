//! The default system call filter of a container: `resources/seccomp/container-default.json`, compiled while building.

use std::io;

use libc::sock_filter;

use crate::sys;

/// What a process may call with docker's default capabilities.
static DEFAULT: &[sock_filter] = &include!(concat!(env!("OUT_DIR"), "/container_default.rs"));

/// Puts the default filter on this process and all that it starts.
///
/// # Errors
/// What seccomp(2) says.
pub fn confine() -> io::Result<()> {
    sys::add_seccomp_filter(DEFAULT)
}
