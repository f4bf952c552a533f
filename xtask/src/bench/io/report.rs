//! What was measured, as JSON with every single run, and as a table of medians.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::machine::Contender;
use super::tasks::{Amount, Task};
use crate::bench::report::Series;

/// The whole result.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    /// The kernel under the contenders.
    pub host_kernel: String,
    /// What the monitors say of themselves.
    pub versions: Vec<String>,
    /// The beginning of the guest kernel's SHA-256.
    pub guest_kernel_sha256: String,
    /// Each task.
    pub measured: Vec<Measured>,
}

/// What a task took.
#[derive(Debug, Serialize, Deserialize)]
pub struct Measured {
    /// The task's name.
    pub name: String,
    /// How much it was.
    pub amount: Amount,
    /// The times of each contender, in microseconds of CLOCK_MONOTONIC: thousands of instructions.
    pub series: Vec<Series<f64>>,
}

impl Measured {
    /// Of a task that nobody has done yet.
    pub fn new(task: &Task, contenders: &[Contender]) -> Self {
        let doing = contenders.iter().filter(|contender| contender.does(task));
        let series = doing.map(|contender| Series { name: contender.name().to_owned(), runs: Vec::new() }).collect();
        Self { name: task.name.clone(), amount: task.amount, series }
    }

    /// What a contender took, if it took part: median, least and most, each in the unit of the table.
    fn figures(&self, name: &str) -> Option<[f64; 3]> {
        let series = self.series.iter().find(|series| series.name == name)?;
        let summary = series.summary(|time| Some(*time))?;
        let times = [summary.median, summary.least, summary.most];
        Some(match self.amount {
            Amount::Operations(count) => times.map(|time| time / count as f64),
            Amount::Bytes(count) => times.map(|time| count as f64 / (1 << 20) as f64 / (time / 1e6)),
        })
    }

    /// How many times as fast as another contender our monitor is, by medians.
    fn ratio(&self, other: &str) -> Option<f64> {
        let [ours, others] = [self.figures(Contender::Cofferdam.name())?[0], self.figures(other)?[0]];
        Some(match self.amount {
            Amount::Operations(_) => others / ours,
            Amount::Bytes(_) => ours / others,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(to, "On Linux {}; {}", self.host_kernel, self.versions.join("; "))?;
        writeln!(to, "Guest kernel {}; a second is 10^9 instructions", self.guest_kernel_sha256)?;
        writeln!(to, "Medians (smallest to largest), and how many times as fast cofferdam-vmm is\n")?;
        let who = |contender: Contender| contender.name();
        write!(to, "{:<34}{:>6}", "", "unit")?;
        writeln!(to, "{:>30}{:>30}{:>8}", who(Contender::Cofferdam), "firecracker, or host", "ratio")?;
        for measured in &self.measured {
            let unit = match measured.amount {
                Amount::Operations(_) => "µs",
                Amount::Bytes(_) => "MiB/s",
            };
            write!(to, "{:<34}{unit:>6}", measured.name)?;
            write!(to, "{:>30}", text(measured.figures(who(Contender::Cofferdam))))?;
            let others = [Contender::Firecracker, Contender::Host].map(who);
            let other = others.into_iter().find(|other| measured.figures(other).is_some());
            write!(to, "{:>30}", text(other.and_then(|other| measured.figures(other))))?;
            match other.and_then(|other| measured.ratio(other)) {
                Some(ratio) => writeln!(to, "{ratio:>8.2}")?,
                None => writeln!(to)?,
            }
        }
        Ok(())
    }
}

fn text(figures: Option<[f64; 3]>) -> String {
    figures.map_or_else(String::new, |[median, least, most]| {
        format!("{median:.1} ({:.1} to {:.1})", least.min(most), least.max(most))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_is_better_for_bytes_and_less_for_operations() {
        let series = |name: &str, time: f64| Series { name: name.to_owned(), runs: vec![time] };
        let mut measured = Measured {
            name: "x".to_owned(),
            amount: Amount::Bytes(2 << 20),
            series: vec![series("cofferdam-vmm", 1e6), series("host", 2e6)],
        };
        assert_eq!(measured.figures("cofferdam-vmm"), Some([2.0; 3]));
        assert_eq!((measured.ratio("host"), measured.ratio("firecracker")), (Some(2.0), None));
        measured.amount = Amount::Operations(1000);
        assert_eq!(measured.figures("host"), Some([2000.0; 3]));
        assert_eq!(measured.ratio("host"), Some(2.0));
    }
}
