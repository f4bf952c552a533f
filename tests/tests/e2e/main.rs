//! End-to-end tests: containers in real guests, driven through the `cofferdam` command.
//!
//! Run them with `cargo xtask e2e`, which prepares what they need and chooses between this machine's KVM and the lab.

#![forbid(unsafe_code)]

mod abuse;
mod api;
mod bad_input;
mod copy;
mod exec;
mod exit_codes;
mod faults;
mod filesystem;
mod generation;
mod hostile;
mod hostile_guest;
mod images;
mod jail;
mod known_holes;
mod life;
mod limits;
mod memory;
mod network;
mod programs;
mod signals;
mod soak;
mod state;
mod streams;
mod takeover;
mod terminal;
mod user_env;
mod verbs;
mod vsock;
