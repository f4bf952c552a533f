//! Starting a container: from the command's `fork` to the first byte of the container's program.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;

use super::measure::Place;
use super::process;
use super::report::{Split, Start};
use super::{probe, stage};

/// Who starts a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contender {
    /// `cofferdam run`.
    Cofferdam,
    /// `crun run` or `runc run`, with a network namespace of the container's own or the host's.
    Oci {
        /// The program's name.
        runtime: &'static str,
        /// The bundle's name.
        bundle: &'static str,
    },
}

/// All of them.
pub const CONTENDERS: [Contender; 4] = [
    Contender::Cofferdam,
    Contender::Oci { runtime: "crun", bundle: "bundle" },
    Contender::Oci { runtime: "runc", bundle: "bundle" },
    Contender::Oci { runtime: "crun", bundle: "bundle-host-network" },
];

impl Contender {
    /// What it is called in the report.
    pub fn name(self) -> String {
        match self {
            Self::Cofferdam => "cofferdam run".to_owned(),
            Self::Oci { runtime, bundle: "bundle" } => format!("{runtime} run"),
            Self::Oci { runtime, .. } => format!("{runtime} run, no netns"),
        }
    }

    /// Starts a container once. `number` makes its name one of its own.
    pub fn run(self, place: &Place, number: u32) -> Result<Start> {
        let timeline = place.run.join("timeline.json");
        let mut command = match self {
            Self::Cofferdam => place.cofferdam(&["run", "--rm", &place.image(), stage::PROBE]),
            Self::Oci { runtime, bundle } => {
                let mut command = Command::new(place.bench.join(runtime));
                command.arg("--root").arg(place.run.join(runtime)).args(["run", "--bundle"]);
                command.arg(place.bench.join(bundle)).arg(format!("bench-{number}"));
                command
            }
        };
        command.env("COFFERDAM_TIMELINE", &timeline).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut running = process::spawn(&mut command)?;
        let began = running.began;
        let first = running.first_byte(probe::MARK)?;
        let ended = running.end()?;
        let split = match self {
            Self::Cofferdam => Some(split(&take_timeline(timeline)?, began, first)?),
            Self::Oci { .. } => None,
        };
        let since = |at: u64| at.saturating_sub(began) as f64 / 1000.0;
        Ok(Start { first_byte_us: since(first), end_us: since(ended.at), cpu_us: ended.cpu_us, split })
    }
}

/// Reads the timeline that a run has written, and removes it.
pub fn take_timeline(path: PathBuf) -> Result<Value> {
    let text = fs::read(&path).with_context(|| format!("the run wrote no timeline to {}", path.display()))?;
    fs::remove_file(&path)?;
    serde_json::from_slice(&text).with_context(|| format!("{} is no timeline", path.display()))
}

/// Where the time went between `began` and `first`.
fn split(timeline: &Value, began: u64, first: u64) -> Result<Split> {
    let number = |name: &str| timeline[name].as_u64().with_context(|| format!("the timeline has no {name}"));
    let between = |from: u64, to: u64| (to as f64 - from as f64) / 1000.0;
    let (spawning, monitor) = (number("monitor_spawning")?, number("monitor_started_ns")?);
    let (vm, ready, created) = (number("vm_created_ns")?, number("agent_ready_ns")?, number("container_created_ns")?);
    // The moment at which the kernel hands over to the agent is known in guest time only. Both clocks run at one speed.
    let agent_us = (number("guest_agent_ready_us")? as f64) - (number("guest_agent_started_us")? as f64);
    Ok(Split {
        command_us: between(began, spawning),
        monitor_start_us: between(spawning, monitor),
        vm_creation_us: between(monitor, vm),
        guest_kernel_us: between(vm, ready) - agent_us,
        agent_us,
        container_us: between(ready, created),
        program_us: between(created, first),
    })
}
