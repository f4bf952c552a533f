//! Signals to `cofferdam`, and the sudden end of either process.

use std::fs;
use std::time::Duration;

use rustix::process::Signal;
use tests::process::{LIMIT, ends, kill, watch};
use tests::sandbox::Sandbox;

#[test]
fn signals_are_the_containers() {
    let sandbox = Sandbox::new();
    let script = "trap 'echo usr1' USR1; trap 'echo term; exit 7' TERM; echo ready; while :; do sleep 0.2; done";
    let running = sandbox.run(&[], "busybox", &["sh", "-c", script]).start();
    running.wait_for("ready\n");
    running.signal(Signal::USR1);
    running.wait_for("usr1\n");
    running.signal(Signal::TERM);
    let ended = running.end();
    assert_eq!((ended.text(), ended.code(), ended.stderr.as_str()), ("ready\nusr1\nterm\n", 7, ""));
}

#[test]
fn a_signal_that_ends_the_program_is_its_exit_code() {
    let sandbox = Sandbox::new();
    // Process 1 has no default actions, its children have.
    let script = "sleep 1000 & trap 'kill -TERM $!' TERM; echo ready; wait; wait $!; exit $?";
    let running = sandbox.run(&[], "busybox", &["sh", "-c", script]).start();
    running.wait_for("ready\n");
    running.signal(Signal::TERM);
    assert_eq!(running.end().code(), 143);
}

#[test]
fn a_run_can_be_ended_before_it_has_begun() {
    let sandbox = Sandbox::new();
    let running = sandbox.run(&[], "busybox", &["sleep", "1000"]).start();
    // From its state directory on, signals are handled; the guest takes much longer to boot.
    wait_for_state(&sandbox);
    running.signal(Signal::TERM);
    let ended = running.end();
    assert_eq!((ended.code(), ended.stderr.as_str()), (143, ""));
}

/// Waits until a run has made its state directory.
fn wait_for_state(sandbox: &Sandbox) {
    use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

    let run = sandbox.run_folder();
    let watch = inotify::init(CreateFlags::empty()).unwrap();
    // The run root is made first, in a folder that is there from the beginning.
    let parent = run.parent().unwrap();
    inotify::add_watch(&watch, parent, WatchFlags::CREATE).unwrap();
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(&watch, &mut buffer);
    while !run.exists() {
        events.next().unwrap();
    }
    inotify::add_watch(&watch, &run, WatchFlags::CREATE).unwrap();
    while fs::read_dir(&run).unwrap().next().is_none() {
        events.next().unwrap();
    }
}

#[test]
fn a_killed_monitor_is_an_error_in_one_line() {
    let sandbox = Sandbox::new();
    let running = sandbox.run(&["--name", "victim"], "busybox", &["sh", "-c", "echo ready >&2; sleep 1000"]).start();
    running.wait_for_error("ready\n");
    kill(running.monitor(), Signal::KILL);
    let ended = running.end();
    assert_eq!((ended.code(), ended.stderr.as_str()), (125, "ready\nerror: the monitor was killed by signal 9\n"));
}

#[test]
fn a_killed_command_leaves_its_container_running() {
    let sandbox = Sandbox::new();
    let running = sandbox.run(&["--name", "orphan"], "busybox", &["sh", "-c", "echo ready; sleep 1000"]).start();
    running.wait_for("ready\n");
    let monitor = watch(running.monitor());
    running.signal(Signal::KILL);
    assert!(ends(&watch(running.pid()), LIMIT));
    assert!(!ends(&monitor, Duration::ZERO), "the monitor went along");
    assert_eq!(sandbox.cofferdam(["ps", "--format", "name,state"]).end().succeeded(), "orphan\trunning\n");
    assert_eq!(sandbox.cofferdam(["exec", "orphan", "echo", "here"]).end().succeeded(), "here\n");
    assert_eq!(sandbox.cofferdam(["rm", "-f", "orphan"]).end().succeeded(), "orphan\n");
    assert!(ends(&monitor, LIMIT), "the monitor lives on");
}

#[test]
fn a_stopped_command_goes_on_where_it_was() {
    let sandbox = Sandbox::new();
    let mut running = sandbox.run(&["-i"], "busybox", &["cat"]).open_input().start();
    running.write("before\n");
    running.wait_for("before\n");
    running.signal(Signal::STOP);
    running.write("after\n");
    running.signal(Signal::CONT);
    running.wait_for("after\n");
    assert!(!ends(&watch(running.pid()), Duration::ZERO));
    assert_eq!(running.end().succeeded(), "before\nafter\n");
}
