//! The life of a container that outlives the command that made it.

use tests::sandbox::Sandbox;

const TICKING: &str = "trap 'echo bye; exit 5' TERM; echo up; echo oops >&2; while :; do sleep 0.2; done";

#[test]
fn a_container_lives_from_create_to_rm() {
    let sandbox = Sandbox::new();
    let image = Sandbox::reference("busybox");
    let id = sandbox.cofferdam(["create", "--name", "one", "-l", "a=b", &image, "sh", "-c", TICKING]).end();
    let id = id.succeeded().trim().to_owned();
    let state = |all| sandbox.cofferdam(["ps", all, "--format", "name,state,exit_code"]).end().succeeded().to_owned();
    assert_eq!((state("-a").as_str(), state("--no-trunc").as_str()), ("one\tcreated\t\n", ""));
    for _ in 0..2 {
        assert_eq!(sandbox.cofferdam(["start", "one"]).end().succeeded(), "one\n");
        assert_eq!(state("-a"), "one\trunning\t\n");
        // As docker has it, to start what runs is no error; to remove it is one.
        assert_eq!(sandbox.cofferdam(["start", "one"]).end().succeeded(), "one\n");
        sandbox.cofferdam(["rm", "one"]).end().failed(1, &["is running", "stop it first"]);
        let waiting = sandbox.cofferdam(["wait", &id[..8]]).start();
        assert_eq!(sandbox.cofferdam(["stop", &id[..12]]).end().succeeded(), format!("{}\n", &id[..12]));
        assert_eq!(waiting.end().succeeded(), "5\n");
        assert_eq!(state("-a"), "one\texited\t5\n");
        assert_eq!(sandbox.cofferdam(["wait", "one"]).end().succeeded(), "5\n");
    }
    let logs = sandbox.cofferdam(["logs", "one"]).end();
    assert_eq!((logs.text(), logs.stderr.as_str()), ("up\nbye\nup\nbye\n", "oops\noops\n"));
    assert_eq!(sandbox.cofferdam(["logs", "-n", "1", "one"]).end().text(), "bye\n");
    assert_eq!(sandbox.cofferdam(["ps", "-aq", "-f", "label=a=b"]).end().succeeded(), format!("{}\n", &id[..12]));
    sandbox.cofferdam(["create", "--name", "one", &image]).end().failed(1, &["\"one\" is in use", &id]);
    assert_eq!(sandbox.cofferdam(["rm", "one"]).end().succeeded(), "one\n");
    assert_eq!(state("-a"), "");
    sandbox.cofferdam(["start", "one"]).end().failed(1, &["no container one"]);
    assert_eq!(sandbox.cofferdam(["rm", "-f", "one"]).end().succeeded(), "");
}

#[test]
fn what_does_not_stop_is_killed() {
    let sandbox = Sandbox::new();
    let deaf = sandbox.detached("deaf", &[], "busybox", &["sh", "-c", "trap '' TERM; while :; do sleep 0.2; done"]);
    assert_eq!(deaf.verb("stop", &["-t", "1"], &[]).end().succeeded(), "deaf\n");
    assert_eq!(deaf.inspect("state.status,state.exit_code"), "exited\t137");
    assert_eq!(deaf.verb("start", &[], &[]).end().succeeded(), "deaf\n");
    assert_eq!(deaf.verb("kill", &[], &[]).end().succeeded(), "deaf\n");
    assert_eq!(deaf.verb("wait", &[], &[]).end().succeeded(), "137\n");
    deaf.verb("kill", &[], &[]).end().failed(1, &["deaf is not running"]);
}

#[test]
fn logs_follow_until_the_end() {
    let sandbox = Sandbox::new();
    let script =
        "echo one; read line; echo $line; i=0; while [ $i -lt 2000 ]; do echo $i; i=$((i+1)); done; echo last >&2";
    let talker = sandbox.detached("talker", &["-i"], "busybox", &["sh", "-c", script]);
    let following = talker.verb("logs", &["-f"], &[]).start();
    following.wait_for("one\n");
    let mut attached = talker.verb("attach", &[], &[]).open_input().start();
    attached.write("two\n");
    let ended = following.end();
    assert!(ended.text().starts_with("one\ntwo\n0\n1\n") && ended.text().ends_with("\n1999\n"), "{ended:?}");
    assert_eq!(ended.stderr, "last\n");
    let attached = attached.end();
    assert!(attached.text().ends_with("\n1999\n") && attached.code() == 0, "{attached:?}");
    let timed = talker.verb("logs", &["-t", "-n", "1"], &[]).end();
    // The streams are two: which of them brought the last line is not said.
    let line = format!("{}{}", timed.text(), timed.stderr);
    assert!(line.starts_with("20") && (line.ends_with("Z last\n") || line.ends_with("Z 1999\n")), "{timed:?}");
    assert_eq!(talker.verb("logs", &["--since", "0s"], &[]).end().succeeded(), "");
}

#[test]
fn a_paused_container_stands_still() {
    let sandbox = Sandbox::new();
    let clock = sandbox.detached("clock", &[], "busybox", &["sh", "-c", "while :; do echo tick; sleep 0.1; done"]);
    assert_eq!(clock.verb("pause", &[], &[]).end().succeeded(), "clock\n");
    assert_eq!(clock.inspect("state.status"), "paused");
    let count = || clock.verb("logs", &[], &[]).end().succeeded().len();
    let before = count();
    clock.verb("exec", &[], &["true"]).end().failed(125, &["is paused", "resume it first"]);
    assert_eq!(count(), before);
    clock.verb("pause", &[], &[]).end().failed(1, &["is not running"]);
    assert_eq!(clock.verb("unpause", &[], &[]).end().succeeded(), "clock\n");
    let following = clock.verb("logs", &["-f", "-n", "0"], &[]).start();
    following.wait_for("tick\n");
    assert_eq!(clock.verb("pause", &[], &[]).end().succeeded(), "clock\n");
    assert_eq!(clock.verb("stop", &["-t", "1"], &[]).end().succeeded(), "clock\n");
    assert_eq!(following.end().code(), 0);
}

#[test]
fn limits_are_shown_and_changed() {
    let sandbox = Sandbox::new();
    let idle = sandbox.detached("idle", &["-m", "64m"], "busybox", &["sleep", "1000"]);
    let shown = idle.verb("stats", &["--no-stream", "--format", "name,memory_limit_bytes,pids"], &[]).end();
    assert_eq!(shown.succeeded(), format!("idle\t{}\t1\n", 64 << 20));
    assert_eq!(idle.verb("update", &["-m", "32m", "--pids-limit", "7"], &[]).end().succeeded(), "idle\n");
    let read = idle.verb("exec", &[], &["sh", "-c", "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max"]).end();
    assert_eq!(read.succeeded(), format!("{}\n7\n", 32 << 20));
    idle.verb("update", &["-m", "1g"], &[]).end().failed(1, &["1024 MiB are more", "idle"]);
    let top = idle.verb("top", &[], &[]).end();
    assert!(top.succeeded().starts_with("UID") && top.text().contains("sleep 1000"), "{top:?}");
    let known: serde_json::Value = serde_json::from_str(idle.verb("inspect", &[], &[]).end().succeeded()).unwrap();
    assert_eq!((&known[0]["state"]["status"], &known[0]["vm"]["vcpus"]), (&"running".into(), &1.into()), "{known}");
    assert_eq!(known[0]["container"]["spec"]["limits"]["pids"], 7);
}

#[test]
fn events_come_in_order_and_from_a_number_on() {
    let sandbox = Sandbox::new();
    let all = sandbox.cofferdam(["events", "--format", "name,event"]).start();
    let short =
        sandbox.detached("short", &[], "busybox", &["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.2; done"]);
    all.wait_for("short\tstarted\n");
    assert_eq!(short.verb("exec", &[], &["true"]).end().succeeded(), "");
    let told = short.verb("events", &["--no-follow", "--from", "2", "--format", "sequence,event"], &[]).end();
    assert_eq!(told.succeeded(), "2\tcreated\n3\tstarted\n4\tprocess_started\n5\tprocess_exited\n");
    let following = short.verb("events", &["--from", "4", "--format", "json"], &[]).start();
    following.wait_for("process_exited");
    assert_eq!(short.verb("stop", &[], &[]).end().succeeded(), "short\n");
    let lines: Vec<serde_json::Value> =
        following.end().succeeded().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let last: Vec<_> = lines[2..].iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!((last, &lines[2]["exit_code"]), (vec!["exited", "vm_stopped"], &3.into()), "{lines:?}");
    all.wait_for("short\tvm_stopped\n");
    all.signal(rustix::process::Signal::KILL);
}

#[test]
fn a_policy_starts_it_again_until_it_is_stopped() {
    let sandbox = Sandbox::new();
    let always = sandbox.detached("always", &["--restart", "always"], "busybox", &["sh", "-c", "echo run; sleep 1"]);
    let following = always.verb("events", &["--from", "1", "--format", "event"], &[]).start();
    following.wait_for("vm_stopped\nvm_ready\n");
    // The next one is the same container, with the same log.
    let read = "until [ \"$(\"$COFFERDAM\" logs always | grep -c run)\" -ge 2 ]; do sleep 0.5; done; \"$COFFERDAM\" stop -t 1 always";
    assert_eq!(sandbox.program("sh", ["-c", read]).end().succeeded(), "always\n");
    assert!(following.end().succeeded().ends_with("vm_stopped\n"));
    assert_eq!(always.inspect("state.status"), "exited");
    assert_eq!(sandbox.cofferdam(["ps", "--format", "name"]).end().succeeded(), "");
    let image = Sandbox::reference("busybox");
    let words = ["run", "-d", "--name", "twice", "--restart", "on-failure:1", &image, "sh", "-c", "echo run; exit 3"];
    assert_eq!(sandbox.cofferdam(words).end().code(), 0);
    let gone = "until \"$COFFERDAM\" ps -a --format name,state,exit_code | grep -q 'twice.exited.3' &&
                [ \"$(\"$COFFERDAM\" logs twice)\" = \"run\nrun\" ]; do sleep 0.5; done; \"$COFFERDAM\" rm -f twice";
    assert_eq!(sandbox.program("sh", ["-c", gone]).end().succeeded(), "twice\n");
    let refused = sandbox.run(&["--restart", "always"], "busybox", &["true"]).end();
    refused.failed(125, &["--rm and --restart"]);
}

#[test]
fn a_policy_can_be_given_and_taken() {
    let sandbox = Sandbox::new();
    let subject = sandbox.detached("subject", &[], "busybox", &["sh", "-c", "echo run; sleep 2"]);
    let given = subject.verb("update", &["--restart", "always"], &[]).end();
    given.failed(1, &["container subject runs without a restart policy"]);
    assert_eq!(subject.verb("wait", &[], &[]).end().succeeded(), "0\n");
    assert_eq!(subject.verb("update", &["--restart", "always"], &[]).end().succeeded(), "subject\n");
    assert_eq!(subject.verb("start", &[], &[]).end().succeeded(), "subject\n");
    let twice = "until [ \"$(\"$COFFERDAM\" logs subject | grep -c run)\" -ge 3 ]; do sleep 0.5; done";
    assert_eq!(sandbox.program("sh", ["-c", twice]).end().succeeded(), "");
    assert_eq!(subject.verb("update", &["--restart", "no"], &[]).end().succeeded(), "subject\n");
    let ended = "until \"$COFFERDAM\" ps -a --format state | grep -q exited; do sleep 0.5; done";
    assert_eq!(sandbox.program("sh", ["-c", ended]).end().succeeded(), "");
    // Its policy is asked for once more only when the wait before the next start is over.
    tests::until("no monitor", || sandbox.monitors().is_empty().then_some(()));
}
