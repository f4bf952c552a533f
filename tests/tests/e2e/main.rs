//! End-to-end tests: containers in real guests, driven through the `cofferdam` command.
//!
//! Run them with `cargo xtask e2e`, which prepares what they need and chooses between this machine's KVM and the lab.

#![forbid(unsafe_code)]

mod bad_input;
mod exit_codes;
mod images;
mod limits;
mod programs;
mod signals;
mod streams;
mod terminal;
mod user_env;
