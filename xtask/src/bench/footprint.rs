//! How much memory a running container costs: the monitor's own, the guest's, and the agent's inside the guest
//! (proc(5), `/proc/pid/smaps`).

use std::fs;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::measure::Place;
use super::report::Footprint;
use super::start::take_timeline;
use super::{probe, process, stage};

/// The name of the monitor's process.
const MONITOR: &str = "cofferdam-vmm";

/// A mapping of a process; memory in KiB.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    file: String,
    resident: u64,
    proportional: u64,
    private: u64,
    anonymous: u64,
}

/// Runs a container that waits, and looks at it.
pub fn measure(place: &Place) -> Result<Footprint> {
    let timeline = place.run.join("timeline.json");
    let mut command = place.cofferdam(&["run", "--rm", "--interactive", &place.image(), stage::PROBE]);
    command.env("COFFERDAM_TIMELINE", &timeline).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut running = process::spawn(&mut command)?;
    running.first_byte(probe::MARK)?;
    let looked = look(place, running.child.id());
    // Ends the container.
    drop(running.child.stdin.take());
    running.end()?;
    let mut footprint = looked?;
    let timeline = take_timeline(timeline)?;
    footprint.agent_resident_kib =
        timeline["agent_resident_kib"].as_u64().context("the timeline lacks the agent's memory")?;
    Ok(footprint)
}

fn look(place: &Place, front_end: u32) -> Result<Footprint> {
    let monitor = monitor_of(front_end)?;
    let path = format!("/proc/{monitor}/smaps");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let mappings = parse(&text);
    let memory_mib = memory_of_only_vm(&place.run.join("state"))?;
    let kernel = place.bench.join("vmlinux");
    let guest = guest_memory(&mappings, memory_mib << 20, &kernel.to_string_lossy())?;
    let (inside, outside): (Vec<&Mapping>, Vec<&Mapping>) =
        mappings.iter().partition(|mapping| guest.0 <= mapping.start && mapping.end <= guest.1);
    let sum = |of: &[&Mapping], what: fn(&Mapping) -> u64| of.iter().map(|mapping| what(mapping)).sum();
    Ok(Footprint {
        vm_memory_mib: memory_mib,
        monitor_private_kib: sum(&outside, |mapping| mapping.private),
        monitor_anonymous_kib: sum(&outside, |mapping| mapping.anonymous),
        monitor_proportional_kib: sum(&outside, |mapping| mapping.proportional),
        monitor_resident_kib: sum(&outside, |mapping| mapping.resident),
        guest_anonymous_kib: sum(&inside, |mapping| mapping.anonymous),
        guest_resident_kib: sum(&inside, |mapping| mapping.resident),
        agent_resident_kib: 0,
    })
}

/// The monitor that a front end has started.
fn monitor_of(front_end: u32) -> Result<u32> {
    let path = format!("/proc/{front_end}/task/{front_end}/children");
    let children = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let is_monitor =
        |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_end() == MONITOR);
    let mut pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    pids.find(is_monitor).with_context(|| format!("process {front_end} has no child {MONITOR}"))
}

/// The memory of the one VM that has a directory below the run root, in MiB.
fn memory_of_only_vm(run: &Path) -> Result<u64> {
    let mut found = Vec::new();
    for entry in fs::read_dir(run).with_context(|| format!("cannot list {}", run.display()))? {
        let config = entry?.path().join("config.json");
        if config.is_file() {
            let config: Value = serde_json::from_slice(&fs::read(config)?)?;
            found.extend(config["vm"]["memory_mib"].as_u64());
        }
    }
    ensure!(found.len() == 1, "{} VMs have a directory in {}, not one", found.len(), run.display());
    Ok(found[0])
}

/// Reads smaps.
fn parse(text: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        if let Some((start, end)) = first.split_once('-') {
            let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16)) else { continue };
            let file = words.nth(4).unwrap_or_default().to_owned();
            mappings.push(Mapping { start, end, file, ..Mapping::default() });
        } else if let Some(mapping) = mappings.last_mut() {
            let kib = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
            match first {
                "Rss:" => mapping.resident = kib,
                "Pss:" => mapping.proportional = kib,
                "Anonymous:" => mapping.anonymous = kib,
                "Private_Clean:" | "Private_Dirty:" => mapping.private += kib,
                _ => {}
            }
        }
    }
    mappings
}

/// Where guest memory is: the stretch of adjacent mappings that is exactly as long as the VM's memory and has the kernel
/// in it.
fn guest_memory(mappings: &[Mapping], size: u64, kernel: &str) -> Result<(u64, u64)> {
    for (index, first) in mappings.iter().enumerate() {
        let (mut end, mut has_kernel) = (first.start, false);
        for mapping in &mappings[index..] {
            if mapping.start != end || end - first.start >= size {
                break;
            }
            end = mapping.end;
            has_kernel |= mapping.file == kernel;
        }
        if has_kernel && end - first.start == size {
            return Ok((first.start, end));
        }
    }
    anyhow::bail!("no mappings of the monitor add up to {} MiB with the kernel {kernel} in them", size >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
        1000-3000 r-xp 00000000 00:01 7   /bench/cofferdam-vmm\n\
        Rss:        8 kB\nPss:        4 kB\nPrivate_Clean:      4 kB\nPrivate_Dirty:      0 kB\n\
        10000-12000 rw-p 00000000 00:00 0 \n\
        Rss:        8 kB\nPss:        8 kB\nPrivate_Clean:      0 kB\nPrivate_Dirty:      8 kB\n\
        12000-14000 rw-p 00001000 00:01 9   /k\n\
        14000-15000 rw-p 00000000 00:00 0 \n";

    #[test]
    fn guest_memory_is_told_from_the_monitors() {
        let mappings = parse(SMAPS);
        assert_eq!(mappings.len(), 4);
        assert_eq!((mappings[0].private, mappings[0].proportional, mappings[1].private), (4, 4, 8));
        assert_eq!(guest_memory(&mappings, 0x5000, "/k").unwrap(), (0x10000, 0x15000));
        assert_eq!(guest_memory(&mappings, 0x3000, "/k").unwrap(), (0x12000, 0x15000));
        assert!(guest_memory(&mappings, 0x2000, "/other").is_err());
    }
}
