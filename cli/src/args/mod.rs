//! The command line. Flags have docker's names and mean what they mean there.

mod containers;
mod run;

use clap::{Args, Parser, Subcommand};

pub use self::containers::{
    Attach, Cp, Events, Exec, Inspect, Kill, Logs, Names, Port, Ps, Rm, Start, Stats, Stop, Update,
};
pub use self::run::{ContainerFlags, Create, Run, When};
use crate::show::Format;

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
    /// Make a container of an image, to be started later
    Create(Box<Create>),
    /// Start containers that were made before
    Start(Start),
    /// List containers
    Ps(Ps),
    /// Execute a program in a running container
    Exec(Exec),
    /// Attach to the first process of a running container
    Attach(Attach),
    /// Show what a container has written
    Logs(Logs),
    /// Ask containers to stop, and kill those that do not
    Stop(Stop),
    /// Send a signal to the first process of containers
    Kill(Kill),
    /// Remove containers
    Rm(Rm),
    /// Wait until containers have ended, and show their exit codes
    Wait(Names),
    /// Stop all processes of containers where they are
    Pause(Names),
    /// Let all processes of paused containers go on
    Unpause(Names),
    /// Show what containers use
    Stats(Stats),
    /// Show the processes in a container
    Top(Names),
    /// Show everything that is known of containers, as JSON
    Inspect(Inspect),
    /// Copy files between a container and here
    Cp(Cp),
    /// Show what happens to containers
    Events(Events),
    /// Change the limits of containers
    Update(Update),
    /// Show which ports of a container are published
    Port(Port),
    /// Get an image from a registry, a directory or an archive
    Pull(Pull),
    /// List the images in the store
    Images(Images),
    /// Remove images
    Rmi(Rmi),
    /// Remove containers that have ended, and what no image in the store and no running container needs
    Prune(Prune),
    /// Check whether this machine can run containers
    Doctor(Doctor),
    /// Write the completions of a shell to standard output
    Completions(Completions),
    /// Write the manual pages into a directory
    Man(Man),
    /// Show the version
    Version,
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
    /// table, json, or names of fields with commas between them
    #[arg(long, default_value = "table")]
    pub format: Format,
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

/// Remove containers that have ended, and what no image in the store and no running container needs
#[derive(Debug, Args)]
pub struct Prune {
    /// Accepted for docker's sake: nothing is asked
    #[arg(short, long)]
    pub force: bool,
}

/// Check whether this machine can run containers
#[derive(Debug, Args)]
pub struct Doctor {
    /// table or json
    #[arg(long, default_value = "table")]
    pub format: Format,
    /// Make only these checks
    #[arg(value_name = "CHECK", value_parser = clap::builder::PossibleValuesParser::new(runtime::doctor::names()))]
    pub checks: Vec<String>,
}

/// Write the completions of a shell to standard output
#[derive(Debug, Args)]
pub struct Completions {
    /// The shell
    pub shell: clap_complete::Shell,
}

/// Write the manual pages into a directory
#[derive(Debug, Args)]
pub struct Man {
    /// The directory
    pub directory: std::path::PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use runtime::size::Bytes;

    use super::*;

    fn run(words: &str) -> ContainerFlags {
        let words = ["cofferdam", "run"].into_iter().chain(words.split_whitespace());
        match Cli::try_parse_from(words).unwrap().verb {
            Verb::Run(run) => run.container,
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
    fn health_flags_are_read_or_refused() {
        let health = run("--health-cmd true --health-interval 1m30s --health-retries=2 img").health.request();
        assert_eq!((health.command.as_deref(), health.interval.0, health.retries), (Some("true"), 90_000_000_000, 2));
        assert_eq!(run("img").health.request(), runtime::health::HealthRequest::default());
        for (words, part) in [
            ("--health-interval 5 img", "\"5\" is not a time"),
            ("--health-timeout -5s img", "\"-5s\" is not a time"),
            ("--health-retries -1 img", "'-1'"),
            ("--health-cmd= img", "--health-cmd"),
            ("--no-healthcheck --health-interval 5s img", "cannot be used with"),
        ] {
            let words = ["cofferdam", "run"].into_iter().chain(words.split_whitespace());
            let error = Cli::try_parse_from(words).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        assert!(run("--no-healthcheck img").no_healthcheck);
    }

    #[test]
    fn what_does_not_work_yet_is_refused_by_name() {
        for (words, flag) in [
            ("-v /a:/b img", "--volume"),
            ("--mount type=bind img", "--mount"),
            ("-p 80:80 img", "--publish"),
            ("-P img", "--publish-all"),
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
