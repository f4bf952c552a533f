//! `inspect` and `port`.

use std::collections::BTreeMap;

use api::config::RestartPolicy;
use api::model::{Container, ContainerState, Health, Vm};
use runtime::control::{ANSWER, Control};
use runtime::holders::{self, InForce};
use runtime::record::Record;
use runtime::state::RunRoot;
use serde::Serialize;
use tokio::time::timeout;

use crate::args::{Inspect, Port};
use crate::report;
use crate::show::json;
use crate::when::rfc3339;

/// Everything that is known of a container.
#[derive(Debug, Serialize)]
struct Known {
    id: String,
    name: Option<String>,
    created: String,
    image: String,
    image_id: String,
    labels: BTreeMap<String, String>,
    state: ContainerState,
    health: Option<Health>,
    state_directory: String,
    auto_remove: bool,
    restart: Option<RestartPolicy>,
    stop_signal: u8,
    /// What its monitor runs.
    container: api::config::ContainerConfig,
    /// What its monitor says of it, while there is one.
    live: Option<Container>,
    /// The VM, while there is one.
    vm: Option<Vm>,
    /// The jail that its monitor is in, as the kernel tells it, while there is one.
    jail: Option<InForce>,
}

/// Shows everything that is known of containers.
pub fn inspect(args: &Inspect) -> anyhow::Result<u8> {
    let root = RunRoot::open()?;
    let mut known = Vec::new();
    let mut code = 0;
    runtime::run::runtime()?.block_on(async {
        for name in &args.names.containers {
            match Control::find(&root, name) {
                Ok(control) => known.push(look(&control).await),
                Err(error) => {
                    report::error(&format!("{:#}", anyhow::Error::from(error)));
                    code = super::FAILED;
                }
            }
        }
    });
    report::print(&args.format.show(&known, |known| json(known).unwrap_or_default())?)?;
    Ok(code)
}

async fn look(control: &Control<'_>) -> Known {
    let status = control.status().await;
    let vm = match status.live {
        Some(_) => timeout(ANSWER, control.client.get("/v1/vm")).await.ok().and_then(Result::ok),
        None => None,
    };
    let Record { id, name, image, image_id, created_ns, auto_remove, restart, stop_signal, labels, container, .. } =
        status.record;
    Known {
        id,
        name,
        created: rfc3339(created_ns),
        image,
        image_id,
        labels: labels.into_iter().collect(),
        state: status.state,
        health: status.health,
        state_directory: control.found.folder.display().to_string(),
        auto_remove,
        restart,
        stop_signal,
        container,
        live: status.live,
        vm,
        jail: holders::jail(&control.found.folder),
    }
}

/// Shows which ports are published: none, since containers have no network to publish them on.
pub fn port(args: &Port) -> anyhow::Result<u8> {
    let root = RunRoot::open()?;
    Control::find(&root, &args.container)?.living()?;
    Ok(0)
}
