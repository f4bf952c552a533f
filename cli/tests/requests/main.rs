//! Requests that are refused before a monitor is started, from the command line to the exit code. What a monitor does is
//! tested with real ones (package `tests`).

mod bench;

use bench::{Bench, stderr};

#[test]
fn a_variable_that_is_not_text_is_refused() {
    use std::os::unix::ffi::OsStrExt as _;

    let bench = Bench::new();
    let mut command = bench.command(&["run", "-e", "BYTES", &bench.image()]);
    let output = command.env("BYTES", std::ffi::OsStr::from_bytes(b"\xff")).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).starts_with("error: the value of the environment variable BYTES is not UTF-8"));
}

#[test]
fn bad_requests_are_one_line_and_leave_nothing() {
    let bench = Bench::new();
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
