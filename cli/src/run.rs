//! `run`, `create` and `start`: from the command line to a request, from a finished run to an exit code.

use std::env;
use std::path::Path;

use anyhow::bail;
use api::model::ContainerStatus;
use image::{Image, PullOptions, Reference, Store};
use runtime::control::{Control, ControlError};
use runtime::env_file;
use runtime::request::{RunRequest, Way};
use runtime::run::{Container, Finished, Plan, RunError};
use runtime::signals;
use runtime::size::MIB;
use runtime::state::{RunRoot, StateError};
use runtime::terminal;
use runtime::timeline::{self, RunTimeline, TIMELINE_VARIABLE};

use crate::args::{ContainerFlags, Create, Run, Start, When};
use crate::progress;
use crate::report;

/// Runs a container, to its end unless it is to be left running, and gives its exit code.
pub fn run(args: Run, started: u64) -> anyhow::Result<u8> {
    let Run { detach, container } = args;
    let (image, container) = make(container, if detach { Way::Detached } else { Way::Foreground })?;
    if detach {
        return detached(container, &image);
    }
    attached(container, &image, true, started)
}

/// Makes a container, and shows its id.
pub fn create(args: Create) -> anyhow::Result<u8> {
    let (_, container) = make(args.container, Way::Created)?;
    report::print(&format!("{}\n", container.keep()))?;
    Ok(0)
}

/// Starts containers that were made before. All of them are tried.
pub fn start(args: &Start, started: u64) -> anyhow::Result<u8> {
    let attach = args.attach || args.interactive;
    if attach && args.names.containers.len() > 1 {
        bail!("only one container can be attached to: give one, or leave out -a and -i");
    }
    let mut code = 0;
    for name in &args.names.containers {
        match start_one(name, attach.then_some(args.interactive), started) {
            Ok(ended) => code = ended,
            Err(error) => {
                if let Some(RunError::Cancelled(signal)) = error.downcast_ref() {
                    return Ok(signals::exit_code(*signal));
                }
                if attach {
                    return Err(error);
                }
                report::error(&format!("{error:#}"));
                code = 1;
            }
        }
    }
    Ok(code)
}

/// Starts a container; `attach` says whether to attach, and then whether to its standard input too.
fn start_one(name: &str, attach: Option<bool>, started: u64) -> anyhow::Result<u8> {
    let root = RunRoot::open()?;
    let control = Control::find(&root, name)?;
    // One that has just ended may have a monitor that says goodbye.
    runtime::run::runtime()?.block_on(control.settle())?;
    let (state, record) = match root.take(&control.found) {
        Err(StateError::Alive { id }) => return runs_already(name, &Control::find(&root, &id)?, attach.is_some()),
        taken => taken?,
    };
    let record = record.usable()?;
    let store = Store::open(&Store::default_root())?;
    let id = record.image_id.strip_prefix("sha256:").unwrap_or(&record.image_id);
    let Some(image) = store.find(&id.parse()?)? else {
        return Err(RunError::ImageGone { image: record.image, id: record.id }.into());
    };
    if attach == Some(true) && record.container.stdin && record.container.spec.process.terminal.is_some() {
        terminal::check()?;
    }
    let container = Container::again(record, state)?;
    if let Some(interactive) = attach {
        return attached(container, &image, interactive, started);
    }
    container.start_detached(&image)?;
    report::print(&format!("{name}\n"))?;
    Ok(0)
}

/// A container that cannot be started because it lives: as docker has it, that is what was asked for where it runs.
fn runs_already(name: &str, control: &Control<'_>, attach: bool) -> anyhow::Result<u8> {
    let status = runtime::run::runtime()?.block_on(control.status());
    let running = [ContainerStatus::Starting, ContainerStatus::Running, ContainerStatus::Paused];
    if status.restarting {
        bail!("container {name} is about to be started again by its restart policy: stop it first");
    }
    if status.lingering {
        bail!("container {name} has ended, but its monitor lives on: end it with stop or kill");
    }
    // Its monitor is there and brings it up: another start has come before.
    let comes_up = status.state.status == ContainerStatus::Creating && status.live.is_some();
    if !comes_up && !running.contains(&status.state.status) {
        return Err(ControlError::Busy { name: name.to_owned() }.into());
    }
    if attach {
        return Err(StateError::Alive { id: name.to_owned() }.into());
    }
    report::print(&format!("{name}\n"))?;
    Ok(0)
}

/// Makes a container, and gives it with its image.
fn make(flags: ContainerFlags, way: Way) -> anyhow::Result<(Image, Container)> {
    flags.later.refuse(flags.network.as_deref())?;
    let (pull, quiet) = (flags.pull, flags.quiet);
    let (name, mut request) = request(flags)?;
    request.way = way;
    let plan = Plan::new(request)?;
    let image = find(&name, pull, quiet)?;
    let container = plan.create(&image, &name)?;
    Ok((image, container))
}

fn detached(container: Container, image: &Image) -> anyhow::Result<u8> {
    match container.start_detached(image) {
        Ok(id) => {
            report::print(&format!("{id}\n"))?;
            Ok(0)
        }
        Err(RunError::Failed { message, exit_code }) => {
            report::error(&message);
            Ok(exit_code)
        }
        Err(RunError::Cancelled(signal)) => Ok(signals::exit_code(signal)),
        Err(error) => Err(error.into()),
    }
}

fn attached(container: Container, image: &Image, stdin: bool, started: u64) -> anyhow::Result<u8> {
    let mut times = RunTimeline { cli_started: started, image_found: timeline::now(), ..RunTimeline::default() };
    let finished = container.run(image, stdin, &mut times)?;
    // The exit code stays the container's: what it did counts, whatever becomes of our notes.
    if let Some(path) = env::var_os(TIMELINE_VARIABLE)
        && let Err(error) = times.append(Path::new(&path))
    {
        report::error(&format!("cannot write the timeline {}: {error}", path.display()));
    }
    Ok(exit_code(&finished))
}

/// Tells what there is to tell of a run's end.
fn exit_code(finished: &Finished) -> u8 {
    if let Some(failure) = &finished.failure {
        report::error(failure);
    }
    if let Some(console) = &finished.console {
        report::console(console);
    }
    if let Some(limit) = finished.out_of_memory {
        report::error(&format!(
            "the container ran out of memory at its limit of {} MiB: give it more with -m",
            limit / MIB
        ));
    }
    finished.exit_code
}

/// The image's name, and everything else that was asked for.
fn request(args: ContainerFlags) -> anyhow::Result<(String, RunRequest)> {
    let mut words = args.words.into_iter();
    let Some(image) = words.next() else { bail!("no image was given") };
    let mut environment = Vec::new();
    for file in &args.env_file {
        environment.extend(env_file::read(file)?);
    }
    environment.extend(args.env);
    // Zero means the default in docker, for both sizes.
    let given = |bytes: Option<runtime::size::Bytes>| bytes.map(|bytes| bytes.0).filter(|bytes| *bytes > 0);
    let request = RunRequest {
        name: args.name,
        hostname: args.hostname,
        command: words.collect(),
        entrypoint: args.entrypoint,
        environment,
        working_directory: args.workdir,
        user: args.user,
        groups: args.group_add,
        interactive: args.interactive,
        terminal: args.tty,
        read_only: args.read_only,
        tmpfs: args.tmpfs,
        cpus: args.cpus,
        memory: given(args.memory),
        shm_bytes: given(args.shm_size),
        pids: args.pids_limit,
        ulimits: args.ulimit,
        capabilities_added: args.cap_add,
        capabilities_dropped: args.cap_drop,
        security: args.security_opt,
        kernel: args.kernel,
        way: Way::default(),
        remove: args.rm,
        restart: args.restart,
        stop_signal: args.stop_signal,
        labels: args.label.iter().map(|label| labelled(label)).collect(),
        no_healthcheck: args.no_healthcheck,
        health: args.health.request(),
    };
    Ok((image, request))
}

/// A label's name and value.
fn labelled(text: &str) -> (String, String) {
    let (name, value) = text.split_once('=').unwrap_or((text, ""));
    (name.to_owned(), value.to_owned())
}

/// The image from the store, or from where its name says.
fn find(name: &str, when: When, quiet: bool) -> anyhow::Result<Image> {
    let reference: Reference = name.parse()?;
    let store = Store::open(&Store::default_root())?;
    if when != When::Always
        && let Some(image) = store.find(&reference)?
    {
        return Ok(image);
    }
    if when == When::Never {
        bail!("the image {name} is not in the store: pull it, or leave out --pull never");
    }
    Ok(progress::show(quiet, |progress| store.pull(&reference, &PullOptions::default(), progress))?)
}
