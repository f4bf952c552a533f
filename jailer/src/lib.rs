//! Confines a monitor before its guest runs. There is no flag to do without.
//!
//! # Layout, in the order of a start
//! - [`cgroup`]: limits on memory, CPU time, threads and disks, made by whoever starts a monitor.
//! - [`birth`]: the start: namespaces and a cgroup of its own from its first moment on, and no descriptor but those named.
//! - [`enter`]: what the monitor does with itself, when it has opened what it needs: [`root`], [`files`], [`limits`],
//!   [`identity`] and [`landlock`].
//! - [`filters`]: the system calls of each kind of thread, from `resources/seccomp/monitor.json`; any other one kills the
//!   process. None of them can execute a program. Only one that serves files can start a thread, which waits for a lock and may
//!   do what it may; and only that one and the one that serves the API can open a file.
//! - [`readback`]: the jail that is in force, as the kernel tells it to others.
//! - [`sys`]: the system calls behind it that are not safe to make.
//!
//! `docs/decisions/0007-jail.md` says why it is in this order, and what it costs.

pub mod birth;
pub mod cgroup;
pub mod enter;
mod error;
pub mod files;
pub mod filters;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod identity;
mod landlock;
pub mod limits;
pub mod readback;
mod root;
mod sys;

pub use birth::{Birth, Born, Place};
pub use enter::{Entered, Jail};
pub use error::JailError;
pub use files::Tree;
pub use filters::{Thread, thread};
pub use limits::Limits;
