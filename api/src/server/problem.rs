//! What is answered when something is wrong: a problem document (RFC 9457, "Problem Details for HTTP APIs").

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use protocol::{Failure, FailureKind};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Shared;
use crate::session::shown;

/// A problem document. `type` is stable: programs decide by it, people read `detail`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// What kind of problem it is.
    #[serde(rename = "type")]
    pub kind: ProblemKind,
    /// The HTTP status code.
    pub status: u16,
    /// The kind in words.
    pub title: String,
    /// What is wrong, with what, in one line.
    pub detail: String,
}

/// The kinds of problems.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ProblemKind {
    /// The request does not have the shape that is described.
    InvalidRequest,
    /// The body of the request is longer than any that is described.
    BodyTooLong,
    /// The body of the request does not arrive.
    BodyTooSlow,
    /// There is no such path in the API.
    NoSuchResource,
    /// The path does not have this method.
    MethodNotAllowed,
    /// There is no such container.
    NoSuchContainer,
    /// There is no such process in the container.
    NoSuchProcess,
    /// There is one with this id already.
    AlreadyExists,
    /// The VM, the container or the process is not in a state that allows it.
    WrongState,
    /// The program is not in the container.
    CommandNotFound,
    /// The program is there but cannot be executed.
    CommandNotExecutable,
    /// The guest refused.
    GuestRefused,
    /// The guest does not keep to the rules of its conversation.
    GuestFailed,
    /// The guest has ended.
    GuestEnded,
    /// The guest did not answer in time. It can still be killed.
    GuestTimeout,
    /// Too much is under way: try again later.
    TooManyRequests,
    /// The monitor cannot do it.
    MonitorFailed,
}

impl ProblemKind {
    fn status(self) -> StatusCode {
        match self {
            Self::InvalidRequest | Self::CommandNotFound | Self::CommandNotExecutable => StatusCode::BAD_REQUEST,
            Self::BodyTooLong => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyTooSlow => StatusCode::REQUEST_TIMEOUT,
            Self::NoSuchResource | Self::NoSuchContainer | Self::NoSuchProcess => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::AlreadyExists | Self::WrongState => StatusCode::CONFLICT,
            Self::GuestRefused => StatusCode::UNPROCESSABLE_ENTITY,
            Self::GuestFailed | Self::GuestEnded => StatusCode::BAD_GATEWAY,
            Self::GuestTimeout => StatusCode::GATEWAY_TIMEOUT,
            Self::TooManyRequests => StatusCode::TOO_MANY_REQUESTS,
            Self::MonitorFailed => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::InvalidRequest => "the request is not valid",
            Self::BodyTooLong => "the body is too long",
            Self::BodyTooSlow => "the body did not arrive in time",
            Self::NoSuchResource => "no such resource",
            Self::MethodNotAllowed => "method not allowed",
            Self::NoSuchContainer => "no such container",
            Self::NoSuchProcess => "no such process",
            Self::AlreadyExists => "it exists already",
            Self::WrongState => "the state does not allow it",
            Self::CommandNotFound => "command not found",
            Self::CommandNotExecutable => "command not executable",
            Self::GuestRefused => "the guest refused",
            Self::GuestFailed => "the guest failed",
            Self::GuestEnded => "the guest has ended",
            Self::GuestTimeout => "the guest did not answer in time",
            Self::TooManyRequests => "too many requests",
            Self::MonitorFailed => "the monitor failed",
        }
    }
}

impl Problem {
    /// A problem of a kind, with what is wrong in one line.
    pub fn new(kind: ProblemKind, detail: impl Into<String>) -> Self {
        Self { kind, status: kind.status().as_u16(), title: kind.title().to_owned(), detail: detail.into() }
    }

    /// There is no such container.
    pub fn no_container(id: &str) -> Self {
        Self::new(ProblemKind::NoSuchContainer, format!("no container {}", shown(id)))
    }

    /// The container is not in a state that allows it.
    pub fn state(detail: impl Into<String>) -> Self {
        Self::new(ProblemKind::WrongState, detail)
    }
}

impl From<Failure> for Problem {
    fn from(failure: Failure) -> Self {
        let kind = match failure.kind {
            FailureKind::CommandNotFound => ProblemKind::CommandNotFound,
            FailureKind::CommandNotExecutable => ProblemKind::CommandNotExecutable,
            FailureKind::NoSuchContainer => ProblemKind::NoSuchContainer,
            FailureKind::WrongState => ProblemKind::WrongState,
            FailureKind::InvalidRequest => ProblemKind::InvalidRequest,
            FailureKind::System => ProblemKind::GuestRefused,
        };
        Self::new(kind, shown(&failure.message))
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = self.kind.status();
        let mut response = (status, Json(self)).into_response();
        let kind = HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }
}

macro_rules! rejected {
    ($($rejection:ty),*) => {$(
        impl From<$rejection> for Problem {
            fn from(rejection: $rejection) -> Self {
                let long = rejection.status() == StatusCode::PAYLOAD_TOO_LARGE;
                let kind = if long { ProblemKind::BodyTooLong } else { ProblemKind::InvalidRequest };
                Self::new(kind, shown(&rejection.body_text()))
            }
        }
    )*};
}
rejected!(JsonRejection, PathRejection, QueryRejection);

/// A JSON body; one that is none is answered with a [`Problem`] that names the field.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Shared> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, context: &Shared) -> Result<Self, Problem> {
        let Json(value) = arrives(context, Json::from_request(request, context)).await??;
        Ok(Self(value))
    }
}

/// Waits for a body, which is not waited for for ever: whoever begins a request and does not go on takes the place of another
/// client.
///
/// # Errors
/// It does not come in time.
pub(super) async fn arrives<T>(context: &Shared, body: impl Future<Output = T>) -> Result<T, Problem> {
    let deadline = context.bounds.body;
    tokio::time::timeout(deadline, body).await.map_err(|_| {
        Problem::new(ProblemKind::BodyTooSlow, format!("the body did not arrive within {} s", deadline.as_secs_f32()))
    })
}

/// The parts of the path.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Path), rejection(Problem))]
pub struct Path<T>(pub T);

/// The query; a field that does not exist is answered with a [`Problem`] that names it.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(Problem))]
pub struct Query<T>(pub T);
