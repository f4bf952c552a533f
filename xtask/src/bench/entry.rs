//! The moment at which a monitor first enters its guest, the same way for every monitor: the kernel's own `kvm_entry`
//! trace event (Linux `Documentation/trace/events.rst`), which turns tracing off
//! when it has fired once.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Where the kernel's trace events are.
const TRACING: &str = "/sys/kernel/tracing";
const TRIGGER: &str = "events/kvm/kvm_entry/trigger";
const ENABLE: &str = "events/kvm/kvm_entry/enable";

/// A trace event that is ready to be armed.
pub struct Entry {
    tracing: PathBuf,
}

impl Entry {
    /// Sets the event up; `None` where the kernel has no such events or does not let us.
    pub fn prepare() -> Option<Self> {
        let entry = Self { tracing: PathBuf::from(TRACING) };
        entry.set("tracing_on", "0").ok()?;
        entry.set("trace_clock", "mono").ok()?;
        entry.set(TRIGGER, "traceoff").ok()?;
        entry.set(ENABLE, "1").ok()?;
        Some(entry)
    }

    /// Forgets what was seen and waits for the next entry.
    pub fn arm(&self) -> Result<()> {
        self.set("trace", "")?;
        self.set("tracing_on", "1")
    }

    /// When the first entry was since [`Entry::arm`], in nanoseconds of CLOCK_MONOTONIC, to the microsecond.
    pub fn first(&self) -> Result<u64> {
        let path = self.tracing.join("trace");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        text.lines().find_map(time).context("no guest was entered, says the kernel's trace")
    }

    fn set(&self, name: &str, value: &str) -> Result<()> {
        let path: &Path = &self.tracing.join(name);
        fs::write(path, value).with_context(|| format!("cannot write {value:?} to {}", path.display()))
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        // As it was; where that fails, the machine has other troubles.
        for (name, value) in [(ENABLE, "0"), (TRIGGER, "!traceoff"), ("trace", ""), ("tracing_on", "1")] {
            let _ = self.set(name, value);
        }
    }
}

/// The time in a line of the trace: `  vcpu_0-77  [000] d....  12.345678: kvm_entry: vcpu 0, rip 0x…`.
fn time(line: &str) -> Option<u64> {
    let (before, _) = line.split_once(": kvm_entry:")?;
    let (seconds, micros) = before.split_whitespace().next_back()?.split_once('.')?;
    if micros.len() != 6 {
        return None;
    }
    seconds.parse::<u64>().ok()?.checked_mul(1_000_000_000)?.checked_add(micros.parse::<u64>().ok()? * 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_from_trace_lines() {
        let line = "          vcpu_0-77      [000] d....    12.345678: kvm_entry: vcpu 0, rip 0x1000000";
        assert_eq!(time(line), Some(12_345_678_000));
        assert_eq!(time("# tracer: nop"), None);
        assert_eq!(time("x: kvm_entry: y"), None);
    }
}
