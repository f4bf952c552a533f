//! `/v1/containers`: create, show, start, kill, pause, wait, delete, limits, statistics, processes, log, attach.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::body::Body as HttpBody;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use protocol::container::{ContainerSpec, Limits, WindowSize};
use protocol::{Answer, Call, Target};
use serde::Deserialize;

use super::guest::{CALL_DEADLINE, Pending, done, late, unfit};
use super::log::{Follower, Log};
use super::problem::{Body, Path, Problem, ProblemKind, Query};
use super::routes::Upgrade;
use super::streams::{Attachment, Streams, Use};
use super::{Offer, Shared};
use crate::config::ContainerConfig;
use crate::log::Selection;
use crate::model::{
    CPU_QUOTA_MIN_US, Container, ContainerCreate, ContainerState, ContainerStatus, CpuStats, EventKind, IoStats, Kill,
    LimitsUpdate, MEMORY_MIN, MemoryStats, PIDS_MIN, PidsStats, Size, Stats, Top, TopProcess,
};
use crate::session::now;

/// Creates and starts the container that the VM is for; both calls are under way at once.
pub(super) fn launch(context: &Shared, container: ContainerConfig) -> io::Result<()> {
    let log = context.folder.as_ref().map(Log::open).transpose()?.map(Arc::new);
    let usage = Use { log, hold: container.wait_for_attach, stdin_once: container.stdin_once, ..Use::default() };
    let id = container.spec.id.clone();
    let begun = begin(context, container.spec, container.stdin, usage);
    let (creation, offers) = begun.map_err(|problem| io::Error::other(problem.detail))?;
    let start = context.guest.send(Call::Start { container: id.clone() });
    let context = Arc::clone(context);
    tokio::spawn(async move {
        let created = creation.answer().await.and_then(done);
        drop(offers);
        context.vm.change(|state| {
            state.boot.container_created_ns = now();
            state.created(&id, created.as_ref().copied());
            if let Ok(entry) = state.container(&id)
                && entry.state.status == ContainerStatus::Created
            {
                entry.state.status = ContainerStatus::Starting;
            }
        });
        let started = match start {
            Ok(start) => start.answer().await.and_then(done),
            Err(problem) => Err(problem),
        };
        context.vm.change(|state| {
            state.boot.container_started_ns = now();
            state.started(&id, started.as_ref().copied());
        });
    });
    Ok(())
}

/// Adds a container and asks the agent to create it. The offers are to be kept until it has.
fn begin(context: &Shared, mut spec: ContainerSpec, stdin: bool, usage: Use) -> Result<(Pending, Vec<Offer>), Problem> {
    let id = spec.id.clone();
    let terminal = spec.process.terminal.is_some();
    let failed = |error: io::Error| {
        Problem::new(ProblemKind::MonitorFailed, format!("cannot make the streams of container {id}: {error}"))
    };
    context.vm.state().may_add(&id)?;
    let (stdio, ends, offers) = context.offer_streams(stdin, terminal).map_err(failed)?;
    spec.process.stdio = stdio;
    let streams = Streams::start(ends, Use { terminal, ..usage }).map_err(failed)?;
    streams.release_in_time();
    let spec = Arc::new(spec);
    let sent = context.vm.change(|state| {
        state.add(Arc::clone(&spec), streams)?;
        context.guest.send(Call::Create(Box::new((*spec).clone())))
    });
    if sent.is_err() {
        context.vm.change(|state| state.containers.remove(&id));
    }
    Ok((sent?, offers))
}

/// List containers
#[utoipa::path(get, path = "/v1/containers", tag = "containers", responses((status = 200, body = Vec<Container>)))]
pub(super) async fn list(State(context): State<Shared>) -> Json<Vec<Container>> {
    Json(context.vm.state().containers.values().map(super::vm::Entry::shown).collect())
}

/// Create a container
///
/// It is set up to the point where its program could be executed.
#[utoipa::path(post, path = "/v1/containers", tag = "containers", request_body = ContainerCreate,
    responses((status = 201, body = Container), (status = "4XX", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn create(
    State(context): State<Shared>,
    Body(create): Body<ContainerCreate>,
) -> Result<(StatusCode, Json<Container>), Problem> {
    let id = create.spec.id.clone();
    if create.spec.process.stdio != protocol::container::Stdio::default() {
        let detail = "spec.process.stdio: the VM chooses its ports, leave them null";
        return Err(Problem::new(ProblemKind::InvalidRequest, detail));
    }
    check_limits("spec.limits.", &create.spec.limits)?;
    let usage = Use { hold: create.wait_for_attach, ..Use::default() };
    let (creation, offers) = begin(&context, create.spec, create.stdin, usage)?;
    let shown = creation.settle(move |created| {
        drop(offers);
        context.vm.change(|state| {
            if let Err(problem) = created.and_then(done) {
                state.containers.remove(&id);
                return Err(problem);
            }
            state.created(&id, Ok(()));
            state.container(&id).map(|entry| entry.shown())
        })
    });
    Ok((StatusCode::CREATED, Json(shown.await?)))
}

/// Show a container
#[utoipa::path(get, path = "/v1/containers/{id}", tag = "containers", params(("id" = String, Path)),
    responses((status = 200, body = Container), (status = 404, body = Problem, content_type = "application/problem+json")))]
pub(super) async fn show(State(context): State<Shared>, Path(id): Path<String>) -> Result<Json<Container>, Problem> {
    Ok(Json(context.vm.state().container(&id)?.shown()))
}

/// Delete a container that has ended, or one that was not started
#[utoipa::path(delete, path = "/v1/containers/{id}", tag = "containers", params(("id" = String, Path)),
    responses((status = 204), (status = "4XX", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn delete(State(context): State<Shared>, Path(id): Path<String>) -> Result<StatusCode, Problem> {
    let status = context.vm.state().container(&id)?.state.status;
    if context.main.as_ref() == Some(&id) {
        return Err(Problem::state(format!("the VM is for container {id} and ends with it: shut the VM down")));
    }
    match status {
        ContainerStatus::Exited => {}
        ContainerStatus::Created => {
            signal(&context, &id, None, Kill { signal: 9, all: true, stop: true }).await?;
            tokio::time::timeout(CALL_DEADLINE, exited(&context, &id)).await.map_err(|_| late())?;
        }
        _ => return Err(Problem::state(format!("container {id} has not ended: kill it first"))),
    }
    context.vm.change(|state| {
        state.containers.remove(&id);
        state.tell(EventKind::Deleted { container: id });
    });
    Ok(StatusCode::NO_CONTENT)
}

/// Execute the program of a created container
#[utoipa::path(post, path = "/v1/containers/{id}/start", tag = "containers", params(("id" = String, Path)),
    responses((status = 200, body = Container), (status = "4XX", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn start(State(context): State<Shared>, Path(id): Path<String>) -> Result<Json<Container>, Problem> {
    let sent = context.vm.change(|state| {
        let entry = state.container(&id)?;
        match entry.state.status {
            ContainerStatus::Created => entry.state.status = ContainerStatus::Starting,
            ContainerStatus::Creating => return Err(Problem::state(format!("container {id} is being created"))),
            ContainerStatus::Exited => return Err(Problem::state(format!("container {id} has ended"))),
            _ => return Err(Problem::state(format!("container {id} was started before"))),
        }
        let sent = context.guest.send(Call::Start { container: id.clone() });
        if sent.is_err() {
            state.container(&id)?.state.status = ContainerStatus::Created;
        }
        sent
    })?;
    let started = sent.settle(move |started| {
        let started = started.and_then(done);
        context.vm.change(|state| {
            state.started(&id, started.as_ref().copied());
            started?;
            state.container(&id).map(|entry| Json(entry.shown()))
        })
    });
    started.await
}

/// Send a signal
#[utoipa::path(post, path = "/v1/containers/{id}/kill", tag = "containers", params(("id" = String, Path)),
    request_body = Kill,
    responses((status = 204), (status = "4XX", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn kill(
    State(context): State<Shared>,
    Path(id): Path<String>,
    Body(kill): Body<Kill>,
) -> Result<StatusCode, Problem> {
    signal(&context, &id, None, kill).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Sends a signal to a process of a container.
pub(super) async fn signal(context: &Shared, id: &str, process: Option<String>, kill: Kill) -> Result<(), Problem> {
    let Kill { signal, all, stop } = kill;
    if !(1..=64).contains(&signal) {
        let detail = format!("signal: {signal} is no signal, they go from 1 to 64");
        return Err(Problem::new(ProblemKind::InvalidRequest, detail));
    }
    let status = context.vm.state().container(id)?.state.status;
    match status {
        ContainerStatus::Exited => return Err(Problem::state(format!("container {id} has ended"))),
        // Its program would not be the one to get it.
        ContainerStatus::Creating | ContainerStatus::Starting => {
            return Err(Problem::state(format!("container {id} is not running yet")));
        }
        _ => {}
    }
    let stops = stop && process.is_none() && context.main.as_deref() == Some(id);
    // Noted before it ends.
    let before = stops && context.stopped.swap(true, Ordering::Relaxed);
    let target = Target { container: id.to_owned(), process };
    let sent = context.guest.act(Call::Signal { target, signal, all }).await;
    if stops && sent.is_err() {
        context.stopped.store(before, Ordering::Relaxed);
    }
    sent
}

/// Stop all processes of a container where they are
#[utoipa::path(post, path = "/v1/containers/{id}/pause", tag = "containers", params(("id" = String, Path)),
    responses((status = 204), (status = "4XX", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn pause(State(context): State<Shared>, Path(id): Path<String>) -> Result<StatusCode, Problem> {
    freeze(&context, id, true).await
}

/// Let all processes of a container go on
#[utoipa::path(post, path = "/v1/containers/{id}/resume", tag = "containers", params(("id" = String, Path)),
    responses((status = 204), (status = "4XX", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn resume(State(context): State<Shared>, Path(id): Path<String>) -> Result<StatusCode, Problem> {
    freeze(&context, id, false).await
}

async fn freeze(context: &Shared, id: String, frozen: bool) -> Result<StatusCode, Problem> {
    let (from, to) = match frozen {
        true => (ContainerStatus::Running, ContainerStatus::Paused),
        false => (ContainerStatus::Paused, ContainerStatus::Running),
    };
    {
        let mut state = context.vm.state();
        let entry = state.container(&id)?;
        if entry.state.status != from {
            let word = if frozen { "running" } else { "paused" };
            return Err(Problem::state(format!("container {id} is not {word}")));
        }
    }
    let frozen_now = context.guest.act(Call::Freeze { container: id.clone(), frozen }).await;
    if frozen && frozen_now.as_ref().is_err_and(|problem| problem.kind == ProblemKind::GuestTimeout) {
        // A process that cannot be stopped now would be later, when nobody counts on it any more.
        let _ = context.guest.send(Call::Freeze { container: id, frozen: false });
        return Err(late());
    }
    frozen_now?;
    context.vm.change(|state| {
        let entry = state.container(&id)?;
        if entry.state.status == from {
            entry.state.status = to;
            let container = id.clone();
            state.tell(if frozen { EventKind::Paused { container } } else { EventKind::Resumed { container } });
        }
        Ok(StatusCode::NO_CONTENT)
    })
}

/// What to wait for.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct WaitQuery {
    /// Whether to wait only until its program was executed, or could not be.
    started: bool,
}

/// Wait until a container has ended and its output has been written
#[utoipa::path(get, path = "/v1/containers/{id}/wait", tag = "containers", params(("id" = String, Path), WaitQuery),
    responses((status = 200, body = ContainerState),
        (status = 404, body = Problem, content_type = "application/problem+json")))]
pub(super) async fn wait(
    State(context): State<Shared>,
    Path(id): Path<String>,
    Query(WaitQuery { started }): Query<WaitQuery>,
) -> Result<Json<ContainerState>, Problem> {
    context.vm.state().container(&id)?;
    let state = if started {
        let running = context.vm.until(|state| {
            let Some(entry) = state.containers.get(&id) else { return Some(None) };
            let early = [ContainerStatus::Creating, ContainerStatus::Created, ContainerStatus::Starting];
            (!early.contains(&entry.state.status)).then(|| Some(entry.state.clone()))
        });
        running.await
    } else {
        exited(&context, &id).await
    };
    state.map(Json).ok_or_else(|| Problem::no_container(&id))
}

/// Waits until a container has ended; `None` when it was deleted meanwhile.
async fn exited(context: &Shared, id: &str) -> Option<ContainerState> {
    let ended = context.vm.until(|state| {
        let Some(entry) = state.containers.get(id) else { return Some(None) };
        entry.is_over().then(|| Some(entry.state.clone()))
    });
    ended.await
}

/// Change a container's limits
#[utoipa::path(patch, path = "/v1/containers/{id}/limits", tag = "containers", params(("id" = String, Path)),
    request_body = LimitsUpdate,
    responses((status = 204), (status = "4XX", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn limits(
    State(context): State<Shared>,
    Path(id): Path<String>,
    Body(update): Body<LimitsUpdate>,
) -> Result<StatusCode, Problem> {
    context.vm.state().container(&id)?;
    let LimitsUpdate { memory_bytes, pids, cpu_quota_us } = update;
    let limits = Limits { memory_bytes, pids, cpu_quota_us };
    check_limits("", &limits)?;
    context.guest.act(Call::Update { container: id, limits }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Refuses limits that leave a container nothing to live on. `place` stands before the names of their fields.
fn check_limits(place: &str, limits: &Limits) -> Result<(), Problem> {
    let least = [
        ("memory_bytes", limits.memory_bytes, MEMORY_MIN),
        ("pids", limits.pids, PIDS_MIN),
        ("cpu_quota_us", limits.cpu_quota_us, CPU_QUOTA_MIN_US),
    ];
    let given = least.into_iter().filter_map(|(name, given, least)| Some((name, given?, least)));
    match given.into_iter().find(|(_, given, least)| given < least) {
        Some((name, given, least)) => {
            let detail = format!("{place}{name} is {given}: give at least {least}, or {} for no limit", u64::MAX);
            Err(Problem::new(ProblemKind::InvalidRequest, detail))
        }
        None => Ok(()),
    }
}

/// What a container uses
#[utoipa::path(get, path = "/v1/containers/{id}/stats", tag = "containers", params(("id" = String, Path)),
    responses((status = 200, body = Stats), (status = "4XX", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn stats(State(context): State<Shared>, Path(id): Path<String>) -> Result<Json<Stats>, Problem> {
    context.vm.state().container(&id)?;
    let Answer::Stats(stats) = context.guest.call(Call::Stats { container: id }).await? else {
        return Err(unfit());
    };
    let limit = |value: u64| (value != u64::MAX).then_some(value);
    Ok(Json(Stats {
        cpu: CpuStats {
            usage_us: stats.cpu_usage_us,
            user_us: stats.cpu_user_us,
            system_us: stats.cpu_system_us,
            throttled_periods: stats.cpu_throttled_periods,
            throttled_us: stats.cpu_throttled_us,
            cpus: context.config.vcpus,
        },
        memory: MemoryStats {
            usage_bytes: stats.memory_bytes,
            peak_bytes: stats.memory_peak_bytes,
            limit_bytes: limit(stats.memory_limit_bytes),
            inactive_file_bytes: stats.memory_inactive_file_bytes,
            oom_kills: stats.memory_oom_kills,
        },
        pids: PidsStats { current: stats.pids, limit: limit(stats.pids_limit) },
        io: IoStats { read_bytes: stats.io_read_bytes, written_bytes: stats.io_written_bytes },
        host: super::machine::host_stats(&context),
    }))
}

/// The processes in a container
#[utoipa::path(get, path = "/v1/containers/{id}/top", tag = "containers", params(("id" = String, Path)),
    responses((status = 200, body = Top), (status = "4XX", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn top(State(context): State<Shared>, Path(id): Path<String>) -> Result<Json<Top>, Problem> {
    context.vm.state().container(&id)?;
    let Answer::Processes(processes) = context.guest.call(Call::Processes { container: id }).await? else {
        return Err(unfit());
    };
    let shown = |process: protocol::report::ProcessInfo| TopProcess {
        pid: process.pid,
        parent_pid: process.parent_pid,
        uid: process.uid,
        started_us: process.started_us,
        cpu_us: process.cpu_us,
        command: crate::session::shown(&process.command),
    };
    Ok(Json(Top { processes: processes.into_iter().map(shown).collect() }))
}

/// Set the size of the terminal of a container's first process
#[utoipa::path(post, path = "/v1/containers/{id}/resize", tag = "containers", params(("id" = String, Path)),
    request_body = Size,
    responses((status = 204), (status = "4XX", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn resize(
    State(context): State<Shared>,
    Path(id): Path<String>,
    Body(size): Body<Size>,
) -> Result<StatusCode, Problem> {
    context.vm.state().container(&id)?;
    let target = Target { container: id, process: None };
    context.guest.act(Call::Resize { target, size: WindowSize::from(size) }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Attach to the streams of a container's first process
///
/// An upgraded connection (`Upgrade: cofferdam-stream`). What the client sends is the process's standard input, until it
/// ends its direction. What it gets is a multiplexed stream as docker has it: a byte that names the stream (1 standard
/// output, 2 standard error), three zeroes, a big-endian 32-bit length, so many bytes. With a terminal there are no frames.
#[utoipa::path(post, path = "/v1/containers/{id}/attach", tag = "containers", params(("id" = String, Path)),
    responses((status = 101), (status = "4XX", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn attach(
    State(context): State<Shared>,
    Path(id): Path<String>,
    mut request: Request,
) -> Result<Response, Problem> {
    let streams = Arc::clone(&context.vm.state().container(&id)?.streams);
    let upgrade = Upgrade::of(&context, &mut request)?;
    Ok(upgrade.attach(Attachment::new(streams)))
}

/// Which entries of a log are wanted.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct LogQuery {
    /// Whether to go on until the container has ended.
    follow: bool,
    /// Only entries of this time or later, in nanoseconds since 1970.
    since_ns: u64,
    /// Only so many of the last lines.
    tail: Option<usize>,
    /// Whether each line begins with its time.
    timestamps: bool,
}

/// The log of the container that the VM is for, as a multiplexed stream
#[utoipa::path(get, path = "/v1/containers/{id}/logs", tag = "containers",
    params(("id" = String, Path), LogQuery),
    responses((status = 200, content_type = "application/vnd.docker.multiplexed-stream"),
        (status = "4XX", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn logs(
    State(context): State<Shared>,
    Path(id): Path<String>,
    Query(query): Query<LogQuery>,
) -> Result<Response, Problem> {
    let log = context.vm.state().container(&id)?.streams.log();
    let log = log.ok_or_else(|| Problem::state(format!("container {id} has no log")))?;
    let selection = Selection { since_ns: query.since_ns, tail: query.tail };
    let reader = log.read(selection, query.timestamps).map_err(|error| unreadable(&id, &error))?;
    let entries = futures_util::stream::unfold((context, id, reader), move |(context, id, mut reader)| async move {
        let piece = next_entries(&context, &id, &mut reader, query.follow).await.transpose()?;
        Some((piece, (context, id, reader)))
    });
    let kind = HeaderValue::from_static("application/vnd.docker.multiplexed-stream");
    Ok(([(header::CONTENT_TYPE, kind)], HttpBody::from_stream(entries)).into_response())
}

async fn next_entries(
    context: &Shared,
    id: &str,
    reader: &mut Follower,
    follow: bool,
) -> io::Result<Option<bytes::Bytes>> {
    loop {
        // Asked before the log is read, so that nothing comes in between.
        let over = context.vm.state().container(id).is_ok_and(|entry| entry.is_over());
        if let Some(frames) = reader.next()? {
            return Ok(Some(frames));
        }
        if !follow || over || context.vm.state().container(id).is_err() {
            return Ok(None);
        }
        tokio::select! {
            () = reader.grown() => {}
            _ = exited(context, id) => {}
        }
    }
}

fn unreadable(id: &str, error: &io::Error) -> Problem {
    Problem::new(ProblemKind::MonitorFailed, format!("cannot read the log of container {id}: {error}"))
}
