//! `/v1/vm`, `/v1/events` and `/v1/metrics`: the VM itself.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::body::Body as HttpBody;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use protocol::{Answer, Call};
use serde::Deserialize;

use super::guest::unfit;
use super::problem::{Body, Problem, ProblemKind, Query};
use super::{Context, DeviceFigures, Shared, memory};
use crate::config::VmConfig;
use crate::model::{ContainerStatus, Event, EventKind, HostStats, Vm, VmState, VmUpdate};

/// Show the VM
#[utoipa::path(get, path = "/v1/vm", tag = "vm", responses((status = 200, body = Vm)))]
pub(super) async fn show(State(context): State<Shared>) -> Json<Vm> {
    Json(shown(&context))
}

/// Change the VM, as far as its guest goes along
#[utoipa::path(patch, path = "/v1/vm", tag = "vm", request_body = VmUpdate, responses(
    (status = 200, body = Vm),
    (status = "4XX", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn update(
    State(context): State<Shared>,
    Body(VmUpdate { memory_mib, vcpus }): Body<VmUpdate>,
) -> Result<Json<Vm>, Problem> {
    let most = context.config.vcpus;
    if let Some(vcpus) = vcpus.filter(|vcpus| !(1..=most).contains(vcpus)) {
        let detail = format!("vcpus is {vcpus}: give 1 to {most}, which is what the VM was started with");
        return Err(Problem::new(ProblemKind::InvalidRequest, detail));
    }
    if let Some(memory_mib) = memory_mib {
        memory::resize(&context, memory_mib)?;
    }
    if let Some(vcpus) = vcpus {
        use_vcpus(&context, vcpus).await?;
    }
    Ok(Json(shown(&context)))
}

/// Has the guest use so many vCPUs.
async fn use_vcpus(context: &Shared, asked: u8) -> Result<(), Problem> {
    let vm = context.vm.state().vm;
    if vm != VmState::Running {
        return Err(Problem::state(format!("the VM is {}", word(vm))));
    }
    let most = context.config.vcpus;
    let called = context.guest.send(Call::SetCpus { online: asked })?;
    let context = Arc::clone(context);
    let noted = called.settle(move |answer| match answer? {
        Answer::Cpus(used) if (1..=most).contains(&used) => {
            context.vm.change(|state| state.vcpus = Some(used));
            Ok(used)
        }
        _ => Err(unfit()),
    });
    let used = noted.await?;
    if used == asked {
        return Ok(());
    }
    let detail =
        format!("the guest uses {used} vCPUs and not {asked}: its kernel did not let go of one, or take one in");
    Err(Problem::new(ProblemKind::GuestRefused, detail))
}

fn shown(context: &Context) -> Vm {
    let devices = context.machine.devices();
    let plugged = context.machine.plugged();
    let config = &context.config;
    let state = context.vm.state();
    Vm {
        state: state.vm,
        pid: context.machine.pid(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: config.kernel.display().to_string(),
        vcpus: state.vcpus.unwrap_or(config.vcpus),
        vcpus_max: config.vcpus,
        memory_mib: config.memory_mib + plugged.plugged_mib,
        memory_requested_mib: config.memory_mib + plugged.requested_mib,
        memory_max_mib: config.memory_max_mib.unwrap_or(config.memory_mib),
        devices,
        boot: state.boot,
    }
}

/// Show the VM's configuration as it was booted
#[utoipa::path(get, path = "/v1/vm/config", tag = "vm", responses((status = 200, body = Object)))]
pub(super) async fn config(State(context): State<Shared>) -> Json<VmConfig> {
    Json(context.config.clone())
}

/// Stop all vCPUs where they are
#[utoipa::path(post, path = "/v1/vm/pause", tag = "vm",
    responses((status = 204), (status = 409, body = Problem, content_type = "application/problem+json")))]
pub(super) async fn pause(State(context): State<Shared>) -> Result<StatusCode, Problem> {
    switch(&context, VmState::Running, VmState::Paused)
}

/// Let all vCPUs go on
#[utoipa::path(post, path = "/v1/vm/resume", tag = "vm",
    responses((status = 204), (status = 409, body = Problem, content_type = "application/problem+json")))]
pub(super) async fn resume(State(context): State<Shared>) -> Result<StatusCode, Problem> {
    switch(&context, VmState::Paused, VmState::Running)
}

fn switch(context: &Shared, from: VmState, to: VmState) -> Result<StatusCode, Problem> {
    context.vm.change(|state| {
        if state.vm != from {
            return Err(Problem::state(format!("the VM is {}", word(state.vm))));
        }
        state.vm = to;
        // Asked for and not waited for: each vCPU stops as soon as it leaves the guest.
        if to == VmState::Paused {
            context.machine.pause();
            state.tell(EventKind::VmPaused);
        } else {
            context.machine.resume();
            state.tell(EventKind::VmResumed);
        }
        Ok(StatusCode::NO_CONTENT)
    })
}

fn word(state: VmState) -> &'static str {
    match state {
        VmState::Booting => "booting",
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Stopping => "stopping",
    }
}

/// End the VM and everything in it
#[utoipa::path(post, path = "/v1/vm/shutdown", tag = "vm", responses((status = 202)))]
pub(super) async fn shutdown(State(context): State<Shared>) -> StatusCode {
    context.stopped.store(true, Ordering::Relaxed);
    context.stop.send_replace(true);
    StatusCode::ACCEPTED
}

/// The end of the guest's console
#[utoipa::path(get, path = "/v1/vm/console", tag = "vm", responses((status = 200, content_type = "text/plain")))]
pub(super) async fn console(State(context): State<Shared>) -> Response {
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    let text = String::from_utf8_lossy(&context.machine.console()).into_owned();
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

/// Which events are wanted.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct EventQuery {
    /// The number of the first one; those that are not kept any more are left out.
    since: u64,
    /// Whether to go on until the VM ends.
    follow: bool,
}

/// What happened, one JSON document a line
#[utoipa::path(get, path = "/v1/events", tag = "vm", params(EventQuery),
    responses((status = 200, body = Event, content_type = "application/x-ndjson")))]
pub(super) async fn events(
    State(context): State<Shared>,
    Query(query): Query<EventQuery>,
) -> Result<Response, Problem> {
    let events = futures_util::stream::unfold((context, Some(query.since)), move |(context, since)| async move {
        let since = since?;
        let found = context.vm.until(|state| {
            let events = state.events_from(since);
            (!events.is_empty() || !query.follow).then_some(events)
        });
        let found = found.await;
        let last = found.last()?;
        let over = !query.follow || last.kind == EventKind::VmStopped;
        let next = (!over).then_some(last.sequence + 1);
        Some((lines(&found), (context, next)))
    });
    let kind = HeaderValue::from_static("application/x-ndjson");
    Ok(([(header::CONTENT_TYPE, kind)], HttpBody::from_stream(events)).into_response())
}

fn lines(events: &[Event]) -> io::Result<String> {
    let mut text = String::new();
    for event in events {
        text.push_str(&serde_json::to_string(event)?);
        text.push('\n');
    }
    Ok(text)
}

/// Figures for Prometheus
#[utoipa::path(get, path = "/v1/metrics", tag = "vm", responses((status = 200, content_type = "text/plain")))]
pub(super) async fn metrics(State(context): State<Shared>) -> Response {
    let host = host_stats(&context);
    let (up, running, vcpus) = {
        let state = context.vm.state();
        let running = state.containers.values().filter(|entry| entry.state.status == ContainerStatus::Running);
        (u64::from(state.vm == VmState::Running), running.count() as u64, state.vcpus)
    };
    let memory_bytes = u64::from(context.config.memory_mib + context.machine.plugged().plugged_mib) << 20;
    let processes = u64::from(context.next_process.load(Ordering::Relaxed) - 1);
    let figures: [(&str, &str, &str, u64); 7] = [
        ("cofferdam_vm_up", "gauge", "Whether the agent takes requests and the vCPUs run.", up),
        ("cofferdam_vm_vcpus", "gauge", "Number of vCPUs in use.", vcpus.unwrap_or(context.config.vcpus).into()),
        ("cofferdam_vm_memory_bytes", "gauge", "Guest memory.", memory_bytes),
        ("cofferdam_containers_running", "gauge", "Containers whose program runs.", running),
        ("cofferdam_processes_executed_total", "counter", "Processes asked for besides first ones.", processes),
        ("cofferdam_monitor_cpu_microseconds_total", "counter", "CPU time of monitor and vCPUs.", host.cpu_us),
        ("cofferdam_monitor_resident_bytes", "gauge", "Resident memory, the guest's included.", host.resident_bytes),
    ];
    let mut text: String = figures
        .iter()
        .map(|(name, kind, help, value)| format!("# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n"))
        .collect();
    text.push_str(&device_figures(&context.machine.figures()));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4");
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

/// What devices have counted, each name once with everybody who counts it.
fn device_figures(devices: &[DeviceFigures]) -> String {
    let mut by_name = BTreeMap::<&str, Vec<(&DeviceFigures, u64)>>::new();
    for device in devices {
        for (name, value) in &device.figures {
            by_name.entry(name).or_default().push((device, *value));
        }
    }
    let mut text = String::new();
    for (name, values) in by_name {
        let words = name.replace('_', " ");
        let name = format!("cofferdam_device_{name}");
        // Some go up and down: only the device knows. Writing to a string does not fail.
        let _ =
            writeln!(text, "# HELP {name} Of each device since the VM began, or now: {words}.\n# TYPE {name} untyped");
        for (DeviceFigures { kind, index, .. }, value) in values {
            let _ = writeln!(text, "{name}{{device=\"{kind}\",index=\"{index}\"}} {value}");
        }
    }
    text
}

/// What this process costs: its CPU clock (clock_gettime(2)) and its resident memory.
pub(super) fn host_stats(context: &Context) -> HostStats {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let (seconds, nanoseconds) = (u64::try_from(time.tv_sec), u64::try_from(time.tv_nsec));
    let cpu_us = seconds.unwrap_or(0) * 1_000_000 + nanoseconds.unwrap_or(0) / 1000;
    HostStats { cpu_us, resident_bytes: context.machine.resident_bytes() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_is_described_once_and_told_for_each_device_that_has_it() {
        let devices = [
            DeviceFigures { kind: "vsock", index: 0, figures: vec![("events", 7), ("throttled", 0)] },
            DeviceFigures { kind: "block", index: 1, figures: vec![("events", 9), ("read_bytes", 512)] },
        ];
        let text = device_figures(&devices);
        let lines: Vec<_> = text.lines().filter(|line| !line.starts_with("# HELP")).collect();
        let expected = [
            "# TYPE cofferdam_device_events untyped",
            r#"cofferdam_device_events{device="vsock",index="0"} 7"#,
            r#"cofferdam_device_events{device="block",index="1"} 9"#,
            "# TYPE cofferdam_device_read_bytes untyped",
            r#"cofferdam_device_read_bytes{device="block",index="1"} 512"#,
            "# TYPE cofferdam_device_throttled untyped",
            r#"cofferdam_device_throttled{device="vsock",index="0"} 0"#,
        ];
        assert_eq!(lines, expected);
        assert_eq!(text.matches("# HELP").count(), 3);
    }
}
