//! Turns a request for a container into a running micro-VM, and follows it to its end.
//!
//! # Layout
//! - [`request`]: what a user asks for, word by word; [`env_file`], [`capability`] and [`size`] read parts of it.
//! - [`merge`]: who wins where an image's configuration and a request differ.
//! - [`spec`]: the document that a monitor is started with.
//! - [`health`]: the health check of a container, its image's or one that was asked for.
//! - [`paths`], [`record`], [`state`], [`launch`]: where everything is, what is kept of a container, and its monitor.
//! - [`lock`], [`holders`]: whether a container lives, and ending the processes that it lives in.
//! - [`attach`], [`signals`], [`terminal`], [`timeline`]: being a process's front end.
//! - [`run`]: a run from its request to its exit code.
//! - [`control`]: what can be done with a container that was made.
//! - [`doctor`]: whether this host can run containers, and what to do where it cannot.
//!
//! # Invariants
//! This crate starts monitors and never links one; it knows nothing of KVM. A container's monitor lives on without its front
//! end; what a killed one leaves behind, the next run sweeps up.

#![forbid(unsafe_code)]

pub mod attach;
pub mod capability;
pub mod control;
pub mod directory;
pub mod doctor;
pub mod env_file;
pub mod health;
pub mod holders;
pub mod launch;
pub mod lock;
pub mod merge;
pub mod multiplexed;
pub mod paths;
pub mod record;
pub mod request;
pub mod run;
pub mod signals;
pub mod size;
pub mod spec;
pub mod state;
pub mod terminal;
pub mod timeline;
