//! `run`: from the command line to a request, from a finished run to an exit code.

use std::env;
use std::path::Path;

use anyhow::bail;
use image::{Image, PullOptions, Reference, Store};
use runtime::env_file;
use runtime::request::RunRequest;
use runtime::run::{Finished, Plan};
use runtime::size::MIB;
use runtime::timeline::{self, RunTimeline, TIMELINE_VARIABLE};

use crate::args::{Run, When};
use crate::progress;
use crate::report;

/// Runs a container to its end, and gives its exit code.
pub fn run(args: Run, started: u64) -> anyhow::Result<u8> {
    args.later.refuse(args.network.as_deref())?;
    let (pull, quiet) = (args.pull, args.quiet);
    let (image, request) = request(args)?;
    let plan = Plan::new(request)?;
    let image = find(&image, pull, quiet)?;
    let mut times = RunTimeline { cli_started: started, image_found: timeline::now(), ..RunTimeline::default() };
    let finished = plan.run(&image, &mut times)?;
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
fn request(args: Run) -> anyhow::Result<(String, RunRequest)> {
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
    };
    Ok((image, request))
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
