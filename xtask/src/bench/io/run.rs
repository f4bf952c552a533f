//! The measuring half: boots the monitors in turn, and has each guest do all tasks.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::Value;

use super::RESULT;
use super::machine::{Contender, Load, Place};
use super::report::{Measured, Report};
use super::tasks::{DRIVE_BYTES, tasks};
use crate::bench::report::Series;
use crate::bench::{process, stage};

/// The disk that `enter.sh` makes.
const DISK: &str = "/dev/ram0";

/// Where to measure what.
#[derive(Args)]
pub struct MeasureIoArgs {
    /// The prepared root
    pub root: PathBuf,
    /// Where the result goes
    pub out: PathBuf,
    /// How often each monitor runs
    #[arg(long)]
    pub runs: u32,
    /// Tasks to do, by parts of their names
    #[arg(long)]
    pub only: Vec<String>,
}

/// Measures everything and writes the result.
pub fn measure(args: &MeasureIoArgs) -> Result<()> {
    let scratch =
        tempfile::Builder::new().prefix("bench-").tempdir_in("/run").context("cannot create a folder in /run")?;
    let bench = std::path::absolute(&args.root)?.join(stage::FOLDER);
    let place = Place { bench, run: scratch.path().to_owned(), disk: scratch.path().join("disk") };
    fs::create_dir(&place.disk)?;
    mount(DISK, &place.disk, "ext4", MountFlags::empty(), None).context("cannot mount the disk in RAM")?;
    let report = on_disk(args, &place);
    unmount(&place.disk, UnmountFlags::DETACH).context("cannot unmount the disk in RAM")?;
    let path = args.out.join(RESULT);
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    serde_json::to_writer_pretty(file, &report?).with_context(|| format!("cannot write {}", path.display()))
}

fn on_disk(args: &MeasureIoArgs, place: &Place) -> Result<Report> {
    process::adopt_orphans()?;
    // No holes: a guest that writes finds a file whose blocks are allocated.
    let mut drive = File::create(place.drive())?;
    for _ in 0..DRIVE_BYTES >> 20 {
        drive.write_all(&vec![0xa5; 1 << 20]).context("cannot fill the drive")?;
    }
    drive.sync_all().context("cannot sync the drive")?;

    let tasks = tasks(&args.only);
    ensure!(!tasks.is_empty(), "no task has any of these in its name: {}", args.only.join(", "));
    let mut contenders = vec![Contender::Cofferdam, Contender::Host];
    if place.bench.join("firecracker").exists() {
        contenders.insert(1, Contender::Firecracker);
    }
    contenders.retain(|contender| tasks.iter().any(|task| contender.does(task)));
    let mut measured: Vec<Measured> = tasks.iter().map(|task| Measured::new(task, &contenders)).collect();
    for round in 0..args.runs as usize {
        for turn in 0..contenders.len() {
            let contender = contenders[(round + turn) % contenders.len()];
            eprintln!("bench: round {} of {}: {}", round + 1, args.runs, contender.name());
            fs::create_dir(place.files())?;
            let mut load =
                Load::start(contender, place).with_context(|| format!("cannot start {}", contender.name()))?;
            for (task, measured) in tasks.iter().zip(&mut measured).filter(|(task, _)| contender.does(task)) {
                let nanoseconds = load
                    .perform(task)
                    .with_context(|| format!("cannot measure \"{}\" of {}", task.name, contender.name()))?;
                eprintln!("bench:   {:<40}{nanoseconds:>14}", task.name);
                let series = measured.series.iter_mut().find(|series| series.name == contender.name());
                series.into_iter().for_each(|series: &mut Series<f64>| series.runs.push(nanoseconds as f64 / 1000.0));
            }
            load.end().with_context(|| format!("{} does not end well", contender.name()))?;
            fs::remove_dir_all(place.files())?;
        }
    }
    let about: Value = serde_json::from_slice(&fs::read(place.bench.join(stage::ABOUT))?)?;
    let kernel = rustix::system::uname();
    Ok(Report {
        host_kernel: format!("{} {}", kernel.release().to_string_lossy(), kernel.version().to_string_lossy()),
        versions: serde_json::from_value(about["versions"].clone())?,
        guest_kernel_sha256: serde_json::from_value(about["kernel_sha256"].clone())?,
        measured,
    })
}
