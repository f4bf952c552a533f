//! `stop`, `kill`, `rm`, `wait`, `pause`, `unpause`, `update`.

use std::time::Duration;

use anyhow::bail;
use api::control::EXIT_FAILED;
use api::model::LimitsUpdate;
use hyper::Method;
use runtime::control::{Control, ControlError};
use runtime::record::Record;
use runtime::request::Restart;
use runtime::run::NOTHING;
use runtime::size::{Host, MIB, Sizes};
use runtime::state::{RunRoot, StateError};

use super::{each, each_with};
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
    let code = each_with(&args.names.containers, args.force, async |name, control| {
        control.remove(args.force).await?;
        done(name)
    })?;
    RunRoot::open()?.sweep();
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

/// Changes limits and the restart policy: those of now, and those of the next start.
pub fn update(args: &Update) -> anyhow::Result<u8> {
    if args.cpus.is_none() && args.memory.is_none() && args.pids_limit.is_none() && args.restart.is_none() {
        bail!("there is nothing to change: give --cpus, --memory, --pids-limit or --restart");
    }
    let sizes = Sizes::new(args.cpus, args.memory.map(|bytes| bytes.0), Host::read())?;
    let root = RunRoot::open()?;
    each(&args.names.containers, async |name, control| {
        if let Some(damage) = control.found.record.damage.clone() {
            return Err(StateError::Damaged { id: control.found.record.id.clone(), damage }.into());
        }
        check_restart(args.restart, name, &control)?;
        let update = limits(args, &sizes, name, &control.found.record)?;
        // Nobody would answer for one that waits to be started again.
        if update != LimitsUpdate::default() && control.found.alive && !control.is_restarting() {
            let path = format!("{}/limits", control.path());
            control.client.act(Method::PATCH, &path, Some(&update)).await.map_err(ControlError::from)?;
        }
        root.change(&control.found, |record| {
            let limits = &mut record.container.spec.limits;
            let given = |update: Option<u64>, limit: &mut Option<u64>| {
                if let Some(value) = update {
                    *limit = (value != u64::MAX).then_some(value);
                }
            };
            given(update.memory_bytes, &mut limits.memory_bytes);
            given(update.cpu_quota_us, &mut limits.cpu_quota_us);
            given(update.pids, &mut limits.pids);
            if let Some(Restart(policy)) = args.restart {
                record.restart = policy;
            }
            anyhow::Ok(())
        })?;
        done(name)
    })
}

/// Whether a restart policy can be had by a container as it is.
fn check_restart(restart: Option<Restart>, name: &str, control: &Control<'_>) -> anyhow::Result<()> {
    if !matches!(restart, Some(Restart(Some(_)))) {
        return Ok(());
    }
    if control.found.record.auto_remove {
        bail!("container {name} goes when it ends (--rm), which excludes a restart policy");
    }
    if !control.can_be_restarted() {
        bail!("container {name} runs without a restart policy: stop it, give it one, and start it");
    }
    Ok(())
}

/// The limits that are asked for, as far as the container's VM can have them.
fn limits(args: &Update, sizes: &Sizes, name: &str, record: &Record) -> anyhow::Result<LimitsUpdate> {
    let mut update = LimitsUpdate::default();
    let (most_memory, most_cpus) = (record.memory_mib, record.vcpus);
    if args.memory.is_some() {
        if sizes.memory_limit > u64::from(most_memory) * MIB {
            let mib = sizes.memory_limit / MIB;
            bail!(
                "{mib} MiB are more than the {most_memory} MiB that the VM of container {name} has: make a new container with more"
            );
        }
        update.memory_bytes = Some(sizes.memory_limit);
    }
    if args.cpus.is_some() {
        if sizes.vcpus > most_cpus {
            let cpus = sizes.vcpus;
            bail!(
                "{cpus} CPUs are more than the {most_cpus} that the VM of container {name} has: make a new container with more"
            );
        }
        update.cpu_quota_us = Some(sizes.cpu_quota_us.unwrap_or(u64::MAX));
    }
    if let Some(pids) = args.pids_limit {
        update.pids = Some(pids.0.unwrap_or(u64::MAX));
    }
    Ok(update)
}
