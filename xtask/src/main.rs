//! `cargo xtask`: what the repository does to itself. `make` targets are one-liners onto these.

#![forbid(unsafe_code)]

mod bench;
mod build;
mod cargo_deny;
mod command;
mod cpio;
mod debian;
mod demo;
mod e2e;
mod fuzz;
mod images;
mod kernel;
mod lab;
mod paths;
mod schemathesis;
mod test;
mod tidy;

use std::ffi::OsString;
use std::path::PathBuf;
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
    /// Build the guest kernel and print where it is
    Kernel,
    /// Make the images that the end-to-end tests run and print where they are
    Images,
    /// Run a command in an emulated machine whose /dev/kvm can run guests
    Lab(lab::LabArgs),
    /// Build everything into target/release
    Build,
    /// Run a container in a micro-VM: directly where KVM can, else in the lab
    Demo,
    /// Run the whole test suite
    Test {
        /// Names of end-to-end tests to run, and options of the test harness [default: all]
        #[arg(last = true)]
        filters: Vec<OsString>,
    },
    /// Run the tests that boot guests
    E2e {
        /// Names of tests to run, and options of the test harness [default: all]
        #[arg(last = true)]
        filters: Vec<OsString>,
    },
    /// Check format, lints and structure
    Check,
    /// Measure
    Bench(bench::BenchArgs),
    /// Look for inputs that break something (docs/security/fuzzing.md)
    Fuzz(fuzz::FuzzArgs),
    /// Write the description of the REST API into api/openapi.json
    Openapi,
    /// Check the structure of the tree
    Tidy,
    /// Check licences and sources of dependencies
    Deny,
    /// Check dependencies against the RustSec advisory database
    Advisories,
    /// Measure what a prepared root holds, and leave the result in a folder
    #[command(hide = true)]
    BenchMeasure(bench::MeasureArgs),
    /// Measure devices on what a prepared root holds, and leave the result in a folder
    #[command(hide = true)]
    BenchMeasureIo(bench::MeasureIoArgs),
    /// Inside the lab: hold what has to stay
    #[command(hide = true)]
    LabHold,
    /// Inside the lab: tell a port that all CPUs go on
    #[command(hide = true)]
    LabPulse {
        /// The port's device node
        port: PathBuf,
    },
    /// Inside the lab: pass standard input on to a port and print how many bytes that were
    #[command(hide = true)]
    LabRelay {
        /// The port's device node
        port: PathBuf,
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
        Task::Kernel => println!("{}", kernel::kernel()?.display()),
        Task::Images => println!("{}", images::images()?.display()),
        Task::Lab(args) => return lab::run(&args),
        Task::Build => build::build()?,
        Task::Demo => return demo::demo(),
        Task::Test { filters } => return test::test(&filters),
        Task::E2e { filters } => return e2e::e2e(&filters),
        Task::Check => test::check()?,
        Task::Bench(args) => return bench::bench(args),
        Task::BenchMeasure(args) => bench::measure(&args)?,
        Task::BenchMeasureIo(args) => bench::measure_io(&args)?,
        Task::Fuzz(args) => fuzz::fuzz(&args)?,
        Task::Openapi => build::openapi()?,
        Task::Tidy => tidy::tidy()?,
        Task::Deny => test::deny()?,
        Task::Advisories => test::advisories()?,
        Task::LabHold => lab::hold()?,
        Task::LabPulse { port } => lab::pulse(&port)?,
        Task::LabRelay { port } => println!("{}", lab::relay(&port)?),
    }
    Ok(ExitCode::SUCCESS)
}
