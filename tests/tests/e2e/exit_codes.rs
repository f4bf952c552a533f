//! The exit code of `run` is the container's.

use tests::sandbox::Sandbox;

#[test]
fn the_code_is_the_programs() {
    let sandbox = Sandbox::new();
    for (words, code) in [
        (["true"].as_slice(), 0),
        (&["false"], 1),
        // A program that a signal ends, as a shell reports it.
        (&["sh", "-c", "sleep 1000 & kill -KILL $!; wait $!"], 137),
    ] {
        let ended = sandbox.run(&[], "busybox", words).end();
        assert_eq!(ended.code(), code, "{words:?}: {ended:?}");
        assert!(!ended.stderr.contains("error"), "{words:?}: {ended:?}");
    }
}

#[test]
fn a_first_process_that_a_signal_ends_gives_128_and_its_number() {
    let sandbox = Sandbox::new();
    // Process 1 is safe from signals of its own container but for those that its own mistakes bring.
    let ended = sandbox.run(&["--ulimit", "cpu=1"], "busybox", &["sh", "-c", "while :; do :; done"]).end();
    // SIGKILL is the end of a program that has used up its CPU time.
    assert_eq!(ended.code(), 137, "{ended:?}");
}

#[test]
fn the_end_of_the_first_process_is_the_end_of_all() {
    let sandbox = Sandbox::new();
    // Each of them holds the container's output.
    let script = "sleep 1000 & (sleep 1000 & sleep 1000 &) ; sh -c 'trap \"\" TERM; sleep 1000' & echo up; exit 4";
    let ended = sandbox.run(&[], "busybox", &["sh", "-c", script]).end();
    assert_eq!((ended.text(), ended.code()), ("up\n", 4), "{ended:?}");
}

#[test]
fn orphans_are_adopted_and_reaped() {
    let sandbox = Sandbox::new();
    // The process in the middle ends and leaves one that says who its parent is now; at its end it must not stay a
    // zombie.
    let script = "mkfifo /tmp/go /tmp/out; exec 3<>/tmp/go 4<>/tmp/out
                  sh -c '(read go <&3; while read key value; do [ $key = PPid: ] && echo $value >&4; done < /proc/self/status) &'
                  echo go >&3; read line <&4; echo \"$line\"
                  wait; sleep 1; grep -c 'State:.Z' /proc/[0-9]*/status | grep -c ':1'";
    let ended = sandbox.run(&[], "busybox", &["sh", "-c", script]).end();
    assert_eq!(ended.text(), "1\n0\n", "{ended:?}");
}
