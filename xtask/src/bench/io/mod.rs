//! `cargo xtask bench io`: how fast a guest's devices move data, beside Firecracker's.
//!
//! As with the start of containers, [`stage`] puts everything into one folder on the host, and [`run`] measures it in the
//! lab, in instructions: it boots the same kernel with the same initramfs under either monitor ([`machine`]), and has the
//! program in it (`tests/io-load`) do the tasks of [`tasks`]. [`report`] is what comes out, and `docs/performance.md` says
//! what the figures mean.

mod machine;
mod report;
mod run;
mod stage;
mod tasks;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;

pub use run::{MeasureIoArgs, measure};

use report::Report;

use crate::lab::{self, LabArgs};

/// How long the lab may take for each round of runs, and for everything around them, in seconds.
const LAB_SECONDS: [u32; 2] = [400, 300];
/// The name of the result in the folder that the measuring half writes to.
const RESULT: &str = "bench-io.json";

#[derive(Args)]
pub struct IoArgs {
    /// A Firecracker binary to measure beside our monitor [default: Firecracker is left out]
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// The guest kernel [default: the one in target/release]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// How often each monitor runs
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Tasks to do, by parts of their names [default: all]
    #[arg(long, value_name = "PART")]
    only: Vec<String>,
    /// Where the result goes as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Seconds after which the lab is ended [default: by the number of runs]
    #[arg(long, value_name = "S")]
    timeout: Option<u32>,
}

/// Runs the benchmark.
pub fn bench(args: IoArgs) -> Result<ExitCode> {
    let stage = stage::prepare(args.firecracker.as_deref(), args.kernel.as_deref())?;
    let out = tempfile::Builder::new().prefix("cofferdam-bench-").tempdir().context("cannot create a folder")?;
    let seconds = LAB_SECONDS[0].saturating_mul(args.runs).saturating_add(LAB_SECONDS[1]).min(86_400);
    let mut command: Vec<OsString> = ["/bin/sh", "-c", include_str!("enter.sh"), "sh"].map(OsString::from).to_vec();
    // What it does then is to enter the root that was prepared.
    command.extend(["/bin/sh", "-c", include_str!("../enter.sh"), "sh"].map(OsString::from));
    command.push(stage.into());
    command.extend(["/bench/xtask", "bench-measure-io", "/", "/out", "--runs"].map(OsString::from));
    command.push(args.runs.to_string().into());
    command.extend(args.only.iter().flat_map(|part| ["--only".into(), part.into()]));
    let code = lab::run(&LabArgs {
        icount: true,
        timeout: args.timeout.unwrap_or(seconds),
        out: Some(out.path().to_owned()),
        ..LabArgs::for_command(command)
    })?;
    if code != ExitCode::SUCCESS {
        return Ok(code);
    }
    super::show::<Report>(out.path(), RESULT, args.json)?;
    Ok(ExitCode::SUCCESS)
}
