//! Turns a request for a container into a running micro-VM, and follows it to its end.
//!
//! # Layout
//! - [`request`]: what a user asks for, word by word; [`env_file`], [`capability`] and [`size`] read parts of it.
//! - [`merge`]: who wins where an image's configuration and a request differ.
//! - [`spec`]: the document that a monitor is started with.
//! - [`paths`], [`state`], [`launch`], [`supervise`], [`terminal`], [`timeline`]: the parts of a run.
//! - [`run`]: a run from its request to its exit code.
//! - [`doctor`]: whether this host can run containers, and what to do where it cannot.
//!
//! # Invariants
//! This crate starts monitors and never links one; it knows nothing of KVM. It has no threads, and an exit by any way
//! leaves neither a process nor a file behind: what a SIGKILL leaves, the next run sweeps up.

#![forbid(unsafe_code)]

pub mod capability;
pub mod doctor;
pub mod env_file;
pub mod launch;
pub mod merge;
pub mod paths;
pub mod request;
pub mod run;
pub mod size;
pub mod spec;
pub mod state;
pub mod supervise;
pub mod terminal;
pub mod timeline;
