//! State that survives: whoever is killed when, the next verb tells the truth and nothing is left.

use std::fs;
use std::time::{Duration, Instant};

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
        std::thread::sleep(Duration::from_millis(milliseconds));
        kill(running.pid(), Signal::KILL);
        let _ = running.end();
        let told = sandbox.cofferdam(["ps", "-a", "--format", "name,state"]).end();
        // It has exited where the command was about to start its monitor.
        let states = ["created", "creating", "starting", "running", "exited"].map(|state| format!("early\t{state}\n"));
        let state = told.succeeded().to_owned();
        assert!(state.is_empty() || states.contains(&state), "after {milliseconds} ms: {told:?}");
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

#[test]
fn a_policy_whose_monitor_stands_still_is_ended_whole() {
    let sandbox = Sandbox::new();
    let flags = ["--restart", "always"];
    let stuck = sandbox.detached("stuck", &flags, "busybox", &["sleep", "1000"]);
    let found = sandbox.monitors();
    assert_eq!(found.len(), 2, "{found:?}");
    let processes: Vec<_> = found.iter().map(|pid| watch(*pid)).collect();
    found.iter().for_each(|pid| kill(*pid, Signal::STOP));
    assert_eq!(stuck.inspect("state.status,state.error"), "running\tits monitor does not answer");
    // Removed when it is dropped, and the sandbox checks that nothing is left.
    drop(stuck);
    assert!(processes.iter().all(|process| ends(process, LIMIT)));
}

#[test]
fn a_policy_in_the_foreground_ends_with_its_reader() {
    let sandbox = Sandbox::new();
    let script = "{ \"$COFFERDAM\" run --restart always --name loop \"$0\" yes; echo $? >&2; } | head -n 2";
    let ended = sandbox.program("sh", ["-c", script, &Sandbox::reference("busybox")]).end();
    assert_eq!((ended.text(), ended.stderr.as_str()), ("y\ny\n", "141\n"));
    assert!(sandbox.monitors().is_empty());
    assert_eq!(sandbox.cofferdam(["rm", "loop"]).end().succeeded(), "loop\n");
}

/// As the first life's for whoever starts it, which would take 30 s.
#[test]
fn the_output_of_later_lives_is_held_for_nobody() {
    let sandbox = Sandbox::new();
    let image = Sandbox::reference("busybox");
    let flags = ["run", "--restart", "on-failure:2", "--name", "thrice"];
    let words = flags.into_iter().chain([image.as_str(), "sh", "-c", "echo life; exit 3"]);
    let first = sandbox.cofferdam(words).end();
    assert_eq!((first.text(), first.code()), ("life\n", 3), "{first:?}");
    let began = Instant::now();
    tests::until("its last end", || sandbox.monitors().is_empty().then_some(()));
    assert!(began.elapsed() < Duration::from_secs(25), "{:?}", began.elapsed());
    assert_eq!(sandbox.cofferdam(["logs", "thrice"]).end().succeeded(), "life\n".repeat(3));
    assert_eq!(sandbox.cofferdam(["rm", "thrice"]).end().succeeded(), "thrice\n");
}

#[test]
fn one_that_waits_to_be_restarted_is_told_of_and_stopped() {
    let sandbox = Sandbox::new();
    let brief = sandbox.detached("brief", &["--restart", "always"], "busybox", &["sh", "-c", "sleep 0.3; exit 3"]);
    let waiting = "until \"$COFFERDAM\" ps --format name,status | grep -q 'brief.Restarting (3)'; do sleep 0.1; done";
    assert_eq!(sandbox.program("sh", ["-c", waiting]).end().succeeded(), "");
    assert_eq!(brief.verb("stop", &[], &[]).end().succeeded(), "brief\n");
    assert!(sandbox.monitors().is_empty());
    assert_eq!(brief.inspect("state.status"), "exited");
}

#[test]
fn a_container_whose_record_is_damaged_can_be_stopped_and_removed() {
    let sandbox = Sandbox::new();
    let image = Sandbox::reference("busybox");
    let id = sandbox.cofferdam(["run", "-d", "--name", "torn", &image, "sleep", "1000"]).end();
    let id = id.succeeded().trim().to_owned();
    fs::write(sandbox.run_folder().join(&id).join("container.json"), b"{").unwrap();
    let told = || sandbox.cofferdam(["ps", "-a", "--no-trunc", "--format", "id,image,state"]).end();
    assert_eq!(told().succeeded(), format!("{id}\t<unreadable>\trunning\n"));
    sandbox.cofferdam(["update", "--pids-limit", "7", &id]).end().failed(1, &["damaged", "remove it with rm"]);
    assert_eq!(sandbox.cofferdam(["stop", "-t", "1", &id]).end().succeeded(), format!("{id}\n"));
    assert_eq!(told().succeeded(), format!("{id}\t<unreadable>\texited\n"));
    sandbox.cofferdam(["start", &id]).end().failed(1, &["damaged", "remove it with rm"]);
    assert_eq!(sandbox.cofferdam(["rm", &id]).end().succeeded(), format!("{id}\n"));
    assert_eq!(told().succeeded(), "");
}

#[test]
fn one_that_is_made_to_go_waits_until_it_has_run() {
    let sandbox = Sandbox::new();
    let image = Sandbox::reference("busybox");
    assert_eq!(sandbox.cofferdam(["create", "--rm", "--name", "once", &image, "echo", "here"]).end().code(), 0);
    // Anything that sweeps leaves it alone.
    assert_eq!(sandbox.cofferdam(["rm", "-f", "another"]).end().succeeded(), "");
    assert_eq!(sandbox.cofferdam(["ps", "-a", "--format", "name,state"]).end().succeeded(), "once\tcreated\n");
    assert_eq!(sandbox.cofferdam(["start", "-a", "once"]).end().succeeded(), "here\n");
    assert_eq!(sandbox.cofferdam(["ps", "-a", "--format", "name"]).end().succeeded(), "");
}

#[test]
fn two_that_remove_the_same_container_both_succeed() {
    let sandbox = Sandbox::new();
    let image = Sandbox::reference("busybox");
    for _ in 0..3 {
        assert_eq!(sandbox.cofferdam(["run", "-d", "--name", "one", &image, "sleep", "1000"]).end().code(), 0);
        let both = [0, 1].map(|_| sandbox.cofferdam(["rm", "-f", "one"]).start());
        for ended in both.map(tests::process::Running::end) {
            assert_eq!((ended.code(), ended.stderr.as_str()), (0, ""));
        }
        assert!(sandbox.leftovers().is_empty(), "{:?}", sandbox.leftovers());
    }
}

#[test]
fn a_detached_start_can_be_cancelled() {
    let sandbox = Sandbox::new();
    let image = Sandbox::reference("busybox");
    let running = sandbox.cofferdam(["run", "-d", "--rm", &image, "sleep", "1000"]).start();
    // The guest takes much longer to boot than a process to be started.
    while sandbox.monitors().is_empty() {
        std::thread::sleep(Duration::from_millis(1));
    }
    running.signal(Signal::TERM);
    let ended = running.end();
    assert_eq!((ended.code(), ended.text(), ended.stderr.as_str()), (143, "", ""));
}

#[test]
fn a_policy_starts_it_again_with_the_limits_of_now() {
    let sandbox = Sandbox::new();
    let script = "cat /sys/fs/cgroup/pids.max; sleep 3";
    let again = sandbox.detached("again", &["--restart", "always"], "busybox", &["sh", "-c", script]);
    assert_eq!(again.verb("update", &["--pids-limit", "7"], &[]).end().succeeded(), "again\n");
    let changed = "until \"$COFFERDAM\" logs again | grep -qx 7; do sleep 0.5; done";
    assert_eq!(sandbox.program("sh", ["-c", changed]).end().succeeded(), "");
}

#[test]
fn output_alone_leaves_standard_input_to_others() {
    let sandbox = Sandbox::new();
    let image = Sandbox::reference("busybox");
    let words = ["create", "-i", "--name", "asks", &image, "sh", "-c", "echo ready; read line; echo got $line"];
    assert_eq!(sandbox.cofferdam(words).end().code(), 0);
    let started = sandbox.cofferdam(["start", "-a", "asks"]).start();
    started.wait_for("ready\n");
    let mut attached = sandbox.cofferdam(["attach", "asks"]).open_input().start();
    attached.write("two\n");
    assert_eq!(started.end().succeeded(), "ready\ngot two\n");
    assert_eq!(attached.end().code(), 0);
    assert_eq!(sandbox.cofferdam(["rm", "asks"]).end().succeeded(), "asks\n");
}
