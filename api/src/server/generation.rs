//! `/v1/vm/generation`: which VM the guest is told that it is in.

use axum::Json;
use axum::extract::State;

use super::Shared;
use super::problem::{Problem, ProblemKind};
use crate::model::Generation;

/// Show which VM the guest is told that it is in
#[utoipa::path(get, path = "/v1/vm/generation", tag = "vm", responses(
    (status = 200, body = Generation),
    (status = 404, body = Problem, content_type = "application/problem+json")))]
pub(super) async fn show(State(context): State<Shared>) -> Result<Json<Generation>, Problem> {
    generation(&context).map(Json)
}

/// Tell the guest that it is in another VM from now on: that it was copied, or that its disks were put back
///
/// Linux seeds its random numbers anew then.
#[utoipa::path(post, path = "/v1/vm/generation", tag = "vm", responses(
    (status = 200, body = Generation),
    (status = 404, body = Problem, content_type = "application/problem+json"),
    (status = 500, body = Problem, content_type = "application/problem+json")))]
pub(super) async fn renew(State(context): State<Shared>) -> Result<Json<Generation>, Problem> {
    generation(&context)?;
    context.machine.renew_generation().map_err(|error| {
        Problem::new(ProblemKind::MonitorFailed, format!("cannot tell the guest of a new generation: {error}"))
    })?;
    generation(&context).map(Json)
}

fn generation(context: &Shared) -> Result<Generation, Problem> {
    context.machine.generation().ok_or_else(|| {
        let detail = "the guest is not told: set `generation_id` in the configuration that the VM is started with";
        Problem::new(ProblemKind::NoSuchResource, detail)
    })
}
