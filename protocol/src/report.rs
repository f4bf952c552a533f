//! What the agent reports about a container: the figures of its cgroup, its processes, a path, its health.

use serde::{Deserialize, Serialize};

/// The most processes that one answer tells of, so that it fits a frame; a container with more is told without the rest.
pub const PROCESSES_MAX: usize = 448;

/// The most bytes of a process's command line that are told.
pub const COMMAND_MAX: usize = 96;

/// The most bytes of a health check's output that are told.
pub const HEALTH_OUTPUT_MAX: usize = 4096;

/// What a container uses, from the interface files of cgroup v2 (in brackets).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// CPU time in microseconds (`cpu.stat`: `usage_usec`).
    pub cpu_usage_us: u64,
    /// CPU time in user mode in microseconds (`user_usec`).
    pub cpu_user_us: u64,
    /// CPU time in the kernel in microseconds (`system_usec`).
    pub cpu_system_us: u64,
    /// How often the CPU limit stopped it (`nr_throttled`).
    pub cpu_throttled_periods: u64,
    /// For how long the CPU limit stopped it, in microseconds (`throttled_usec`).
    pub cpu_throttled_us: u64,
    /// Bytes of memory, page cache included (`memory.current`).
    pub memory_bytes: u64,
    /// The most bytes of memory it ever used (`memory.peak`).
    pub memory_peak_bytes: u64,
    /// The limit in bytes; `u64::MAX` for none (`memory.max`).
    pub memory_limit_bytes: u64,
    /// Bytes of page cache that would be given up first (`memory.stat`: `inactive_file`).
    pub memory_inactive_file_bytes: u64,
    /// How many processes the kernel killed because memory ran out (`memory.events`: `oom_kill`).
    pub memory_oom_kills: u64,
    /// Number of tasks (`pids.current`).
    pub pids: u64,
    /// The limit of tasks; `u64::MAX` for none (`pids.max`).
    pub pids_limit: u64,
    /// Bytes read from block devices (`io.stat`: `rbytes` of all devices).
    pub io_read_bytes: u64,
    /// Bytes written to block devices (`io.stat`: `wbytes` of all devices).
    pub io_written_bytes: u64,
}

/// One process, as ps(1) would show it (proc(5)).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// Its id as the container sees it.
    pub pid: u32,
    /// Its parent's id as the container sees it; 0 for none or one outside.
    pub parent_pid: u32,
    /// Its real user id.
    pub uid: u32,
    /// When it began, in microseconds of CLOCK_BOOTTIME.
    pub started_us: u64,
    /// CPU time in microseconds.
    pub cpu_us: u64,
    /// The number of its controlling terminal's device; 0 for none.
    pub terminal: u32,
    /// Its command line, at most [`COMMAND_MAX`] bytes of it; its name in brackets when it has none.
    pub command: String,
}

/// What is at a path (stat(2)).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathInfo {
    /// The path's last component; `.` where it ends with `/.`, `/` of the root.
    pub name: String,
    /// File type and permission bits (`st_mode`).
    pub mode: u32,
    /// Size in bytes.
    pub size: u64,
    /// Time of the last change in seconds since 1970.
    pub modified: i64,
    /// Where a symbolic link points; empty for anything else.
    pub link_target: String,
}

/// The result of one run of a health check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// What it means for the container.
    pub status: HealthStatus,
    /// How many runs in a row have failed.
    pub failing_streak: u32,
    /// The check's exit code; `None` when it was not executed or took too long.
    pub exit_code: Option<u8>,
    /// The beginning of what it wrote, at most [`HEALTH_OUTPUT_MAX`] bytes; behind a note when it took too long; or why
    /// it was not executed.
    pub output: String,
}

/// Whether a container is well, by its own check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum HealthStatus {
    /// It is too early to say.
    Starting,
    /// The last check succeeded.
    Healthy,
    /// As many checks as allowed have failed in a row.
    Unhealthy,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{MAX_FROM_AGENT, encode};
    use crate::{Answer, FromAgent};

    #[test]
    fn the_longest_list_of_processes_fits_a_frame() {
        let (number, time) = (u32::MAX, u64::MAX);
        let longest = ProcessInfo {
            pid: number,
            parent_pid: number,
            uid: number,
            started_us: time,
            cpu_us: time,
            terminal: number,
            command: "x".repeat(COMMAND_MAX),
        };
        let result = Ok(Answer::Processes(vec![longest; PROCESSES_MAX]));
        assert!(encode(&FromAgent::Reply { id: number, result }, MAX_FROM_AGENT).is_ok());
    }
}
