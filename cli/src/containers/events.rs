//! `events`: what happens to containers, from the VMs that there are and, unless some were named, from those to come.

use std::collections::HashSet;
use std::mem::MaybeUninit;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use api::model::{Event, EventKind};
use http_body_util::BodyExt as _;
use runtime::state::{Found, RunRoot};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::args::Events;
use crate::report;
use crate::show::Format;
use crate::when::rfc3339;

/// How often, and how far apart, the API of a VM that is being started is tried.
const TRIES: u32 = 50;
const BETWEEN_TRIES: Duration = Duration::from_millis(100);

/// Shows events until there can be no more.
pub fn events(args: &Events) -> anyhow::Result<u8> {
    let root = RunRoot::open()?;
    let (sender, mut receiver) = mpsc::channel(16);
    if args.containers.is_empty() && !args.no_follow {
        watch(&root, sender.clone())?;
    }
    let found = match args.containers.as_slice() {
        [] => root.list()?.into_iter().filter(|found| found.alive).collect(),
        names => names.iter().map(|name| root.find(name)).collect::<Result<Vec<_>, _>>()?,
    };
    drop(sender);
    runtime::run::runtime()?.block_on(async {
        let mut seen: HashSet<String> = HashSet::new();
        let mut streams: JoinSet<anyhow::Result<()>> = JoinSet::new();
        for found in found {
            seen.insert(found.record.id.clone());
            streams.spawn(follow_one(found, args.since, !args.no_follow, args.format.clone()));
        }
        loop {
            tokio::select! {
                Some(id) = receiver.recv() => {
                    if let Ok(found) = settled(&root, &id).await
                        && seen.insert(id)
                    {
                        // Of one that has just come, everything is new.
                        streams.spawn(follow_one(found, Some(0), true, args.format.clone()));
                    }
                }
                Some(ended) = streams.join_next() => {
                    ended.context("a stream of events failed")??;
                }
                else => return Ok(0),
            }
        }
    })
}

/// A container whose directory has just come, when its monitor can be asked.
async fn settled(root: &RunRoot, id: &str) -> anyhow::Result<Found> {
    for _ in 0..TRIES {
        if let Ok(found) = root.find(id)
            && found.folder.join(api::client::SOCKET).exists()
        {
            return Ok(found);
        }
        tokio::time::sleep(BETWEEN_TRIES).await;
    }
    anyhow::bail!("container {id} was not started")
}

/// Sends the names of directories that come into the run root, from a thread of its own: it ends with the process.
fn watch(root: &RunRoot, sender: mpsc::Sender<String>) -> anyhow::Result<()> {
    let notify = inotify::init(CreateFlags::CLOEXEC).context("cannot watch for new containers")?;
    inotify::add_watch(&notify, root.path(), WatchFlags::CREATE | WatchFlags::MOVED_TO)
        .context("cannot watch for new containers")?;
    let watch = move || {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&notify, &mut buffer);
        while let Ok(event) = reader.next() {
            let name = event.file_name().and_then(|name| name.to_str().ok()).map(str::to_owned);
            if let Some(name) = name
                && sender.blocking_send(name).is_err()
            {
                return;
            }
        }
    };
    thread::Builder::new().name("watch".into()).spawn(watch).context("cannot start a thread")?;
    Ok(())
}

async fn follow_one(found: Found, since: Option<u64>, follow: bool, format: Format) -> anyhow::Result<()> {
    let client = api::client::Client::new(&found.folder);
    let since = match since {
        Some(since) => since,
        None if !follow => 0,
        // From the next one on.
        None => match last(&client).await {
            Some(last) => last + 1,
            None => return Ok(()),
        },
    };
    let Ok(response) = client.stream(&format!("/v1/events?follow={follow}&since={since}")).await else { return Ok(()) };
    let mut body = response.into_body();
    let mut pending = Vec::new();
    // A stream that breaks off is a VM that was killed.
    while let Some(Ok(frame)) = body.frame().await {
        let Ok(data) = frame.into_data() else { continue };
        pending.extend_from_slice(&data);
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            report::print(&shown(&serde_json::from_slice(&line)?, &found, &format)?)?;
        }
    }
    Ok(())
}

/// The number of the last event so far.
async fn last(client: &api::client::Client) -> Option<u64> {
    let body = client.stream("/v1/events").await.ok()?.into_body().collect().await.ok()?.to_bytes();
    let line = body.rsplit(|byte| *byte == b'\n').find(|line| !line.is_empty());
    line.map_or(Some(0), |line| serde_json::from_slice::<Event>(line).ok().map(|event| event.sequence))
}

fn shown(event: &Event, found: &Found, format: &Format) -> anyhow::Result<String> {
    let mut value = serde_json::to_value(event)?;
    if let Some(object) = value.as_object_mut() {
        object.insert("vm".to_owned(), found.record.id.clone().into());
        object.insert("name".to_owned(), found.record.name.clone().into());
    }
    if *format != Format::Table {
        return match format {
            Format::Json => Ok(format!("{value}\n")),
            fields => fields.show(&[value], |_| String::new()),
        };
    }
    let name = value.get("event").and_then(Value::as_str).unwrap_or_default().to_owned();
    let hidden = ["event", "sequence", "time_ns", "container", "vm", "name"];
    let details = value.as_object().into_iter().flatten().filter(|(key, _)| !hidden.contains(&key.as_str()));
    let details: Vec<String> = details.map(|(key, value)| format!("{key}={value}")).collect();
    let subject = match event.kind {
        EventKind::VmReady | EventKind::VmPaused | EventKind::VmResumed | EventKind::VmStopped => "vm",
        _ => "container",
    };
    let details = if details.is_empty() { String::new() } else { format!(" ({})", details.join(", ")) };
    Ok(format!("{} {subject} {name} {}{details}\n", rfc3339(event.time_ns), found.record.shown_name()))
}
