//! `cargo xtask`: what the repository does to itself. `make` targets are one-liners onto these.

#![forbid(unsafe_code)]

mod command;
mod cpio;
mod debian;
mod lab;
mod paths;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Builds, tests and measures Cofferdam
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install the Debian packages that building, testing and the demo need
    Setup,
    /// Run a command in an emulated machine whose /dev/kvm can run guests
    Lab(lab::LabArgs),
    /// Inside the lab: pass standard input on to a port and print how many bytes that were
    #[command(hide = true)]
    LabRelay {
        /// The port's device node
        port: std::path::PathBuf,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    perform(cli.task).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn perform(task: Task) -> Result<ExitCode> {
    match task {
        Task::Setup => debian::setup()?,
        Task::Lab(args) => return lab::run(&args),
        Task::LabRelay { port } => println!("{}", lab::relay(&port)?),
    }
    Ok(ExitCode::SUCCESS)
}
