//! How a pull is shown on standard error: bars on a terminal, lines elsewhere.

use std::collections::HashMap;
use std::io::{IsTerminal as _, Write as _};
use std::sync::{Mutex, PoisonError};

use image::{Phase, Progress, Silent, Step};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::table;

/// How many digits of a layer's digest tell it from the others.
const DIGITS: usize = 12;

/// Does something that reports progress, and shows it unless `quiet`.
pub fn show<T>(quiet: bool, work: impl FnOnce(&dyn Progress) -> T) -> T {
    if quiet {
        return work(&Silent);
    }
    if !std::io::stderr().is_terminal() {
        return work(&Lines);
    }
    let bars = Bars::new();
    let result = work(&bars);
    // What is left are bars of a pull that failed; the error that follows says it better.
    _ = bars.all.clear();
    result
}

fn short(digest: &str) -> &str {
    let digits = digest.strip_prefix("sha256:").unwrap_or(digest);
    digits.get(..DIGITS).unwrap_or(digits)
}

fn verb(phase: Phase) -> &'static str {
    match phase {
        Phase::Download => "downloading",
        Phase::Unpack => "unpacking",
    }
}

/// What to say of a step; the layers speak for themselves.
fn step(step: Step) -> Option<&'static str> {
    match step {
        Step::Resolving => Some("reading the manifest"),
        Step::Waiting => Some("another pull of this image is at work, waiting for it"),
        Step::Sealing => Some("writing the image file"),
        Step::Unpacking | Step::Publishing | Step::Recording | Step::Tagging => None,
    }
}

/// One line when something begins.
struct Lines;

impl Lines {
    fn say(text: &str) {
        // A closed standard error has nobody to tell.
        _ = writeln!(std::io::stderr(), "{text}");
    }
}

impl Progress for Lines {
    fn step(&self, now: Step) {
        if let Some(text) = step(now) {
            Self::say(text);
        }
    }

    fn begin(&self, _layer: usize, phase: Phase, name: &str, total_bytes: u64) {
        Self::say(&format!("{}: {} {}", short(name), verb(phase), table::bytes(total_bytes)));
    }

    fn message(&self, text: &str) {
        Self::say(text);
    }
}

/// A bar for each phase of each layer, gone when it is done.
struct Bars {
    all: MultiProgress,
    layers: Mutex<HashMap<(usize, Phase), ProgressBar>>,
    status: ProgressBar,
}

impl Bars {
    fn new() -> Self {
        let all = MultiProgress::new();
        let status = all.add(ProgressBar::new_spinner());
        Self { all, layers: Mutex::default(), status }
    }

    fn layer(&self, layer: usize, phase: Phase) -> Option<ProgressBar> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner).get(&(layer, phase)).cloned()
    }
}

impl Progress for Bars {
    fn step(&self, now: Step) {
        self.status.set_message(step(now).unwrap_or_default());
        self.status.tick();
    }

    fn begin(&self, layer: usize, phase: Phase, name: &str, total_bytes: u64) {
        let bar = self.all.add(ProgressBar::new(total_bytes));
        if let Ok(style) =
            ProgressStyle::with_template("{prefix} {msg:11} [{bar:30}] {bytes:>10}/{total_bytes:<10} {eta}")
        {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(short(name).to_owned());
        bar.set_message(verb(phase));
        self.layers.lock().unwrap_or_else(PoisonError::into_inner).insert((layer, phase), bar);
    }

    fn advance(&self, layer: usize, phase: Phase, bytes: u64) {
        if let Some(bar) = self.layer(layer, phase) {
            bar.inc(bytes);
        }
    }

    fn done(&self, layer: usize, phase: Phase) {
        let bar = self.layers.lock().unwrap_or_else(PoisonError::into_inner).remove(&(layer, phase));
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
    }

    fn message(&self, text: &str) {
        // Shown above the bars; where that fails there is no terminal any more.
        _ = self.all.println(text);
    }
}
