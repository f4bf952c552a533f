//! `/v1/vm/balloon`: memory that the guest gives up; and memory that it is given.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::problem::{Body, Problem, ProblemKind};
use super::{Context, Shared};
use crate::model::{Balloon, BalloonUpdate, VmState};

/// How long a guest that runs has time to say how it fares.
const STATISTICS_DEADLINE: Duration = Duration::from_secs(5);

/// Show the balloon, with statistics that are current if the guest gives them within 5 seconds
#[utoipa::path(get, path = "/v1/vm/balloon", tag = "vm", responses(
    (status = 200, body = Balloon),
    (status = 404, body = Problem, content_type = "application/problem+json")))]
pub(super) async fn show(State(context): State<Shared>) -> Result<Json<Balloon>, Problem> {
    balloon(&context)?;
    if context.vm.state().vm == VmState::Running {
        let (sender, heard) = oneshot::channel();
        // Nobody hears it when the client is gone.
        context.machine.ask_statistics(Box::new(move || _ = sender.send(())));
        // Without an answer, what it said last is told.
        let _ = timeout(STATISTICS_DEADLINE, heard).await;
    }
    balloon(&context).map(Json)
}

/// Ask the guest to give memory up, or to take it back
#[utoipa::path(patch, path = "/v1/vm/balloon", tag = "vm", request_body = BalloonUpdate, responses(
    (status = 200, body = Balloon),
    (status = 400, body = Problem, content_type = "application/problem+json"),
    (status = 404, body = Problem, content_type = "application/problem+json")))]
pub(super) async fn update(
    State(context): State<Shared>,
    Body(BalloonUpdate { target_mib }): Body<BalloonUpdate>,
) -> Result<Json<Balloon>, Problem> {
    balloon(&context)?;
    let most = context.config.memory_mib;
    if target_mib > most {
        let detail = format!("target_mib is {target_mib}: give 0 to {most}, which is what the VM has");
        return Err(Problem::new(ProblemKind::InvalidRequest, detail));
    }
    context.machine.set_balloon(target_mib);
    balloon(&context).map(Json)
}

/// Asks the guest to have so much memory.
///
/// # Errors
/// It cannot be as much, or as little.
pub(super) fn resize(context: &Context, memory_mib: u32) -> Result<(), Problem> {
    let least = context.config.memory_mib;
    let most = context.config.memory_max_mib.unwrap_or(least);
    if !(least..=most).contains(&memory_mib) {
        let remedy = if most == least { ", or start the VM with a higher `memory_max_mib`" } else { "" };
        let detail = format!("memory_mib is {memory_mib}: give {least} to {most}{remedy}");
        return Err(Problem::new(ProblemKind::InvalidRequest, detail));
    }
    context.machine.plug(memory_mib - least);
    Ok(())
}

fn balloon(context: &Shared) -> Result<Balloon, Problem> {
    context.machine.balloon().ok_or_else(|| {
        let detail = "the VM has no balloon: set `balloon` in the configuration it is started with";
        Problem::new(ProblemKind::NoSuchResource, detail)
    })
}
