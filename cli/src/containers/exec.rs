//! `exec` and `attach`: being the front end of a process of a running container.

use std::env;

use anyhow::{Context as _, bail};
use api::client::ClientError;
use api::control::{EXIT_FAILED, EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND};
use api::model::{Container, ContainerState, Process, ProcessCreate, Size, WaitResult};
use api::server::problem::ProblemKind;
use hyper::Method;
use runtime::attach::{Attach as Streams, AttachError, Attached, Followed};
use runtime::control::{Control, ControlError};
use runtime::env_file;
use runtime::request::EnvEntry;
use runtime::run::UNHEARD;
use runtime::signals::Signals;
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
        if args.detach {
            control.client.ask::<Process>(Method::POST, &path, Some(&create)).await?;
            return Ok(Followed::Ended(WaitResult { exit_code: 0, error: None }));
        }
        let waiter = signals.wait().map_err(|source| AttachError::System { step: "receive signals", source })?;
        let streams = control.client.upgrade(&path, Some(&create)).await?;
        let process = streams.location.clone();
        let process = process.ok_or_else(|| ClientError::Answer("it does not name the process".to_owned()))?;
        let usage = Streams { stdin: create.stdin, terminal: args.tty };
        let attached = Attached::begin(streams, process.clone(), usage)?;
        let end = async { Ok::<_, AttachError>(control.client.get(&format!("{process}/wait")).await?) };
        let followed = attached.follow(&control.client, &waiter, end).await?;
        if matches!(followed, Followed::Unheard) {
            // It may have ended by now.
            let kill = api::model::Kill { signal: 9, all: false, stop: false };
            _ = control.client.act(Method::POST, &format!("{process}/kill"), Some(&kill)).await;
        }
        Ok(followed)
    });
    match done {
        Ok(Followed::Ended(result)) => {
            if let Some(error) = result.error {
                report::error(&error);
            }
            Ok(result.exit_code)
        }
        Ok(Followed::Detached) => Ok(0),
        Ok(Followed::Unheard) => Ok(UNHEARD),
        Ok(Followed::Cancelled(signal)) => Ok(u8::try_from(128 + signal).unwrap_or(EXIT_FAILED)),
        Err(AttachError::Client(error)) => refused(error),
        Err(error) => Err(error.into()),
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
        let container = control.client.get::<Container>(&path).await?;
        let usage =
            Streams { stdin: !args.no_stdin && control.found.record.container.stdin, terminal: container.terminal };
        let waiter = signals.wait().map_err(|source| AttachError::System { step: "receive signals", source })?;
        let streams = control.client.upgrade(&format!("{path}/attach"), runtime::run::NOTHING).await?;
        let attached = Attached::begin(streams, path.clone(), usage)?;
        attached.resize(&control.client).await;
        let end = async { Ok::<_, AttachError>(control.client.get::<ContainerState>(&format!("{path}/wait")).await?) };
        attached.follow(&control.client, &waiter, end).await
    });
    match done.map_err(|error| match error {
        AttachError::Client(error) => anyhow::Error::from(ControlError::from(error)),
        error => error.into(),
    })? {
        Followed::Ended(state) => match (state.exit_code, state.error) {
            (Some(code), None) => Ok(code),
            (_, error) => bail!(error.unwrap_or_else(|| "the container has ended".to_owned())),
        },
        Followed::Detached => Ok(0),
        Followed::Unheard => Ok(UNHEARD),
        Followed::Cancelled(signal) => Ok(u8::try_from(128 + signal).unwrap_or(EXIT_FAILED)),
    }
}
