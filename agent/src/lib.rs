//! The guest agent: PID 1 of a micro-VM, which sets up and supervises the containers in it.
//!
//! # Shape
//! [`boot`] turns the bare machine that the kernel hands over into one that containers can live on. [`control`] is the
//! one loop of the one thread: the host's requests come in on a vsock connection, each container's child process
//! reports on a channel of its own, and a [pump] moves each standard stream. `container` holds a container's life. What
//! could make the agent wait (a copy, a look at other processes' memory) a forked helper does.
//!
//! # Trust
//! The agent trusts the host and nothing else: the image decides what paths lead to, what `/etc/passwd` says and what
//! the program does. Mounts go through descriptors, path resolution stays inside the root, and every read of a file
//! of the image is bounded.
#![deny(unsafe_code)]

pub mod boot;
pub mod clock;
pub mod container;
pub mod control;
mod cpus;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod memory;
mod network;
pub mod pids;
pub mod pump;
mod seccomp;
pub mod sys;
