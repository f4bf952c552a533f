//! What the verbs take that work on containers that were made.

use std::path::PathBuf;

use clap::Args;
use runtime::request::{EnvEntry, PidsLimit, Restart, SignalName};
use runtime::size::{Bytes, Cpus};

use crate::show::Format;

/// Containers.
#[derive(Debug, Args)]
pub struct Names {
    /// Names, ids, or beginnings of ids
    #[arg(required = true, value_name = "CONTAINER")]
    pub containers: Vec<String>,
}

/// Start containers that were made before
#[derive(Debug, Args)]
pub struct Start {
    /// Attach to its output, pass signals on, and end with its exit code
    #[arg(short, long)]
    pub attach: bool,
    /// Attach to its standard input too
    #[arg(short, long)]
    pub interactive: bool,
    /// Which.
    #[command(flatten)]
    pub names: Names,
}

/// List containers
#[derive(Debug, Args)]
pub struct Ps {
    /// Show those that do not run too
    #[arg(short, long)]
    pub all: bool,
    /// Show ids only
    #[arg(short, long)]
    pub quiet: bool,
    /// Show ids and commands whole
    #[arg(long)]
    pub no_trunc: bool,
    /// Show only those that this is true of: id=, name=, status=, ancestor= or label=
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub filter: Vec<String>,
    /// table, json, or names of fields with commas between them
    #[arg(long, default_value = "table")]
    pub format: Format,
}

/// Execute a program in a running container
#[derive(Debug, Args)]
#[command(override_usage = "cofferdam exec [OPTIONS] CONTAINER COMMAND [ARG]...")]
pub struct Exec {
    /// Leave it running
    #[arg(short, long)]
    pub detach: bool,
    /// Keep standard input open
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the program a terminal
    #[arg(short, long)]
    pub tty: bool,
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
    /// Give the program every capability
    #[arg(long)]
    pub privileged: bool,
    /// The container, the program, and its arguments
    #[arg(value_name = "CONTAINER COMMAND [ARG]", required = true, num_args = 2.., trailing_var_arg = true)]
    pub words: Vec<String>,
}

/// Attach to the first process of a running container
#[derive(Debug, Args)]
pub struct Attach {
    /// Leave standard input alone
    #[arg(long)]
    pub no_stdin: bool,
    /// Name, id, or beginning of an id
    pub container: String,
}

/// Show what a container has written
#[derive(Debug, Args)]
pub struct Logs {
    /// Go on until it ends
    #[arg(short, long)]
    pub follow: bool,
    /// Only what was written since then: RFC 3339, seconds since 1970, or an age like 10m
    #[arg(long, value_name = "TIME")]
    pub since: Option<crate::when::Moment>,
    /// Only so many of the last lines, or all
    #[arg(short = 'n', long, value_name = "NUMBER", default_value = "all")]
    pub tail: crate::when::Tail,
    /// Begin each line with its time
    #[arg(short, long)]
    pub timestamps: bool,
    /// Name, id, or beginning of an id
    pub container: String,
}

/// Ask containers to stop, and kill those that do not
#[derive(Debug, Args)]
pub struct Stop {
    /// Seconds until they are killed; -1 for never
    #[arg(short, long, visible_alias = "timeout", default_value = "10", allow_hyphen_values = true)]
    pub time: i64,
    /// The signal that asks, instead of the one that each was made with
    #[arg(short, long)]
    pub signal: Option<SignalName>,
    /// Which.
    #[command(flatten)]
    pub names: Names,
}

/// Send a signal to the first process of containers
#[derive(Debug, Args)]
pub struct Kill {
    /// The signal, by name or number
    #[arg(short, long, default_value = "KILL")]
    pub signal: SignalName,
    /// Which.
    #[command(flatten)]
    pub names: Names,
}

/// Remove containers
#[derive(Debug, Args)]
pub struct Rm {
    /// End those that run; what is not there is no error
    #[arg(short, long)]
    pub force: bool,
    /// Accepted for docker's sake: there are no volumes
    #[arg(short, long)]
    pub volumes: bool,
    /// Which.
    #[command(flatten)]
    pub names: Names,
}

/// Show what containers use
#[derive(Debug, Args)]
pub struct Stats {
    /// Show it once, instead of each second
    #[arg(long)]
    pub no_stream: bool,
    /// table, json, or names of fields with commas between them
    #[arg(long, default_value = "table")]
    pub format: Format,
    /// Names, ids, or beginnings of ids: all that run unless given
    #[arg(value_name = "CONTAINER")]
    pub containers: Vec<String>,
}

/// Show everything that is known of containers, as JSON
#[derive(Debug, Args)]
pub struct Inspect {
    /// json, or names of fields with commas between them
    #[arg(short, long, default_value = "json")]
    pub format: Format,
    /// Which.
    #[command(flatten)]
    pub names: Names,
}

/// Copy files between a container and here
#[derive(Debug, Args)]
pub struct Cp {
    /// Copy what the source leads to where it is a symbolic link
    #[arg(short = 'L', long)]
    pub follow_link: bool,
    /// Accepted for docker's sake: nothing is shown
    #[arg(short, long)]
    pub quiet: bool,
    /// CONTAINER:PATH, a path here, or - for a tar archive on standard input
    pub source: String,
    /// CONTAINER:PATH, a path here, or - for a tar archive on standard output
    pub destination: String,
}

/// Show what happens to containers
#[derive(Debug, Args)]
pub struct Events {
    /// Show what has happened since then too: RFC 3339, seconds since 1970, or an age like 10m
    #[arg(long, value_name = "TIME")]
    pub since: Option<crate::when::Moment>,
    /// Only show what happens until then
    #[arg(long, value_name = "TIME")]
    pub until: Option<crate::when::Moment>,
    /// Begin with the event of this number in each VM that there is, not with the next one
    #[arg(long, value_name = "NUMBER")]
    pub from: Option<u64>,
    /// Only show what has happened already
    #[arg(long)]
    pub no_follow: bool,
    /// table or json
    #[arg(long, default_value = "table")]
    pub format: Format,
    /// Names, ids, or beginnings of ids: all, and those to come, unless given
    #[arg(value_name = "CONTAINER")]
    pub containers: Vec<String>,
}

/// Change the limits of containers
#[derive(Debug, Args)]
pub struct Update {
    /// CPU time, as a number of CPUs, which may be a fraction
    #[arg(long, value_name = "NUMBER")]
    pub cpus: Option<Cpus>,
    /// Memory, with a unit of b, k, m or g
    #[arg(short, long, value_name = "BYTES")]
    pub memory: Option<Bytes>,
    /// The most processes, -1 for no limit
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true)]
    pub pids_limit: Option<PidsLimit>,
    /// When to start it again: no, always, unless-stopped or on-failure[:NUMBER]
    #[arg(long, value_name = "POLICY")]
    pub restart: Option<Restart>,
    /// Which.
    #[command(flatten)]
    pub names: Names,
}

/// Show which ports of a container are published
#[derive(Debug, Args)]
pub struct Port {
    /// Name, id, or beginning of an id
    pub container: String,
}
