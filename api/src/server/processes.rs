//! `/v1/containers/{id}/processes`: processes that are executed in a container besides its first one.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use protocol::container::{ProcessSpec, WindowSize};
use protocol::{Call, Target};

use super::containers::signal;
use super::guest::done;
use super::problem::{Body, Path, Problem, ProblemKind};
use super::routes::Upgrade;
use super::streams::{Attachment, Streams, Use};
use super::{Shared, routes};
use crate::control::EXIT_FAILED;
use crate::model::{Kill, Process, ProcessCreate, ProcessState, Size, WaitResult};

/// Every capability that Linux has, as a mask.
const ALL_CAPABILITIES: u64 = (1 << 41) - 1;

/// Execute a process in a running container
///
/// With `Upgrade: cofferdam-stream` the connection becomes the process's streams, as by attaching to a container; none of
/// its output is missed. The answer's header `Location` names the process. Without, its output is dropped.
#[utoipa::path(post, path = "/v1/containers/{id}/processes", tag = "processes", params(("id" = String, Path)),
    request_body = ProcessCreate,
    responses((status = 101), (status = 201, body = Process),
        (status = "4XX", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn create(
    State(context): State<Shared>,
    Path(id): Path<String>,
    mut request: Request,
) -> Result<Response, Problem> {
    let body = std::mem::take(request.body_mut());
    let create: ProcessCreate = routes::json(&context, body).await?;
    let upgrade = routes::wants_upgrade(&request).then(|| Upgrade::of(&context, &mut request)).transpose()?;
    let (process, attachment) = execute(&context, &id, create, upgrade.is_some()).await?;
    let location = format!("/v1/containers/{id}/processes/{}", process.id);
    let mut response = match upgrade {
        Some(upgrade) => upgrade.attach(attachment),
        None => (StatusCode::CREATED, Json(process)).into_response(),
    };
    if let Ok(location) = location.parse() {
        response.headers_mut().insert(axum::http::header::LOCATION, location);
    }
    Ok(response)
}

/// Executes a process; gives it and, if its output is held for that, its client's attachment to come.
async fn execute(
    context: &Shared,
    id: &str,
    create: ProcessCreate,
    hold: bool,
) -> Result<(Process, Attachment), Problem> {
    let invalid = |detail: &str| Problem::new(ProblemKind::InvalidRequest, detail);
    if create.args.is_empty() {
        return Err(invalid("args: there is no program to execute"));
    }
    let (mut spec, process) = {
        let mut state = context.vm.state();
        let entry = state.container(id)?;
        entry.check_running(id)?;
        let number = || context.next_process.fetch_add(1, Ordering::Relaxed);
        let mut free = std::iter::repeat_with(|| format!("exec-{}", number())).filter(|id| entry.process(id).is_err());
        // There are more numbers than processes.
        let process = create.id.clone().or_else(|| free.next()).unwrap_or_default();
        (specify(&entry.spec.process, &create), process)
    };
    let terminal = spec.terminal.is_some();
    let failed = |error: std::io::Error| {
        Problem::new(ProblemKind::MonitorFailed, format!("cannot make the streams of process {process}: {error}"))
    };
    let (stdio, ends, offers) = context.offer_streams(create.stdin, terminal).map_err(failed)?;
    spec.stdio = stdio;
    let streams = Streams::start(ends, Use { terminal, hold, stdin_once: true, log: None }).map_err(failed)?;
    // A client that goes away before it is attached takes this with it.
    let attachment = Attachment::new(Arc::clone(&streams));
    let shown = Process {
        id: process.clone(),
        args: create.args,
        state: ProcessState::Starting,
        exit_code: None,
        error: None,
        terminal,
    };
    let sent = context.vm.change(|state| {
        state.add_process(id, shown, streams)?;
        let (container, id, spec) = (id.to_owned(), process.clone(), Box::new(spec));
        let sent = context.guest.send(Call::Exec { container: container.clone(), process: id, spec });
        sent.inspect_err(|problem| state.process_started(&container, &process, Err(problem)))
    })?;
    let (context, id) = (Arc::clone(context), id.to_owned());
    let executed = sent.settle(move |executed| {
        drop(offers);
        let executed = executed.and_then(done);
        context.vm.change(|state| {
            state.process_started(&id, &process, executed.as_ref().copied());
            executed?;
            Ok(state.container(&id)?.process(&process)?.shown.clone())
        })
    });
    Ok((executed.await?, attachment))
}

/// A process as the container's first one, but for what is asked.
fn specify(first: &ProcessSpec, create: &ProcessCreate) -> ProcessSpec {
    let mut spec = first.clone();
    spec.args.clone_from(&create.args);
    for entry in &create.env {
        let name = entry.split('=').next().unwrap_or_default();
        spec.env.retain(|old| old.split('=').next() != Some(name));
        spec.env.push(entry.clone());
    }
    if let Some(directory) = &create.working_directory {
        spec.working_directory.clone_from(directory);
    }
    if let Some(user) = &create.user {
        spec.user.clone_from(user);
    }
    if create.privileged {
        spec.capabilities = ALL_CAPABILITIES;
        spec.seccomp = protocol::container::Seccomp::Unconfined;
    }
    spec.terminal = create.terminal.map(WindowSize::from);
    spec
}

/// List the processes that were executed in a container
#[utoipa::path(get, path = "/v1/containers/{id}/processes", tag = "processes", params(("id" = String, Path)),
    responses((status = 200, body = Vec<Process>), (status = 404, body = Problem, content_type = "application/problem+json")))]
pub(super) async fn list(State(context): State<Shared>, Path(id): Path<String>) -> Result<Json<Vec<Process>>, Problem> {
    Ok(Json(context.vm.state().container(&id)?.shown().processes))
}

/// Show a process
#[utoipa::path(get, path = "/v1/containers/{id}/processes/{process}", tag = "processes",
    params(("id" = String, Path), ("process" = String, Path)),
    responses((status = 200, body = Process), (status = 404, body = Problem, content_type = "application/problem+json")))]
pub(super) async fn show(
    State(context): State<Shared>,
    Path((id, process)): Path<(String, String)>,
) -> Result<Json<Process>, Problem> {
    Ok(Json(context.vm.state().container(&id)?.process(&process)?.shown.clone()))
}

/// Wait until a process has ended and its output has been given to whoever is attached
#[utoipa::path(get, path = "/v1/containers/{id}/processes/{process}/wait", tag = "processes",
    params(("id" = String, Path), ("process" = String, Path)),
    responses((status = 200, body = WaitResult), (status = 404, body = Problem, content_type = "application/problem+json")))]
pub(super) async fn wait(
    State(context): State<Shared>,
    Path((id, process)): Path<(String, String)>,
) -> Result<Json<WaitResult>, Problem> {
    let ended = context.vm.until(|state| {
        let found = state.container(&id).and_then(|entry| entry.process(&process));
        match found {
            Ok(found) if found.is_over() => Some(Ok(found.shown.clone())),
            Ok(_) => None,
            Err(problem) => Some(Err(problem)),
        }
    });
    let ended = ended.await?;
    let exit_code = ended.exit_code.unwrap_or(EXIT_FAILED);
    Ok(Json(WaitResult { exit_code, error: ended.error }))
}

/// Send a signal to a process
#[utoipa::path(post, path = "/v1/containers/{id}/processes/{process}/kill", tag = "processes",
    params(("id" = String, Path), ("process" = String, Path)), request_body = Kill,
    responses((status = 204), (status = "4XX", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn kill(
    State(context): State<Shared>,
    Path((id, process)): Path<(String, String)>,
    Body(kill): Body<Kill>,
) -> Result<StatusCode, Problem> {
    if kill.all {
        let detail = "all: only a container's first process stands for all of them";
        return Err(Problem::new(ProblemKind::InvalidRequest, detail));
    }
    running(&context, &id, &process)?;
    signal(&context, &id, Some(process), kill).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn running(context: &Shared, id: &str, process: &str) -> Result<(), Problem> {
    let mut state = context.vm.state();
    match state.container(id)?.process(process)?.shown.state {
        ProcessState::Exited => Err(Problem::state(format!("process {process} has ended"))),
        _ => Ok(()),
    }
}

/// Set the size of a process's terminal
#[utoipa::path(post, path = "/v1/containers/{id}/processes/{process}/resize", tag = "processes",
    params(("id" = String, Path), ("process" = String, Path)), request_body = Size,
    responses((status = 204), (status = "4XX", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn resize(
    State(context): State<Shared>,
    Path((id, process)): Path<(String, String)>,
    Body(size): Body<Size>,
) -> Result<StatusCode, Problem> {
    running(&context, &id, &process)?;
    let target = Target { container: id, process: Some(process) };
    context.guest.act(Call::Resize { target, size: size.into() }).await?;
    Ok(StatusCode::NO_CONTENT)
}
