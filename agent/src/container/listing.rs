//! The processes in a container as ps(1) would show them there (proc(5)). Runs in a helper: what a process makes of its own
//! memory decides how long a look at its command line takes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;

use protocol::report::{COMMAND_MAX, PROCESSES_MAX, ProcessInfo};
use rustix::process::Pid;

use super::cgroup;
use super::error::{InStep, SetupError};

/// The most that is read of `status` or `stat`: the first has some sixty short lines, but one of them, before the ids, lists
/// up to 65536 groups.
const FILE_MAX: u64 = 1 << 20;

/// A tick of the times that the kernel tells (`USER_HZ` is 100 on x86-64).
const TICK_US: u64 = 10_000;

/// The flag of a process that has begun to end (`PF_EXITING`).
const EXITING: u64 = 0x4;

/// Lists the processes of a cgroup, up to [`PROCESSES_MAX`].
///
/// # Errors
/// What the cgroup's interface files say.
pub fn list(cgroup: BorrowedFd<'_>) -> Result<Vec<ProcessInfo>, SetupError> {
    let mut pids = Vec::new();
    let visit = |pid| {
        pids.push(pid);
        pids.len() < PROCESSES_MAX
    };
    cgroup::for_each_process(cgroup, visit).in_step("list the container's processes")?;
    let mut known = BTreeMap::new();
    let mut list: Vec<ProcessInfo> = pids.into_iter().filter_map(|pid| look_at(pid, &mut known)).collect();
    list.sort_by_key(|process| process.pid);
    Ok(list)
}

/// Whether a process is on its way out, and has perhaps only others to wait for.
pub fn is_ending(pid: Pid) -> bool {
    let stat = read(pid, "stat", FILE_MAX);
    stat.and_then(|stat| Times::parse(&stat)).is_some_and(|times| times.flags & EXITING != 0)
}

/// What is to be told of a process; `None` when it has ended meanwhile. `known` has the ids that were looked up.
fn look_at(pid: Pid, known: &mut BTreeMap<i32, u32>) -> Option<ProcessInfo> {
    let status = read(pid, "status", FILE_MAX)?;
    let stat = read(pid, "stat", FILE_MAX)?;
    let own = inner_id(&status)?;
    known.insert(pid.as_raw_pid(), own);
    let times = Times::parse(&stat)?;
    let parent = field(&status, "PPid")?.trim().parse().ok().and_then(Pid::from_raw);
    let parent_pid = parent.and_then(|parent| {
        known.get(&parent.as_raw_pid()).copied().or_else(|| {
            let id = inner_id(&read(parent, "status", FILE_MAX)?)?;
            known.insert(parent.as_raw_pid(), id);
            Some(id)
        })
    });
    Some(ProcessInfo {
        pid: own,
        parent_pid: parent_pid.unwrap_or(0),
        uid: field(&status, "Uid")?.split_whitespace().next()?.parse().ok()?,
        started_us: times.started.saturating_mul(TICK_US),
        cpu_us: times.used.saturating_mul(TICK_US),
        terminal: times.terminal,
        command: command(pid, &status),
    })
}

fn read(pid: Pid, name: &str, limit: u64) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(format!("/proc/{}/{name}", pid.as_raw_nonzero())).ok()?.take(limit).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// The text behind `name:` on its line.
fn field<'a>(status: &'a [u8], name: &str) -> Option<&'a str> {
    let mut lines = status.split(|byte| *byte == b'\n');
    let line = lines.find_map(|line| line.strip_prefix(name.as_bytes())?.strip_prefix(b":"))?;
    str::from_utf8(line).ok()
}

/// The id of a process in the pid namespace below the agent's; `None` of one that is in the agent's own.
fn inner_id(status: &[u8]) -> Option<u32> {
    field(status, "NSpid")?.split_whitespace().nth(1)?.parse().ok()
}

/// What is needed of `stat`.
#[derive(Debug, PartialEq, Eq)]
struct Times {
    terminal: u32,
    flags: u64,
    used: u64,
    started: u64,
}

impl Times {
    fn parse(stat: &[u8]) -> Option<Self> {
        // The name before it may hold any byte, parentheses too.
        let behind_name = stat.iter().rposition(|byte| *byte == b')')? + 1;
        let text = str::from_utf8(stat.get(behind_name..)?).ok()?;
        let fields: Vec<&str> = text.split_ascii_whitespace().collect();
        // The first is number 3 in proc(5).
        let number = |index: usize| fields.get(index - 3)?.parse::<i64>().ok();
        let positive = |index| number(index).map(|value| u64::try_from(value).unwrap_or(0));
        let terminal = u32::try_from(number(7)?).unwrap_or(0);
        Some(Self {
            terminal,
            flags: positive(9)?,
            used: positive(14)?.saturating_add(positive(15)?),
            started: positive(22)?,
        })
    }
}

/// The command line, or the name of a process that has none.
fn command(pid: Pid, status: &[u8]) -> String {
    let mut line = read(pid, "cmdline", COMMAND_MAX as u64).unwrap_or_default();
    while line.last() == Some(&0) {
        line.pop();
    }
    if line.is_empty() {
        line = format!("[{}]", field(status, "Name").unwrap_or_default().trim()).into_bytes();
    }
    line.iter_mut().filter(|byte| **byte == 0).for_each(|byte| *byte = b' ');
    let mut text = String::from_utf8_lossy(&line).into_owned();
    text.truncate(text.floor_char_boundary(COMMAND_MAX));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_forge_the_fields_behind_it() {
        let stat = b"77 (a) R 1 (b)) S 1 77 77 34816 77 4194560 1 2 3 4 11 22 0 0 20 0 1 0 555 1000 20 184";
        assert_eq!(Times::parse(stat), Some(Times { terminal: 34816, flags: 4_194_560, used: 33, started: 555 }));
        assert_eq!(Times::parse(b"77 (a) R 1"), None);
        assert_eq!(Times::parse(b""), None);
    }

    #[test]
    fn ids_are_those_of_the_container() {
        let status = b"Name:\tx\nPPid:\t12\nNSpid:\t345\t7\t1\nUid:\t5\t6\t6\t6\n";
        assert_eq!((inner_id(status), field(status, "PPid")), (Some(7), Some("\t12")));
        assert_eq!(inner_id(b"NSpid:\t345\n"), None);
    }
}
