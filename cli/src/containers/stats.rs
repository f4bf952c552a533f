//! `stats` and `top`: what containers use, and their processes.

use std::time::Duration;

use api::model::{Stats as Sample, Top};
use runtime::control::Control;
use runtime::state::RunRoot;
use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::each;
use crate::args::{Names, Stats};
use crate::report;
use crate::show::Format;
use crate::table;

/// The time between two samples.
const PERIOD: Duration = Duration::from_secs(1);
/// Clears the terminal and goes to its upper left corner.
const CLEAR: &str = "\x1b[2J\x1b[H";

/// What a container uses, for programs.
#[derive(Debug, Serialize)]
struct Row {
    id: String,
    name: String,
    cpu_percent: f64,
    memory_bytes: u64,
    memory_limit_bytes: Option<u64>,
    memory_percent: Option<f64>,
    read_bytes: u64,
    written_bytes: u64,
    pids: u64,
    host_cpu_us: u64,
    host_resident_bytes: u64,
}

/// Shows what containers use: again and again unless told to do it once.
pub fn stats(args: &Stats) -> anyhow::Result<u8> {
    let root = RunRoot::open()?;
    runtime::run::runtime()?.block_on(async {
        let mut before = samples(&root, &args.containers).await?;
        loop {
            sleep(PERIOD).await;
            let after = samples(&root, &args.containers).await?;
            let rows: Vec<Row> = after
                .iter()
                .map(|now| {
                    let earlier = before.iter().find(|earlier| earlier.id == now.id).unwrap_or(now);
                    row(earlier, now)
                })
                .collect();
            let text = args.format.show(&rows, shown)?;
            let on_terminal =
                args.format == Format::Table && !args.no_stream && rustix::termios::isatty(std::io::stdout());
            report::print(&if on_terminal { format!("{CLEAR}{text}") } else { text })?;
            if args.no_stream {
                return Ok(0);
            }
            before = after;
        }
    })
}

/// What a container has used up to a moment.
struct Taken {
    id: String,
    name: String,
    at: Instant,
    sample: Sample,
}

async fn samples(root: &RunRoot, names: &[String]) -> anyhow::Result<Vec<Taken>> {
    let found = match names {
        [] => root.list()?.into_iter().filter(|found| found.alive).collect(),
        names => names.iter().map(|name| root.find(name)).collect::<Result<Vec<_>, _>>()?,
    };
    let mut taken = Vec::new();
    for found in found {
        let control = Control::new(root, found);
        let path = format!("{}/stats", if names.is_empty() { control.path() } else { control.living()? });
        match control.client.get::<Sample>(&path).await {
            Ok(sample) => taken.push(Taken {
                id: control.found.record.id.clone(),
                name: control.found.record.shown_name().to_owned(),
                at: Instant::now(),
                sample,
            }),
            // One that has ended, or does not run yet, uses nothing; unless it was asked for by its name.
            Err(_) if names.is_empty() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(taken)
}

fn row(before: &Taken, now: &Taken) -> Row {
    let Sample { cpu, memory, pids, io, host } = now.sample;
    let elapsed_us = now.at.duration_since(before.at).as_micros().max(1) as f64;
    let used_us = cpu.usage_us.saturating_sub(before.sample.cpu.usage_us) as f64;
    // As docker counts: without the page cache that would be given up first.
    let memory_bytes = memory.usage_bytes.saturating_sub(memory.inactive_file_bytes);
    Row {
        id: now.id.clone(),
        name: now.name.clone(),
        cpu_percent: (10_000.0 * used_us / elapsed_us).round() / 100.0,
        memory_bytes,
        memory_limit_bytes: memory.limit_bytes,
        memory_percent: memory.limit_bytes.map(|limit| percent(memory_bytes, limit)),
        read_bytes: io.read_bytes,
        written_bytes: io.written_bytes,
        pids: pids.current,
        host_cpu_us: host.cpu_us,
        host_resident_bytes: host.resident_bytes,
    }
}

fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { (10_000.0 * part as f64 / whole as f64).round() / 100.0 }
}

fn shown(rows: &[Row]) -> String {
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            let limit = row.memory_limit_bytes.map_or_else(|| "-".to_owned(), table::bytes);
            [
                row.id.chars().take(12).collect(),
                row.name.clone(),
                format!("{:.2}%", row.cpu_percent),
                format!("{} / {limit}", table::bytes(row.memory_bytes)),
                row.memory_percent.map_or_else(|| "-".to_owned(), |percent| format!("{percent:.2}%")),
                format!("{} / {}", table::bytes(row.read_bytes), table::bytes(row.written_bytes)),
                row.pids.to_string(),
                table::bytes(row.host_resident_bytes),
            ]
        })
        .collect();
    let headings = ["CONTAINER ID", "NAME", "CPU %", "MEM USAGE / LIMIT", "MEM %", "BLOCK I/O", "PIDS", "HOST MEM"];
    table::table(headings, &rows)
}

/// Shows the processes in containers.
pub fn top(args: &Names) -> anyhow::Result<u8> {
    each(&args.containers, async |_, control| {
        let path = format!("{}/top", control.living()?);
        let top: Top = control.client.get(&path).await?;
        let rows: Vec<_> = top
            .processes
            .iter()
            .map(|process| {
                let seconds = process.cpu_us / 1_000_000;
                let time = format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60);
                let command = process.command.clone();
                [process.uid.to_string(), process.pid.to_string(), process.parent_pid.to_string(), time, command]
            })
            .collect();
        Ok(report::print(&table::table(["UID", "PID", "PPID", "TIME", "CMD"], &rows))?)
    })
}
