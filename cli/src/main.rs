//! The `cofferdam` command: containers, each in a micro-VM of its own.
//!
//! Exit codes: what the container's program returned, for `run`; 125 when Cofferdam failed, 126 when the program cannot
//! be executed, 127 when there is none. Other verbs return 1 when they fail, and every verb 125 for a command line that
//! is none. Errors are one line on standard error.

#![forbid(unsafe_code)]

mod args;
mod doctor;
mod images;
mod later;
mod progress;
mod report;
mod run;
mod table;

use std::process::ExitCode;

use api::control::EXIT_FAILED;
use clap::Parser as _;

use args::{Cli, Verb};

/// The exit code of a verb that failed.
const FAILED: u8 = 1;

fn main() -> ExitCode {
    let started = runtime::timeline::now();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return ExitCode::from(report::usage(&error)),
    };
    let (result, failed) = match cli.verb {
        Verb::Run(run) => (run::run(*run, started), EXIT_FAILED),
        Verb::Pull(pull) => (images::pull(&pull), FAILED),
        Verb::Images(list) => (images::list(&list), FAILED),
        Verb::Rmi(remove) => (images::remove(&remove), FAILED),
        Verb::Prune(prune) => (images::prune(&prune), FAILED),
        Verb::Doctor(doctor) => (doctor::doctor(&doctor), FAILED),
        Verb::Version => (report::version(), FAILED),
    };
    ExitCode::from(result.unwrap_or_else(|error| {
        report::error(&format!("{error:#}"));
        failed
    }))
}
