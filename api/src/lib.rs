//! What can be asked of a micro-VM.
//!
//! # Layout
//! - [`config`]: the document that a monitor is started with, and what is refused in it.
//! - [`control`]: what a front end and a running monitor say to each other over the control socket.
//! - [`session`]: the conversation with the guest agent: one container, from its creation to its exit.
//! - [`stdio`]: the streams of a foreground container.
//!
//! This crate knows containers and their agent; it knows neither KVM nor devices. The monitor (`vmm`) depends on it,
//! and every front end speaks through it.

#![forbid(unsafe_code)]

pub mod config;
pub mod control;
pub mod session;
pub mod stdio;
