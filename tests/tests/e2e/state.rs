//! State that survives: whoever is killed when, the next verb tells the truth and nothing is left.

use rustix::process::Signal;
use tests::process::{LIMIT, ends, kill, watch};
use tests::sandbox::Sandbox;

#[test]
fn a_killed_monitor_is_told_of_and_can_be_started_again() {
    let sandbox = Sandbox::new();
    let victim = sandbox.detached("victim", &[], "busybox", &["sh", "-c", "echo up; sleep 1000"]);
    let following = victim.verb("logs", &["-f"], &[]).start();
    following.wait_for("up\n");
    let process = watch(sandbox.monitor());
    kill(sandbox.monitor(), Signal::KILL);
    assert!(ends(&process, LIMIT));
    let _ = following.end();
    assert_eq!(victim.inspect("state.status,state.exit_code,state.error"), "exited\t137\tits monitor was killed");
    victim.verb("exec", &[], &["true"]).end().failed(125, &["victim is not running"]);
    assert_eq!(victim.verb("logs", &[], &[]).end().succeeded(), "up\n");
    assert_eq!(victim.verb("start", &[], &[]).end().succeeded(), "victim\n");
    assert_eq!(victim.inspect("state.status"), "running");
}

#[test]
fn a_monitor_that_stands_still_can_be_removed() {
    let sandbox = Sandbox::new();
    let stuck = sandbox.detached("stuck", &[], "busybox", &["sleep", "1000"]);
    let process = watch(sandbox.monitor());
    kill(sandbox.monitor(), Signal::STOP);
    // Removed when it is dropped, and the sandbox checks that nothing is left.
    drop(stuck);
    assert!(ends(&process, LIMIT));
}

#[test]
fn a_command_that_is_killed_anywhere_leaves_the_truth() {
    let sandbox = Sandbox::new();
    let image = Sandbox::reference("busybox");
    // From the first system calls of the command to a running container.
    for milliseconds in [5, 20, 60, 150, 400, 900, 2500] {
        let running = sandbox.cofferdam(["run", "-d", "--name", "early", &image, "sleep", "1000"]).start();
        std::thread::sleep(std::time::Duration::from_millis(milliseconds));
        kill(running.pid(), Signal::KILL);
        let _ = running.end();
        let told = sandbox.cofferdam(["ps", "-a", "--format", "name,state"]).end();
        let states = ["", "early\tcreated\n", "early\tcreating\n", "early\tstarting\n", "early\trunning\n"];
        assert!(states.contains(&told.succeeded()), "after {milliseconds} ms: {told:?}");
        assert_eq!(sandbox.cofferdam(["rm", "-f", "early"]).end().code(), 0, "after {milliseconds} ms");
        assert!(sandbox.leftovers().is_empty(), "after {milliseconds} ms: {:?}", sandbox.leftovers());
    }
}

#[test]
fn one_that_goes_by_itself_is_not_listed() {
    let sandbox = Sandbox::new();
    let image = Sandbox::reference("busybox");
    let id = sandbox.cofferdam(["run", "-d", "--rm", "--name", "brief", &image, "true"]).end();
    let id = id.succeeded().trim().to_owned();
    let waited = sandbox.cofferdam(["wait", &id]).end();
    assert!(waited.text() == "0\n" || waited.stderr.contains("no container"), "{waited:?}");
    assert_eq!(sandbox.cofferdam(["ps", "-a", "--format", "name"]).end().succeeded(), "");
    assert!(sandbox.cofferdam(["prune", "-f"]).end().succeeded().contains("Total reclaimed space"));
}

#[test]
fn what_fails_to_start_stays_and_can_be_looked_at() {
    let sandbox = Sandbox::new();
    let image = Sandbox::reference("busybox");
    sandbox
        .cofferdam(["run", "-d", "--name", "typo", &image, "nothing-like-it"])
        .end()
        .failed(127, &["nothing-like-it"]);
    let told = sandbox.cofferdam(["ps", "-a", "--format", "name,state,exit_code"]).end();
    assert_eq!(told.succeeded(), "typo\texited\t127\n");
    assert_eq!(sandbox.cofferdam(["rm", "typo"]).end().succeeded(), "typo\n");
}
