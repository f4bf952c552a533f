//! `cofferdam-vmm`: runs one micro-VM, and the container in it, and exits with the container's exit code.
//!
//! ```text
//! cofferdam-vmm --config FILE [--control-fd N]
//! cofferdam-vmm --probe
//! ```

use std::ffi::OsString;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use api::config::LaunchConfig;
use api::control::{EXIT_FAILED, Failure, FromMonitor};
use api::session::{now, tell};
use vmm::inherited;
use vmm::monitor::{self, Report};

const USAGE: &str = "usage: cofferdam-vmm --config FILE [--control-fd N] | --probe | --version";

/// What to do.
enum Command {
    Run { config: PathBuf, control: Option<i32> },
    Probe,
    Version,
}

fn main() -> ExitCode {
    let started = now();
    let outcome = match parse(std::env::args_os().skip(1)) {
        Ok(Command::Run { config, control }) => run(config, control, started),
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
            eprintln!("error: {error:#}");
            EXIT_FAILED.into()
        }
    })
}

fn parse(mut arguments: impl Iterator<Item = OsString>) -> Result<Command> {
    let (mut config, mut control) = (None, None);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{} needs a value: {USAGE}", argument.display()));
        match argument.to_str() {
            Some("--probe") => return Ok(Command::Probe),
            Some("--version") => return Ok(Command::Version),
            Some("--config") => config = Some(PathBuf::from(value()?)),
            Some("--control-fd") => {
                let number = value()?.to_str().and_then(|number| number.parse().ok()).filter(|number| *number > 2);
                control = Some(number.context("--control-fd takes the number of an inherited socket, 3 or more")?);
            }
            _ => bail!("unknown argument {argument:?}: {USAGE}"),
        }
    }
    Ok(Command::Run { config: config.context(USAGE)?, control })
}

fn run(config: PathBuf, control: Option<i32>, started: u64) -> Result<u8> {
    let front_end = control.map(inherited_socket).transpose()?;
    match launch(config, front_end.as_ref(), started) {
        Ok(Report::Exited(code)) => Ok(code),
        Ok(Report::Abandoned) => Ok(EXIT_FAILED),
        Ok(Report::Failed(failure)) if front_end.is_some() => Ok(failure.exit_code),
        Ok(Report::Failed(failure)) => {
            eprintln!("error: {}", failure.message);
            Ok(failure.exit_code)
        }
        Err(error) => match &front_end {
            Some(front_end) => {
                let failure = Failure { exit_code: EXIT_FAILED, message: format!("{error:#}"), console: None };
                tell(front_end, &FromMonitor::Failed(failure));
                Ok(EXIT_FAILED)
            }
            None => Err(error),
        },
    }
}

fn launch(config: PathBuf, front_end: Option<&UnixStream>, started: u64) -> Result<Report> {
    jailer::process()?;
    let config = LaunchConfig::read(&config)?;
    if front_end.is_some() {
        ignore_terminal_signals();
    }
    let front_end = front_end.map(UnixStream::try_clone).transpose().context("cannot share the control socket")?;
    Ok(monitor::run(config, front_end, started)?)
}

fn probe() -> Result<u8> {
    let probe = vmm::probe::probe()?;
    println!("{}", serde_json::to_string(&probe)?);
    Ok(0)
}

/// Takes the socket that the front end left open under this number.
fn inherited_socket(number: i32) -> Result<UnixStream> {
    let socket = inherited::take(number).with_context(|| format!("no descriptor {number} was inherited"))?;
    if rustix::net::sockopt::socket_type(&socket) != Ok(rustix::net::SocketType::STREAM) {
        bail!("descriptor {number} is not a stream socket");
    }
    Ok(UnixStream::from(socket))
}

/// The keys of a terminal signal the whole foreground process group; the container gets them from the front end.
#[expect(unsafe_code, reason = "no safe wrapper ignores a signal")]
fn ignore_terminal_signals() {
    for signal in [libc::SIGINT, libc::SIGQUIT, libc::SIGHUP] {
        // SAFETY: ignoring a signal runs no code of ours.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}
