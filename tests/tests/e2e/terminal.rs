//! `-t`: a terminal in the container that follows the caller's.

use tests::sandbox::Sandbox;

#[test]
fn the_container_has_a_terminal_that_follows_the_callers_size() {
    let sandbox = Sandbox::new();
    let script = "tty; stty size; trap 'stty size; exit 5' WINCH; echo ready; while :; do sleep 0.2; done";
    let running = sandbox.run(&["-it"], "busybox", &["sh", "-c", script]).start_on_terminal(33, 101);
    running.wait_for("ready\r\n");
    running.terminal().resize(44, 132).unwrap();
    let ended = running.end();
    let lines: Vec<&str> = ended.text().lines().collect();
    assert_eq!((lines, ended.code()), (vec!["/dev/pts/0", "33 101", "ready", "44 132"], 5));
}

#[test]
fn keys_go_to_the_container_alone() {
    let sandbox = Sandbox::new();
    let script = "trap 'echo interrupted' INT; echo ready; until [ \"$line\" = right ]; do read line; done; echo \"<$line>\"; exit 6";
    let mut running = sandbox.run(&["-it"], "busybox", &["sh", "-c", script]).start_on_terminal(24, 80);
    let before = running.terminal().settings().unwrap();
    running.wait_for("ready\r\n");
    // Ctrl-C must interrupt the program in the container, not `cofferdam`; the line editing is the container's, too.
    running.write("\x03");
    running.wait_for("interrupted\r\n");
    running.write("wrong\x15right\n");
    let terminal = running.terminal().try_clone().unwrap();
    let ended = running.end();
    assert!(ended.text().contains("<right>\r\n"), "{:?}", ended.text());
    assert_eq!(ended.code(), 6);
    let after = terminal.settings().unwrap();
    let modes =
        |settings: &rustix::termios::Termios| (settings.local_modes, settings.input_modes, settings.output_modes);
    assert_eq!(modes(&before), modes(&after), "the terminal was left changed");
}

#[test]
fn a_shell_on_a_terminal_ends_with_its_input() {
    let sandbox = Sandbox::new();
    let mut running = sandbox.run(&["-it", "-e", "PS1=$ "], "busybox", &[]).start_on_terminal(24, 80);
    running.wait_for("$ ");
    running.write("test -t 0 && test -t 1 && test -t 2 && echo all\n");
    running.wait_for("\nall\r\n$ ");
    running.write("\x04");
    assert_eq!(running.end().code(), 0);
}

#[test]
fn a_terminal_of_its_own_needs_none_of_the_callers() {
    let sandbox = Sandbox::new();
    let ended = sandbox.run(&["-t"], "busybox", &["sh", "-c", "test -t 1 && echo terminal; echo error >&2"]).end();
    // A terminal has one stream for everything.
    assert_eq!(ended.succeeded(), "terminal\r\nerror\r\n");
}

#[test]
fn keys_need_a_terminal_to_come_from() {
    let sandbox = Sandbox::new();
    sandbox.run(&["-it"], "busybox", &["true"]).input("").end().failed(125, &["terminal"]);
}
