//! What is done, in its order.

use serde::{Deserialize, Serialize};

/// How much a task is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Amount {
    /// So many operations, each of which is counted.
    Operations(u64),
    /// So many bytes.
    Bytes(u64),
}

impl Amount {
    /// The number.
    pub fn count(self) -> u64 {
        match self {
            Self::Operations(count) | Self::Bytes(count) => count,
        }
    }
}

/// Who takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Both monitors' guests, on a block device of theirs.
    Block,
    /// Both, with a stream to the host.
    Stream {
        /// Of which kind.
        kind: &'static str,
        /// What the guest does: `send`, `receive` or `echo`.
        direction: &'static str,
    },
    /// Our guest, in a directory of the host's, and the host itself.
    Files,
}

/// A task.
#[derive(Debug, Clone)]
pub struct Task {
    /// What it is called in the report.
    pub name: String,
    /// Who does it.
    pub part: Part,
    /// What the load is told, with `@` for the place.
    pub line: String,
    /// How much that is.
    pub amount: Amount,
    /// Whether the host's page cache is emptied first.
    pub cold: bool,
}

/// The size of the block device, in bytes.
pub const DRIVE_BYTES: u64 = 32 << 20;

/// How many small operations.
const OPERATIONS: u64 = 1000;
/// How many bytes in large ones.
const BYTES: u64 = 16 << 20;
/// How many round trips.
const ROUND_TRIPS: u64 = 500;
/// How many files.
const FILES: u64 = 500;

const SMALL: u64 = 4096;
const LARGE: u64 = 1 << 20;

/// All tasks whose names have one of the given parts in them; all, if none are given.
pub fn tasks(only: &[String]) -> Vec<Task> {
    let mut tasks = Vec::new();
    for direction in ["read", "write"] {
        let scattered =
            |threads| block(format!("4k direct, {threads} at a time"), direction, "direct", SMALL, OPERATIONS, threads);
        tasks.extend([scattered(1), scattered(8)]);
        tasks.push(block("1M direct".to_owned(), direction, "direct", LARGE, BYTES / LARGE, 1));
        tasks.push(block("4k through the cache".to_owned(), direction, "buffered", SMALL, BYTES / SMALL, 1));
        tasks.push(block("1M through the cache".to_owned(), direction, "buffered", LARGE, BYTES / LARGE, 1));
    }
    for (name, size, count) in
        [("4k direct, host cold", SMALL, OPERATIONS), ("1M direct, host cold", LARGE, BYTES / LARGE)]
    {
        tasks.push(Task { cold: true, ..block(name.to_owned(), "read", "direct", size, count, 1) });
    }
    for kind in ["vsock", "net"] {
        for (name, direction) in [("guest to host", "send"), ("host to guest", "receive"), ("round trip", "echo")] {
            let (count, amount) = match direction {
                "echo" => (ROUND_TRIPS, Amount::Operations(ROUND_TRIPS)),
                _ => (BYTES, Amount::Bytes(BYTES)),
            };
            let line = format!("stream {kind} {direction} {count}");
            let part = Part::Stream { kind, direction };
            tasks.push(Task { name: format!("{kind}, {name}"), part, line, amount, cold: false });
        }
    }
    for what in ["create", "stat", "cold-stat", "open", "cold-open", "rename", "unlink"] {
        tasks.push(Task {
            name: format!(
                "fs, {}",
                what.replace("cold-stat", "stat, guest cold").replace("cold-open", "open, guest cold")
            ),
            part: Part::Files,
            line: format!("files {what} @ {FILES}"),
            amount: Amount::Operations(FILES),
            cold: false,
        });
    }
    for (direction, size, count, cache) in [
        ("write", LARGE, BYTES / LARGE, "buffered"),
        ("read", LARGE, BYTES / LARGE, "buffered"),
        ("read", SMALL, BYTES / SMALL, "buffered"),
        ("write", SMALL, OPERATIONS, "direct"),
        ("read", SMALL, OPERATIONS, "direct"),
    ] {
        let how = format!("{} {}", unit(size), if cache == "direct" { "direct" } else { "through the cache" });
        let task = block(how, direction, cache, size, count, 1);
        let name = task.name.replacen("blk", "fs", 1);
        let line = task.line.replacen('@', "@/data", 1);
        tasks.push(Task { name, part: Part::Files, line, ..task });
    }
    tasks.retain(|task| only.is_empty() || only.iter().any(|part| task.name.contains(part)));
    tasks
}

fn unit(size: u64) -> &'static str {
    if size == SMALL { "4k" } else { "1M" }
}

fn block(how: String, direction: &str, cache: &str, size: u64, count: u64, threads: u64) -> Task {
    let amount = match (size, cache) {
        (SMALL, "direct") => Amount::Operations(count),
        _ => Amount::Bytes(size * count),
    };
    Task {
        name: format!("blk, {direction} {how}"),
        part: Part::Block,
        line: format!("block @ {direction} {cache} {size} {count} {threads}"),
        amount,
        cold: false,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_task_has_a_name_of_its_own_and_is_found_by_parts_of_it() {
        let all = tasks(&[]);
        let names: BTreeSet<&str> = all.iter().map(|task| task.name.as_str()).collect();
        assert_eq!(names.len(), all.len());
        assert!(tasks(&["vsock".to_owned(), "fs, stat".to_owned()]).len() == 5);
        assert!(tasks(&["nothing of the kind".to_owned()]).is_empty());
    }
}
