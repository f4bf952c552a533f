//! The measuring half: interleaves the contenders on what the host's half has prepared.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::Value;

use super::boot::Monitor;
use super::entry::Entry;
use super::report::{Report, Series};
use super::start::{CONTENDERS, Contender};
use super::{RESULT, footprint, process, stage};

/// Where to measure what.
#[derive(Args)]
pub struct MeasureArgs {
    /// The prepared root
    pub root: PathBuf,
    /// Where the result goes
    pub out: PathBuf,
    /// How often each contender runs
    #[arg(long)]
    pub runs: u32,
    /// Whether time is counted in instructions
    #[arg(long)]
    pub instructions: bool,
}

/// Where everything is.
pub struct Place {
    /// What the host's half has prepared.
    pub bench: PathBuf,
    /// What is written while measuring.
    pub run: PathBuf,
}

impl Place {
    /// The `cofferdam` command with these arguments, with a store and a run root of its own.
    pub fn cofferdam(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.bench.join("cofferdam"));
        command.args(arguments);
        command.env("COFFERDAM_DATA", self.run.join("store")).env("COFFERDAM_RUN", self.run.join("state"));
        // What the caller has set must not change what is measured.
        for name in ["COFFERDAM_KERNEL", "COFFERDAM_INITRAMFS", "COFFERDAM_VMM"] {
            command.env_remove(name);
        }
        command
    }

    /// The image's reference.
    pub fn image(&self) -> String {
        format!("oci:{}:latest", self.bench.join("layout").display())
    }

    /// The image's root file system in the store.
    pub fn rootfs(&self) -> Result<PathBuf> {
        let images = self.run.join("store/images");
        let mut files = Vec::new();
        for entry in fs::read_dir(&images).with_context(|| format!("cannot list {}", images.display()))? {
            files.push(entry?.path());
        }
        files.retain(|path| path.extension().is_some_and(|extension| extension == "erofs"));
        ensure!(files.len() == 1, "{} images are in the store, not one", files.len());
        files.pop().context("no image is in the store")
    }
}

/// Measures everything and writes the result.
pub fn measure(args: &MeasureArgs) -> Result<()> {
    let scratch =
        tempfile::Builder::new().prefix("bench-").tempdir_in("/run").context("cannot create a folder in /run")?;
    let root = std::path::absolute(&args.root)?;
    let place = Place { bench: root.join(stage::FOLDER), run: scratch.path().to_owned() };
    process::adopt_orphans()?;
    for bundle in ["bundle", "bundle-host-network"] {
        set_root(&place.bench.join(bundle).join("config.json"), &place.bench.join("rootfs"))?;
    }
    let pulled = place.cofferdam(&["pull", "--quiet", &place.image()]).stdout(Stdio::null()).status()?;
    ensure!(pulled.success(), "cofferdam pull: {pulled}");

    let starts = starts(&place, args.runs)?;
    let boots = boots(&place, args.runs)?;
    eprintln!("bench: memory");
    let about: Value = serde_json::from_slice(&fs::read(place.bench.join(stage::ABOUT))?)?;
    let kernel = rustix::system::uname();
    let report = Report {
        instructions: args.instructions,
        host_kernel: format!("{} {}", kernel.release().to_string_lossy(), kernel.version().to_string_lossy()),
        versions: serde_json::from_value(about["versions"].clone())?,
        guest_kernel_sha256: serde_json::from_value(about["kernel_sha256"].clone())?,
        starts,
        boots,
        footprint: footprint::measure(&place)?,
    };
    let path = args.out.join(RESULT);
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    serde_json::to_writer_pretty(file, &report).with_context(|| format!("cannot write {}", path.display()))
}

/// Tells a bundle where its root is.
fn set_root(config: &Path, root: &Path) -> Result<()> {
    let mut value: Value = serde_json::from_slice(&fs::read(config)?)?;
    value["root"]["path"] = serde_json::to_value(root)?;
    fs::write(config, serde_json::to_vec(&value)?).with_context(|| format!("cannot write {}", config.display()))
}

fn starts(place: &Place, runs: u32) -> Result<Vec<Series<super::report::Start>>> {
    let mut number = 0;
    interleave(&CONTENDERS, runs, Contender::name, |contender| {
        number += 1;
        contender.run(place, number)
    })
}

fn boots(place: &Place, runs: u32) -> Result<Vec<Series<super::report::Boot>>> {
    let mut monitors = vec![Monitor::Cofferdam, Monitor::CofferdamSerial];
    if place.bench.join("firecracker").exists() {
        monitors.push(Monitor::Firecracker);
    }
    let entry = Entry::prepare();
    interleave(&monitors, runs, Monitor::name, |monitor| monitor.run(place, entry.as_ref()))
}

/// Runs each contender once to warm up, and then `runs` times, each round beginning with another one. Every run counts.
fn interleave<C: Copy, S>(
    contenders: &[C],
    runs: u32,
    name: impl Fn(C) -> String,
    mut run: impl FnMut(C) -> Result<S>,
) -> Result<Vec<Series<S>>> {
    let mut series: Vec<Series<S>> =
        contenders.iter().map(|&contender| Series { name: name(contender), runs: Vec::new() }).collect();
    for round in 0..=runs as usize {
        let names: Vec<&str> = series.iter().map(|series| series.name.as_str()).collect();
        eprintln!("bench: {} of {runs} rounds done: {}", round.saturating_sub(1), names.join(", "));
        for turn in 0..contenders.len() {
            let index = (round + turn) % contenders.len();
            let sample = run(contenders[index]).with_context(|| format!("cannot measure {}", series[index].name))?;
            // The first round warms caches up.
            if round > 0 {
                series[index].runs.push(sample);
            }
        }
    }
    Ok(series)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_contender_begins_a_round() {
        let mut order = Vec::new();
        let series = interleave(&['a', 'b'], 2, String::from, |contender| {
            order.push(contender);
            Ok(order.len())
        });
        assert_eq!(order, ['a', 'b', 'b', 'a', 'a', 'b']);
        let series = series.unwrap();
        assert_eq!((&series[0].runs, &series[1].runs), (&vec![4, 5], &vec![3, 6]));
    }
}
