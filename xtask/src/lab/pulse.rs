//! Inside the lab: a sign of life from each of its CPUs, by a virtio-serial port.
//!
//! The emulator has faults that leave a CPU in a loop with interrupts off (see `hold.rs`, docs/decisions/0012-lab-first-cpu.md).
//! What waits for that CPU then waits for ever, and nobody is told. A program that visits every CPU in turn stops with it.

use std::fs::File;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::relay;

/// How long it rests between two rounds.
const REST: Duration = Duration::from_secs(5);

/// Goes from CPU to CPU for ever, and writes a byte to `port` after each round.
pub fn pulse(port: &Path) -> Result<()> {
    let mut to = relay::open(port)?;
    let all = sched_getaffinity(None).context("cannot ask for the CPUs")?;
    loop {
        round(&all, &mut to)?;
        thread::sleep(REST);
    }
}

/// Visits every CPU, and says so.
fn round(all: &CpuSet, to: &mut File) -> Result<()> {
    for cpu in (0..CpuSet::MAX_CPU).filter(|&cpu| all.is_set(cpu)) {
        let mut one = CpuSet::new();
        one.set(cpu);
        // Returns when it runs there.
        sched_setaffinity(None, &one).with_context(|| format!("cannot move to CPU {cpu}"))?;
    }
    relay::write(to, b".").context("cannot write to the port")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_visits_every_cpu_and_is_told_once() {
        let mut told = tempfile::tempfile().unwrap();
        let all = sched_getaffinity(None).unwrap();
        round(&all, &mut told).unwrap();
        let now = sched_getaffinity(None).unwrap();
        assert_eq!(now.count(), 1);
        assert!(now.is_set((0..CpuSet::MAX_CPU).rfind(|&cpu| all.is_set(cpu)).unwrap()));
        assert_eq!(told.metadata().unwrap().len(), 1);
    }
}
