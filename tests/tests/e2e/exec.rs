//! Further processes in a running container.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use tests::sandbox::Sandbox;

use crate::api::{curl, json_of};

#[test]
fn a_process_has_what_it_was_given() {
    let sandbox = Sandbox::new();
    let flags = ["-e", "A=1", "-w", "/tmp"];
    let host = sandbox.detached("host", &flags, "debian", &["sleep", "1000"]);
    let script = "echo $A $B; pwd; id -un; echo err >&2; exit 9";
    let ended = host.verb("exec", &["-e", "B=2", "-u", "nobody"], &["sh", "-c", script]).end();
    assert_eq!((ended.text(), ended.stderr.as_str(), ended.code()), ("1 2\n/tmp\nnobody\n", "err\n", 9));
    let ended = host.verb("exec", &["-i", "-w", "/etc"], &["sh", "-c", "pwd; cat"]).input("through\n").end();
    assert_eq!(ended.succeeded(), "/etc\nthrough\n");
    assert_eq!(host.verb("exec", &["-d"], &["sh", "-c", "echo left > /tmp/left"]).end().succeeded(), "");
    let read = "until [ -s /tmp/left ]; do sleep 0.1; done; cat /tmp/left";
    assert_eq!(host.verb("exec", &[], &["sh", "-c", read]).end().succeeded(), "left\n");
}

#[test]
fn commands_that_cannot_be_executed_have_their_codes() {
    let sandbox = Sandbox::new();
    let host = sandbox.detached("host", &[], "busybox", &["sleep", "1000"]);
    host.verb("exec", &[], &["nothing-like-it"]).end().failed(127, &["nothing-like-it"]);
    host.verb("exec", &[], &["/etc/passwd"]).end().failed(126, &["/etc/passwd"]);
    host.verb("exec", &["-u", "nobody-at-all"], &["true"]).end().failed(125, &["nobody-at-all"]);
    sandbox.cofferdam(["exec", "nothere", "true"]).end().failed(125, &["no container nothere"]);
}

#[test]
fn a_terminal_resizes_and_signals_pass() {
    let sandbox = Sandbox::new();
    let host = sandbox.detached("host", &[], "debian", &["sleep", "1000"]);
    let mut running = host.verb("exec", &["-it"], &["bash", "--norc"]).start_on_terminal(31, 97);
    running.write("stty size; echo end of $((1+1))\n");
    running.wait_for("31 97");
    running.wait_for("end of 2");
    running.terminal().resize(20, 50).unwrap();
    running.write("until [ \"$(stty size)\" = '20 50' ]; do sleep 0.1; done; echo resized to $((20+50))\n");
    running.wait_for("resized to 70");
    running.write("exit 6\n");
    assert_eq!(running.end().code(), 6);
    let running =
        host.verb("exec", &[], &["sh", "-c", "trap 'exit 8' TERM; echo up; while :; do sleep 0.1; done"]).start();
    running.wait_for("up\n");
    running.signal(Signal::TERM);
    assert_eq!(running.end().code(), 8);
}

/// Whoever was to be attached is not waited for, which a process's output otherwise is for 30 s.
#[test]
fn a_client_that_is_gone_before_its_process_runs_holds_nothing_up() {
    let sandbox = Sandbox::new();
    let host = sandbox.detached("host", &[], "busybox", &["sleep", "1000"]);
    let processes = format!("/v1/containers/{}/processes", host.inspect("id"));
    let post = |path| curl(&sandbox, &host, &["--request", "POST"], path).0;
    assert_eq!(post("/v1/vm/pause"), 204);
    let client = host.verb("exec", &[], &["echo", "nobody reads this"]).start();
    tests::until("the process", || {
        let (_, known) = json_of(curl(&sandbox, &host, &[], &processes));
        (known[0]["state"] == "starting").then_some(())
    });
    client.signal(Signal::KILL);
    let _ = client.end();
    let began = Instant::now();
    assert_eq!(post("/v1/vm/resume"), 204);
    let (code, ended) = json_of(curl(&sandbox, &host, &[], &format!("{processes}/exec-1/wait")));
    assert_eq!((code, &ended["exit_code"]), (200, &0.into()), "{ended}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn many_at_once_all_answer() {
    let sandbox = Sandbox::new();
    let host = sandbox.detached("host", &["-m", "256m"], "busybox", &["sleep", "1000"]);
    std::thread::scope(|scope| {
        let storm = |from: usize| {
            let host = &host;
            move || {
                for number in (from..200).step_by(20) {
                    let word = format!("number {number}");
                    assert_eq!(host.verb("exec", &[], &["echo", &word]).end().succeeded(), format!("{word}\n"));
                }
            }
        };
        for from in 0..20 {
            scope.spawn(storm(from));
        }
    });
    assert_eq!(host.inspect("state.status"), "running");
}

#[test]
fn a_flood_through_one_slows_no_other() {
    let sandbox = Sandbox::new();
    let host = sandbox.detached("host", &[], "busybox", &["sleep", "1000"]);
    // Nobody reads the first; the second moves as fast as it can.
    let stuck = sandbox.program("sh", ["-c", "\"$COFFERDAM\" exec host cat /dev/zero | sleep 1000"]).start();
    let flood = host.verb("exec", &[], &["cat", "/dev/zero"]).start();
    flood.wait_for_bytes(8 << 20);
    assert_eq!(host.inspect("state.status"), "running");
    assert_eq!(host.verb("exec", &[], &["echo", "alive"]).end().succeeded(), "alive\n");
    flood.wait_for_bytes(24 << 20);
    assert_eq!(host.verb("kill", &[], &[]).end().succeeded(), "host\n");
    assert_eq!(host.verb("wait", &[], &[]).end().succeeded(), "137\n");
    assert_eq!(flood.end().code(), 137);
    stuck.signal(Signal::KILL);
    for process in sandbox.processes() {
        tests::process::kill(process, Signal::KILL);
    }
}
