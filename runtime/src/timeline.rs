//! When each phase of a start was over, written for whoever measures: one JSON object a line, appended to the file that
//! `COFFERDAM_TIMELINE` names. All times are nanoseconds of CLOCK_MONOTONIC unless their names say otherwise.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::Path;

use api::model::VmBoot;
use api::record::End;
use serde::Serialize;

pub use api::session::{now, wall_clock_ns};

/// Names the file.
pub const TIMELINE_VARIABLE: &str = "COFFERDAM_TIMELINE";

/// One run.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct RunTimeline {
    /// This process's `main` began.
    pub cli_started: u64,
    /// The request was read and the image found.
    pub image_found: u64,
    /// The monitor was about to be started.
    pub monitor_spawning: u64,
    /// The monitor was started.
    pub monitor_spawned: u64,
    /// What the monitor reports.
    #[serde(flatten)]
    pub start: VmBoot,
    /// Guest time just before the program's `execve`, in microseconds.
    pub guest_executed_us: u64,
    /// The agent's resident memory when the container had ended, in KiB.
    pub agent_resident_kib: u32,
    /// The container's end was known, and the monitor gone.
    pub finished: u64,
}

impl RunTimeline {
    /// Takes over what is known at the end.
    pub(crate) fn finish(&mut self, end: &End) {
        self.start = end.boot;
        (self.guest_executed_us, self.agent_resident_kib) = (end.state.executed_us, end.state.agent_resident_kib);
        self.finished = now();
    }

    /// Appends this run to a file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn append(&self, path: &Path) -> io::Result<()> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        OpenOptions::new().append(true).create(true).open(path)?.write_all(&line)
    }
}
