//! The `cofferdam` command: containers, each in a micro-VM of its own.
//!
//! Exit codes: what the container's program returned, for `run`; 125 when Cofferdam failed, 126 when the program cannot
//! be executed, 127 when there is none. Other verbs return 1 when they fail, and every verb 125 for a command line that
//! is none. Errors are one line on standard error.

#![forbid(unsafe_code)]

mod args;
mod containers;
mod doctor;
mod generate;
mod images;
mod later;
mod progress;
mod report;
mod run;
mod show;
mod table;
mod when;

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
        Verb::Create(create) => (run::create(*create), FAILED),
        Verb::Start(start) => (run::start(&start, started), FAILED),
        Verb::Ps(ps) => (containers::list::ps(&ps), FAILED),
        Verb::Exec(exec) => (containers::exec::exec(exec), EXIT_FAILED),
        Verb::Attach(attach) => (containers::exec::attach(&attach), FAILED),
        Verb::Logs(logs) => (containers::logs::logs(&logs), FAILED),
        Verb::Stop(stop) => (containers::life::stop(&stop), FAILED),
        Verb::Kill(kill) => (containers::life::kill(&kill), FAILED),
        Verb::Rm(remove) => (containers::life::remove(&remove), FAILED),
        Verb::Wait(names) => (containers::life::wait(&names), FAILED),
        Verb::Pause(names) => (containers::life::pause(&names, true), FAILED),
        Verb::Unpause(names) => (containers::life::pause(&names, false), FAILED),
        Verb::Stats(stats) => (containers::stats::stats(&stats), FAILED),
        Verb::Top(names) => (containers::stats::top(&names), FAILED),
        Verb::Inspect(inspect) => (containers::inspect::inspect(&inspect), FAILED),
        Verb::Cp(cp) => (containers::copy::copy(&cp), FAILED),
        Verb::Events(events) => (containers::events::events(&events), FAILED),
        Verb::Update(update) => (containers::life::update(&update), FAILED),
        Verb::Port(port) => (containers::inspect::port(&port), FAILED),
        Verb::Pull(pull) => (images::pull(&pull), FAILED),
        Verb::Images(list) => (images::list(&list), FAILED),
        Verb::Rmi(remove) => (images::remove(&remove), FAILED),
        Verb::Prune(prune) => (images::prune(&prune), FAILED),
        Verb::Doctor(doctor) => (doctor::doctor(&doctor), FAILED),
        Verb::Completions(completions) => (generate::completions(&completions), FAILED),
        Verb::Man(man) => (generate::manual(&man), FAILED),
        Verb::Version => (report::version(), FAILED),
    };
    ExitCode::from(result.unwrap_or_else(|error| {
        report::error(&format!("{error:#}"));
        failed
    }))
}
