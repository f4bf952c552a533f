//! `cofferdam-vmm`: runs one micro-VM, and the container in it, and exits with the container's exit code.
//!
//! ```text
//! cofferdam-vmm --config FILE [--api-fd N] [--lock-fd N]
//! cofferdam-vmm --probe
//! cofferdam-vmm --born --jail
//! ```
//!
//! The process that is started like this is above the monitor, which it has born in its jail and waits for ([`restart`]). A
//! front end starts the monitor itself, as one that was born (`--born`), where it is to be started once.

use std::ffi::OsString;
use std::io::Write as _;
use std::mem::ManuallyDrop;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use api::config::LaunchConfig;
use api::control::EXIT_FAILED;
use api::folder::Folder;
use api::lock::{self, Byte};
use api::server::Outcome;
use api::session::{chain, now};
use jailer::birth::BORN;
use vmm::restart::Above;
use vmm::{inherited, monitor, restart};

const USAGE: &str = "usage: cofferdam-vmm --config FILE [--api-fd N] [--lock-fd N] | --probe | --version";

/// What a monitor is told.
#[derive(Debug, Default)]
struct Arguments {
    config: Option<PathBuf>,
    api: Option<i32>,
    lock: Option<i32>,
    born: bool,
    again: bool,
    parent: Option<i32>,
}

/// What to do.
enum Command {
    Run(Arguments),
    Probe,
    Jail,
    Version,
}

fn main() -> ExitCode {
    let started = now();
    let outcome = match parse(std::env::args_os().skip(1)) {
        Ok(Command::Run(arguments)) if arguments.born => run(arguments, started),
        Ok(Command::Run(arguments)) => above(&arguments),
        Ok(Command::Probe) => probe(),
        Ok(Command::Jail) => jail(),
        Ok(Command::Version) => {
            println!("cofferdam-vmm {}", env!("CARGO_PKG_VERSION"));
            Ok(0)
        }
        Err(error) => Err(error),
    };
    // Not by returning from main: threads may still wait for the outside, and there is nothing to wait for.
    std::process::exit(match outcome {
        Ok(code) => code.into(),
        Err(error) => {
            tell(&format!("{error:#}"));
            EXIT_FAILED.into()
        }
    })
}

/// Says what went wrong. Standard error may be a file on a disk that is full: nobody can be told then.
fn tell(error: &str) {
    let _ = writeln!(std::io::stderr(), "error: {error}");
}

fn parse(mut words: impl Iterator<Item = OsString>) -> Result<Command> {
    let mut arguments = Arguments::default();
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{} needs a value: {USAGE}", word.display()));
        let mut number = || {
            let number = value()?.to_str().and_then(|number| number.parse().ok()).filter(|number| *number > 2);
            number.with_context(|| format!("{} takes the number of an inherited descriptor, 3 or more", word.display()))
        };
        match word.to_str() {
            Some("--probe") => return Ok(Command::Probe),
            Some("--jail") => return Ok(Command::Jail),
            Some("--version") => return Ok(Command::Version),
            Some(BORN) => arguments.born = true,
            Some(restart::AGAIN) => arguments.again = true,
            Some("--config") => arguments.config = Some(PathBuf::from(value()?)),
            Some("--api-fd") => arguments.api = Some(number()?),
            Some("--lock-fd") => arguments.lock = Some(number()?),
            Some(restart::PARENT) => arguments.parent = Some(number()?),
            _ => bail!("unknown argument {word:?}: {USAGE}"),
        }
    }
    arguments.config.as_ref().context(USAGE)?;
    Ok(Command::Run(arguments))
}

impl Arguments {
    fn read_config(&self) -> Result<LaunchConfig> {
        Ok(LaunchConfig::read(self.config.as_deref().context(USAGE)?)?)
    }
}

/// Has a monitor born in its jail, as often as a policy asks for, and gives its exit code.
fn above(arguments: &Arguments) -> Result<u8> {
    let config = arguments.read_config()?;
    let lock = arguments.lock.map(take).transpose()?;
    let inherited =
        arguments.api.into_iter().chain(config.vm.descriptors()).map(take).collect::<Result<Vec<OwnedFd>>>()?;
    let above = Above::new(std::env::args_os().skip(1).collect(), lock, inherited, &config)?;
    let (Some(_), Some(folder)) = (config.restart, config.folder) else {
        return Ok(above.once()?.unwrap_or(EXIT_FAILED));
    };
    let folder = Folder::open(&folder).context("cannot open the folder for the record of its end")?;
    let document = arguments.config.as_deref().context(USAGE)?;
    above.supervise(document, &folder).map_err(|error| {
        monitor::record_failure(&folder, &chain(&error));
        anyhow::Error::from(error)
    })
}

/// Runs a monitor that was born.
fn run(arguments: Arguments, started: u64) -> Result<u8> {
    // First of all: from here on it can be found, whatever becomes of it.
    if let Some(number) = arguments.lock {
        // Its end is this process's: to close any descriptor of the file would be to let go.
        let lock = ManuallyDrop::new(take(number)?);
        lock::take(&*lock, Byte::Monitor).context("cannot lock the state directory")?;
    }
    let mut config = arguments.read_config()?;
    if let Some(container) = config.container.as_mut().filter(|_| arguments.again) {
        container.wait_for_attach = false;
    }
    let listener = arguments.api.map(inherited_listener).transpose()?;
    let parent = arguments.parent.map(take).transpose()?;
    // It leads out of the jail: for what goes wrong before that is entered.
    let outside = config.folder.as_deref().map(Folder::open).transpose();
    let outside = outside.context("cannot open the folder for the record of its end")?;
    let inside = monitor::enter(&config, parent).inspect_err(|error| record(outside.as_ref(), error))?;
    drop(outside);
    let folder = inside.folder.clone();
    let Outcome { exit_code, error } =
        monitor::run(config, inside, listener, started).inspect_err(|error| record(folder.as_ref(), error))?;
    if let Some(error) = error {
        tell(&error);
    }
    Ok(exit_code)
}

fn record(folder: Option<&Folder>, error: &monitor::MonitorError) {
    if let Some(folder) = folder {
        monitor::record_failure(folder, &chain(error));
    }
}

fn take(number: i32) -> Result<OwnedFd> {
    inherited::take(number).with_context(|| format!("no descriptor {number} was inherited"))
}

fn probe() -> Result<u8> {
    let probe = vmm::probe::probe()?;
    println!("{}", serde_json::to_string(&probe)?);
    Ok(0)
}

/// Enters a jail that holds nothing, for `cofferdam doctor` to see whether that can be done. The process was born for it.
fn jail() -> Result<u8> {
    let (user, limits) = (jailer::identity::user("doctor"), jailer::Limits::new(1, 0, 0));
    jailer::Jail { folder: None, user, limits, tied: false, trees: &[] }.enter()?;
    Ok(0)
}

/// Takes the listening socket that whoever started this process left open under this number.
fn inherited_listener(number: i32) -> Result<UnixListener> {
    let socket = take(number)?;
    if rustix::net::sockopt::socket_acceptconn(&socket) != Ok(true) {
        bail!("descriptor {number} is not a listening socket");
    }
    Ok(UnixListener::from(socket))
}
