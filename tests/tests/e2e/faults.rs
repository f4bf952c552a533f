//! Whoever is killed at whichever step, and wherever the disk fills up: the next verb tells the truth, and `rm -f` leaves
//! nothing.
//!
//! The programs are those that users get. strace(1) kills one as it enters the N-th of the system calls that can change
//! anything, for N from 1 until it gets to its end unharmed: there is no step that nobody thought of. A full disk is a real
//! one, of N files or of N pages.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use tests::process::{Ended, LIMIT, ends, watch};
use tests::sandbox::{Sandbox, programs};

/// The system calls by which a front end changes or learns something.
const FRONT_END: &str = "?mkdir,mkdirat,?open,openat,?rename,renameat,renameat2,?unlink,unlinkat,?rmdir,?symlink,symlinkat,\
                         ?link,linkat,write,pwrite64,writev,sendto,sendmsg,fsync,fdatasync,ftruncate,flock,fcntl,bind,listen,\
                         connect,clone,clone3,vfork,execve,kill,pidfd_send_signal,recvfrom";
/// Those by which a monitor builds its VM.
const BUILDING: &str = "openat,fcntl,ioctl,clone,clone3,socketpair,eventfd2,seccomp";
/// Those by which its API serves and records.
const SERVING: &str = "accept4,writev,?rename,renameat,renameat2,?unlink,unlinkat,ftruncate,fdatasync,fsync";
/// More steps than anything here has.
const STEPS_MAX: usize = 400;
/// The exit code of a shell whose program was killed.
const KILLED: i32 = 137;

/// Options of strace for killing at one step of some system calls.
fn injection(calls: &str, step: usize) -> String {
    format!("-qq -o /dev/null --signal=none -e trace={calls} -e inject={calls}:signal=KILL:when={step}")
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

    /// A verb that is killed at this step. Whether it got to its end before.
    fn kill_at(&self, step: usize, words: &[&str]) -> bool {
        let script = format!("strace {} \"$COFFERDAM\" \"$@\"; exit $?", injection(FRONT_END, step));
        let given = ["-c", script.as_str(), "sh"].into_iter().chain(words.iter().copied());
        let ended = self.sandbox.program("sh", given).end();
        if ended.code() != KILLED {
            assert_eq!(ended.code(), 0, "{words:?} without a fault at step {step}: {ended:?}");
        }
        ended.code() != KILLED
    }

    /// What `ps` says of it, which must fit what there is; empty when it is not listed.
    fn state(&self, when: &str) -> String {
        let told = self.verb(&["ps", "-a", "--format", "name,state"]);
        let state = told.succeeded().trim_end().strip_prefix("subject\t").unwrap_or_default().to_owned();
        let known = ["", "created", "creating", "starting", "running", "paused", "exited", "restarting"];
        assert!(known.contains(&state.as_str()), "{when}: {told:?}");
        let lives = !matches!(state.as_str(), "" | "exited" | "created");
        if lives {
            assert!(!self.sandbox.monitors().is_empty(), "{when}: no monitor, but told to be {state}");
        }
        state
    }

    /// Brings it into a state, whatever it is in.
    fn bring_to(&self, wanted: &str, when: &str) {
        let state = self.state(when);
        let started = match state.as_str() {
            "" => Some(self.verb(&self.run_words())),
            "paused" => Some(self.verb(&["unpause", Self::NAME])),
            "running" => None,
            _ => Some(self.verb(&["start", Self::NAME])),
        };
        if let Some(started) = started {
            assert_eq!(started.code(), 0, "{when}: was {state:?}: {started:?}");
        }
        let then: &[&[&str]] = match wanted {
            "exited" => &[&["kill", Self::NAME], &["wait", Self::NAME]],
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
        let ended = (1..STEPS_MAX).find(|step| {
            let when = format!("{words:?} killed at step {step}");
            if before.is_empty() {
                self.remove(&when);
            } else {
                self.bring_to(before, &when);
            }
            let unharmed = self.kill_at(*step, words);
            let state = self.state(&when);
            if state == "running" {
                assert_eq!(self.verb(&["exec", Self::NAME, "true"]).code(), 0, "{when}");
            }
            if words.first() == Some(&"rm") {
                self.remove(&when);
            }
            unharmed
        });
        eprintln!("{words:?}: killed at {} steps", ended.expect("there are fewer steps") - 1);
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

/// A monitor under strace, for one step of some system calls.
fn traced_monitor(sandbox: &Sandbox, calls: &str, step: usize) -> PathBuf {
    let path = sandbox.files().join(format!("monitor-{step}"));
    let (options, monitor) = (injection(calls, step), programs().join("cofferdam-vmm"));
    // Detached, so that the monitor is the process that was started, and its parent is who started it.
    fs::write(&path, format!("#!/bin/sh\nexec strace -D -f {options} {} \"$@\"\n", monitor.display())).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// A whole life whose monitor is killed at some step of some system calls: all of them, one after the other.
fn lives_are_told_of(calls: &str) {
    let subject = Subject::new();
    let ended = (1..STEPS_MAX).find(|step| {
        let when = format!("the monitor killed at step {step} of {calls}");
        let monitor = traced_monitor(&subject.sandbox, calls, *step);
        let verb = |words: &[&str]| subject.sandbox.cofferdam(words).env("COFFERDAM_VMM", &monitor).end();
        let mut unharmed = verb(&subject.run_words()).code() == 0;
        for words in [
            &["exec", Subject::NAME, "true"][..],
            &["update", "--pids-limit", "50", Subject::NAME],
            &["stop", "-t", "0", Subject::NAME],
        ] {
            subject.state(&when);
            unharmed &= verb(words).code() == 0;
        }
        let end = subject.verb(&["inspect", "--format", "state.status,state.error", Subject::NAME]);
        if unharmed {
            assert_eq!(end.succeeded(), "exited\tnull\n", "{when}");
        }
        subject.remove(&when);
        unharmed
    });
    eprintln!("the monitor: killed at {} steps of {calls}", ended.expect("there are fewer steps") - 1);
}

#[test]
fn a_monitor_that_is_killed_at_any_step_of_its_beginning() {
    lives_are_told_of(BUILDING);
}

#[test]
fn a_monitor_that_is_killed_at_any_step_of_its_service() {
    lives_are_told_of(SERVING);
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
    let ended = (1..STEPS_MAX).find(|size| {
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
