//! Further processes in a running container.

use std::io::{Read, Write};
use std::net::Shutdown;

use protocol::container::WindowSize;
use protocol::{Call, FailureKind, FromAgent};

use crate::host::{Host, Output, first, further, read_all, read_until};
use crate::image::{Image, process, script};

/// A host with a container `c` that waits to be killed.
fn waiting(image: &Image) -> Host {
    let mut host = Host::new();
    host.launch(&image.spec("c", &["sleep", "1000"])).unwrap();
    host
}

#[test]
fn output_and_exit_code_come_back() {
    let image = Image::new();
    let mut host = waiting(&image);
    let output = host.run_further("c", "p", &script("echo out; echo err >&2; exit 3"));
    assert_eq!(output, Output { stdout: "out\n".into(), stderr: "err\n".into(), code: 3 });
    // The name is free again.
    let mut streams = host.exec("c", "p", &process(&["wc", "-c"])).unwrap();
    streams.stdin.write_all(&vec![b'x'; 300_000]).unwrap();
    assert_eq!(streams.read().0.trim(), "300000");
    assert_eq!(host.process_exited("c", "p"), 0);
    host.kill("c");
}

#[test]
fn it_is_in_the_container() {
    let image = Image::new();
    let mut host = Host::new();
    let mut first = host.launch(&image.shell("echo here > /tmp/mark; echo ready; sleep 1000")).unwrap();
    first.expect("ready\n");
    let output = host.run_further(
        "c",
        "p",
        &script("cat /tmp/mark /proc/sys/kernel/hostname; grep ^0: /proc/self/cgroup; echo $$; ls -d /proc/[0-9]* | wc -l; \
                 for n in mnt pid ipc uts net cgroup; do [ $(readlink /proc/1/ns/$n) = $(readlink /proc/self/ns/$n) ] || echo $n; done"),
    );
    // The first process, and the shell with its ls and, perhaps already, wc.
    assert_eq!(output.stderr, "", "{output:?}");
    let mut lines = output.stdout.lines();
    assert_eq!(lines.by_ref().take(3).collect::<Vec<_>>(), ["here", "box", "0::/"], "{output:?}");
    assert!(lines.next().unwrap().parse::<u32>().unwrap() > 1, "{output:?}");
    assert!(matches!(lines.next(), Some("3" | "4")), "{output:?}");
    host.kill("c");
}

#[test]
fn it_has_privileges_and_surroundings_of_its_own() {
    let image = Image::new();
    let mut host = waiting(&image);
    let status = "cat /proc/self/status | grep -E '^(Cap|NoNewPrivs|Seccomp:)'; ls /proc/self/fd | grep -v '^[012]$'";
    let output = host.run_further("c", "root", &script(status));
    for line in ["CapEff:\t00000000a80425fb", "CapBnd:\t00000000a80425fb", "NoNewPrivs:\t0", "Seccomp:\t2"] {
        assert!(output.stdout.contains(line), "{line} is missing: {}", output.stdout);
    }
    assert_eq!(output.stdout.lines().last(), Some("3"), "{output:?}");
    let mut spec = script(&format!("id; pwd; echo $HOME $A; cat /proc/self/oom_score_adj; ulimit -n; {status}"));
    spec.user = "app".into();
    spec.env.push("A=b c".into());
    spec.working_directory = "/home/app".into();
    spec.no_new_privileges = true;
    spec.oom_score_adj = 123;
    spec.rlimits = vec![protocol::container::Rlimit { resource: 7, soft: 77, hard: 88 }];
    let output = host.run_further("c", "app", &spec);
    for line in [
        "uid=1000(app) gid=1001(app) groups=29(audio),1001(app)\n/home/app\n/home/app b c\n123\n77\n",
        "CapEff:\t0000000000000000",
        "NoNewPrivs:\t1",
    ] {
        assert!(output.stdout.contains(line), "{line} is missing: {output:?}");
    }
    host.kill("c");
}

#[test]
fn what_cannot_be_executed_is_told() {
    let image = Image::new();
    let mut host = waiting(&image);
    let cases: [(&str, FailureKind, &str); 4] = [
        ("nope", FailureKind::CommandNotFound, "exec: \"nope\": executable file not found in $PATH"),
        ("/bin/not-executable", FailureKind::CommandNotExecutable, "exec: \"/bin/not-executable\": permission denied"),
        ("no-format", FailureKind::CommandNotExecutable, "exec /bin/no-format: exec format error"),
        ("", FailureKind::InvalidRequest, "the process has no program to execute: name one"),
    ];
    for (program, kind, message) in cases {
        let failure = host.exec("c", "p", &process(&[program])).err().unwrap();
        assert_eq!((failure.kind, failure.message.as_str()), (kind, message));
    }
    let mut spec = process(&["true"]);
    spec.user = "nobody".into();
    let failure = host.exec("c", "p", &spec).err().unwrap();
    assert_eq!(failure.message, "unable to find user nobody: no matching entries in passwd file");
    spec.user.clear();
    spec.stdio.stdout = Some(9);
    let exec =
        |process: &str| Call::Exec { container: "c".into(), process: process.into(), spec: Box::new(spec.clone()) };
    let failure = host.call(exec("p")).unwrap_err();
    assert_eq!(failure.kind, FailureKind::System);
    assert!(failure.message.starts_with("cannot connect to port 9 of the host: "), "{failure:?}");
    assert_eq!(host.call(exec("../p")).unwrap_err().kind, FailureKind::InvalidRequest);
    host.kill("c");
}

#[test]
fn a_terminal_can_be_resized_and_ends_with_its_process() {
    let image = Image::new();
    let mut host = waiting(&image);
    let port = host.port();
    let listener = host.listen(port);
    let mut spec = script(
        "trap 'stty size; setsid sh -c \"trap : HUP; sleep 1000\" & exit 7' WINCH; stty size; \
         ls -l /proc/self/fd/0; echo $TERM > /dev/tty; read line; echo got $line; while :; do sleep 0.01; done",
    );
    spec.terminal = Some(WindowSize { rows: 24, columns: 80 });
    spec.stdio.stdin = Some(port);
    spec.user = "app".into();
    host.call(Call::Exec { container: "c".into(), process: "p".into(), spec: Box::new(spec) }).unwrap();
    let (mut terminal, _) = listener.accept().unwrap();
    terminal.write_all(b"hello\n").unwrap();
    let output = read_until(&mut terminal, "got hello\r\n");
    for text in ["24 80\r\n", "/dev/pts/0\r\n", "xterm\r\n"] {
        assert!(output.contains(text), "{text:?} is missing: {output:?}");
    }
    assert_eq!(host.resize(first("c"), 1, 1).unwrap_err().message, "container c has no terminal");
    host.resize(further("c", "p"), 30, 100).unwrap();
    assert_eq!(read_all(&mut terminal), "30 100\r\n");
    assert_eq!(host.process_exited("c", "p"), 7);
    host.kill("c");
}

#[test]
fn a_signal_reaches_the_process_that_is_meant() {
    let image = Image::new();
    let mut host = waiting(&image);
    let spec = script("trap 'exit 42' TERM; echo ready; while :; do sleep 0.01; done");
    let mut one = host.exec("c", "one", &spec).unwrap();
    let mut other = host.exec("c", "other", &spec).unwrap();
    one.expect("ready\n");
    other.expect("ready\n");
    host.call(Call::Signal { target: further("c", "one"), signal: 15, all: false }).unwrap();
    assert_eq!(host.process_exited("c", "one"), 42);
    host.call(Call::Signal { target: further("c", "other"), signal: 9, all: false }).unwrap();
    assert_eq!(host.process_exited("c", "other"), 137);
    let late = host.call(Call::Signal { target: further("c", "other"), signal: 9, all: false }).unwrap_err();
    assert_eq!((late.kind, late.message.as_str()), (FailureKind::WrongState, "container c has no process other"));
    let both = host.call(Call::Signal { target: further("c", "other"), signal: 9, all: true }).unwrap_err();
    assert_eq!(both.kind, FailureKind::InvalidRequest);
    host.kill("c");
}

#[test]
fn a_container_that_does_not_run_takes_no_process() {
    let image = Image::new();
    let mut host = Host::new();
    let failure = |host: &mut Host| {
        let failure = host.exec("c", "p", &process(&["true"])).err().unwrap();
        (failure.kind, failure.message)
    };
    assert_eq!(failure(&mut host).0, FailureKind::NoSuchContainer);
    host.create(&image.spec("c", &["sleep", "1000"])).unwrap();
    assert_eq!(failure(&mut host), (FailureKind::WrongState, "container c is not running".into()));
    host.start("c").unwrap();
    let streams = host.exec("c", "p", &process(&["sleep", "1000"])).unwrap();
    let again = host.exec("c", "p", &process(&["true"])).err().unwrap();
    assert_eq!(again.message, "container c has a process p already");
    host.signal("c", 9, true).unwrap();
    assert_eq!(host.process_exited("c", "p"), 137);
    assert_eq!(host.exited("c").code, 137);
    assert_eq!(streams.read().0, "");
}

#[test]
fn what_runs_when_the_first_process_ends_is_told_first() {
    let image = Image::new();
    let mut host = Host::new();
    let mut first = host.launch(&image.shell("read line; exit 9")).unwrap();
    let names: Vec<String> = (0..5).map(|number| format!("p{number}")).collect();
    let mut all: Vec<_> = names
        .iter()
        .map(|name| host.exec("c", name, &script("echo begun; sleep 1000 & sleep 1000; echo never")).unwrap())
        .collect();
    all.iter_mut().for_each(|streams| streams.expect("begun\n"));
    first.stdin.write_all(b"\n").unwrap();
    let mut ended: Vec<String> = names
        .iter()
        .map(|_| match host.next() {
            FromAgent::ProcessExited { process, code: 137, .. } => process,
            other => panic!("unexpected message {other:?}"),
        })
        .collect();
    ended.sort();
    assert_eq!(ended, names);
    assert_eq!(host.exited("c").code, 9);
    all.into_iter().for_each(|streams| assert_eq!(streams.read().0, ""));
}

#[test]
fn a_start_that_meets_the_end_is_answered() {
    let image = Image::new();
    let mut host = Host::new();
    // The end comes somewhere between the first and the last of them.
    for round in 0..5 {
        let mut first = host.launch(&image.shell("read line; exit 9")).unwrap();
        let before: Vec<_> = (0..round).map(|n| host.begin_exec("c", &format!("b{n}"), &process(&["true"]))).collect();
        first.stdin.write_all(b"\n").unwrap();
        let behind: Vec<_> = (0..10).map(|n| host.begin_exec("c", &format!("p{n}"), &process(&["true"]))).collect();
        let mut executed = 0;
        for (request, _) in before.iter().chain(&behind) {
            match host.reply(*request) {
                Ok(_) => executed += 1,
                Err(failure) => assert!(
                    matches!(failure.kind, FailureKind::WrongState | FailureKind::NoSuchContainer),
                    "{failure:?}"
                ),
            }
        }
        for _ in 0..executed {
            assert!(matches!(host.next(), FromAgent::ProcessExited { .. }));
        }
        assert_eq!(host.exited("c").code, 9);
    }
}

#[test]
fn many_run_at_once_and_leave_nothing_behind() {
    let image = Image::new();
    let mut host = waiting(&image);
    let descriptors = |host: &Host| std::fs::read_dir(format!("/proc/{}/fd", host.agent())).unwrap().count();
    let before = descriptors(&host);
    let begun: Vec<_> = (0..50)
        .map(|number| {
            host.begin_exec("c", &format!("p{number}"), &script(&format!("read x; echo {number}; exit {number}")))
        })
        .collect();
    let mut running = Vec::new();
    for (request, listeners) in begun {
        host.reply(request).unwrap();
        running.push(listeners.map(|listener| listener.accept().unwrap().0));
    }
    for (number, [stdin, stdout, _]) in running.iter_mut().enumerate().rev() {
        stdin.write_all(b"go\n").unwrap();
        assert_eq!(read_all(stdout), format!("{number}\n"));
        assert_eq!(host.process_exited("c", &format!("p{number}")), u8::try_from(number).unwrap());
    }
    assert!(descriptors(&host) <= before);
    assert_eq!(host.children(), 1);
    host.kill("c");
}

#[test]
fn output_ends_with_the_process_though_others_hold_the_pipe() {
    let image = Image::new();
    let mut host = waiting(&image);
    // The first child only holds the pipe, the second writes on for ever.
    let spec = script("sleep 1000 & (while :; do echo noise; done) & echo said; exit 4");
    let output = host.run_further("c", "p", &spec);
    assert!(output.stdout.contains("said\n"), "{output:?}");
    assert_eq!(output.code, 4);
    // All that was written before the end is there, however slowly it is read.
    let mut streams = host.exec("c", "q", &script("sleep 1000 & head -c 50000 /dev/zero")).unwrap();
    streams.stdin.shutdown(Shutdown::Write).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(200));
    let mut bytes = Vec::new();
    streams.stdout.read_to_end(&mut bytes).unwrap();
    assert_eq!((bytes.len(), host.process_exited("c", "q")), (50_000, 0));
    host.kill("c");
}
