//! Whoever is killed at whichever step, and wherever the disk fills up: the next verb tells the truth, and `rm -f` leaves
//! nothing.
//!
//! The programs are those that users get. strace(1) first lists the system calls of a program that can change anything, and
//! then kills it as it enters each of them, one after the other: there is no step that nobody thought of. A full disk is a
//! real one, of N files or of N pages.
//!
//! That takes half an hour in the lab. `COFFERDAM_FAULTS=all` asks for it; without it each fifth step is tried.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use tests::process::{Ended, LIMIT, ends, watch};
use tests::sandbox::{Sandbox, programs};

/// The system calls by which a front end changes or learns something.
const FRONT_END: &str = "?mkdir,mkdirat,?open,openat,?rename,renameat,renameat2,?unlink,unlinkat,?rmdir,?symlink,symlinkat,\
                         ?link,linkat,write,pwrite64,writev,sendto,sendmsg,fsync,fdatasync,ftruncate,flock,fcntl,bind,listen,\
                         connect,clone,clone3,vfork,kill,pidfd_send_signal";
/// Those by which a monitor begins, serves and records.
const MONITOR: &str = "openat,fcntl,clone3,socketpair,accept4,writev,?rename,renameat,renameat2,?unlink,unlinkat,ftruncate,\
                       fdatasync,fsync,seccomp";
/// Larger disks than anything here needs.
const SIZES_MAX: usize = 100;
/// The exit code of a shell whose program was killed.
const KILLED: i32 = 137;

/// How far apart the steps are that are tried.
fn stride() -> usize {
    let all = std::env::var(tests::FAULTS_VARIABLE).is_ok_and(|value| value == "all");
    if all { 1 } else { 5 }
}

/// The N-th call of one system call.
type Step = (String, usize);

/// The steps that strace has listed. It counts the calls of each thread for itself: of those that have the same number, the
/// first one is meant.
fn steps(trace: &Path) -> Vec<Step> {
    let text = fs::read_to_string(trace).expect("strace has made a list");
    let (mut counts, mut steps) = (BTreeMap::new(), Vec::new());
    for line in text.lines() {
        let (thread, call) = match line.split_once(' ') {
            Some((thread, call)) if thread.bytes().all(|byte| byte.is_ascii_digit()) => (thread, call.trim_start()),
            _ => ("", line),
        };
        let Some((name, _)) = call.split_once('(') else { continue };
        if name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            let count = counts.entry((thread.to_owned(), name.to_owned())).or_insert(0);
            *count += 1;
            let step = (name.to_owned(), *count);
            if !steps.contains(&step) {
                steps.push(step);
            }
        }
    }
    steps
}

/// Options of strace: to kill at a step, or to list the steps of these system calls in a file.
fn options(calls: &str, step: Option<&Step>, trace: &Path) -> String {
    match step {
        Some((call, number)) => {
            format!("-qq -o /dev/null --signal=none -e trace={call} -e inject={call}:signal=KILL:when={number}")
        }
        None => format!("-qq -o {} --signal=none -e trace={calls}", trace.display()),
    }
}

/// A container in a place of its own, and what is done to it.
struct Subject {
    sandbox: Sandbox,
    image: String,
}

impl Subject {
    const NAME: &str = "subject";

    fn new() -> Self {
        Self { sandbox: Sandbox::new(), image: Sandbox::reference("busybox") }
    }

    fn verb(&self, words: &[&str]) -> Ended {
        self.sandbox.cofferdam(words).end()
    }

    fn run_words(&self) -> [&str; 8] {
        ["run", "-d", "--name", Self::NAME, &self.image, "sh", "-c", "echo up; sleep 1000"]
    }

    fn trace(&self) -> PathBuf {
        self.sandbox.files().join("trace")
    }

    /// A verb that is killed at this step; without one, its steps are listed.
    fn kill_at(&self, step: Option<&Step>, words: &[&str]) {
        let script = format!("strace {} \"$COFFERDAM\" \"$@\"; exit $?", options(FRONT_END, step, &self.trace()));
        let given = ["-c", script.as_str(), "sh"].into_iter().chain(words.iter().copied());
        let ended = self.sandbox.program("sh", given).end();
        if step.is_none() || ended.code() != KILLED {
            assert_eq!(ended.code(), 0, "{words:?} at {step:?}: {ended:?}");
        }
    }

    /// What `ps` says of it, which must fit what there is; empty when it is not listed.
    fn state(&self, when: &str) -> String {
        let told = self.told(when);
        let lives = |state: &str| !matches!(state, "" | "exited" | "created");
        if !lives(&told) || !self.sandbox.monitors().is_empty() {
            return told;
        }
        // One that was killed needs a moment to be gone, and may have gone since it was asked for.
        let told = self.told(when);
        assert!(!lives(&told), "{when}: no monitor, but told to be {told}");
        told
    }

    fn told(&self, when: &str) -> String {
        let told = self.verb(&["ps", "-a", "--format", "name,state"]);
        let state = told.succeeded().trim_end().strip_prefix("subject\t").unwrap_or_default().to_owned();
        let known = ["", "created", "creating", "starting", "running", "paused", "exited", "unresponsive"];
        assert!(known.contains(&state.as_str()), "{when}: {told:?}");
        state
    }

    /// Brings it into a state, whatever it is in.
    fn bring_to(&self, wanted: &str, when: &str) {
        // Who was killed may have started a monitor, which goes on.
        let settled = "until \"$COFFERDAM\" ps -a --format state | grep -vqE '^(creating|starting)$' ||
                       [ -z \"$(\"$COFFERDAM\" ps -aq)\" ]; do sleep 0.2; done";
        assert_eq!(self.sandbox.program("sh", ["-c", settled]).end().code(), 0, "{when}");
        let state = self.state(when);
        let started = match state.as_str() {
            "" => Some(self.verb(&self.run_words())),
            "paused" => Some(self.verb(&["unpause", Self::NAME])),
            "running" => None,
            _ if wanted == "exited" => None,
            _ => Some(self.verb(&["start", Self::NAME])),
        };
        if let Some(started) = started {
            assert_eq!(started.code(), 0, "{when}: was {state:?}: {started:?}");
        }
        let then: &[&[&str]] = match wanted {
            "exited" if state != "exited" => &[&["kill", Self::NAME], &["wait", Self::NAME]],
            "paused" => &[&["pause", Self::NAME]],
            _ => &[],
        };
        for words in then {
            assert_eq!(self.verb(words).code(), 0, "{when}: {words:?}");
        }
    }

    /// Removes it, and looks for what is left.
    fn remove(&self, when: &str) {
        let removed = self.verb(&["rm", "-f", Self::NAME]);
        assert_eq!(removed.code(), 0, "{when}: {removed:?}");
        for process in self.sandbox.processes() {
            // Who watches a monitor goes right after it.
            assert!(ends(&watch(process), LIMIT), "{when}: process {process} is left");
        }
        assert!(self.sandbox.leftovers().is_empty(), "{when}: {:?}", self.sandbox.leftovers());
    }

    /// Kills a verb at each of its steps, each time from the same state.
    fn survives(&self, before: &str, words: &[&str]) {
        let prepare = |when: &str| if before.is_empty() { self.remove(when) } else { self.bring_to(before, when) };
        prepare("at first");
        self.kill_at(None, words);
        let steps = steps(&self.trace());
        assert!(steps.len() > 3, "{steps:?}");
        for step in steps.iter().skip(stride() / 2).step_by(stride()) {
            let when = format!("{words:?} killed at {step:?}");
            prepare(&when);
            self.kill_at(Some(step), words);
            if self.state(&when) == "running" {
                assert_eq!(self.verb(&["exec", Self::NAME, "true"]).code(), 0, "{when}");
            }
            if words.first() == Some(&"rm") {
                self.remove(&when);
            }
        }
        eprintln!("{words:?}: killed at each {}. of {} steps", stride(), steps.len());
        self.remove("at the end");
    }
}

#[test]
fn a_run_that_is_killed_at_any_step() {
    let subject = Subject::new();
    subject.survives("", &subject.run_words());
}

#[test]
fn a_start_that_is_killed_at_any_step() {
    Subject::new().survives("exited", &["start", Subject::NAME]);
}

#[test]
fn a_removal_that_is_killed_at_any_step() {
    Subject::new().survives("running", &["rm", "-f", Subject::NAME]);
}

#[test]
fn an_end_that_is_killed_at_any_step() {
    Subject::new().survives("running", &["stop", "-t", "0", Subject::NAME]);
    Subject::new().survives("running", &["kill", Subject::NAME]);
}

#[test]
fn verbs_that_are_killed_at_any_step_do_a_running_container_no_harm() {
    let subject = Subject::new();
    for words in [
        &["exec", Subject::NAME, "true"][..],
        &["pause", Subject::NAME],
        &["update", "--pids-limit", "50", Subject::NAME],
        &["kill", "-s", "URG", Subject::NAME],
        &["cp", "/etc/hostname", "subject:/root/copied"],
        &["logs", Subject::NAME],
        &["inspect", Subject::NAME],
    ] {
        subject.survives("running", words);
    }
    subject.survives("paused", &["unpause", Subject::NAME]);
}

/// A monitor under strace: killed at a step, or its steps listed.
fn traced_monitor(subject: &Subject, step: Option<&Step>) -> PathBuf {
    let path = subject.sandbox.files().join("monitor");
    let (options, monitor) = (options(MONITOR, step, &subject.trace()), programs().join("cofferdam-vmm"));
    // Detached, so that the monitor is the process that was started, and its parent is who started it.
    fs::write(&path, format!("#!/bin/sh\nexec strace -D -f {options} {} \"$@\"\n", monitor.display())).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn a_monitor_that_is_killed_at_any_step() {
    let subject = Subject::new();
    let live = |step: Option<&Step>| {
        let when = format!("the monitor killed at {step:?}");
        let monitor = traced_monitor(&subject, step);
        let verb = |words: &[&str]| subject.sandbox.cofferdam(words).env("COFFERDAM_VMM", &monitor).end();
        let mut unharmed = verb(&subject.run_words()).code() == 0;
        for words in [&["exec", Subject::NAME, "true"][..], &["stop", "-t", "0", Subject::NAME]] {
            subject.state(&when);
            unharmed &= verb(words).code() == 0;
        }
        if unharmed {
            assert_eq!(subject.state(&when), "exited", "{when}");
        }
        subject.remove(&when);
        unharmed
    };
    assert!(live(None), "without a fault");
    let steps: Vec<_> = steps(&subject.trace()).into_iter().step_by(stride()).collect();
    let survived: Vec<_> = steps.iter().filter(|step| live(Some(step))).collect();
    // The last steps come when everybody has been answered, and some not every time.
    assert!(survived.len() < steps.len(), "no step is one: {steps:?}");
    eprintln!("the monitor: killed at {} of {} steps", steps.len() - survived.len(), steps.len());
}

/// A file system for the state, limited by a mount option. Dropping it unmounts it.
struct Disk<'a>(&'a Sandbox);

impl<'a> Disk<'a> {
    fn mount(sandbox: &'a Sandbox, option: &str) -> Self {
        let (folder, options) = (sandbox.run_folder(), format!("mode=700,{option}"));
        fs::create_dir_all(&folder).unwrap();
        let words = ["-t", "tmpfs", "-o", &options, "tmpfs", folder.to_str().unwrap()];
        assert_eq!(sandbox.program("mount", words).end().code(), 0, "{option}");
        Self(sandbox)
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        let run = self.0.run_folder();
        let ended = self.0.program("umount", [run.to_str().unwrap()]).end();
        assert!(std::thread::panicking() || ended.code() == 0, "{ended:?}");
    }
}

/// Whole lives on disks that are larger and larger, until one is large enough. `option` makes one of a size.
fn lives_on_small_disks(option: impl Fn(usize) -> String) {
    let subject = Subject::new();
    let ended = (1..SIZES_MAX).step_by(stride()).find(|size| {
        let when = option(*size);
        let disk = Disk::mount(&subject.sandbox, &when);
        let mut unharmed = true;
        for words in [
            &subject.run_words()[..],
            &["exec", Subject::NAME, "sh", "-c", "seq 1 2000 > /proc/1/fd/1"],
            &["update", "--pids-limit", "50", Subject::NAME],
            &["stop", "-t", "0", Subject::NAME],
            &["start", Subject::NAME],
            &["kill", Subject::NAME],
        ] {
            let ended = subject.verb(words);
            if ended.code() != 0 {
                let errors = ended.stderr.lines().filter(|line| line.starts_with("error: ")).count();
                assert_eq!(errors, 1, "{when}: {words:?}: {ended:?}");
            }
            unharmed &= ended.code() == 0;
            subject.state(&when);
        }
        let removed = subject.verb(&["rm", "-f", Subject::NAME]);
        assert_eq!(removed.code(), 0, "{when}: {removed:?}");
        let names = subject.sandbox.run_folder().join("names");
        let left = subject.sandbox.leftovers();
        let left: Vec<_> = left.iter().filter(|left| !left.starts_with("mount ")).collect();
        assert!(left.is_empty(), "{when}: {left:?}, names: {:?}", fs::read_dir(names));
        drop(disk);
        unharmed
    });
    eprintln!("whole lives need {}", option(ended.expect("there is a disk that is large enough")));
}

#[test]
fn a_disk_that_runs_out_of_files_at_any_step() {
    lives_on_small_disks(|files| format!("nr_inodes={files}"));
}

#[test]
fn a_disk_that_runs_out_of_pages_at_any_step() {
    lives_on_small_disks(|pages| format!("size={}k", pages * 4));
}
