//! `cofferdam run` from its command line to its exit code, with a script in the monitor's place: what the monitor can do
//! to the front end, and the front end to the monitor, without a VM. The script speaks the real control protocol.

mod bench;
mod terminal;

use std::fs;
use std::io::Write as _;
use std::process::Stdio;

use api::config::LaunchConfig;
use bench::{Bench, kill, stderr};
use rustix::process::Signal;

#[test]
fn the_exit_code_is_the_containers_and_nothing_is_left() {
    let bench = Bench::new("echo out; echo err >&2; say started; say exited-7; exit 7");
    let output = bench.run(&["run", "--rm", "--name", "web", &bench.image(), "x"]);
    assert_eq!(output.status.code(), Some(7));
    assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!(bench.left(), [""; 0]);
}

#[test]
fn a_failure_is_one_line_and_the_guests_console_is_harmless() {
    let bench = Bench::new("say failed-127; exit 127");
    let output = bench.run(&["run", &bench.image()]);
    assert_eq!(output.status.code(), Some(127));
    let expected = "error: nothing is found: \u{fffd}[2Jcleared\nthe guest's console ended with:\n    first line\n    last \u{fffd}line\n";
    assert_eq!(stderr(&output), expected);
    assert_eq!(bench.left(), [""; 0]);
}

#[test]
fn a_killed_monitor_is_an_error_that_says_so() {
    let bench = Bench::new("say started; kill -KILL $$");
    let output = bench.run(&["run", &bench.image()]);
    assert_eq!(
        (output.status.code(), stderr(&output).as_str()),
        (Some(125), "error: the monitor was killed by signal 9\n")
    );
    assert_eq!(bench.left(), [""; 0]);
}

#[test]
fn a_monitor_that_ends_without_a_word_is_an_error() {
    let bench = Bench::new("exit 0");
    let output = bench.run(&["run", &bench.image()]);
    assert_eq!(output.status.code(), Some(125));
    assert_eq!(stderr(&output), "error: the monitor ended with code 0 and without a report\n");
}

#[test]
fn a_monitor_that_talks_nonsense_is_stopped() {
    let bench = Bench::new("printf '\\377\\377\\377\\377nonsense' >&$FD; exec sleep 600");
    let output = bench.run(&["run", &bench.image()]);
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).starts_with("error: the monitor's report cannot be read: a frame of 4294967295 bytes"));
    assert_eq!(bench.left(), [""; 0]);
}

#[test]
fn memory_that_ran_out_is_reported() {
    let bench = Bench::new("say started; say out-of-memory");
    let output = bench.run(&["run", "-m", "64m", &bench.image()]);
    assert_eq!(output.status.code(), Some(137));
    assert_eq!(
        stderr(&output),
        "error: the container ran out of memory at its limit of 64 MiB: give it more with -m\n"
    );
}

#[test]
fn a_signal_before_the_start_ends_the_run() {
    let bench = Bench::new("echo ready; wait_for_end; : >$HERE/ended");
    let child = bench.start(bench.command(&["run", &bench.image()]));
    kill(&child, Signal::TERM);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(143), ""));
    assert!(bench.path("ended").exists(), "the monitor was not waited for");
    assert_eq!(bench.left(), [""; 0]);
}

#[test]
fn signals_after_the_start_are_the_containers() {
    let bench = Bench::new("say started; echo ready; hear 6 first; echo again; hear 6 second; say exited-143");
    let mut child = bench.start(bench.command(&["run", &bench.image()]));
    kill(&child, Signal::USR1);
    let mut line = [0; 6];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
    kill(&child, Signal::TERM);
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(143));
    // A frame of two bytes: the message `Signal`, and its number.
    assert_eq!(fs::read(bench.path("first")).unwrap(), [2, 0, 0, 0, 0, 10]);
    assert_eq!(fs::read(bench.path("second")).unwrap(), [2, 0, 0, 0, 0, 15]);
}

#[test]
fn a_signal_that_came_early_waits_for_the_container() {
    let bench = Bench::new("echo ready; read -r go <$HERE/go; say started; hear 6 signal; say exited-0");
    rustix::fs::mkfifoat(rustix::fs::CWD, bench.path("go"), rustix::fs::Mode::RWXU).unwrap();
    let child = bench.start(bench.command(&["run", &bench.image()]));
    kill(&child, Signal::USR2);
    fs::write(bench.path("go"), "\n").unwrap();
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(0));
    assert_eq!(fs::read(bench.path("signal")).unwrap(), [2, 0, 0, 0, 0, 12]);
}

#[test]
fn a_killed_front_end_is_swept_up_after_and_its_monitor_learns_of_it() {
    let bench = Bench::new("echo ready; wait_for_end; : >$HERE/ended");
    let mut child = bench.start(bench.command(&["run", "--name", "web", &bench.image()]));
    kill(&child, Signal::KILL);
    child.wait().unwrap();
    // The monitor holds the other end of standard error: at its end the monitor is gone.
    std::io::Read::read_to_end(child.stderr.as_mut().unwrap(), &mut Vec::new()).unwrap();
    assert!(bench.path("ended").exists());
    assert_eq!(bench.left().len(), 2, "a SIGKILL leaves the directory and the name");
    let script = fs::read_to_string(bench.path("monitor")).unwrap();
    fs::write(bench.path("monitor"), script.replace("echo ready; wait_for_end", "say started; say exited-0")).unwrap();
    assert_eq!(bench.run(&["run", "--name", "web", &bench.image()]).status.code(), Some(0));
    assert_eq!(bench.left(), [""; 0]);
}

#[test]
fn a_name_in_use_is_refused() {
    let bench = Bench::new("echo ready; wait_for_end");
    let child = bench.start(bench.command(&["run", "--name", "web", &bench.image()]));
    let output = bench.run(&["run", "--name", "web", &bench.image()]);
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).starts_with("error: the name \"web\" is in use by container "), "{}", stderr(&output));
    kill(&child, Signal::TERM);
    child.wait_with_output().unwrap();
    assert_eq!(bench.left(), [""; 0]);
}

#[test]
fn standard_input_is_the_containers_only_when_asked() {
    let bench = Bench::new("cat >$HERE/input; say started; say exited-0");
    for (arguments, expected) in [(&["run", "-i"][..], &b"some input"[..]), (&["run"][..], &b""[..])] {
        let mut command = bench.command(arguments);
        let mut child = command.arg(bench.image()).stdin(Stdio::piped()).spawn().unwrap();
        // A monitor that does not read leaves a broken pipe.
        _ = child.stdin.take().unwrap().write_all(b"some input");
        assert!(child.wait().unwrap().success());
        assert_eq!(fs::read(bench.path("input")).unwrap(), expected, "{arguments:?}");
    }
}

#[test]
fn the_monitor_gets_the_document_and_the_lease_and_no_secrets() {
    let bench = Bench::new(
        "cp $CONFIG $HERE/config; ls -l /proc/$$/fd >$HERE/descriptors; env >$HERE/environment; say started; say exited-0",
    );
    let mut command =
        bench.command(&["run", "-e", "A=1", "-e", "TOKEN", "--cpus", "0.5", &bench.image(), "sh", "-c", "x"]);
    assert!(command.env("TOKEN", "hush").status().unwrap().success());
    let config = LaunchConfig::read(&bench.path("config")).unwrap();
    let container = config.container.unwrap();
    assert_eq!(container.process.args, ["sh", "-c", "x"]);
    assert!(
        container.process.env.contains(&"A=1".to_owned()) && container.process.env.contains(&"TOKEN=hush".to_owned())
    );
    assert_eq!(container.limits.cpu_quota_us, Some(50_000));
    let api::config::DriveFile::Descriptor(drive) = config.vm.drives[0].file else { panic!("{:?}", config.vm.drives) };
    let descriptors = fs::read_to_string(bench.path("descriptors")).unwrap();
    let line = descriptors.lines().find(|line| line.contains(&format!(" {drive} -> "))).unwrap();
    assert!(line.ends_with(".erofs"), "{line}");
    let held = [descriptors.matches("socket:").count(), descriptors.matches(".erofs").count()];
    assert_eq!(held, [1, 1], "the control socket and the lease, and nothing else of ours: {descriptors}");
    assert!(!descriptors.contains("/run/"), "{descriptors}");
    assert!(!fs::read_to_string(bench.path("environment")).unwrap().contains("hush"));
}

#[test]
fn an_image_in_use_is_kept() {
    let bench = Bench::new("echo ready; wait_for_end");
    let child = bench.start(bench.command(&["run", &bench.image()]));
    let output = bench.run(&["rmi", &bench.image()]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    kill(&child, Signal::TERM);
    child.wait_with_output().unwrap();
    assert_eq!(bench.run(&["rmi", &bench.image()]).status.code(), Some(0));
}

#[test]
fn a_timeline_is_one_line_of_json() {
    let bench = Bench::new("say started; say exited-0");
    for _ in 0..2 {
        let mut command = bench.command(&["run", &bench.image()]);
        assert!(command.env("COFFERDAM_TIMELINE", bench.path("timeline")).status().unwrap().success());
    }
    let text = fs::read_to_string(bench.path("timeline")).unwrap();
    assert_eq!(text.lines().count(), 2);
    let line: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!((&line["agent_ready"], &line["guest_executed_us"]), (&5.into(), &77.into()));
    let order = ["cli_started", "image_found", "monitor_spawning", "monitor_spawned", "finished"]
        .map(|name| line[name].as_u64().unwrap());
    assert!(order.is_sorted() && order[0] > 0, "{order:?}");
}

#[test]
fn a_variable_that_is_not_text_is_refused() {
    use std::os::unix::ffi::OsStrExt as _;

    let bench = Bench::new("say started; say exited-0");
    let mut command = bench.command(&["run", "-e", "BYTES", &bench.image()]);
    let output = command.env("BYTES", std::ffi::OsStr::from_bytes(b"\xff")).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).starts_with("error: the value of the environment variable BYTES is not UTF-8"));
}

#[test]
fn bad_requests_are_one_line_and_leave_nothing() {
    let bench = Bench::new("say started; say exited-0");
    let image = bench.image();
    for (arguments, expected) in [
        (&["run", "-m", "900t", &image][..], "this host has"),
        (&["run", "--cpus", "999", &image], "asks for 999 CPUs, and this host has"),
        (&["run", "--kernel", "/nowhere", &image], "/nowhere"),
        (&["run", "-it", &image], "the input device is not a TTY"),
        (&["run", "-w", "relative", &image], "\"relative\" is not an absolute path"),
        (&["run", "--entrypoint", "", &image], "no command"),
        (&["run", "-v", "/a:/b", &image], "--volume"),
        (&["run", "--name", "../up", &image], "the name \"../up\""),
        (&["run", "--hostname", "a b", &image], "the hostname \"a b\""),
        (&["run", "--env-file", "/nowhere", &image], "/nowhere"),
        (&["run", "--pull", "never", "oci:/nowhere"], "not in the store"),
        (&["run", "oci:/nowhere"], "/nowhere"),
        (&["run", "UPPER"], "UPPER"),
        (&["run", "--no-such-flag", &image], "--no-such-flag"),
    ] {
        let output = bench.run(arguments);
        let text = stderr(&output);
        let errors: Vec<_> = text.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!((output.status.code(), errors.len()), (Some(125), 1), "{arguments:?}: {text}");
        assert!(errors[0].contains(expected) && text.ends_with(&format!("{}\n", errors[0])), "{arguments:?}: {text}");
        assert_eq!(bench.left(), [""; 0], "{arguments:?}");
    }
}
