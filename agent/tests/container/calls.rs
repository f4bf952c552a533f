//! What can be asked of a running container: to stand still, what it uses, its processes.

use std::io::Read;
use std::time::Duration;

use protocol::container::Limits;
use protocol::report::ProcessInfo;
use protocol::{Answer, Call, Failure, FailureKind};

use crate::host::{Host, PATIENCE, first};
use crate::image::{Image, process, script};

fn freeze(frozen: bool) -> Call {
    Call::Freeze { container: "c".into(), frozen }
}

fn processes(host: &mut Host) -> Vec<ProcessInfo> {
    match host.call(Call::Processes { container: "c".into() }).unwrap() {
        Answer::Processes(list) => list,
        other => panic!("unexpected answer {other:?}"),
    }
}

#[test]
fn a_frozen_container_stands_still_until_it_is_thawed() {
    let image = Image::new();
    let mut host = Host::new();
    let mut streams = host.launch(&image.shell("while :; do echo tick; sleep 0.01; done")).unwrap();
    streams.expect("tick\n");
    assert_eq!(host.call(freeze(true)).unwrap(), Answer::Done);
    assert_eq!(host.call(freeze(true)).unwrap(), Answer::Done);
    // What was said before arrives, and then nothing.
    streams.stdout.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut buffer = [0; 4096];
    while streams.stdout.read(&mut buffer).is_ok() {}
    let failure = host.exec("c", "p", &process(&["true"])).err().unwrap();
    assert_eq!((failure.kind, failure.message.as_str()), (FailureKind::WrongState, "container c is paused"));
    assert_eq!(processes(&mut host)[0].pid, 1);
    // A signal waits, and comes with the thaw.
    host.signal("c", 10, false).unwrap();
    assert_eq!(host.call(freeze(false)).unwrap(), Answer::Done);
    streams.stdout.set_read_timeout(Some(PATIENCE)).unwrap();
    streams.expect("tick\n");
    assert_eq!(host.run_further("c", "p", &script("echo fine")).stdout, "fine\n");
    host.kill("c");
    assert_eq!(host.call(freeze(true)).unwrap_err().kind, FailureKind::NoSuchContainer);
}

#[test]
fn a_frozen_container_can_be_killed() {
    let image = Image::new();
    let mut host = Host::new();
    host.launch(&image.spec("c", &["sleep", "1000"])).unwrap();
    let _streams = host.exec("c", "p", &process(&["sleep", "1000"])).unwrap();
    host.call(freeze(true)).unwrap();
    host.signal("c", 9, true).unwrap();
    assert_eq!(host.process_exited("c", "p"), 137);
    assert_eq!(host.exited("c").code, 137);
}

#[test]
fn only_what_runs_can_be_frozen() {
    let image = Image::new();
    let mut host = Host::new();
    host.create(&image.spec("c", &["sleep", "1000"])).unwrap();
    for frozen in [true, false] {
        let failure = host.call(freeze(frozen)).unwrap_err();
        assert_eq!((failure.kind, failure.message.as_str()), (FailureKind::WrongState, "container c is not running"));
    }
    host.kill("c");
}

#[test]
fn processes_are_listed_as_the_container_sees_them() {
    let image = Image::new();
    let mut host = Host::new();
    let mut streams = host.launch(&image.shell("sleep 1000 & echo ready; wait")).unwrap();
    streams.expect("ready\n");
    let mut spec = script("echo ready; sleep 1000; exit 1");
    spec.user = "app".into();
    let mut further = host.exec("c", "p", &spec).unwrap();
    further.expect("ready\n");
    // The second sleep may take a moment to be one.
    let list = loop {
        let list = processes(&mut host);
        if list.iter().filter(|process| process.command == "sleep 1000").count() == 2 {
            break list;
        }
    };
    let of = |pid: u32| list.iter().find(|process| process.pid == pid).unwrap();
    assert_eq!(list.len(), 4);
    assert_eq!((of(1).parent_pid, of(1).uid), (0, 0));
    assert_eq!(of(1).command, "sh -c sleep 1000 & echo ready; wait");
    let shell = list.iter().find(|process| process.command.starts_with("sh -c echo")).unwrap();
    assert_eq!((shell.parent_pid, shell.uid), (0, 1000));
    let parents: Vec<u32> =
        list.iter().filter(|process| process.command == "sleep 1000").map(|process| process.parent_pid).collect();
    assert_eq!(parents, [1, shell.pid]);
    assert!(list.iter().all(|process| process.started_us > 0 && process.terminal == 0), "{list:?}");
    host.wait_for_children(2);
    host.signal("c", 9, true).unwrap();
    assert_eq!(host.process_exited("c", "p"), 137);
    host.exited("c");
}

#[test]
fn a_listing_is_bounded() {
    let image = Image::new();
    let mut host = Host::new();
    let script = "i=0; while [ $i -lt 500 ]; do sleep 1000 & i=$((i+1)); done; echo ready; wait";
    let mut streams = host.launch(&image.shell(script)).unwrap();
    streams.expect("ready\n");
    assert_eq!(processes(&mut host).len(), protocol::report::PROCESSES_MAX);
    host.kill("c");
}

#[test]
fn what_no_controller_counts_is_nothing() {
    let image = Image::new();
    let mut host = Host::new();
    host.launch(&image.spec("c", &["sleep", "1000"])).unwrap();
    let Answer::Stats(stats) = host.call(Call::Stats { container: "c".into() }).unwrap() else { panic!("no stats") };
    let controllers = std::fs::read_to_string(host.cgroup.join("cgroup.controllers")).unwrap();
    if !controllers.contains("memory") {
        assert_eq!((stats.memory_bytes, stats.memory_limit_bytes, stats.memory_oom_kills), (0, u64::MAX, 0));
    }
    if !controllers.contains("pids") {
        assert_eq!((stats.pids, stats.pids_limit), (0, u64::MAX));
        let limits = Limits { pids: Some(5), ..Limits::default() };
        let failure: Failure = host.call(Call::Update { container: "c".into(), limits }).unwrap_err();
        assert_eq!(failure.kind, FailureKind::System);
        assert!(failure.message.starts_with("cannot set the container's limits: "), "{failure:?}");
    }
    let nothing = Call::Update { container: "c".into(), limits: Limits::default() };
    assert_eq!(host.call(nothing).unwrap(), Answer::Done);
    assert_eq!(host.call(Call::Signal { target: first("c"), signal: 9, all: true }).unwrap(), Answer::Done);
    host.exited("c");
}
