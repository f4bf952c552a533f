//! `stop`, `kill`, `rm`, `wait`, `pause`, `unpause`, `update`.

use std::time::Duration;

use anyhow::bail;
use api::control::EXIT_FAILED;
use api::model::LimitsUpdate;
use hyper::Method;
use runtime::control::ControlError;
use runtime::run::NOTHING;
use runtime::size::{Host, MIB, Sizes};
use runtime::state::{RunRoot, StateError};

use super::each;
use crate::args::{Kill, Names, Rm, Stop, Update};
use crate::report;

/// Says that something was done with a container, as docker does: by the name that was given.
fn done(name: &str) -> anyhow::Result<()> {
    Ok(report::print(&format!("{name}\n"))?)
}

/// Asks containers to stop.
pub fn stop(args: &Stop) -> anyhow::Result<u8> {
    let grace = u64::try_from(args.time).ok().map(Duration::from_secs);
    each(&args.names.containers, async |name, control| {
        let signal = args.signal.map_or(control.found.record.stop_signal, |signal| signal.0);
        control.stop(signal, grace).await?;
        done(name)
    })
}

/// Sends a signal.
pub fn kill(args: &Kill) -> anyhow::Result<u8> {
    each(&args.names.containers, async |name, control| {
        control.kill(args.signal.0).await?;
        done(name)
    })
}

/// Removes containers.
pub fn remove(args: &Rm) -> anyhow::Result<u8> {
    let root = RunRoot::open()?;
    // With --force, what is gone already is as it was wanted.
    let gone = |name: &String| args.force && matches!(root.find(name), Err(StateError::NoSuchContainer { .. }));
    let names: Vec<_> = args.names.containers.iter().filter(|name| !gone(name)).cloned().collect();
    let code = each(&names, async |name, control| {
        control.remove(args.force).await?;
        done(name)
    })?;
    root.sweep();
    Ok(code)
}

/// Waits until containers have ended.
pub fn wait(args: &Names) -> anyhow::Result<u8> {
    each(&args.containers, async |_, control| {
        let state = control.wait().await?;
        // Who is told that it has ended may start or remove it.
        control.settle().await?;
        let code = state.exit_code.unwrap_or(if state.error.is_some() { EXIT_FAILED } else { 0 });
        done(&code.to_string())
    })
}

/// Stops all processes of containers where they are, or lets them go on.
pub fn pause(args: &Names, paused: bool) -> anyhow::Result<u8> {
    let verb = if paused { "pause" } else { "resume" };
    each(&args.containers, async |name, control| {
        let path = control.living()?;
        control.client.act(Method::POST, &format!("{path}/{verb}"), NOTHING).await.map_err(ControlError::from)?;
        done(name)
    })
}

/// Changes limits: those of now, and those of the next start.
pub fn update(args: &Update) -> anyhow::Result<u8> {
    if args.cpus.is_none() && args.memory.is_none() && args.pids_limit.is_none() {
        bail!("there is nothing to change: give --cpus, --memory or --pids-limit");
    }
    let sizes = Sizes::new(args.cpus, args.memory.map(|bytes| bytes.0), Host::read())?;
    let root = RunRoot::open()?;
    each(&args.names.containers, async |name, mut control| {
        let record = &mut control.found.record;
        let limits = &mut record.container.spec.limits;
        let mut update = LimitsUpdate::default();
        if args.memory.is_some() {
            let most = u64::from(record.memory_mib) * MIB;
            if sizes.memory_limit > most {
                bail!(
                    "{} MiB are more than the {} MiB that the VM of container {name} has: make a new container with more",
                    sizes.memory_limit / MIB,
                    record.memory_mib
                );
            }
            limits.memory_bytes = Some(sizes.memory_limit);
            update.memory_bytes = limits.memory_bytes;
        }
        if args.cpus.is_some() {
            if sizes.vcpus > record.vcpus {
                bail!(
                    "{} CPUs are more than the {} that the VM of container {name} has: make a new container with more",
                    sizes.vcpus,
                    record.vcpus
                );
            }
            limits.cpu_quota_us = sizes.cpu_quota_us;
            update.cpu_quota_us = Some(sizes.cpu_quota_us.unwrap_or(u64::MAX));
        }
        if let Some(pids) = args.pids_limit {
            limits.pids = pids.0;
            update.pids = Some(pids.0.unwrap_or(u64::MAX));
        }
        if control.found.alive {
            let path = format!("{}/limits", control.path());
            control.client.act(Method::PATCH, &path, Some(&update)).await.map_err(ControlError::from)?;
        }
        root.update(&control.found)?;
        done(name)
    })
}
