//! `cargo xtask bench start`: what it costs to start a container, beside runc, crun and Firecracker.
//!
//! The host's half ([`stage`]) puts everything that is measured into one folder; the measuring half ([`measure`]) runs
//! on it, in the lab with instruction-counted time or, with `--direct`, right here. [`start`] starts containers, [`boot`]
//! boots monitors up to the agent's first word, [`footprint`] looks at memory; [`report`] is what comes out.
//! `cargo xtask bench io` is in [`io`]. `docs/performance.md` says what the figures mean.

mod boot;
mod bundle;
mod entry;
mod footprint;
mod io;
mod measure;
mod probe;
mod process;
mod report;
mod stage;
mod start;

use std::ffi::OsString;
use std::fmt::Display;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use serde::de::DeserializeOwned;

pub use io::{MeasureIoArgs, measure as measure_io};
pub use measure::{MeasureArgs, measure};

use report::Report;

use crate::lab::{self, LabArgs};
use crate::paths;

/// How long the lab may take for each round of runs, and for everything around them, in seconds.
const LAB_SECONDS: [u32; 2] = [180, 900];
/// The name of the result in the folder that the measuring half writes to.
const RESULT: &str = "bench-start.json";

/// Measure
#[derive(Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// The start of a container, side by side with runc and crun, and the boot of a VM with Firecracker
    Start(StartArgs),
    /// How fast a guest's devices move data, side by side with Firecracker's, and its files with the host's
    Io(io::IoArgs),
}

#[derive(Args)]
struct StartArgs {
    /// A Firecracker binary to boot the same kernel and initramfs with [default: Firecracker is left out]
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// The guest kernel [default: the one in target/release]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// How often each contender runs, after one run that warms up
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Where the result goes as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure time on this machine instead of instructions in the lab: needs a KVM that runs guests, and root
    #[arg(long)]
    direct: bool,
}

/// Runs a benchmark.
pub fn bench(args: BenchArgs) -> Result<ExitCode> {
    match args.what {
        Bench::Start(args) => bench_start(args),
        Bench::Io(args) => io::bench(args),
    }
}

fn bench_start(args: StartArgs) -> Result<ExitCode> {
    let stage = stage::prepare(args.firecracker.as_deref(), args.kernel.as_deref())?;
    let out = tempfile::Builder::new().prefix("cofferdam-bench-").tempdir().context("cannot create a folder")?;
    if args.direct {
        measure(&MeasureArgs { root: stage, out: out.path().to_owned(), runs: args.runs, instructions: false })?;
    } else {
        let seconds = LAB_SECONDS[0].saturating_mul(args.runs + 1).saturating_add(LAB_SECONDS[1]).min(86_400);
        let mut command: Vec<OsString> = ["/bin/sh", "-c", include_str!("enter.sh"), "sh"].map(OsString::from).to_vec();
        command.push(stage.into());
        command.extend(["/bench/xtask", "bench-measure", "/", "/out", "--instructions", "--runs"].map(OsString::from));
        command.push(args.runs.to_string().into());
        let code = lab::run(&LabArgs {
            icount: true,
            timeout: seconds,
            out: Some(out.path().to_owned()),
            ..LabArgs::for_command(command)
        })?;
        if code != ExitCode::SUCCESS {
            return Ok(code);
        }
    }
    show::<Report>(out.path(), RESULT, args.json)?;
    Ok(ExitCode::SUCCESS)
}

/// Prints what a measurement left in its folder, and keeps it where asked, or else in the target folder.
fn show<R: DeserializeOwned + Display>(out: &Path, name: &str, kept: Option<PathBuf>) -> Result<()> {
    let result = out.join(name);
    let file = File::open(&result).context("the measurement left no result")?;
    let report: R = serde_json::from_reader(file).context("the result does not decode")?;
    print!("{report}");
    let kept = kept.unwrap_or_else(|| paths::target().join(name));
    fs::copy(&result, &kept).with_context(|| format!("cannot write {}", kept.display()))?;
    eprintln!("bench: the figures of every run are in {}", kept.display());
    Ok(())
}
