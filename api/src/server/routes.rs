//! The paths of the API, the document that describes them, and what requests have in common.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, patch, post};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::sync::OwnedSemaphorePermit;
use utoipa::OpenApi;

use super::problem::{Problem, ProblemKind, arrives};
use super::streams::Attachment;
use super::{Shared, containers, files, generation, machine, memory, processes};

/// The longest body of a request that is no archive: a container with the arguments and the environment of its program.
pub(super) const BODY_MAX: usize = 4 << 20;
/// The protocol that connections are upgraded to.
pub const PROTOCOL: &str = "cofferdam-stream";
/// The document, as committed; a test compares it with the code.
const DOCUMENT: &str = include_str!("../../openapi.json");

/// What the API's description is made of. Only who writes or checks it makes it: it takes longer than the rest of a monitor's start.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Cofferdam micro-VM",
        description = "One micro-VM and the containers in it, over the Unix socket in its state directory.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    paths(
        machine::show,
        machine::update,
        machine::config,
        machine::pause,
        machine::resume,
        machine::shutdown,
        machine::console,
        machine::events,
        machine::metrics,
        memory::show,
        memory::update,
        generation::show,
        generation::renew,
        containers::list,
        containers::create,
        containers::show,
        containers::delete,
        containers::start,
        containers::kill,
        containers::pause,
        containers::resume,
        containers::wait,
        containers::limits,
        containers::stats,
        containers::top,
        containers::resize,
        containers::attach,
        containers::logs,
        processes::list,
        processes::create,
        processes::show,
        processes::wait,
        processes::kill,
        processes::resize,
        files::copy_out,
        files::copy_in
    ),
    components(schemas(files::PathStat))
)]
struct Document;

/// Every path that is described, and who answers there.
fn paths() -> [(&'static str, MethodRouter<Shared>); 29] {
    // Archives have no length limit: they are passed on piece by piece.
    let archives = get(files::copy_out).put(files::copy_in).layer(DefaultBodyLimit::disable());
    [
        ("/v1/vm", get(machine::show).patch(machine::update)),
        ("/v1/vm/config", get(machine::config)),
        ("/v1/vm/pause", post(machine::pause)),
        ("/v1/vm/resume", post(machine::resume)),
        ("/v1/vm/shutdown", post(machine::shutdown)),
        ("/v1/vm/console", get(machine::console)),
        ("/v1/vm/balloon", get(memory::show).patch(memory::update)),
        ("/v1/vm/generation", get(generation::show).post(generation::renew)),
        ("/v1/events", get(machine::events)),
        ("/v1/metrics", get(machine::metrics)),
        ("/v1/containers", get(containers::list).post(containers::create)),
        ("/v1/containers/{id}", get(containers::show).delete(containers::delete)),
        ("/v1/containers/{id}/start", post(containers::start)),
        ("/v1/containers/{id}/kill", post(containers::kill)),
        ("/v1/containers/{id}/pause", post(containers::pause)),
        ("/v1/containers/{id}/resume", post(containers::resume)),
        ("/v1/containers/{id}/wait", get(containers::wait)),
        ("/v1/containers/{id}/limits", patch(containers::limits)),
        ("/v1/containers/{id}/stats", get(containers::stats)),
        ("/v1/containers/{id}/top", get(containers::top)),
        ("/v1/containers/{id}/resize", post(containers::resize)),
        ("/v1/containers/{id}/attach", post(containers::attach)),
        ("/v1/containers/{id}/logs", get(containers::logs)),
        ("/v1/containers/{id}/files", archives),
        ("/v1/containers/{id}/processes", get(processes::list).post(processes::create)),
        ("/v1/containers/{id}/processes/{process}", get(processes::show)),
        ("/v1/containers/{id}/processes/{process}/wait", get(processes::wait)),
        ("/v1/containers/{id}/processes/{process}/kill", post(processes::kill)),
        ("/v1/containers/{id}/processes/{process}/resize", post(processes::resize)),
    ]
}

/// The API of a VM.
pub(super) fn router(context: Shared) -> Router {
    let router = paths().into_iter().fold(Router::new(), |router, (path, handlers)| router.route(path, handlers));
    router
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .route("/openapi.json", get(document_as_committed))
        .fallback(no_such_resource)
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(context)
}

/// The API's description (OpenAPI 3.1), as JSON.
///
/// # Errors
/// It does not encode.
pub fn document() -> serde_json::Result<String> {
    Document::openapi().to_pretty_json().map(|text| text + "\n")
}

async fn document_as_committed() -> Response {
    let kind = HeaderValue::from_static("application/json");
    ([(header::CONTENT_TYPE, kind)], DOCUMENT).into_response()
}

async fn no_such_resource(request: Request) -> Problem {
    let path = crate::session::shown(request.uri().path());
    Problem::new(ProblemKind::NoSuchResource, format!("there is no {path}: /openapi.json lists what there is"))
}

async fn method_not_allowed(request: Request) -> Problem {
    let detail = format!("{} does not have the method {}", request.uri().path(), request.method());
    Problem::new(ProblemKind::MethodNotAllowed, crate::session::shown(&detail))
}

/// Reads a JSON body.
///
/// # Errors
/// It is too long, breaks off or does not come, or is not what it should be.
pub(super) async fn json<T: DeserializeOwned>(context: &Shared, body: Body) -> Result<T, Problem> {
    let collected = arrives(context, Limited::new(body, BODY_MAX).collect()).await?;
    let bytes = collected.map_err(|error| {
        let long = error.is::<LengthLimitError>();
        let kind = if long { ProblemKind::BodyTooLong } else { ProblemKind::InvalidRequest };
        Problem::new(kind, crate::session::shown(&error.to_string()))
    });
    let bytes = bytes?.to_bytes();
    // As the extractor does it: with the name of the field that does not fit.
    axum::Json::from_bytes(&bytes).map(|axum::Json(value)| value).map_err(Problem::from)
}

/// Whether a client wants streams.
pub(super) fn wants_upgrade(request: &Request) -> bool {
    let asks = |headers: &HeaderMap| {
        let upgrade = headers.get(header::UPGRADE).and_then(|value| value.to_str().ok());
        upgrade.is_some_and(|value| value.eq_ignore_ascii_case(PROTOCOL))
    };
    asks(request.headers()) && request.extensions().get::<OnUpgrade>().is_some()
}

/// A connection that may become the streams of a process, and the right to have one.
pub(super) struct Upgrade {
    connection: OnUpgrade,
    permit: OwnedSemaphorePermit,
}

impl Upgrade {
    /// That of a request.
    ///
    /// # Errors
    /// The client does not ask for it, or too many have one.
    pub fn of(context: &Shared, request: &mut Request) -> Result<Self, Problem> {
        if !wants_upgrade(request) {
            let detail =
                format!("streams need an upgraded connection: send `Connection: Upgrade` and `Upgrade: {PROTOCOL}`");
            return Err(Problem::new(ProblemKind::InvalidRequest, detail));
        }
        let Some(connection) = request.extensions_mut().remove::<OnUpgrade>() else {
            return Err(Problem::new(ProblemKind::InvalidRequest, "the connection cannot be upgraded"));
        };
        let permit = Arc::clone(&context.clients).try_acquire_owned();
        let permit =
            permit.map_err(|_| Problem::new(ProblemKind::TooManyRequests, "too many clients are connected"))?;
        Ok(Self { connection, permit })
    }

    /// Attaches the client to streams as soon as it has this answer.
    pub fn attach(self, attachment: Attachment) -> Response {
        let kind = if attachment.streams().is_terminal() { "raw" } else { "multiplexed" };
        tokio::spawn(async move {
            let Self { connection, permit } = self;
            let upgraded = connection.await.map(|upgraded| upgraded.downcast::<TokioIo<UnixStream>>());
            // A client that breaks off before is gone.
            if let Ok(Ok(parts)) = upgraded {
                attachment.streams().attach(parts.io.into_inner(), parts.read_buf).await;
            }
            drop(permit);
        });
        let headers = [
            (header::CONNECTION, HeaderValue::from_static("upgrade")),
            (header::UPGRADE, HeaderValue::from_static(PROTOCOL)),
        ];
        let mut response = (StatusCode::SWITCHING_PROTOCOLS, headers).into_response();
        response.headers_mut().insert("cofferdam-stream", HeaderValue::from_static(kind));
        response
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::MethodFilter;

    use super::*;

    #[test]
    fn the_committed_document_is_what_the_code_says() {
        let current = document().unwrap();
        assert!(current == DOCUMENT, "api/openapi.json is not current: run `cargo xtask openapi`");
    }

    #[test]
    fn what_is_described_is_answered_and_nothing_else_is() {
        let methods = [
            ("get", MethodFilter::GET),
            ("post", MethodFilter::POST),
            ("put", MethodFilter::PUT),
            ("patch", MethodFilter::PATCH),
            ("delete", MethodFilter::DELETE),
        ];
        // Who answers already is not replaced: a second one is a panic.
        let answers = |handlers: &MethodRouter<Shared>, filter| {
            let handlers = handlers.clone();
            let another = move || handlers.on(filter, document_as_committed);
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(another)).is_err()
        };
        let mut answered = serde_json::Map::new();
        for (path, handlers) in paths() {
            let there = methods.iter().filter(|(_, filter)| answers(&handlers, *filter));
            answered.insert(path.to_owned(), there.map(|(name, _)| *name).collect::<Vec<_>>().into());
        }
        let document: serde_json::Value = serde_json::from_str(DOCUMENT).unwrap();
        let mut described = serde_json::Map::new();
        for (path, operations) in document["paths"].as_object().unwrap() {
            let there = methods.iter().filter(|(name, _)| operations.get(name).is_some());
            described.insert(path.clone(), there.map(|(name, _)| *name).collect::<Vec<_>>().into());
        }
        assert_eq!(answered, described);
    }
}
