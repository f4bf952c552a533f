//! What verbs show of containers: events, figures, logs, lists and health, and when they end.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::process::Signal;
use tests::process::kill;
use tests::sandbox::Sandbox;

#[test]
fn events_are_those_of_containers_that_start_later_and_again_too() {
    let sandbox = Sandbox::new();
    let image = Sandbox::reference("busybox");
    let create = |name| sandbox.cofferdam(["create", "--name", name, &image, "true"]).end().code();
    assert_eq!(create("late"), 0);
    let all = sandbox.cofferdam(["events", "--format", "name,event"]).start();
    let idle = sandbox.detached("idle", &[], "busybox", &["sleep", "1000"]);
    all.wait_for("idle\tstarted\n");
    // One that is only created holds up nobody.
    assert_eq!(create("never"), 0);
    for _ in 0..2 {
        assert_eq!(sandbox.cofferdam(["start", "late"]).end().succeeded(), "late\n");
        assert_eq!(sandbox.cofferdam(["wait", "late"]).end().succeeded(), "0\n");
    }
    all.wait_for("late\tvm_stopped\nlate\tvm_ready\n");
    let words = ["run", "-d", "--name", "again", "--restart", "on-failure:1", &image, "false"];
    assert_eq!(sandbox.cofferdam(words).end().code(), 0);
    all.wait_for("again\tvm_stopped\nagain\tvm_ready\n");
    assert_eq!(sandbox.cofferdam(["rm", "-f", "late", "never", "again"]).end().succeeded(), "late\nnever\nagain\n");
    all.signal(Signal::KILL);
    drop(idle);
}

#[test]
fn events_begin_and_end_at_times() {
    let sandbox = Sandbox::new();
    let idle = sandbox.detached("idle", &[], "busybox", &["sleep", "1000"]);
    let told = |flags: &[&str]| idle.verb("events", &[flags, &["--format", "event"]].concat(), &[]).end();
    assert_eq!(told(&["--no-follow", "--since", "1h"]).succeeded(), "vm_ready\ncreated\nstarted\n");
    assert_eq!(told(&["--no-follow", "--since", "2100-01-01T00:00:00Z"]).succeeded(), "");
    assert_eq!(told(&["--until", "1h"]).succeeded(), "");
    let soon = SystemTime::now().duration_since(UNIX_EPOCH).unwrap() + Duration::from_secs(3);
    let soon = soon.as_secs().to_string();
    assert_eq!(told(&["--since", "1h", "--until", &soon]).succeeded(), "vm_ready\ncreated\nstarted\n");
}

#[test]
fn what_goes_on_ends_with_its_reader() {
    let sandbox = Sandbox::new();
    let _idle = sandbox.detached("idle", &[], "busybox", &["sleep", "1000"]);
    let first = |verb: &str| {
        let pipe = format!("\"$COFFERDAM\" {verb} | head -n 1");
        sandbox.program("sh", ["-c", &pipe]).end().succeeded().to_owned()
    };
    assert_eq!(first("stats --format name idle"), "idle\n");
    // Nothing happens any more.
    assert_eq!(first("events --from 0 --format name,event"), "idle\tvm_ready\n");
}

#[test]
fn logs_count_lines_and_not_the_pieces_that_they_were_written_in() {
    let sandbox = Sandbox::new();
    let script = "printf x; sleep 0.5; printf 'y\\n'; sleep 0.5; printf 'z\\n'; sleep 1000";
    let talker = sandbox.detached("talker", &[], "busybox", &["sh", "-c", script]);
    let following = talker.verb("logs", &["-f"], &[]).start();
    following.wait_for("xy\nz\n");
    following.signal(Signal::KILL);
    for (tail, shown) in [("1", "z\n"), ("2", "xy\nz\n"), ("all", "xy\nz\n"), ("0", "")] {
        assert_eq!(talker.verb("logs", &["-n", tail], &[]).end().succeeded(), shown, "-n {tail}");
    }
    let check = |timed: &str| {
        let texts: Vec<_> = timed.lines().map(|line| line.split_once("Z ").unwrap().1).collect();
        assert_eq!(texts, ["xy", "z"], "{timed}");
    };
    check(talker.verb("logs", &["-t"], &[]).end().succeeded());
    assert_eq!(talker.verb("kill", &[], &[]).end().succeeded(), "talker\n");
    assert_eq!(talker.verb("wait", &[], &[]).end().succeeded(), "137\n");
    check(talker.verb("logs", &["-t", "-n", "2"], &[]).end().succeeded());
}

#[test]
fn ps_is_filtered_as_in_docker() {
    let sandbox = Sandbox::new();
    let image = Sandbox::reference("busybox");
    for (name, label) in [("one", "a=1"), ("two", "a=2")] {
        let words = ["create", "--name", name, "-l", label, "-l", "both", &image, "true"];
        assert_eq!(sandbox.cofferdam(words).end().code(), 0);
    }
    let id = sandbox.cofferdam(["inspect", "--format", "image_id", "one"]).end().succeeded().trim().to_owned();
    let digits = id.trim_start_matches("sha256:");
    let listed = |filters: &[&str]| {
        let flags = filters.iter().flat_map(|filter| ["-f", filter]);
        let words = ["ps", "-a", "--format", "name"].into_iter().chain(flags);
        sandbox.cofferdam(words).end().succeeded().to_owned()
    };
    assert_eq!(listed(&["name=one", "name=two"]), "two\none\n");
    assert_eq!(listed(&["name=one", "status=running"]), "");
    assert_eq!(listed(&["status=created", "status=running"]), "two\none\n");
    assert_eq!(listed(&["label=both", "label=a=1"]), "one\n");
    assert_eq!(listed(&["label=a=1", "label=a=2"]), "");
    for of_image in [image.as_str(), &digits[..12], &format!("sha256:{}", &digits[..12])] {
        assert_eq!(listed(&[&format!("ancestor={of_image}")]), "two\none\n", "{of_image}");
    }
    assert_eq!(listed(&["ancestor=sha256"]), "");
    let refused = sandbox.cofferdam(["ps", "-f", "status=runing"]).end();
    refused.failed(1, &["\"runing\"", "creating, created, starting, running, paused, restarting, exited"]);
    assert_eq!(sandbox.cofferdam(["rm", "one", "two"]).end().succeeded(), "one\ntwo\n");
}

#[test]
fn a_container_that_its_policy_starts_again_is_restarting_in_between() {
    let sandbox = Sandbox::new();
    let image = Sandbox::reference("busybox");
    let words = ["run", "-d", "--name", "broken", "--restart", "always", &image, "false"];
    assert_eq!(sandbox.cofferdam(words).end().code(), 0);
    // Each wait is twice as long as the one before.
    let seen = "until \"$COFFERDAM\" ps -f status=restarting | grep -q 'Restarting (1)'; do sleep 0.2; done";
    assert_eq!(sandbox.program("sh", ["-c", seen]).end().succeeded(), "");
    assert_eq!(sandbox.cofferdam(["rm", "-f", "broken"]).end().succeeded(), "broken\n");
}

#[test]
fn a_monitor_that_hangs_is_told_and_holds_up_nobody_for_ever() {
    let sandbox = Sandbox::new();
    let stuck = sandbox.detached("stuck", &[], "busybox", &["sleep", "1000"]);
    let well = sandbox.detached("well", &[], "busybox", &["sleep", "1000"]);
    let pid = stuck.inspect("vm.pid").parse().unwrap();
    kill(pid, Signal::STOP);
    let shown = sandbox.cofferdam(["stats", "--no-stream", "--format", "name,pids"]).end();
    assert_eq!(shown.succeeded(), "stuck\t\nwell\t1\n");
    let table = stuck.verb("stats", &["--no-stream"], &[]).end();
    assert!(table.succeeded().contains("-- / --"), "{table:?}");
    let listed = sandbox.cofferdam(["ps", "--format", "name,state"]).end();
    assert_eq!(listed.succeeded(), "well\trunning\nstuck\tunresponsive\n");
    stuck.verb("events", &["--no-follow"], &[]).end().failed(1, &["container stuck", "its monitor does not answer"]);
    kill(pid, Signal::CONT);
    assert_eq!(stuck.inspect("state.status"), "running");
    drop((stuck, well));
}

#[test]
fn a_health_check_can_be_given() {
    let sandbox = Sandbox::new();
    let flags = ["--health-cmd", "test -e /well && echo fine", "--health-interval", "300ms", "--health-retries", "1"];
    let checked = sandbox.detached("checked", &flags, "busybox", &["sleep", "1000"]);
    let told = checked.verb("events", &["--from", "0", "--format", "json"], &[]).start();
    told.wait_for("\"health\":\"unhealthy\"");
    assert_eq!(checked.verb("exec", &[], &["touch", "/well"]).end().succeeded(), "");
    told.wait_for("\"health\":\"healthy\"");
    assert_eq!(checked.inspect("health.status,health.output"), "healthy\tfine");
    told.signal(Signal::KILL);
    let refused = sandbox.run(&["--health-interval", "5"], "busybox", &["true"]).end();
    refused.failed(125, &["\"5\" is not a time of a health check"]);
    let refused = sandbox.run(&["--no-healthcheck", "--health-cmd", "true"], "busybox", &["true"]).end();
    refused.failed(125, &["--no-healthcheck", "cannot be used with"]);
}
