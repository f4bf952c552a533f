//! The command line. Flags have docker's names and mean what they mean there.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use runtime::capability::Capability;
use runtime::request::{EnvEntry, PidsLimit, SecurityOption, Tmpfs, Ulimit};
use runtime::size::{Bytes, Cpus};

use crate::later::Later;

/// Run each container in a micro-VM of its own
#[derive(Debug, Parser)]
#[command(name = "cofferdam", version, propagate_version = false, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// What can be done. The flags of a verb are only built when it is the one.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub enum Verb {
    /// Run a program of an image in a new container
    Run(Box<Run>),
    /// Get an image from a registry, a directory or an archive
    Pull(Pull),
    /// List the images in the store
    Images(Images),
    /// Remove images
    Rmi(Rmi),
    /// Remove what no image in the store and no running container needs
    Prune(Prune),
    /// Check whether this machine can run containers
    Doctor(Doctor),
    /// Show the version
    Version,
}

/// Run a program of an image in a new container
#[derive(Debug, Args)]
#[command(disable_help_flag = true, override_usage = "cofferdam run [OPTIONS] IMAGE [COMMAND] [ARG]...")]
pub struct Run {
    /// Keep standard input open
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the container a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Remove the container when it ends (containers are always removed then)
    #[arg(long)]
    pub rm: bool,
    /// A name for the container, unique among running ones
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

/// Get an image from a registry, a directory or an archive
#[derive(Debug, Args)]
pub struct Pull {
    /// Show the image's id only
    #[arg(short, long)]
    pub quiet: bool,
    /// NAME[:TAG|@DIGEST], oci:DIR[:TAG] or docker-archive:FILE[:NAME]
    pub image: String,
}

/// List the images in the store
#[derive(Debug, Args)]
pub struct Images {
    /// Show ids only
    #[arg(short, long)]
    pub quiet: bool,
    /// How to show them
    #[arg(long, default_value = "table")]
    pub format: Format,
}

/// A form of output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// For programs: one array of objects.
    Json,
}

/// Remove images
#[derive(Debug, Args)]
pub struct Rmi {
    /// Remove the name even if a running container uses the image
    #[arg(short, long)]
    pub force: bool,
    /// Names or ids
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<String>,
}

/// Remove what no image in the store and no running container needs
#[derive(Debug, Args)]
pub struct Prune {
    /// Accepted for docker's sake: nothing is asked
    #[arg(short, long)]
    pub force: bool,
}

/// Check whether this machine can run containers
#[derive(Debug, Args)]
pub struct Doctor {
    /// How to show the checks
    #[arg(long, default_value = "table")]
    pub format: Format,
    /// Make only these checks
    #[arg(value_name = "CHECK", value_parser = clap::builder::PossibleValuesParser::new(runtime::doctor::names()))]
    pub checks: Vec<String>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn run(words: &str) -> Run {
        let words = ["cofferdam", "run"].into_iter().chain(words.split_whitespace());
        match Cli::try_parse_from(words).unwrap().verb {
            Verb::Run(run) => *run,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        let mut command = Cli::command();
        command.build();
        command.debug_assert();
    }

    #[test]
    fn everything_after_the_image_is_the_containers() {
        let args = run("-it --rm busybox sh -c -x --rm -v --help -- -e");
        assert!(args.interactive && args.tty && args.rm);
        assert_eq!(args.words, ["busybox", "sh", "-c", "-x", "--rm", "-v", "--help", "--", "-e"]);
        assert!(args.later.refuse(None).is_ok());
    }

    #[test]
    fn short_flags_mean_what_they_mean_in_docker() {
        let args = run("-h box -m 1g -w /w -u 1:2 -e A=1 -e B --cpus=1.5 img");
        assert_eq!((args.hostname.as_deref(), args.memory), (Some("box"), Some(Bytes(1 << 30))));
        assert_eq!((args.workdir.as_deref(), args.user.as_deref(), args.env.len()), (Some("/w"), Some("1:2"), 2));
        assert_eq!(args.words, ["img"]);
    }

    #[test]
    fn what_does_not_work_yet_is_refused_by_name() {
        for (words, flag) in [
            ("-v /a:/b img", "--volume"),
            ("--mount type=bind img", "--mount"),
            ("-p 80:80 img", "--publish"),
            ("-P img", "--publish-all"),
            ("-d img", "--detach"),
            ("--init img", "--init"),
            ("--privileged img", "--privileged"),
            ("--net host img", "--network host"),
        ] {
            let args = run(words);
            let error = args.later.refuse(args.network.as_deref()).unwrap_err().to_string();
            assert!(error.contains(flag), "{words}: {error}");
        }
        assert!(run("--network none img").later.refuse(Some("none")).is_ok());
    }

    #[test]
    fn an_image_is_needed_and_may_be_all() {
        assert!(Cli::try_parse_from(["cofferdam", "run"]).is_err());
        assert!(Cli::try_parse_from(["cofferdam", "run", "-i"]).is_err());
        assert_eq!(run("img").words, ["img"]);
    }
}
