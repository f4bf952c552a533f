//! A container as the agent sets it up: the OCI runtime specification's `config.json` (sections "Process", "Mounts",
//! "Linux Namespaces", "Linux Capabilities", "Resources"), resolved by the host as far as it can be without the rootfs.
//!
//! Every container has namespaces of its own for mounts, uts and cgroup; [`Namespaces`] says what it has of the others.
//! Users and groups are named as in the image and looked up in the guest, since the
//! files that define them are the image's.

use serde::{Deserialize, Serialize};

/// One container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContainerSpec {
    /// The container's id: 1 to 64 of `[a-zA-Z0-9_.-]`, not starting with `.`; names its directory and cgroup in the guest.
    pub id: String,
    /// The uts hostname.
    pub hostname: String,
    /// Where the root file system comes from.
    pub rootfs: Rootfs,
    /// Further mounts, in order, on top of the standard ones (`/proc`, `/dev`, `/dev/pts`, `/dev/shm`, `/dev/mqueue`,
    /// `/sys`, `/sys/fs/cgroup`).
    pub mounts: Vec<Mount>,
    /// Files written into the root before the program starts: `/etc/hosts`, `/etc/hostname`, `/etc/resolv.conf`. They
    /// are bind-mounted from a tmpfs, so a read-only root has them too.
    pub files: Vec<File>,
    /// Paths that read as empty (files) or as empty directories.
    pub masked_paths: Vec<String>,
    /// Paths that are read-only.
    pub readonly_paths: Vec<String>,
    /// Limits of the container's cgroup.
    pub limits: Limits,
    /// Which namespaces are its own.
    pub namespaces: Namespaces,
    /// The size of `/dev/shm` in bytes, unless it is another container's.
    pub shm_bytes: u64,
    /// The container's first process.
    pub process: ProcessSpec,
    /// How to find out whether it is well, from the moment its program runs.
    pub health_check: Option<HealthCheck>,
}

/// The namespaces that containers of one VM may share.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Namespaces {
    /// Process ids.
    pub pid: Namespace,
    /// System V IPC and POSIX message queues; another container's comes with its `/dev/shm`.
    pub ipc: Namespace,
    /// The network. A namespace of its own has nothing but a loopback interface.
    pub network: NetworkNamespace,
}

/// Whose namespace a container is in.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Namespace {
    /// A new one.
    #[default]
    Own,
    /// The one of the running container of this id.
    Container(String),
}

/// Whose network namespace a container is in.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum NetworkNamespace {
    /// The VM's: the VM is the network boundary.
    #[default]
    Vm,
    /// A new one.
    Own,
    /// The one of the running container of this id.
    Container(String),
}

/// A program that says whether a container is well, as an image's HEALTHCHECK: it is when the exit code is 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HealthCheck {
    /// The program and its arguments; run as the container's first process is (user, environment, capabilities).
    pub args: Vec<String>,
    /// From the end of one run to the next, in microseconds.
    pub interval_us: u64,
    /// How long a run may take before it is killed and has failed, in microseconds.
    pub timeout_us: u64,
    /// How long after the start failures do not count, unless a run has succeeded, in microseconds.
    pub start_period_us: u64,
    /// The interval during that time, in microseconds.
    pub start_interval_us: u64,
    /// How many runs in a row must fail for the container to be unhealthy; at least 1.
    pub retries: u32,
}

/// Where a root file system comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rootfs {
    /// The block device in the guest that holds the image as EROFS, for example `/dev/vda`.
    pub device: String,
    /// Whether the root is mounted read-only. Otherwise an overlay with a tmpfs upper directory takes writes.
    pub read_only: bool,
}

/// A mount inside the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mount {
    /// The absolute path in the container; created when missing, resolved inside the root.
    pub destination: String,
    /// What is mounted there.
    pub source: MountSource,
    /// Whether it is read-only.
    pub read_only: bool,
}

/// What a mount shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum MountSource {
    /// A new tmpfs.
    Tmpfs {
        /// Its size in bytes; `None` for half of the VM's memory.
        size_bytes: Option<u64>,
        /// The mode of its root directory.
        mode: u32,
        /// Whether programs may be executed from it.
        exec: bool,
        /// Whether device nodes on it work.
        dev: bool,
        /// Whether set-uid bits on it work.
        suid: bool,
    },
}

/// A file given to the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// The absolute path in the container.
    pub path: String,
    /// Its bytes.
    pub content: Vec<u8>,
    /// Its permission bits.
    pub mode: u32,
}

/// Limits of a cgroup (cgroup v2 interface files in brackets). `None` leaves a limit as it is, which for a new container is
/// none; `u64::MAX` takes it away.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Bytes of memory (`memory.max`).
    pub memory_bytes: Option<u64>,
    /// Number of tasks (`pids.max`).
    pub pids: Option<u64>,
    /// CPU time in microseconds per 100 ms (`cpu.max`).
    pub cpu_quota_us: Option<u64>,
}

/// One process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessSpec {
    /// The program and its arguments; the program is looked up in the process's own `PATH`. At least one.
    pub args: Vec<String>,
    /// The environment as `NAME=value`. `HOME` and, on a terminal, `TERM` are added when missing.
    pub env: Vec<String>,
    /// The working directory, created when missing.
    pub working_directory: String,
    /// `USER[:GROUP]` by name or number, looked up in the image's `/etc/passwd` and `/etc/group`; empty for root.
    pub user: String,
    /// Groups by name or number, besides those that `/etc/group` lists for the user.
    pub additional_groups: Vec<String>,
    /// The bounding, permitted and effective capability set: bit N for capability N. A user other than root keeps the
    /// bounding set only. The inheritable and ambient sets are empty.
    pub capabilities: u64,
    /// Resource limits.
    pub rlimits: Vec<Rlimit>,
    /// Whether `execve` may never give privileges.
    pub no_new_privileges: bool,
    /// The system calls the process may make.
    pub seccomp: Seccomp,
    /// What the kernel adds to the process's badness when memory runs out: -1000 to 1000.
    pub oom_score_adj: i16,
    /// A terminal instead of three pipes, and its first size.
    pub terminal: Option<WindowSize>,
    /// Where its streams go.
    pub stdio: Stdio,
}

/// The host's vsock ports that the agent dials for the streams of a process. A stream without a port is `/dev/null`.
/// With a terminal, `stdin` carries both directions and the others are not used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stdio {
    /// Standard input; with a terminal, its master side in both directions.
    pub stdin: Option<u32>,
    /// Standard output.
    pub stdout: Option<u32>,
    /// Standard error.
    pub stderr: Option<u32>,
}

/// A resource limit as `setrlimit(2)` takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rlimit {
    /// The resource's number on Linux x86-64 (`RLIMIT_NOFILE` is 7).
    pub resource: u8,
    /// The soft limit; `u64::MAX` for none.
    pub soft: u64,
    /// The hard limit; `u64::MAX` for none.
    pub hard: u64,
}

/// Which system calls a process may make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Seccomp {
    /// The profile that docker and podman apply by default.
    Default,
    /// All of them.
    Unconfined,
}

/// The size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// The capabilities that docker and podman give a container by default, as a mask for [`ProcessSpec::capabilities`]:
/// chown, dac_override, fowner, fsetid, kill, setgid, setuid, setpcap, net_bind_service, net_raw, sys_chroot, mknod,
/// audit_write, setfcap.
pub const DEFAULT_CAPABILITIES: u64 = mask(&[0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31]);

const fn mask(capabilities: &[u8]) -> u64 {
    let mut mask = 0;
    let mut i = 0;
    while i < capabilities.len() {
        mask |= 1 << capabilities[i];
        i += 1;
    }
    mask
}

/// Paths hidden from a container by default, as docker and podman do.
pub const DEFAULT_MASKED_PATHS: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Paths a container cannot write by default, as docker and podman do.
pub const DEFAULT_READONLY_PATHS: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
