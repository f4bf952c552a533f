//! `exec` and `attach`: being the front end of a process of a running container.

use std::env;
use std::io;

use anyhow::Context as _;
use api::client::ClientError;
use api::control::{EXIT_FAILED, EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND};
use api::model::{Container, ContainerState, Process, ProcessCreate, Size, WaitResult};
use api::server::problem::ProblemKind;
use hyper::Method;
use runtime::attach::{self, Attach as Streams, AttachError, Attached, Followed};
use runtime::control::{Control, ControlError};
use runtime::env_file;
use runtime::request::EnvEntry;
use runtime::run::UNHEARD;
use runtime::signals::{self, Signals};
use runtime::state::RunRoot;
use runtime::terminal;

use crate::args::{Attach, Exec};
use crate::report;

/// Executes a program in a running container, and gives its exit code.
pub fn exec(args: Exec) -> anyhow::Result<u8> {
    let mut words = args.words.into_iter();
    let container = words.next().context("no container was given")?;
    let mut entries = Vec::new();
    for file in &args.env_file {
        entries.extend(env_file::read(file)?);
    }
    entries.extend(args.env);
    if args.tty && args.interactive && !args.detach {
        terminal::check()?;
    }
    let window = terminal::window_size();
    let create = ProcessCreate {
        id: None,
        args: words.collect(),
        env: entries.into_iter().filter_map(entry).collect(),
        working_directory: args.workdir,
        user: args.user,
        terminal: args.tty.then_some(Size { rows: window.rows, columns: window.columns }),
        stdin: args.interactive && !args.detach,
        privileged: args.privileged,
    };
    let root = RunRoot::open()?;
    let control = Control::find(&root, &container)?;
    let path = format!("{}/processes", control.living()?);
    let signals = Signals::block().context("cannot block signals")?;
    let done = runtime::run::runtime()?.block_on(async {
        let waiter = signals.wait().map_err(receiving)?;
        if args.detach {
            let asked = control.client.ask::<Process>(Method::POST, &path, Some(&create));
            return Ok(match waiter.unless_cancelled(asked).await.map_err(receiving)? {
                Ok(process) => process.map(|_| Followed::Ended(WaitResult { exit_code: 0, error: None }))?,
                Err(signal) => Followed::Cancelled(signal),
            });
        }
        let asked = control.client.upgrade(&path, Some(&create));
        let streams = match waiter.unless_cancelled(asked).await.map_err(receiving)? {
            Ok(streams) => streams?,
            Err(signal) => return Ok(Followed::Cancelled(signal)),
        };
        let process = streams.location.clone();
        let process = process.ok_or_else(|| ClientError::Answer("it does not name the process".to_owned()))?;
        let usage = Streams { stdin: create.stdin, terminal: args.tty };
        let attached = Attached::begin(streams, process.clone(), usage)?;
        let end = async { Ok::<_, AttachError>(control.client.get(&format!("{process}/wait")).await?) };
        let followed = attached.follow(&control.client, &waiter, end).await?;
        if matches!(followed, Followed::Unheard) {
            // It may have ended by now.
            let kill = api::model::Kill { signal: 9, all: false, stop: false };
            _ = attach::send(&control.client, &process, kill).await;
        }
        Ok(followed)
    });
    match done {
        Ok(followed) => Ok(exit_code(followed, |result: WaitResult| (Some(result.exit_code), result.error))),
        Err(AttachError::Client(error)) => refused(error),
        Err(error) => Err(error.into()),
    }
}

fn receiving(source: io::Error) -> AttachError {
    AttachError::System { step: "receive signals", source }
}

/// Tells what there is to tell of a process that was followed, and gives the exit code. `end` is the process's own, and why
/// it has none.
fn exit_code<T>(followed: Followed<T>, end: impl FnOnce(T) -> (Option<u8>, Option<String>)) -> u8 {
    match followed {
        Followed::Ended(result) => {
            let (code, error) = end(result);
            if let Some(error) = error {
                report::error(&error);
            }
            code.unwrap_or(EXIT_FAILED)
        }
        Followed::Detached => 0,
        Followed::Unheard => UNHEARD,
        Followed::Lost { message, .. } => {
            report::error(&message);
            EXIT_FAILED
        }
        Followed::Cancelled(signal) => signals::exit_code(signal),
    }
}

/// A program that is not there has an exit code of its own.
fn refused(error: ClientError) -> anyhow::Result<u8> {
    let code = match error.kind() {
        Some(ProblemKind::CommandNotFound) => EXIT_NOT_FOUND,
        Some(ProblemKind::CommandNotExecutable) => EXIT_NOT_EXECUTABLE,
        _ => return Err(error.into()),
    };
    report::error(&error.to_string());
    Ok(code)
}

fn entry(entry: EnvEntry) -> Option<String> {
    match entry {
        EnvEntry::Set(name, value) => Some(format!("{name}={value}")),
        EnvEntry::Inherit(name) => env::var(&name).ok().map(|value| format!("{name}={value}")),
    }
}

/// Attaches to a container's first process, and gives its exit code when it ends.
pub fn attach(args: &Attach) -> anyhow::Result<u8> {
    let root = RunRoot::open()?;
    let control = Control::find(&root, &args.container)?;
    let path = control.living()?;
    let signals = Signals::block().context("cannot block signals")?;
    let done = runtime::run::runtime()?.block_on(async {
        let waiter = signals.wait().map_err(receiving)?;
        let asked = async {
            let container = control.client.get::<Container>(&path).await?;
            let streams = control.client.upgrade(&format!("{path}/attach"), runtime::run::NOTHING).await?;
            Ok::<_, ClientError>((container.terminal, streams))
        };
        let (terminal, streams) = match waiter.unless_cancelled(asked).await.map_err(receiving)? {
            Ok(answered) => answered?,
            Err(signal) => return Ok(Followed::Cancelled(signal)),
        };
        let usage = Streams { stdin: !args.no_stdin && control.found.record.container.stdin, terminal };
        let attached = Attached::begin(streams, path.clone(), usage)?;
        attached.resize(&control.client).await;
        let end = async { Ok::<_, AttachError>(control.client.get::<ContainerState>(&format!("{path}/wait")).await?) };
        attached.follow(&control.client, &waiter, end).await
    });
    let followed = done.map_err(|error| match error {
        AttachError::Client(error) => anyhow::Error::from(ControlError::from(error)),
        error => error.into(),
    })?;
    Ok(exit_code(followed, |state: ContainerState| (state.exit_code, state.error)))
}
