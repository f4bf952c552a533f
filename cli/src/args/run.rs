//! What `run` and `create` take. Flags have docker's names and mean what they mean there.

use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, ValueEnum};
use runtime::capability::Capability;
use runtime::health::{HealthRequest, Period};
use runtime::request::{EnvEntry, PidsLimit, Restart, SecurityOption, SignalName, Tmpfs, Ulimit};
use runtime::size::{Bytes, Cpus};

use crate::later::Later;

/// Run a program of an image in a new container
#[derive(Debug, Args)]
#[command(disable_help_flag = true, override_usage = "cofferdam run [OPTIONS] IMAGE [COMMAND] [ARG]...")]
pub struct Run {
    /// Leave it running, and show its id
    #[arg(short, long)]
    pub detach: bool,
    /// The container.
    #[command(flatten)]
    pub container: ContainerFlags,
}

/// Make a container of an image, to be started later
#[derive(Debug, Args)]
#[command(disable_help_flag = true, override_usage = "cofferdam create [OPTIONS] IMAGE [COMMAND] [ARG]...")]
pub struct Create {
    /// The container.
    #[command(flatten)]
    pub container: ContainerFlags,
}

/// A container to make.
#[derive(Debug, Args)]
pub struct ContainerFlags {
    /// Keep standard input open
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the container a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Remove the container when it ends
    #[arg(long)]
    pub rm: bool,
    /// A name for the container
    #[arg(long)]
    pub name: Option<String>,
    /// Set an environment variable: NAME=VALUE, or NAME for the value it has here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<EnvEntry>,
    /// Read environment variables from a file
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// The working directory
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// The user, and the group, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// A further group of the user
    #[arg(long, value_name = "GROUP")]
    pub group_add: Vec<String>,
    /// Replace the image's entrypoint, and leave out its command
    #[arg(long, value_name = "PROGRAM")]
    pub entrypoint: Option<String>,
    /// The number of CPUs, which may be a fraction [default: 1]
    #[arg(long, value_name = "NUMBER")]
    pub cpus: Option<Cpus>,
    /// The container's memory, with a unit of b, k, m or g [default: 440m]
    #[arg(short, long, value_name = "BYTES")]
    pub memory: Option<Bytes>,
    /// Mount the root file system read-only
    #[arg(long)]
    pub read_only: bool,
    /// Mount a tmpfs: options are ro, exec, suid, dev, size=BYTES, mode=OCTAL
    #[arg(long, value_name = "PATH[:OPTIONS]")]
    pub tmpfs: Vec<Tmpfs>,
    /// The host name in the container
    #[arg(short = 'h', long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// The most processes in the container, -1 for no limit [default: 2048]
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true)]
    pub pids_limit: Option<PidsLimit>,
    /// The size of /dev/shm [default: 64m]
    #[arg(long, value_name = "BYTES")]
    pub shm_size: Option<Bytes>,
    /// Set a resource limit
    #[arg(long, value_name = "NAME=SOFT[:HARD]")]
    pub ulimit: Vec<Ulimit>,
    /// Add a capability
    #[arg(long, value_name = "CAPABILITY")]
    pub cap_add: Vec<Capability>,
    /// Drop a capability
    #[arg(long, value_name = "CAPABILITY")]
    pub cap_drop: Vec<Capability>,
    /// seccomp=unconfined, or no-new-privileges
    #[arg(long, value_name = "OPTION")]
    pub security_opt: Vec<SecurityOption>,
    /// A label
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub label: Vec<String>,
    /// When to start it again: no, always, unless-stopped or on-failure[:NUMBER]
    #[arg(long, value_name = "POLICY", default_value = "no")]
    pub restart: Restart,
    /// The signal that asks the program to end
    #[arg(long, value_name = "SIGNAL")]
    pub stop_signal: Option<SignalName>,
    /// Leave the image's health check out
    #[arg(long, conflicts_with = "HealthFlags")]
    pub no_healthcheck: bool,
    /// How well it is.
    #[command(flatten)]
    pub health: HealthFlags,
    /// When to get the image
    #[arg(long, value_name = "WHEN", default_value = "missing")]
    pub pull: When,
    /// Say nothing about getting the image
    #[arg(short, long)]
    pub quiet: bool,
    /// The network: none is the only one there is
    #[arg(long, visible_alias = "net", value_name = "NETWORK")]
    pub network: Option<String>,
    /// Boot this guest kernel (vmlinux)
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Show this help
    #[arg(long, action = clap::ArgAction::Help)]
    help: Option<bool>,
    /// What is refused.
    #[command(flatten)]
    pub later: Later,
    /// The image, the program to run in it, and the program's arguments
    #[arg(value_name = "IMAGE [COMMAND] [ARG]", required = true, trailing_var_arg = true)]
    pub words: Vec<String>,
}

/// The container's health check. What is not given, or zero, is as in the image, or docker's default.
#[derive(Debug, Args)]
pub struct HealthFlags {
    /// Check the container's health with this line for its shell
    #[arg(long, value_name = "COMMAND", value_parser = NonEmptyStringValueParser::new())]
    pub health_cmd: Option<String>,
    /// The time between two health checks, like 30s or 1m30s [default: 30s]
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub health_interval: Option<Period>,
    /// How long a health check may take [default: 30s]
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub health_timeout: Option<Period>,
    /// How many health checks in a row must fail for the container to be unhealthy [default: 3]
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true)]
    pub health_retries: Option<u32>,
    /// How long after its start failures do not count [default: 0s]
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub health_start_period: Option<Period>,
    /// The time between two health checks until then [default: 5s]
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub health_start_interval: Option<Period>,
}

impl HealthFlags {
    /// What was asked for.
    pub fn request(self) -> HealthRequest {
        HealthRequest {
            command: self.health_cmd,
            interval: self.health_interval.unwrap_or_default(),
            timeout: self.health_timeout.unwrap_or_default(),
            start_period: self.health_start_period.unwrap_or_default(),
            start_interval: self.health_start_interval.unwrap_or_default(),
            retries: self.health_retries.unwrap_or_default(),
        }
    }
}

/// When `run` gets an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum When {
    /// When the store does not have it.
    Missing,
    /// Each time.
    Always,
    /// Not at all.
    Never,
}
