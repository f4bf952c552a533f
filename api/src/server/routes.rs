//! The paths of the API, the document that describes them, and what requests have in common.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt as _, Limited};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::problem::{Problem, ProblemKind};
use super::streams::Streams;
use super::{Shared, containers, files, machine, memory, processes};

/// The longest body of a request that is no archive: a container with the arguments and the environment of its program.
const BODY_MAX: usize = 4 << 20;
/// The protocol that connections are upgraded to.
pub const PROTOCOL: &str = "cofferdam-stream";
/// The document, as committed; a test compares it with the code.
const DOCUMENT: &str = include_str!("../../openapi.json");

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Cofferdam micro-VM",
        description = "One micro-VM and the containers in it, over the Unix socket in its state directory.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    components(schemas(files::PathStat))
)]
struct Document;

fn described() -> OpenApiRouter<Shared> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(machine::show, machine::update))
        .routes(routes!(machine::config))
        .routes(routes!(machine::pause))
        .routes(routes!(machine::resume))
        .routes(routes!(machine::shutdown))
        .routes(routes!(machine::console))
        .routes(routes!(machine::events))
        .routes(routes!(machine::metrics))
        .routes(routes!(memory::show, memory::update))
        .routes(routes!(containers::list, containers::create))
        .routes(routes!(containers::show, containers::delete))
        .routes(routes!(containers::start))
        .routes(routes!(containers::kill))
        .routes(routes!(containers::pause))
        .routes(routes!(containers::resume))
        .routes(routes!(containers::wait))
        .routes(routes!(containers::limits))
        .routes(routes!(containers::stats))
        .routes(routes!(containers::top))
        .routes(routes!(containers::resize))
        .routes(routes!(containers::attach))
        .routes(routes!(containers::logs))
        .routes(routes!(processes::list, processes::create))
        .routes(routes!(processes::show))
        .routes(routes!(processes::wait))
        .routes(routes!(processes::kill))
        .routes(routes!(processes::resize))
}

/// Archives have no length limit: they are passed on piece by piece.
fn archives() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(files::copy_out, files::copy_in)).layer(DefaultBodyLimit::disable())
}

/// The API of a VM.
pub(super) fn router(context: Shared) -> Router {
    let (router, _) = described().layer(DefaultBodyLimit::max(BODY_MAX)).merge(archives()).split_for_parts();
    router
        .route("/openapi.json", axum::routing::get(document_as_committed))
        .fallback(no_such_resource)
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(context)
}

/// The API's description (OpenAPI 3.1), as JSON.
///
/// # Errors
/// It does not encode.
pub fn document() -> serde_json::Result<String> {
    let (_, document) = described().merge(archives()).split_for_parts();
    document.to_pretty_json().map(|text| text + "\n")
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
/// It is too long, breaks off, or is not what it should be.
pub(super) async fn json<T: DeserializeOwned>(body: Body) -> Result<T, Problem> {
    let invalid = |detail: String| Problem::new(ProblemKind::InvalidRequest, crate::session::shown(&detail));
    let bytes = Limited::new(body, BODY_MAX).collect().await.map_err(|error| invalid(error.to_string()))?.to_bytes();
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

/// Turns a connection into the streams of a process.
///
/// # Errors
/// The client does not ask for it.
pub(super) fn upgrade(context: &Shared, request: &mut Request, streams: Arc<Streams>) -> Result<Response, Problem> {
    if !wants_upgrade(request) {
        let detail =
            format!("streams need an upgraded connection: send `Connection: Upgrade` and `Upgrade: {PROTOCOL}`");
        return Err(Problem::new(ProblemKind::InvalidRequest, detail));
    }
    let Some(upgrade) = request.extensions_mut().remove::<OnUpgrade>() else {
        return Err(Problem::new(ProblemKind::InvalidRequest, "the connection cannot be upgraded"));
    };
    let permit = Arc::clone(&context.clients).try_acquire_owned();
    let permit = permit.map_err(|_| Problem::new(ProblemKind::TooManyRequests, "too many clients are connected"))?;
    let kind = if streams.is_terminal() { "raw" } else { "multiplexed" };
    tokio::spawn(async move {
        let upgraded = upgrade.await.map(|upgraded| upgraded.downcast::<TokioIo<UnixStream>>());
        match upgraded {
            Ok(Ok(parts)) => streams.attach(parts.io.into_inner(), parts.read_buf).await,
            // A client that breaks off before is gone.
            _ => streams.release(),
        }
        drop(permit);
    });
    let headers = [
        (header::CONNECTION, HeaderValue::from_static("upgrade")),
        (header::UPGRADE, HeaderValue::from_static(PROTOCOL)),
    ];
    let mut response = (StatusCode::SWITCHING_PROTOCOLS, headers).into_response();
    response.headers_mut().insert("cofferdam-stream", HeaderValue::from_static(kind));
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_document_is_what_the_code_says() {
        let current = document().unwrap();
        assert!(current == DOCUMENT, "api/openapi.json is not current: run `cargo xtask openapi`");
    }
}
