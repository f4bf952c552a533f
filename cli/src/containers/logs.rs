//! `logs`: what a container has written, from its monitor while there is one, else from the files that it left.

use std::io;

use api::client::ClientError;
use api::folder::Folder;
use api::log::{LogReader, Selection};
use runtime::attach;
use runtime::control::{Control, ControlError};
use runtime::state::RunRoot;

use crate::args::Logs;

/// Shows a container's log.
pub fn logs(args: &Logs) -> anyhow::Result<u8> {
    let root = RunRoot::open()?;
    let control = Control::find(&root, &args.container)?;
    let since_ns = args.since.map_or(0, |moment| moment.0);
    let tail = args.tail.0;
    // Nobody answers for one that waits to be started again, but what was written is in the files.
    if control.found.alive && (args.follow || !control.is_restarting()) {
        let mut path = format!(
            "{}/logs?follow={}&timestamps={}&since_ns={since_ns}",
            control.path(),
            args.follow,
            args.timestamps
        );
        if let Some(tail) = tail {
            path.push_str(&format!("&tail={tail}"));
        }
        let copied = runtime::run::runtime()?.block_on(async {
            let body = control.client.stream(&path).await?.into_body();
            Ok::<_, ClientError>(attach::copy_body(body).await)
        });
        match copied {
            Ok(copied) => return finish(copied),
            // It has ended meanwhile: everything is in the files.
            Err(ClientError::Connect { .. } | ClientError::Gone(_)) => {}
            Err(error) => return Err(ControlError::from(error).into()),
        }
    }
    finish(from_files(&control, Selection { since_ns, tail }, args.timestamps))
}

fn from_files(control: &Control<'_>, selection: Selection, timestamps: bool) -> io::Result<()> {
    let folder = match Folder::open(&control.found.monitor_folder()) {
        // It was never started.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        folder => folder?,
    };
    let mut reader = LogReader::open(&folder, selection)?;
    while let Some(entry) = reader.next()? {
        attach::write_all(entry.stream, &entry.shown(timestamps))?;
    }
    Ok(())
}

/// A reader that has gone away, as in `| head`, is no error.
fn finish(copied: io::Result<()>) -> anyhow::Result<u8> {
    match copied {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(0),
        Err(error) => Err(anyhow::Error::from(error).context("cannot show the log")),
        Ok(()) => Ok(0),
    }
}
