//! A container's life: streams, signals, order, ends.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;

use protocol::{Call, FailureKind, FromAgent};

use crate::host::{Host, Output, first, read_all};
use crate::image::Image;
use crate::run;

#[test]
fn streams_are_kept_apart_and_the_code_comes_back() {
    let output = run("echo out; echo err >&2; exit 3");
    assert_eq!(output, Output { stdout: "out\n".into(), stderr: "err\n".into(), code: 3 });
}

#[test]
fn input_is_passed_on_until_its_end() {
    let image = Image::new();
    let output = Host::new().run(&image.spec("c", &["wc", "-c"]), &vec![b'x'; 300_000]);
    assert_eq!((output.stdout.trim(), output.code), ("300000", 0));
}

#[test]
fn a_signal_is_told_as_128_and_its_number() {
    assert_eq!(run("kill -TERM $$; kill -9 $$; sleep 1; exit 5").code, 5, "pid 1 is safe from its own signals");
    let image = Image::new();
    let mut host = Host::new();
    let mut streams =
        host.launch(&image.shell("trap 'exit 42' TERM; echo ready; while :; do sleep 0.01; done")).unwrap();
    let mut line = [0; 6];
    streams.stdout.read_exact(&mut line).unwrap();
    host.signal("c", 15, false).unwrap();
    assert_eq!(host.exited("c").code, 42);
    host.launch(&image.spec("d", &["sleep", "1000"])).unwrap();
    host.signal("d", 9, true).unwrap();
    assert_eq!(host.exited("d").code, 137);
    assert_eq!(host.signal("d", 9, true).unwrap_err().kind, FailureKind::NoSuchContainer);
}

#[test]
fn a_signal_to_all_reaches_the_children() {
    let image = Image::new();
    let mut host = Host::new();
    let script = "sleep 1000 & (trap '' TERM; trap 'echo child; exit' USR1; echo x; while :; do sleep 0.01; done) & wait; wait; sleep 1000";
    let mut streams = host.launch(&image.shell(&format!("trap : USR1; {script}"))).unwrap();
    let mut ready = [0; 2];
    streams.stdout.read_exact(&mut ready).unwrap();
    host.signal("c", 10, true).unwrap();
    let mut line = [0; 6];
    streams.stdout.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"child\n");
    host.signal("c", 9, true).unwrap();
    assert_eq!(host.exited("c").code, 137);
}

#[test]
fn what_the_first_process_leaves_behind_ends_with_it() {
    let output = run("(sleep 1000; echo never) & (sh -c 'sleep 1000 &') & sleep 0.1; echo done");
    assert_eq!((output.stdout.as_str(), output.code), ("done\n", 0));
}

#[test]
fn calls_out_of_turn_are_refused() {
    let image = Image::new();
    let mut host = Host::new();
    assert_eq!(host.start("c").unwrap_err().kind, FailureKind::NoSuchContainer);
    host.call(Call::Create(Box::new(image.spec("c", &["sleep", "1000"])))).unwrap();
    let again = host.call(Call::Create(Box::new(image.spec("c", &["true"])))).unwrap_err();
    assert_eq!((again.kind, again.message.as_str()), (FailureKind::WrongState, "container c exists already"));
    assert_eq!(host.resize(first("c"), 1, 1).unwrap_err().kind, FailureKind::WrongState);
    assert_eq!(host.signal("c", 65, false).unwrap_err().kind, FailureKind::InvalidRequest);
    host.start("c").unwrap();
    assert_eq!(host.start("c").unwrap_err().kind, FailureKind::WrongState);
    host.signal("c", 9, false).unwrap();
    assert_eq!(host.exited("c").code, 137);
    // One that was never started ends, too.
    host.call(Call::Create(Box::new(image.spec("c", &["true"])))).unwrap();
    host.signal("c", 9, false).unwrap();
    let status = host.exited("c");
    assert_eq!((status.code, status.executed_us), (137, 0));
}

#[test]
fn a_start_need_not_wait_for_the_creation() {
    let image = Image::new();
    let mut host = Host::new();
    for (program, results) in [("true", [true, true]), ("nope", [false, false])] {
        let create = host.send(Call::Create(Box::new(image.spec("c", &[program]))));
        let start = host.send(Call::Start { container: "c".into() });
        for (request, succeeds) in [create, start].into_iter().zip(results) {
            match host.receive() {
                FromAgent::Reply { id, result } => assert_eq!((id, result.is_ok()), (request, succeeds)),
                other => panic!("unexpected message {other:?}"),
            }
        }
        if results[1] {
            assert_eq!(host.exited("c").code, 0);
        }
    }
}

#[test]
fn a_slow_reader_slows_the_writer_down() {
    let image = Image::new();
    let mut host = Host::new();
    let mut streams = host.launch(&image.spec("c", &["dd", "if=/dev/zero", "bs=65536", "count=2048"])).unwrap();
    let (mut received, mut buffer) = (0, vec![0; 1 << 16]);
    // The agent's whole memory, while 128 MiB want to pass.
    let memory = || {
        let status = fs::read_to_string(format!("/proc/{}/status", host.agent())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let before = memory();
    loop {
        match streams.stdout.read(&mut buffer).unwrap() {
            0 => break,
            length => received += length,
        }
        assert!(memory() < before + 256, "{before} KiB became {}", memory());
    }
    assert_eq!(received, 128 << 20);
    assert_eq!(host.exited("c").code, 0);
}

#[test]
fn a_closed_reader_ends_the_writer_and_not_the_agent() {
    let image = Image::new();
    let mut host = Host::new();
    let streams = host.launch(&image.shell("sh -c 'while :; do echo yes; done'; exit $?")).unwrap();
    drop(streams.stdout);
    assert_eq!(host.exited("c").code, 141);
}

#[test]
fn containers_live_side_by_side() {
    let image = Image::new();
    let mut host = Host::new();
    let mut first = host.launch(&image.spec("first", &["cat"])).unwrap();
    let mut second = host.launch(&image.spec("second", &["cat"])).unwrap();
    // A third that is only created must not hold the others' streams open.
    host.call(Call::Create(Box::new(image.spec("third", &["true"])))).unwrap();
    for (name, streams) in [("first", &mut first), ("second", &mut second)] {
        streams.stdin.write_all(name.as_bytes()).unwrap();
        streams.stdin.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_all(&mut streams.stdout), name);
        assert_eq!(host.exited(name).code, 0);
    }
    host.start("third").unwrap();
    assert_eq!(host.exited("third").code, 0);
}
