//! `stats` and `top`: what containers use, and their processes.

use std::time::Duration;

use api::model::{Stats as Sample, Top};
use api::session::shown as shown_on_a_line;
use runtime::control::Control;
use runtime::state::RunRoot;
use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};

use super::each;
use crate::args::{Names, Stats};
use crate::report;
use crate::show::Format;
use crate::table;

/// The time between two samples.
const PERIOD: Duration = Duration::from_secs(1);
/// How long a container may take to answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// What is shown where something is not known, as docker does.
const UNKNOWN: &str = "--";
/// Clears the terminal and goes to its upper left corner.
const CLEAR: &str = "\x1b[2J\x1b[H";

/// What a container uses, for programs. What a container that does not answer uses is not known.
#[derive(Debug, Default, Serialize)]
struct Row {
    id: String,
    name: String,
    cpu_percent: Option<f64>,
    memory_bytes: Option<u64>,
    memory_limit_bytes: Option<u64>,
    memory_percent: Option<f64>,
    read_bytes: Option<u64>,
    written_bytes: Option<u64>,
    pids: Option<u64>,
    host_cpu_us: Option<u64>,
    host_resident_bytes: Option<u64>,
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
                .map(|now| row(before.iter().find(|earlier| earlier.id == now.id).unwrap_or(now), now))
                .collect();
            let text = args.format.show(&rows, shown)?;
            let on_terminal =
                args.format == Format::Table && !args.no_stream && rustix::termios::isatty(std::io::stdout());
            let text = if on_terminal { format!("{CLEAR}{text}") } else { text };
            if report::print_part(&text)?.is_break() || args.no_stream {
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
    /// Nothing where it does not answer.
    sample: Option<Sample>,
}

/// Asks all containers at the same time: one that does not answer holds nobody up but for the deadline.
async fn samples(root: &RunRoot, names: &[String]) -> anyhow::Result<Vec<Taken>> {
    let found = match names {
        [] => root.list()?.into_iter().filter(|found| found.alive).collect(),
        names => names.iter().map(|name| root.find(name)).collect::<Result<Vec<_>, _>>()?,
    };
    let mut asked = Vec::new();
    for found in found {
        let control = Control::new(root, found);
        let path = format!("{}/stats", if names.is_empty() { control.path() } else { control.living()? });
        let Control { client, found, .. } = control;
        let ask = async move { (timeout(DEADLINE, client.get::<Sample>(&path)).await, Instant::now()) };
        asked.push((found.record, tokio::spawn(ask)));
    }
    let mut taken = Vec::new();
    for (record, asked) in asked {
        let name = record.shown_name().to_owned();
        let (answer, at) = asked.await?;
        let sample = match answer {
            Ok(Ok(sample)) => Some(sample),
            // One that has ended, or does not run yet, uses nothing; unless it was asked for by its name.
            Ok(Err(_)) if names.is_empty() => continue,
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => None,
        };
        taken.push(Taken { id: record.id, name, at, sample });
    }
    Ok(taken)
}

fn row(before: &Taken, now: &Taken) -> Row {
    let (id, name) = (now.id.clone(), now.name.clone());
    let Some(Sample { cpu, memory, pids, io, host }) = now.sample else {
        return Row { id, name, ..Row::default() };
    };
    let elapsed_us = now.at.duration_since(before.at).as_micros().max(1) as f64;
    let used_before_us = before.sample.map_or(cpu.usage_us, |before| before.cpu.usage_us);
    let used_us = cpu.usage_us.saturating_sub(used_before_us) as f64;
    // As docker counts: without the page cache that would be given up first.
    let memory_bytes = memory.usage_bytes.saturating_sub(memory.inactive_file_bytes);
    Row {
        id,
        name,
        cpu_percent: Some((10_000.0 * used_us / elapsed_us).round() / 100.0),
        memory_bytes: Some(memory_bytes),
        memory_limit_bytes: memory.limit_bytes,
        memory_percent: memory.limit_bytes.map(|limit| percent(memory_bytes, limit)),
        read_bytes: Some(io.read_bytes),
        written_bytes: Some(io.written_bytes),
        pids: Some(pids.current),
        host_cpu_us: Some(host.cpu_us),
        host_resident_bytes: Some(host.resident_bytes),
    }
}

fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { (10_000.0 * part as f64 / whole as f64).round() / 100.0 }
}

fn shown(rows: &[Row]) -> String {
    let bytes = |count: Option<u64>| count.map_or_else(|| UNKNOWN.to_owned(), table::bytes);
    let percent = |part: Option<f64>| part.map_or_else(|| UNKNOWN.to_owned(), |part| format!("{part:.2}%"));
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            [
                runtime::record::short_id(&row.id).to_owned(),
                row.name.clone(),
                percent(row.cpu_percent),
                format!("{} / {}", bytes(row.memory_bytes), bytes(row.memory_limit_bytes)),
                percent(row.memory_percent),
                format!("{} / {}", bytes(row.read_bytes), bytes(row.written_bytes)),
                row.pids.map_or_else(|| UNKNOWN.to_owned(), |pids| pids.to_string()),
                bytes(row.host_resident_bytes),
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
        Ok(report::print(&listed(&top))?)
    })
}

fn listed(top: &Top) -> String {
    let rows: Vec<_> = top
        .processes
        .iter()
        .map(|process| {
            let seconds = process.cpu_us / 1_000_000;
            let time = format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60);
            // An honest monitor has made it fit for a terminal: this one may be none.
            let command = shown_on_a_line(&process.command);
            [process.uid.to_string(), process.pid.to_string(), process.parent_pid.to_string(), time, command]
        })
        .collect();
    table::table(["UID", "PID", "PPID", "TIME", "CMD"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_that_does_not_answer_is_shown_without_figures() {
        let taken = Taken { id: "0123456789abcdef".into(), name: "web".into(), at: Instant::now(), sample: None };
        let row = row(&taken, &taken);
        let cells: Vec<String> = shown(&[row]).lines().nth(1).unwrap().split("   ").map(|c| c.trim().into()).collect();
        let cells: Vec<&str> = cells.iter().map(String::as_str).filter(|cell| !cell.is_empty()).collect();
        assert_eq!(cells, ["0123456789ab", "web", "--", "-- / --", "--", "-- / --", "--", "--"]);
    }

    #[test]
    fn a_command_does_nothing_to_a_terminal() {
        let command = "sh\u{1b}[2J\u{9b}2J\n0 1 0 forged".to_owned();
        let process =
            api::model::TopProcess { pid: 1, parent_pid: 0, uid: 0, started_us: 0, cpu_us: 61_000_000, command };
        let text = listed(&Top { processes: vec![process] });
        assert_eq!(text.lines().count(), 2, "{text:?}");
        assert!(text.contains("00:01:01") && !text.contains(['\u{1b}', '\u{9b}']), "{text:?}");
    }
}
