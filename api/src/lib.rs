//! What can be asked of a micro-VM.
//!
//! # Layout
//! - [`config`]: the document that a monitor is started with, and what is refused in it.
//! - [`model`]: the documents of the REST API.
//! - [`server`]: the API itself: one per VM, in its monitor.
//! - [`client`]: the same API from a front end's side.
//! - [`folder`], [`log`], [`record`]: what a container leaves on disk, and where: what it wrote, and how it ended.
//! - [`lock`]: whether it lives, and in which processes.
//! - [`control`], [`session`]: exit codes, times, and errors that both sides know.
//!
//! This crate knows containers and their agent; it knows neither KVM nor devices. The monitor (`vmm`) depends on it,
//! and every front end speaks through it.

#![forbid(unsafe_code)]

pub mod client;
pub mod config;
pub mod control;
pub mod folder;
pub mod lock;
pub mod log;
pub mod model;
pub mod record;
pub mod server;
pub mod session;
