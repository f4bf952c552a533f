//! `cofferdam-vmm`: runs one micro-VM, and the container in it, and exits with the container's exit code.
//!
//! ```text
//! cofferdam-vmm --config FILE [--api-fd N]
//! cofferdam-vmm --probe
//! ```

use std::ffi::OsString;
use std::io::Write as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use api::config::LaunchConfig;
use api::control::EXIT_FAILED;
use api::lock::{self, Byte};
use api::server::Outcome;
use api::session::{chain, now};
use vmm::inherited;
use vmm::{monitor, restart};

const USAGE: &str = "usage: cofferdam-vmm --config FILE [--api-fd N] | --probe | --version";

/// What is done first in a state directory.
const LOCKING: &str = "cannot lock the state directory";

/// What to do.
enum Command {
    Run { config: PathBuf, api: Option<i32>, supervised: bool },
    Probe,
    Version,
}

fn main() -> ExitCode {
    let started = now();
    let outcome = match parse(std::env::args_os().skip(1)) {
        Ok(Command::Run { config, api, supervised }) => run(&config, api, supervised, started),
        Ok(Command::Probe) => probe(),
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

fn parse(mut arguments: impl Iterator<Item = OsString>) -> Result<Command> {
    let (mut config, mut api, mut supervised) = (None, None, false);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{} needs a value: {USAGE}", argument.display()));
        match argument.to_str() {
            Some("--probe") => return Ok(Command::Probe),
            Some(restart::SUPERVISED) => supervised = true,
            Some("--version") => return Ok(Command::Version),
            Some("--config") => config = Some(PathBuf::from(value()?)),
            Some("--api-fd") => {
                let number = value()?.to_str().and_then(|number| number.parse().ok()).filter(|number| *number > 2);
                api = Some(number.context("--api-fd takes the number of an inherited socket, 3 or more")?);
            }
            _ => bail!("unknown argument {argument:?}: {USAGE}"),
        }
    }
    Ok(Command::Run { config: config.context(USAGE)?, api, supervised })
}

fn run(document: &Path, api: Option<i32>, supervised: bool, started: u64) -> Result<u8> {
    jailer::process()?;
    let config = LaunchConfig::read(document)?;
    if let (Some(_), Some(folder), false) = (config.restart, &config.folder, supervised) {
        lock::take(folder, Byte::Supervisor).context(LOCKING)?;
        let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
        return restart::supervise(document, folder, &arguments).map_err(|error| {
            monitor::record_failure(folder, &format!("cannot start the monitor again: {error}"));
            anyhow::Error::from(error).context("cannot start the monitor again")
        });
    }
    if let Some(folder) = &config.folder {
        // First of all: from here on it can be found, whatever becomes of it.
        lock::take(folder, Byte::Monitor).context(LOCKING)?;
    }
    let listener = api.map(inherited_listener).transpose()?;
    let folder = config.folder.clone();
    match monitor::run(config, listener, started) {
        Ok(Outcome { exit_code, error }) => {
            if let Some(error) = error {
                tell(&error);
            }
            Ok(exit_code)
        }
        Err(error) => {
            if let Some(folder) = folder {
                monitor::record_failure(&folder, &chain(&error));
            }
            Err(error.into())
        }
    }
}

fn probe() -> Result<u8> {
    let probe = vmm::probe::probe()?;
    println!("{}", serde_json::to_string(&probe)?);
    Ok(0)
}

/// Takes the listening socket that whoever started this process left open under this number.
fn inherited_listener(number: i32) -> Result<UnixListener> {
    let socket = inherited::take(number).with_context(|| format!("no descriptor {number} was inherited"))?;
    if rustix::net::sockopt::socket_acceptconn(&socket) != Ok(true) {
        bail!("descriptor {number} is not a listening socket");
    }
    Ok(UnixListener::from(socket))
}
