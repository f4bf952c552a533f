//! `events`: what happens to containers, from the VMs that there are and, unless some were named, from those to come.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use api::client::{Client, ClientError};
use api::model::{Event, EventKind};
use http_body_util::BodyExt as _;
use runtime::state::{Found, RunRoot};
use runtime::timeline::wall_clock_ns;
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::lines::Lines;
use super::watch::{Change, changes};
use crate::args::Events;
use crate::report;
use crate::show::{Format, escaped};
use crate::when::rfc3339;

/// How long a VM may take to tell what has happened already.
const DEADLINE: Duration = Duration::from_secs(5);
/// Lines that wait to be shown.
const QUEUE: usize = 16;

/// Which events are shown, and how.
#[derive(Debug)]
struct Wanted {
    /// The number of the first one in a VM that is there already; without it, the next one.
    from: Option<u64>,
    since_ns: u64,
    until_ns: u64,
    follow: bool,
    format: Format,
}

/// Shows events until there can be no more.
pub fn events(args: &Events) -> anyhow::Result<u8> {
    let now = wall_clock_ns();
    let until_ns = args.until.map_or(u64::MAX, |until| until.0);
    let follow = !args.no_follow && until_ns > now;
    let all_there_are = (!follow || args.since.is_some()).then_some(0);
    let wanted = Wanted {
        from: args.from.or(all_there_are),
        since_ns: args.since.map_or(0, |since| since.0),
        until_ns,
        follow,
        format: args.format.clone(),
    };
    let root = RunRoot::open()?;
    // Watched before it is looked at, so that nobody comes in between.
    let mut changes = match follow && args.containers.is_empty() {
        true => Some(changes(root.path()).context("cannot watch for new containers")?),
        false => None,
    };
    let found = match args.containers.as_slice() {
        [] => root.list()?.into_iter().filter(|found| found.alive).collect(),
        names => names.iter().map(|name| root.find(name)).collect::<Result<Vec<_>, _>>()?,
    };
    runtime::run::runtime()?.block_on(async {
        let (sender, mut lines) = mpsc::channel(QUEUE);
        let mut followers = Followers {
            wanted: Arc::new(wanted),
            lines: Some(sender),
            tasks: JoinSet::new(),
            served: HashMap::new(),
            watching: changes.is_some(),
            code: 0,
        };
        for found in found {
            followers.add(found, followers.wanted.from);
        }
        if changes.is_none() {
            followers.lines = None;
        }
        let over = sleep(if follow { Duration::from_nanos(until_ns - now) } else { Duration::MAX });
        tokio::pin!(over);
        let mut gone = report::reader_gone().context("cannot start a thread")?;
        loop {
            tokio::select! {
                biased;
                line = lines.recv() => match line {
                    Some(line) if report::print_part(&line)?.is_break() => return Ok(0),
                    Some(_) => {}
                    None => return followers.end().await,
                },
                Some(ended) = followers.tasks.join_next(), if !followers.tasks.is_empty() => {
                    followers.leave(ended.context("a stream of events failed")?);
                }
                Some(change) = next(&mut changes) => {
                    followers.hear(&root, change.context("cannot watch for new containers")?);
                }
                _ = &mut gone => return Ok(0),
                () = &mut over => return Ok(followers.code),
            }
        }
    })
}

async fn next<T>(changes: &mut Option<mpsc::Receiver<T>>) -> Option<T> {
    changes.as_mut()?.recv().await
}

/// Everybody who is followed.
struct Followers {
    wanted: Arc<Wanted>,
    /// Where what is to be shown goes; nothing once nobody can come any more.
    lines: Option<mpsc::Sender<String>>,
    tasks: JoinSet<Ended>,
    /// By id, where one is told that its container is started anew.
    served: HashMap<String, watch::Sender<()>>,
    watching: bool,
    /// The exit code.
    code: u8,
}

/// Whose events are not told any more, by id and name, and why.
struct Ended {
    id: String,
    shown_name: String,
    result: anyhow::Result<()>,
}

impl Followers {
    fn add(&mut self, found: Found, from: Option<u64>) {
        let Some(lines) = self.lines.clone() else { return };
        let (sender, served) = watch::channel(());
        if self.watching {
            self.served.insert(found.record.id.clone(), sender);
        }
        let subject = Subject {
            client: Client::new(&found.folder),
            shown_name: found.record.shown_name().to_owned(),
            id: found.record.id,
            name: found.record.name,
            is_restarted: found.record.restart.is_some(),
        };
        let follower = Follower { subject, wanted: Arc::clone(&self.wanted), lines, from, told_ns: 0 };
        let served = self.watching.then_some(served);
        self.tasks.spawn(async move {
            let (id, shown_name) = (follower.subject.id.clone(), follower.subject.shown_name.clone());
            Ended { id, shown_name, result: follower.run(served).await }
        });
    }

    /// Lets one go. What a monitor says that makes no sense is no reason not to hear the others.
    fn leave(&mut self, ended: Ended) {
        if let Err(error) = ended.result {
            let error = error.context(format!("the events of container {} are not told any more", ended.shown_name));
            report::error(&format!("{error:#}"));
            self.code = super::FAILED;
            // It is heard again when it is started again.
            self.served.remove(&ended.id);
        }
    }

    fn hear(&mut self, root: &RunRoot, change: Change) {
        match change {
            Change::Served(id) => {
                if let Some(served) = self.served.get(&id) {
                    served.send_replace(());
                } else if let Ok(found) = root.find(&id) {
                    // Of one that has just come, everything is new.
                    self.add(found, Some(0));
                }
            }
            Change::Gone(id) => {
                self.served.remove(&id);
            }
        }
    }

    async fn end(mut self) -> anyhow::Result<u8> {
        while let Some(ended) = self.tasks.join_next().await {
            self.leave(ended.context("a stream of events failed")?);
        }
        Ok(self.code)
    }
}

/// A container whose events are told.
struct Subject {
    client: Client,
    id: String,
    name: Option<String>,
    shown_name: String,
    /// Whether a policy starts it again.
    is_restarted: bool,
}

/// Who tells of one container.
struct Follower {
    subject: Subject,
    wanted: Arc<Wanted>,
    lines: mpsc::Sender<String>,
    /// The number of the first wanted event of the VM that is there; without it, the next one.
    from: Option<u64>,
    /// The time of the last event that was told or passed over.
    told_ns: u64,
}

/// Whose events were told.
#[derive(Debug, PartialEq, Eq)]
enum Told {
    /// Nobody's: no VM answers.
    Nobody,
    /// Those of a VM, to its end.
    Vm,
}

impl Follower {
    /// Tells of one VM after another; `served` wakes it when another one is started, and ends it when none can be.
    async fn run(mut self, mut served: Option<watch::Receiver<()>>) -> anyhow::Result<()> {
        loop {
            let told = if served.is_some() { self.new_vm().await? } else { self.vm().await? };
            // Between two VMs its supervisor holds the socket: who connects is answered by the next one.
            if told == Told::Vm && self.subject.is_restarted && self.wanted.follow {
                continue;
            }
            let Some(served) = &mut served else { return Ok(()) };
            if served.changed().await.is_err() {
                return Ok(());
            }
        }
    }

    /// As [`Follower::vm`], when the socket may have been bound just now: it refuses until somebody listens to it, a moment
    /// later, and nothing tells of that.
    async fn new_vm(&mut self) -> anyhow::Result<Told> {
        for wait_ms in [1, 2, 4, 8, 16, 32, 64] {
            if self.vm().await? == Told::Vm {
                return Ok(Told::Vm);
            }
            sleep(Duration::from_millis(wait_ms)).await;
        }
        self.vm().await
    }

    /// Tells what happens to the VM that answers now.
    async fn vm(&mut self) -> anyhow::Result<Told> {
        let told_ns = self.told_ns;
        let from = match self.from {
            Some(from) => from,
            None => match last(&self.subject.client).await {
                Ok(last) => {
                    self.told_ns = last.as_ref().map_or(0, |last| last.time_ns);
                    last.map_or(0, |last| last.sequence + 1)
                }
                Err(_) => 0,
            },
        };
        // Of the next VM, everything is new. What answers first may still be this one, whose events were told.
        self.from = Some(0);
        let path = format!("/v1/events?follow={}&since={from}", self.wanted.follow);
        let mut body = match self.in_time(self.subject.client.stream(&path)).await? {
            Ok(response) => response.into_body(),
            Err(ClientError::Gone(_)) => return Ok(Told::Vm),
            Err(_) => return Ok(Told::Nobody),
        };
        let mut lines = Lines::default();
        // A stream that breaks off is a VM that was killed.
        while let Some(Ok(frame)) = self.in_time(body.frame()).await? {
            let Ok(data) = frame.into_data() else { continue };
            lines.push(&data)?;
            while let Some(line) = lines.take() {
                let event: Event = serde_json::from_slice(&line)?;
                if event.time_ns > told_ns && self.tell(&event).await?.is_break() {
                    return Ok(Told::Vm);
                }
            }
        }
        Ok(Told::Vm)
    }

    /// What has happened already, a VM can tell at once; what is to come, it cannot.
    async fn in_time<T>(&self, what: impl Future<Output = T>) -> anyhow::Result<T> {
        if self.wanted.follow {
            return Ok(what.await);
        }
        let answer = timeout(DEADLINE, what).await;
        answer.context("its monitor does not answer")
    }

    /// Tells of an event if it is wanted.
    async fn tell(&mut self, event: &Event) -> anyhow::Result<ControlFlow<()>> {
        self.told_ns = event.time_ns;
        if !(self.wanted.since_ns..=self.wanted.until_ns).contains(&event.time_ns) {
            return Ok(ControlFlow::Continue(()));
        }
        let line = shown(event, &self.subject, &self.wanted.format)?;
        let heard = self.lines.send(line).await.is_ok();
        Ok(if heard { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    }
}

/// The last event so far.
async fn last(client: &Client) -> anyhow::Result<Option<Event>> {
    let mut body = client.stream("/v1/events").await?.into_body();
    let (mut lines, mut last) = (Lines::default(), None);
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        lines.push(&data)?;
        last = std::iter::from_fn(|| lines.take()).last().or(last);
    }
    Ok(last.as_deref().map(serde_json::from_slice).transpose()?)
}

fn shown(event: &Event, subject: &Subject, format: &Format) -> anyhow::Result<String> {
    let mut value = serde_json::to_value(event)?;
    if let Some(object) = value.as_object_mut() {
        object.insert("vm".to_owned(), subject.id.clone().into());
        object.insert("name".to_owned(), subject.name.clone().into());
    }
    if *format != Format::Table {
        return match format {
            Format::Json => Ok(format!("{}\n", escaped(&value.to_string()))),
            fields => fields.show(&[value], |_| String::new()),
        };
    }
    let name = value.get("event").and_then(Value::as_str).unwrap_or_default().to_owned();
    let hidden = ["event", "sequence", "time_ns", "container", "vm", "name"];
    let details = value.as_object().into_iter().flatten().filter(|(key, _)| !hidden.contains(&key.as_str()));
    let details: Vec<String> = details.map(|(key, value)| format!("{key}={}", escaped(&value.to_string()))).collect();
    let kind = match event.kind {
        EventKind::VmReady | EventKind::VmPaused | EventKind::VmResumed | EventKind::VmStopped => "vm",
        _ => "container",
    };
    let details = if details.is_empty() { String::new() } else { format!(" ({})", details.join(", ")) };
    Ok(format!("{} {kind} {name} {}{details}\n", rfc3339(event.time_ns), subject.shown_name))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::thread;

    use api::client::SOCKET;

    use super::*;

    fn event(sequence: u64, time_ns: u64) -> String {
        format!("{{\"sequence\":{sequence},\"time_ns\":{time_ns},\"event\":\"vm_ready\"}}\n")
    }

    /// Answers one request after another with these events, and then nobody any more.
    fn serve(folder: &Path, answers: Vec<String>) -> thread::JoinHandle<Vec<String>> {
        let listener = UnixListener::bind(folder.join(SOCKET)).unwrap();
        thread::spawn(move || {
            let answer = |events: String| {
                let (mut client, _) = listener.accept().unwrap();
                let mut request = [0; 1024];
                let length = client.read(&mut request).unwrap();
                write!(client, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{events}").unwrap();
                let request = String::from_utf8_lossy(&request[..length]).into_owned();
                request.split_whitespace().nth(1).unwrap().to_owned()
            };
            answers.into_iter().map(answer).collect()
        })
    }

    fn follower(
        folder: &Path,
        from: Option<u64>,
        is_restarted: bool,
        follow: bool,
    ) -> (Follower, mpsc::Receiver<String>) {
        let format = "sequence,time_ns".parse().unwrap();
        let wanted = Arc::new(Wanted { from, since_ns: 20, until_ns: 60, follow, format });
        let (id, name, shown_name) = ("1".to_owned(), None, "web".to_owned());
        let subject = Subject { client: Client::new(folder), id, name, shown_name, is_restarted };
        let (lines, shown) = mpsc::channel(QUEUE);
        (Follower { subject, wanted, lines, from, told_ns: 0 }, shown)
    }

    async fn all(mut shown: mpsc::Receiver<String>) -> Vec<String> {
        let mut lines = Vec::new();
        while let Some(line) = shown.recv().await {
            lines.push(line);
        }
        lines
    }

    #[tokio::test]
    async fn a_container_that_is_started_again_is_told_of_again_and_nothing_twice() {
        let folder = tempfile::tempdir().unwrap();
        let first = event(1, 10) + &event(2, 20) + &event(3, 30);
        let (end, next) = (event(4, 35), event(1, 40) + &event(2, 50) + &event(3, 70));
        let answers = vec![first.clone(), end.clone(), first + &end, next];
        let server = serve(folder.path(), answers);
        let (follower, shown) = follower(folder.path(), None, true, true);
        follower.run(None).await.unwrap();
        // What the first VM told before it was asked is not news; what the second one told too late is not wanted.
        assert_eq!(all(shown).await, ["4\t35\n", "1\t40\n", "2\t50\n"]);
        let paths = server.join().unwrap();
        assert_eq!(paths[..2], ["/v1/events", "/v1/events?follow=true&since=4"]);
        assert_eq!(paths[2..], ["/v1/events?follow=true&since=0"; 2]);
    }

    #[tokio::test]
    async fn a_container_that_is_started_later_is_told_of_until_it_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let (follower, mut shown) = follower(folder.path(), Some(0), false, true);
        let (sender, served) = watch::channel(());
        let following = tokio::spawn(follower.run(Some(served)));
        for time in [30, 40] {
            let server = serve(folder.path(), vec![event(1, time)]);
            sender.send_replace(());
            assert_eq!(shown.recv().await.unwrap(), format!("1\t{time}\n"));
            server.join().unwrap();
            std::fs::remove_file(folder.path().join(SOCKET)).unwrap();
        }
        drop(sender);
        following.await.unwrap().unwrap();
    }
}
