//! A monitor that was taken over: enters the jail as a monitor does, and tries to get out of it. For the tests in
//! `jailer/tests/`; no program that is shipped can do this.
//!
//! `inmate start FOLDER FILTER ATTEMPT ARGUMENT…` has one born, as whoever calls it, and tells how it ended; the one that is
//! born gets the same words. It ends with 0 when an attempt was fruitful, and with [`REFUSED`] when it was not.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;

use jailer::cgroup::{Bounds, Group, IoBound, Plan};
use jailer::{Birth, Jail, Limits, Place, Thread, Tree};
use rustix::process::{WaitId, WaitIdOptions, waitid};

mod attempts;
mod served;

use self::served::How;

/// The exit code of who tried and failed.
const REFUSED: u8 = 10;
/// The size of the VM that it would have.
const VCPUS: u8 = 1;
const MEMORY_MIB: u32 = 64;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let result = match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["start", ..] => start(&words[1..]),
        [jailer::birth::BORN, folder, filter, attempt, ref more @ ..] => inmate(folder, filter, attempt, more),
        _ => Err("usage: inmate start FOLDER FILTER ATTEMPT ARGUMENT…".into()),
    };
    result.unwrap_or_else(|error| fail(&*error))
}

/// Ends with what is wrong with the inmate, or with how it was called.
fn fail(error: &dyn std::error::Error) -> ! {
    eprintln!("inmate: {error}");
    std::process::exit(99)
}

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Has an inmate born and waits for its end, as a front end does. `$INMATE_GROUP` names a cgroup for it, in which
/// `$INMATE_THREADS` are allowed, `$INMATE_CPU` microseconds of each tenth of a second, and little of `$INMATE_DISK`; and
/// `$INMATE_NETWORK` names a network namespace.
fn start(words: &[String]) -> Result<ExitCode> {
    let program = std::env::current_exe()?;
    let arguments: Vec<&OsStr> = words.iter().map(OsStr::new).collect();
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    let (mut group, mut folders) = (Group::default(), Vec::new());
    if let Ok(name) = std::env::var("INMATE_GROUP") {
        let threads = std::env::var("INMATE_THREADS").ok().map(|threads| threads.parse()).transpose()?;
        let plan = Plan::new(&name)?;
        folders = plan.folders();
        let disk = std::env::var("INMATE_DISK").ok();
        let io =
            disk.map(|device| IoBound { device, read_bps: Some(1 << 20), write_iops: Some(7), ..IoBound::default() });
        let usual = Bounds::new(VCPUS, MEMORY_MIB);
        let cpu = std::env::var("INMATE_CPU").ok().map(|cpu| cpu.parse()).transpose()?;
        let bounds = Bounds { threads, io: io.into_iter().collect(), cpu_us: cpu.or(usual.cpu_us), ..usual };
        group = plan.make(&bounds)?;
    }
    let network = std::env::var_os("INMATE_NETWORK");
    let birth = Birth {
        program: &program,
        arguments: &arguments,
        streams: [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()],
        descriptors: &[],
        mask: None,
        jail: Some(Place { network: network.as_deref().map(Path::new), cgroup: Some(&group) }),
    };
    let born = birth.start()?;
    let status = waitid(WaitId::PidFd(born.process.as_fd()), WaitIdOptions::EXITED)?.ok_or("it has no status")?;
    jailer::cgroup::remove(&folders)?;
    Ok(match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => ExitCode::from(u8::try_from(code)?),
        (None, Some(signal)) => ExitCode::from(128 + u8::try_from(signal)?),
        (None, None) => return Err("it neither ended nor was killed".into()),
    })
}

/// Enters the jail by the monitor's own way and tries one thing.
fn inmate(folder: &str, filter: &str, attempt: &str, more: &[&str]) -> Result<ExitCode> {
    let served = if filter.starts_with("serving") { Some(How::of(more)?) } else { None };
    let trees = served.as_ref().map(|how| Tree { path: Path::new(how.path), read_only: how.read_only });
    // Whoever is served has a file of the host's as well, as a disk is one.
    let held = served.as_ref().map(|_| File::open(Path::new(folder).with_file_name("held"))).transpose()?;
    let jail = Jail {
        folder: Some(Path::new(folder)),
        user: jailer::identity::user(folder),
        limits: Limits::new(VCPUS, MEMORY_MIB, 0),
        tied: filter == "tied",
        trees: trees.as_slice(),
    };
    let mut entered = jail.enter()?;
    if let (Some(how), Some(held)) = (served, held) {
        let result = match attempt {
            "serve" => served::serve(entered, &how),
            _ => served::break_out(entered, &how, &held),
        };
        return end(result.map_err(|error| io::Error::other(error.to_string())));
    }
    let folder = entered.folder.take().ok_or("there is no folder")?;
    let kind = match filter {
        "none" | "tied" => return end(attempts::attempt(&folder, attempt, more)),
        "event_loop" => Thread::EventLoop,
        "vcpu" => Thread::Vcpu,
        "api" => Thread::Api,
        "disk" => Thread::Disk,
        "fs" => Thread::Fs,
        _ => return Err("the filter is none, tied, event_loop, vcpu, api, disk, fs or serving".into()),
    };
    // Not every filter lets its thread end, or the process: another one does that when it has heard.
    let (sender, told) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            if let Err(error) = jailer::thread(kind) {
                fail(&error);
            }
            // Whoever hears it ends the process.
            let _ = sender.send(attempts::attempt(&folder, attempt, more));
            loop {
                thread::park();
            }
        });
        end(told.recv()?)
    })
}

/// Tells what came of it, and ends the process.
fn end(result: io::Result<String>) -> Result<ExitCode> {
    let (code, told) = match result {
        Ok(told) => (0, told),
        Err(error) => (REFUSED.into(), error.to_string()),
    };
    rustix::io::write(io::stderr(), format!("{told}\n").as_bytes())?;
    // Not by returning from main, which does more than a filter allows.
    std::process::exit(code)
}
