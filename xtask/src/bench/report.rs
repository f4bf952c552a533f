//! What was measured, as JSON with every single run, and as tables of medians.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A named part of a run.
type Part<R, T> = (&'static str, fn(&R) -> T);

/// The whole result. Times are microseconds of CLOCK_MONOTONIC.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    /// Whether a nanosecond is an instruction, as in the lab.
    pub instructions: bool,
    /// The kernel under the contenders.
    pub host_kernel: String,
    /// What the programs say of themselves.
    pub versions: Vec<String>,
    /// The beginning of the guest kernel's SHA-256.
    pub guest_kernel_sha256: String,
    /// Starts of a container.
    pub starts: Vec<Series<Start>>,
    /// Boots of a VM.
    pub boots: Vec<Series<Boot>>,
    /// Memory.
    pub footprint: Footprint,
}

/// The runs of one contender, in their order.
#[derive(Debug, Serialize, Deserialize)]
pub struct Series<S> {
    /// Who.
    pub name: String,
    /// All of them but the one that warmed up.
    pub runs: Vec<S>,
}

/// One start of a container.
#[derive(Debug, Serialize, Deserialize)]
pub struct Start {
    /// From just before the command's fork to the first byte of the container's program.
    pub first_byte_us: f64,
    /// To the end of the command.
    pub end_us: f64,
    /// CPU time of the command and all its descendants.
    pub cpu_us: u64,
    /// Where the time to the first byte went, for our own.
    pub split: Option<Split>,
}

/// Where the time of a start goes; adds up to [`Start::first_byte_us`].
#[derive(Debug, Serialize, Deserialize)]
pub struct Split {
    /// The command's process and its work before it starts the monitor.
    pub command_us: f64,
    /// The monitor's process, up to its `main`.
    pub monitor_start_us: f64,
    /// Building the VM.
    pub vm_creation_us: f64,
    /// The guest's kernel up to the agent; includes the message that the agent is ready.
    pub guest_kernel_us: f64,
    /// The agent up to that message, by the guest's clock.
    pub agent_us: f64,
    /// Setting the container up.
    pub container_us: f64,
    /// Executing the program, and the way of its first byte.
    pub program_us: f64,
}

/// One boot of a VM.
#[derive(Debug, Serialize, Deserialize)]
pub struct Boot {
    /// From just before the monitor's fork to its first entry into the guest, where the kernel tells.
    pub entry_us: Option<f64>,
    /// To the agent's first message.
    pub ready_us: f64,
    /// To the end of the monitor, after it was let go.
    pub end_us: f64,
    /// CPU time of the monitor.
    pub cpu_us: u64,
    /// Guest time at which the agent began.
    pub guest_agent_started_us: u64,
    /// Guest time at which it was ready.
    pub guest_agent_ready_us: u64,
}

/// Memory of one running container, in KiB.
#[derive(Debug, Serialize, Deserialize)]
pub struct Footprint {
    /// The VM's memory in MiB.
    pub vm_memory_mib: u64,
    /// Pages that only the monitor has, guest memory left out.
    pub monitor_private_kib: u64,
    /// With its part of what it shares.
    pub monitor_proportional_kib: u64,
    /// With all that it shares.
    pub monitor_resident_kib: u64,
    /// Those of them that are in no file: they are there once per VM, the others once per host.
    pub monitor_anonymous_kib: u64,
    /// Pages of guest memory that are in no file or are changed copies: there once per VM.
    pub guest_anonymous_kib: u64,
    /// With those that it can share with other VMs through the page cache.
    pub guest_resident_kib: u64,
    /// The agent's, inside the guest.
    pub agent_resident_kib: u64,
}

/// Smallest, middle and largest of some numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// The middle one, or the mean of the middle two.
    pub median: f64,
    /// The smallest.
    pub least: f64,
    /// The largest.
    pub most: f64,
}

impl Summary {
    fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        Some(Self { median, least, most })
    }
}

impl<S> Series<S> {
    /// The summary of what the runs have of some value.
    pub fn summary(&self, value: impl Fn(&S) -> Option<f64>) -> Option<Summary> {
        Summary::of(self.runs.iter().filter_map(value))
    }

    fn median(&self, value: impl Fn(&S) -> Option<f64>) -> Option<f64> {
        self.summary(value).map(|summary| summary.median)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = if self.instructions { "instruction-counted µs: 1,000 instructions each" } else { "µs" };
        writeln!(to, "On Linux {}; {}", self.host_kernel, self.versions.join("; "))?;
        writeln!(to, "Guest kernel {}; all times in {unit}", self.guest_kernel_sha256)?;
        self.write_starts(to)?;
        self.write_split(to)?;
        self.write_boots(to)?;
        let memory = &self.footprint;
        writeln!(to, "\nMemory of a waiting container in a VM of {} MiB (KiB)", memory.vm_memory_mib)?;
        for (what, kib) in [
            ("monitor without guest memory, private", memory.monitor_private_kib),
            ("  of it in no file", memory.monitor_anonymous_kib),
            ("monitor without guest memory, Pss", memory.monitor_proportional_kib),
            ("monitor without guest memory, resident", memory.monitor_resident_kib),
            ("guest memory, own pages", memory.guest_anonymous_kib),
            ("guest memory, with pages of files", memory.guest_resident_kib),
            ("agent in the guest, resident", memory.agent_resident_kib),
        ] {
            writeln!(to, "  {what:<40}{kib:>10}")?;
        }
        Ok(())
    }
}

impl Report {
    fn write_starts(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(to, "\nStart of a container, from the command's exec to its program's first byte")?;
        let heads = ["median", "min", "max", "to the end", "CPU", "runs"];
        write!(to, "  {:<22}", "")?;
        heads.iter().try_for_each(|head| write!(to, "{head:>11}"))?;
        writeln!(to)?;
        for series in &self.starts {
            let Some(first) = series.summary(|run| Some(run.first_byte_us)) else { continue };
            let end = series.median(|run| Some(run.end_us)).unwrap_or_default();
            let cpu = series.median(|run| Some(run.cpu_us as f64)).unwrap_or_default();
            write!(to, "  {:<22}", series.name)?;
            for number in [first.median, first.least, first.most, end, cpu] {
                write!(to, "{number:>11.0}")?;
            }
            writeln!(to, "{:>11}", series.runs.len())?;
        }
        let Some((ours, others)) = self.starts.split_first() else { return Ok(()) };
        writeln!(to, "  {} takes, by medians:", ours.name)?;
        for other in others {
            let ratio = |value: fn(&Start) -> Option<f64>| {
                ours.median(value).zip(other.median(value)).map_or(f64::NAN, |(ours, other)| ours / other)
            };
            writeln!(
                to,
                "    {:.2} of the time to the first byte, {:.2} of the time to the end, {:.2} of the CPU time of {}",
                ratio(|run| Some(run.first_byte_us)),
                ratio(|run| Some(run.end_us)),
                ratio(|run| Some(run.cpu_us as f64)),
                other.name
            )?;
        }
        Ok(())
    }

    fn write_split(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(ours) = self.starts.first() else { return Ok(()) };
        writeln!(to, "\nWhere the time of {} goes (median, min, max)", ours.name)?;
        let parts: [Part<Split, f64>; 7] = [
            ("command line", |split| split.command_us),
            ("monitor's start", |split| split.monitor_start_us),
            ("VM creation", |split| split.vm_creation_us),
            ("guest kernel", |split| split.guest_kernel_us),
            ("agent", |split| split.agent_us),
            ("container", |split| split.container_us),
            ("exec and first byte", |split| split.program_us),
        ];
        for (name, part) in parts {
            if let Some(part) = ours.summary(|run| run.split.as_ref().map(part)) {
                writeln!(to, "  {name:<22}{:>11.0}{:>11.0}{:>11.0}", part.median, part.least, part.most)?;
            }
        }
        Ok(())
    }

    fn write_boots(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(to, "\nBoot of a VM to the agent's first message (median, min, max)")?;
        let parts: [Part<Boot, Option<f64>>; 6] = [
            ("exec to guest entry", |run| run.entry_us),
            ("entry to agent ready", |run| Some(run.ready_us - run.entry_us?)),
            ("exec to agent ready", |run| Some(run.ready_us)),
            ("kernel, guest's clock", |run| Some(run.guest_agent_started_us as f64)),
            ("agent, guest's clock", |run| Some(run.guest_agent_ready_us as f64 - run.guest_agent_started_us as f64)),
            ("CPU time with the end", |run| Some(run.cpu_us as f64)),
        ];
        for series in &self.boots {
            writeln!(to, "  {}, {} runs", series.name, series.runs.len())?;
            for (name, part) in parts {
                if let Some(part) = series.summary(part) {
                    writeln!(to, "    {name:<23}{:>11.0}{:>11.0}{:>11.0}", part.median, part.least, part.most)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(Summary::of([3.0, 1.0, 2.0]).unwrap(), Summary { median: 2.0, least: 1.0, most: 3.0 });
        assert_eq!(Summary::of([4.0, 1.0]).unwrap().median, 2.5);
        assert_eq!(Summary::of([]), None);
    }
}
