//! Standard input, output and error between the caller and the container.

use std::fs;

use rustix::process::Signal;
use tests::process::peak_memory_kib;
use tests::sandbox::Sandbox;

/// Set to run the tests at the size that the project promises, which takes minutes in an emulated machine.
const FULL_VARIABLE: &str = "COFFERDAM_E2E_FULL";

/// Bytes that repeat nowhere, so that a piece that is lost, doubled or moved shows.
fn numbers(count: u32) -> Vec<u8> {
    (0..count).flat_map(u32::to_le_bytes).collect()
}

#[test]
fn output_and_errors_are_kept_apart() {
    let sandbox = Sandbox::new();
    let ended = sandbox.run(&[], "busybox", &["sh", "-c", "echo out; echo err >&2; printf 'no line'; exit 3"]).end();
    assert_eq!((ended.text(), ended.stderr.as_str(), ended.code()), ("out\nno line", "err\n", 3));
}

#[test]
fn input_arrives_whole_and_ends() {
    let sandbox = Sandbox::new();
    let bytes = numbers(1 << 20);
    let script = "tee /tmp/copy; wc -c < /tmp/copy >&2";
    let ended = sandbox.run(&["-i"], "busybox", &["sh", "-c", script]).input(bytes.clone()).end();
    assert_eq!((ended.code(), ended.stderr.as_str()), (0, "4194304\n"));
    assert!(ended.stdout == bytes, "the {} bytes that came back are not those sent", ended.written);
}

#[test]
fn without_interactive_there_is_nothing_to_read() {
    let sandbox = Sandbox::new();
    // The caller's input stays open: the container's must end all the same.
    let running = sandbox.run(&[], "busybox", &["sh", "-c", "cat; echo end"]).open_input().start();
    running.wait_for("end\n");
    assert_eq!(running.end().succeeded(), "end\n");
}

#[test]
fn an_input_that_nobody_reads_holds_nothing_up() {
    let sandbox = Sandbox::new();
    let ended = sandbox.run(&["-i"], "busybox", &["sh", "-c", "head -c 4; exec 0<&-; echo; exit 6"]);
    let ended = ended.input(b"some".repeat(1 << 20)).end();
    assert_eq!((ended.text(), ended.code()), ("some\n", 6), "{ended:?}");
}

#[test]
fn a_reader_that_goes_away_ends_the_writer() {
    let sandbox = Sandbox::new();
    let script = "{ \"$COFFERDAM\" run --rm \"$0\" yes; echo $? >&2; } | head -n 2";
    let ended = sandbox.program("sh", ["-c", script, &Sandbox::reference("busybox")]).end();
    // 141: as of a program that SIGPIPE ends.
    assert_eq!((ended.text(), ended.stderr.as_str()), ("y\ny\n", "141\n"));
}

#[test]
fn a_long_output_takes_no_memory() {
    let sandbox = Sandbox::new();
    let mib: u64 = if std::env::var_os(FULL_VARIABLE).is_some() { 1024 } else { 64 };
    let script = format!("dd if=/dev/zero bs=1M count={mib} 2>/dev/null; read line; echo \"$line\"");
    let flags = ["-i", "-m", "48m"];
    let mut running = sandbox.run(&flags, "busybox", &["sh", "-c", &script]).open_input().start();
    running.wait_for_bytes(mib << 20);
    // All of the guest's memory counts as the monitor's: that much is taken whatever is written.
    let monitor = running.monitor();
    let monitor_kib = peak_memory_kib(monitor).saturating_sub(guest_memory_kib(&sandbox));
    let command_kib = peak_memory_kib(running.pid());
    running.write("end\n");
    let ended = running.end();
    assert_eq!((ended.code(), ended.written, ended.stderr.as_str()), (0, (mib << 20) + 4, ""));
    eprintln!(
        "{mib} MiB through standard output: monitor {monitor_kib} KiB beside the guest, command {command_kib} KiB"
    );
    assert!(monitor_kib < 16 << 10, "the monitor took {monitor_kib} KiB");
    assert!(command_kib < 24 << 10, "the command took {command_kib} KiB");
}

/// The memory of the one VM that runs in a sandbox, from the document that its monitor was started with.
fn guest_memory_kib(sandbox: &Sandbox) -> u64 {
    let states = fs::read_dir(sandbox.run_folder()).expect("a container runs").flatten();
    let document = states.map(|state| state.path().join("config.json")).find(|path| path.exists());
    let text = fs::read(document.expect("a container runs")).expect("its configuration can be read");
    let document: serde_json::Value = serde_json::from_slice(&text).expect("its configuration is JSON");
    document["vm"]["memory_mib"].as_u64().unwrap_or_else(|| panic!("no memory in {document}")) << 10
}

#[test]
fn output_written_before_a_signal_is_not_lost() {
    let sandbox = Sandbox::new();
    let script = "trap 'seq 1 20000; exit 0' TERM; echo ready; while :; do sleep 0.1; done";
    let running = sandbox.run(&[], "busybox", &["sh", "-c", script]).start();
    running.wait_for("ready\n");
    running.signal(Signal::TERM);
    let ended = running.end();
    assert_eq!(ended.succeeded().lines().last(), Some("20000"));
}

#[test]
fn a_slow_reader_gets_everything() {
    let sandbox = Sandbox::new();
    let image = Sandbox::reference("busybox");
    let late = "\"$COFFERDAM\" run --rm \"$IMAGE\" seq 1 200000 | (sleep 8; wc -l)";
    let counted = sandbox.program("sh", ["-c", late]).env("IMAGE", &image).end();
    assert_eq!(counted.succeeded().trim(), "200000");
    let host = sandbox.detached("host", &[], "busybox", &["sleep", "1000"]);
    let late = "\"$COFFERDAM\" exec host seq 1 200000 | (sleep 8; wc -l)";
    assert_eq!(sandbox.program("sh", ["-c", late]).end().succeeded().trim(), "200000");
    drop(host);
}
