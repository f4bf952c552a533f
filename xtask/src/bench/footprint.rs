//! How much memory a running container costs: the monitor's own, the guest's, and the agent's inside the guest
//! (proc(5), `/proc/pid/smaps`).

use std::fs;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::measure::Place;
use super::report::Footprint;
use super::start::take_timeline;
use super::{probe, process, stage};

/// The name of the monitor's process.
const MONITOR: &str = "cofferdam-vmm";

/// A mapping of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    /// Where in the file it begins.
    offset: u64,
    file: String,
    memory: Memory,
}

/// Memory in KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Memory {
    resident: u64,
    proportional: u64,
    private: u64,
    anonymous: u64,
}

impl Memory {
    /// Each of two memories' numbers, taken together.
    fn with(self, other: Self, join: fn(u64, u64) -> u64) -> Self {
        Self {
            resident: join(self.resident, other.resident),
            proportional: join(self.proportional, other.proportional),
            private: join(self.private, other.private),
            anonymous: join(self.anonymous, other.anonymous),
        }
    }

    /// The same number everywhere.
    fn all(kib: u64) -> Self {
        Self { resident: kib, proportional: kib, private: kib, anonymous: kib }
    }
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
    let image = fs::read(&kernel).with_context(|| format!("cannot read {}", kernel.display()))?;
    let base = guest_base(&mappings, &kernel.to_string_lossy(), &image)?;
    let (guest, outside) = divide(&mappings, base, base.saturating_add(memory_mib << 20));
    Ok(Footprint {
        vm_memory_mib: memory_mib,
        monitor_private_kib: outside.private,
        monitor_anonymous_kib: outside.anonymous,
        monitor_proportional_kib: outside.proportional,
        monitor_resident_kib: outside.resident,
        guest_anonymous_kib: guest.anonymous,
        guest_resident_kib: guest.resident,
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
            let offset = words.nth(1).and_then(|word| u64::from_str_radix(word, 16).ok()).unwrap_or(0);
            let file = words.nth(2).unwrap_or_default().to_owned();
            mappings.push(Mapping { start, end, offset, file, memory: Memory::default() });
        } else if let Some(mapping) = mappings.last_mut() {
            let kib = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
            let memory = &mut mapping.memory;
            match first {
                "Rss:" => memory.resident = kib,
                "Pss:" => memory.proportional = kib,
                "Anonymous:" => memory.anonymous = kib,
                "Private_Clean:" | "Private_Dirty:" => memory.private += kib,
                _ => {}
            }
        }
    }
    mappings
}

/// Where guest memory begins: as far before the first piece of the kernel as that piece's physical address says (ELF
/// program headers, System V ABI "Program Loading").
fn guest_base(mappings: &[Mapping], kernel: &str, image: &[u8]) -> Result<u64> {
    let number = |at: usize, length: usize| -> Option<u64> {
        let bytes = image.get(at..at.checked_add(length)?)?;
        Some(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    };
    let segments = || -> Option<Vec<[u64; 3]>> {
        let (first, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        let starts = (0..count).map(|index| usize::try_from(first + index * size).ok());
        starts
            .map(|start| {
                let start = start?;
                // Type 1 is loaded; offset in the file, physical address and length there are told apart by place.
                let length = if number(start, 4)? == 1 { number(start + 32, 8)? } else { 0 };
                Some([number(start + 8, 8)?, number(start + 24, 8)?, length])
            })
            .collect()
    };
    let segments = segments().with_context(|| format!("{kernel} is no 64-bit ELF file"))?;
    for mapping in mappings.iter().filter(|mapping| mapping.file == kernel) {
        for [offset, address, length] in &segments {
            let within = mapping.offset.checked_sub(*offset).filter(|within| within < length);
            if let Some(base) = within.and_then(|within| mapping.start.checked_sub(address.checked_add(within)?)) {
                return Ok(base);
            }
        }
    }
    bail!("the monitor has not mapped the kernel {kernel}")
}

/// The memory of the mappings inside a range and of those outside. Where the kernel has joined a mapping on each side of
/// an end of the range, the pages count as outside as far as there is room for them.
fn divide(mappings: &[Mapping], start: u64, end: u64) -> (Memory, Memory) {
    let (mut inside, mut outside) = (Memory::default(), Memory::default());
    for mapping in mappings {
        let overlap = mapping.end.min(end).saturating_sub(mapping.start.max(start));
        let room = Memory::all((mapping.end - mapping.start - overlap) / 1024);
        let out = mapping.memory.with(room, u64::min);
        outside = outside.with(out, |sum, more| sum + more);
        inside = inside.with(mapping.memory.with(out, |all, out| all - out), |sum, more| sum + more);
    }
    (inside, outside)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
        1000-3000 r-xp 00000000 00:01 7   /bench/cofferdam-vmm\n\
        Rss:        8 kB\nPss:        4 kB\nPrivate_Clean:      4 kB\nPrivate_Dirty:      0 kB\nAnonymous:     0 kB\n\
        10000-12000 rw-p 00000000 00:00 0 \n\
        Rss:        8 kB\nPss:        8 kB\nPrivate_Clean:      0 kB\nPrivate_Dirty:      8 kB\nAnonymous:     8 kB\n\
        12000-14000 rw-p 00001000 00:01 9   /k\n\
        14000-18000 rw-p 00000000 00:00 0 \n\
        Rss:       12 kB\nPss:       12 kB\nPrivate_Clean:      0 kB\nPrivate_Dirty:     12 kB\nAnonymous:    12 kB\n";

    /// An ELF file of one segment: 0x2000 bytes from 0x1000 at physical address 0x2000.
    fn kernel() -> Vec<u8> {
        let mut image = vec![0; 128];
        (image[32], image[54], image[56]) = (64, 56, 1);
        (image[64], image[64 + 9], image[64 + 25], image[64 + 33]) = (1, 0x10, 0x20, 0x20);
        image
    }

    #[test]
    fn guest_memory_is_told_from_the_monitors() {
        let mappings = parse(SMAPS);
        assert_eq!(mappings.len(), 4);
        assert_eq!(mappings[0].memory, Memory { resident: 8, proportional: 4, private: 4, anonymous: 0 });
        assert_eq!(guest_base(&mappings, "/k", &kernel()).unwrap(), 0x10000);
        assert!(guest_base(&mappings, "/other", &kernel()).is_err());
        assert!(guest_base(&mappings, "/k", &[0; 10]).is_err());
        // The last mapping has 4 KiB inside and 12 KiB outside.
        let (inside, outside) = divide(&mappings, 0x10000, 0x15000);
        assert_eq!((inside.private, outside.private), (8, 16));
        let (inside, outside) = divide(&mappings, 0x10000, 0x17000);
        assert_eq!((inside.anonymous, outside.anonymous), (16, 4));
    }
}
