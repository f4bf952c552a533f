//! Containers.

use protocol::container::ContainerSpec;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Process, Size};

/// A container to create in a running VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ContainerCreate {
    /// The container, as the agent sets it up. Its stdio ports are chosen by the VM and must be left `null`.
    #[schema(value_type = Object)]
    pub spec: ContainerSpec,
    /// Whether its program reads what is attached to it; otherwise `/dev/null`.
    #[serde(default)]
    pub stdin: bool,
    /// Whether to wait for somebody to be attached before any output is read, so that they miss none.
    #[serde(default)]
    pub wait_for_attach: bool,
}

/// A container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Where it is in its life.
    #[serde(flatten)]
    pub state: ContainerState,
    /// What its first process executes.
    pub args: Vec<String>,
    /// Whether its first process has a terminal.
    pub terminal: bool,
    /// The result of its health checks; `null` without one.
    pub health: Option<Health>,
    /// The processes that were executed in it besides its first one.
    pub processes: Vec<Process>,
}

/// Where a container is in its life, and how it ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ContainerState {
    /// Where it is.
    pub status: ContainerStatus,
    /// When it was started, in nanoseconds since 1970.
    pub started_ns: Option<u64>,
    /// When it ended, in nanoseconds since 1970.
    pub finished_ns: Option<u64>,
    /// Its exit code: 128 + N after signal N; 125 when its VM died, 126 and 127 when there was nothing to execute.
    pub exit_code: Option<u8>,
    /// Whether memory ran out in it.
    pub out_of_memory: bool,
    /// Why it did not run, or ended without an exit code of its own, in one line.
    pub error: Option<String>,
    /// The end of the guest's console where it may explain that error. Untrusted text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<String>,
    /// Guest time just before its program was executed, in microseconds; known when it has ended.
    #[serde(default)]
    pub executed_us: u64,
    /// The resident memory of the guest's agent when it had ended, in KiB.
    #[serde(default)]
    pub agent_resident_kib: u32,
}

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ContainerStatus {
    /// It is being set up.
    #[default]
    Creating,
    /// It waits to be started.
    Created,
    /// Its program is about to be executed.
    Starting,
    /// Its program runs.
    Running,
    /// Its processes stand still.
    Paused,
    /// It has ended.
    Exited,
}

/// A signal to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Kill {
    /// The signal's number on Linux x86-64, 1 to 64.
    pub signal: u8,
    /// Whether every process of the container gets it, instead of the first one.
    #[serde(default)]
    pub all: bool,
    /// Whether the container is meant to end of it: its restart policy does not start it again then.
    #[serde(default)]
    pub stop: bool,
}

/// The least memory limit in bytes, as docker has it: with less, a container's first process cannot be set up.
pub const MEMORY_MIN: u64 = 6 << 20;
/// The least number of tasks that a container may be limited to: its first process.
pub const PIDS_MIN: u64 = 1;
/// The least CPU quota in microseconds per 100 ms: a hundredth of a CPU, below which the kernel refuses one.
pub const CPU_QUOTA_MIN_US: u64 = 1000;

/// Limits to change; what is left out stays as it is, and the largest number takes a limit away.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitsUpdate {
    /// Bytes of memory.
    #[serde(default)]
    #[schema(minimum = 6_291_456)]
    pub memory_bytes: Option<u64>,
    /// Number of tasks.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub pids: Option<u64>,
    /// CPU time in microseconds per 100 ms.
    #[serde(default)]
    #[schema(minimum = 1000)]
    pub cpu_quota_us: Option<u64>,
}

/// How well a container is, by its own check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// What the last checks mean.
    pub status: HealthState,
    /// How many checks in a row have failed.
    pub failing_streak: u32,
    /// The last check's exit code; `null` when it was not executed or took too long.
    pub exit_code: Option<u8>,
    /// The beginning of what the last check wrote.
    pub output: String,
}

/// What checks mean for a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HealthState {
    /// It is too early to say.
    Starting,
    /// The last check succeeded.
    Healthy,
    /// As many checks as allowed have failed in a row.
    Unhealthy,
}

/// What a container uses, and what its VM costs the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stats {
    /// CPU time in the guest.
    pub cpu: CpuStats,
    /// Memory in the guest.
    pub memory: MemoryStats,
    /// Tasks in the guest.
    pub pids: PidsStats,
    /// Block devices in the guest.
    pub io: IoStats,
    /// The VM's own cost on the host.
    pub host: HostStats,
}

/// CPU time (cgroup v2 `cpu.stat`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CpuStats {
    /// In all, in microseconds.
    pub usage_us: u64,
    /// In user mode, in microseconds.
    pub user_us: u64,
    /// In the kernel, in microseconds.
    pub system_us: u64,
    /// How often the limit stopped it.
    pub throttled_periods: u64,
    /// For how long the limit stopped it, in microseconds.
    pub throttled_us: u64,
    /// The number of CPUs there are.
    pub cpus: u8,
}

/// Memory (cgroup v2 `memory.*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryStats {
    /// Bytes used, page cache included.
    pub usage_bytes: u64,
    /// The most bytes ever used.
    pub peak_bytes: u64,
    /// The limit in bytes; `null` for none.
    pub limit_bytes: Option<u64>,
    /// Bytes of page cache that would be given up first.
    pub inactive_file_bytes: u64,
    /// How many processes were killed because memory ran out.
    pub oom_kills: u64,
}

/// Tasks (cgroup v2 `pids.*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PidsStats {
    /// How many there are.
    pub current: u64,
    /// The limit; `null` for none.
    pub limit: Option<u64>,
}

/// Block devices (cgroup v2 `io.stat`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct IoStats {
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
}

/// What a VM costs the host (proc(5) of its monitor).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostStats {
    /// CPU time of the monitor and its vCPUs in microseconds.
    pub cpu_us: u64,
    /// Resident memory in bytes, guest memory included.
    pub resident_bytes: u64,
}

/// The processes in a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Top {
    /// In the order in which the kernel lists them.
    pub processes: Vec<TopProcess>,
}

/// One process, as ps(1) would show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TopProcess {
    /// Its id as the container sees it.
    pub pid: u32,
    /// Its parent's id; 0 for none.
    pub parent_pid: u32,
    /// Its user's number.
    pub uid: u32,
    /// When it began, in microseconds since the guest booted.
    pub started_us: u64,
    /// CPU time in microseconds.
    pub cpu_us: u64,
    /// Its command line.
    pub command: String,
}

impl From<Size> for protocol::container::WindowSize {
    fn from(Size { rows, columns }: Size) -> Self {
        Self { rows, columns }
    }
}
