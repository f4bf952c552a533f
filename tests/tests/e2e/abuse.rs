//! Guests that use up what they can reach: what that costs the host stays within bounds, and a VM beside them is served
//! meanwhile.
//!
//! A flood goes on until its test has seen what it wants to see, or ends by itself ([`ENDS`]). The bounds are those of
//! `docs/security/threat-model.md`, each with the constant that makes it.

use std::cell::RefCell;
use std::fs;
use std::io::{copy, sink};
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tests::process::Running;
use tests::sandbox::{Detached, Sandbox, programs};
use tests::until;

use crate::api::{curl, json_of};
use crate::network::{Network, UP};
use crate::soak::private_kib;

/// What a flood runs under: it ends after so many seconds, whatever becomes of the test.
const ENDS: &str = "timeout 170";
/// How often the neighbour is asked for something while a flood goes on, and how often a program in it is for an echo.
const ASKED: usize = 3;
const ECHOES: usize = 60;
/// How long an echo of the neighbour's takes beside a flood: half of them, and all. Both VMs have as many CPUs as the machine, which
/// is emulated, so that the neighbour waits for its turn; nothing else may make it wait.
const ECHO_USUAL: Duration = Duration::from_millis(250);
const ECHO_MOST: Duration = Duration::from_secs(5);
/// How much more memory of its own a monitor may have in a flood than before it, in KiB: more than any of its buffers
/// (`TAIL_MAX` of the console; `CREDIT` for each connection of a socket device; `DEPTH` operations of a block device).
const GROWTH_KIB: u64 = 16 << 10;
/// The container's memory.
const MEMORY: &str = "256m";
/// What a container's log takes: two files (`FILE_MAX` in `api/src/log.rs`).
const LOG_FILE_MAX: u64 = 8 << 20;
/// How much of the console is kept (`TAIL_MAX` in `devices/src/console.rs`), and told (`CONSOLE_MAX` in `vmm/src/monitor.rs`).
const TAIL_MAX: u64 = 16 << 10;
const CONSOLE_MAX: usize = 8 << 10;
/// What else is in a state directory.
const STATE_MAX: u64 = 1 << 20;
/// The length of the guest's disk.
const DISK: u64 = 32 << 20;

/// A monitor that runs with more in its VM's configuration: lists get longer, other values are replaced. `inside` stands before
/// its name.
pub fn with(sandbox: &Sandbox, inside: &str, more: &Value) -> PathBuf {
    let path = sandbox.files().join("monitor");
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/configured.py");
    let (python, real) = (python.display(), programs().join("cofferdam-vmm"));
    let script = format!("#!/bin/sh\nexec {inside} /usr/bin/python3 {python} '{more}' {} \"$@\"\n", real.display());
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// A program in a VM that says what it is told.
struct Echo {
    program: Running,
    said: u64,
}

impl Echo {
    fn of(container: &Detached<'_>) -> Self {
        Self { program: container.verb("exec", &["-i"], &["cat"]).open_input().start(), said: 0 }
    }

    /// How long each of some echoes took, the shortest first.
    fn times(&mut self) -> Vec<Duration> {
        let mut time = || {
            let began = Instant::now();
            self.program.write("x\n");
            self.said += 2;
            self.program.wait_for_bytes(self.said);
            began.elapsed()
        };
        let mut times: Vec<_> = (0..ECHOES).map(|_| time()).collect();
        times.sort_unstable();
        times
    }
}

/// A VM that is abused, and its neighbour.
struct Pair<'a> {
    sandbox: &'a Sandbox,
    abused: Detached<'a>,
    neighbour: Detached<'a>,
    echo: RefCell<Echo>,
    monitor: u32,
    before_kib: u64,
}

impl<'a> Pair<'a> {
    fn new(sandbox: &'a Sandbox, more: &Value, flags: &[&str], image: &str, words: &[&str]) -> Self {
        Self::by(sandbox, &with(sandbox, "", more), flags, image, words)
    }

    /// The same by a monitor of this kind.
    fn by(sandbox: &'a Sandbox, monitor: &Path, flags: &[&str], image: &str, words: &[&str]) -> Self {
        let flags: Vec<&str> = ["-m", MEMORY, "--cpus", "2"].iter().chain(flags).copied().collect();
        let abused = sandbox.detached_by(monitor, "abused", &flags, image, words);
        let monitor = sandbox.monitor();
        let neighbour = sandbox.detached("neighbour", &[], "busybox", &["sleep", "1000"]);
        let before_kib = private_kib(monitor, &abused);
        let mut echo = Echo::of(&neighbour);
        let idle = echo.times();
        eprintln!("echoes beside an idle VM: {:?}, at most {:?}", idle[ECHOES / 2], idle[ECHOES - 1]);
        Self { sandbox, abused, neighbour, echo: RefCell::new(echo), monitor, before_kib }
    }

    /// Starts a flood, by a script that runs while `$GO` succeeds and says `flooding` when it has begun.
    fn flood(&self, script: &str) -> Running {
        let script = format!("GO='test ! -e /tmp/stop'; {script}; echo flooded");
        let ends: Vec<&str> = ENDS.split(' ').collect();
        let words: Vec<&str> = ends.into_iter().chain(["sh", "-c", &script]).collect();
        let flood = self.abused.verb("exec", &[], &words).start();
        flood.wait_for("flooding\n");
        flood
    }

    /// The neighbour is served, and the monitor stays within its bounds.
    fn goes_on(&self) {
        for number in 0..ASKED {
            let word = format!("alive {number}\n");
            assert_eq!(self.neighbour.verb("exec", &[], &["echo", word.trim_end()]).end().succeeded(), word);
            let now = private_kib(self.monitor, &self.abused);
            let before = self.before_kib;
            assert!(now <= before + GROWTH_KIB, "the monitor's own memory grew from {before} to {now} KiB");
        }
        let times = self.echo.borrow_mut().times();
        let (usual, most) = (times[ECHOES / 2], times[ECHOES - 1]);
        eprintln!("echoes beside a flood: {usual:?}, at most {most:?}");
        assert!(usual <= ECHO_USUAL && most <= ECHO_MOST, "the neighbour is kept waiting: {times:?}");
        let kept = self.kept();
        assert!(kept <= 2 * LOG_FILE_MAX + STATE_MAX, "the state directory takes {kept} bytes");
    }

    /// How many bytes its state directory takes.
    fn kept(&self) -> u64 {
        size(Path::new(&self.abused.inspect("state_directory")))
    }

    /// Ends a flood, which was still going on.
    fn stop(&self, flood: Running) {
        // By a process in the flooded VM: it is served, too.
        assert_eq!(self.abused.verb("exec", &[], &["touch", "/tmp/stop"]).end().succeeded(), "");
        let ended = flood.end();
        assert!(ended.code() == 0 && ended.text().ends_with("flooded\n"), "{ended:?}");
        assert_eq!(self.abused.inspect("state.status"), "running");
    }

    fn patch(&self, path: &str, body: &Value) -> (u16, Value) {
        let words = ["--request", "PATCH", "--json", &body.to_string()];
        json_of(curl(self.sandbox, &self.abused, &words, path))
    }

    fn metrics(&self, name: &str) -> u64 {
        let (code, text) = curl(self.sandbox, &self.abused, &[], "/v1/metrics");
        assert_eq!(code, 200, "{text}");
        let lines = text.lines().filter(|line| line.starts_with(name));
        lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok()).sum()
    }
}

/// How long all files below a folder are.
fn size(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).unwrap().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(entry_is) if entry_is.is_dir() => size(&entry.path()),
        Ok(entry_is) => entry_is.len(),
        // A file that was rotated away meanwhile.
        Err(_) => 0,
    });
    sizes.sum()
}

#[test]
fn a_flood_of_output_is_kept_in_two_files_of_bounded_size() {
    let sandbox = Sandbox::new();
    let line = "x".repeat(1000);
    let script = format!("while [ ! -e /tmp/go ]; do sleep 0.2; done; {ENDS} yes {line}; exec sleep 1000");
    let pair = Pair::new(&sandbox, &json!({}), &[], "busybox", &["sh", "-c", &script]);
    assert_eq!(pair.abused.verb("exec", &[], &["touch", "/tmp/go"]).end().succeeded(), "");
    let folder = PathBuf::from(pair.abused.inspect("state_directory")).join("monitor");
    // More was written than one file may hold, and it goes on.
    until("a second log file", || folder.join("log.1").exists().then_some(()));
    pair.goes_on();
    for name in ["log", "log.1"] {
        let length = fs::metadata(folder.join(name)).map_or(0, |file| file.len());
        assert!(length <= LOG_FILE_MAX, "{name} has {length} bytes");
    }
    // Somebody who reads it is served as well.
    let tail = pair.abused.verb("logs", &["-n", "1"], &[]).end();
    assert_eq!(tail.code(), 0, "{tail:?}");
}

#[test]
fn a_flood_of_the_console_is_kept_as_a_tail() {
    let sandbox = Sandbox::new();
    let pair = Pair::new(&sandbox, &json!({}), &[], "busybox", &["sleep", "1000"]);
    let printed = || pair.metrics("cofferdam_device_output_bytes{device=\"console\"");
    let before = printed();
    // Both ways that there are: the kernel's log, which admits a few lines for each time that it is opened, and the terminal.
    let flood = pair.flood(
        "mknod /tmp/kmsg c 1 11; mknod /tmp/hvc c 229 0; echo flooding; while $GO; do \
         echo '<0>flood flood flood flood flood flood' > /tmp/kmsg; dd if=/bin/busybox of=/tmp/hvc bs=4k count=4 2> /dev/null; \
         done",
    );
    until("more output than is kept", || (printed() > before + 2 * TAIL_MAX).then_some(()));
    pair.goes_on();
    let (code, console) = curl(&sandbox, &pair.abused, &[], "/v1/vm/console");
    // What is no text is shown as a character of three bytes.
    assert!(code == 200 && console.len() <= 3 * CONSOLE_MAX, "{code}: {} bytes", console.len());
    pair.stop(flood);
}

/// Connects to ports of the host that nobody is at, from several threads at once, and keeps every socket it gets.
const CONNECTING: &str = r"
import os, socket, threading
kept, refused = [], [0] * 8
def storm(number):
    port = 10000 * (number + 1)
    while not os.path.exists('/tmp/stop'):
        port = 10000 * (number + 1) + (port + 1) % 9999
        stream = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        stream.settimeout(5)
        try:
            stream.connect((2, port))
            stream.send(b'x' * 65536)
            kept.append(stream)
        except OSError:
            refused[number] += 1
            stream.close()
threads = [threading.Thread(target=storm, args=(number,)) for number in range(len(refused))]
[thread.start() for thread in threads]
print('flooding', flush=True)
[thread.join() for thread in threads]
print('kept', len(kept), 'refused', min(1, sum(refused)), flush=True)
";

#[test]
fn a_storm_of_connections_is_refused_one_by_one() {
    let sandbox = Sandbox::new();
    let flags = ["--security-opt", "seccomp=unconfined"];
    let pair = Pair::new(&sandbox, &json!({}), &flags, "debian", &["sleep", "1000"]);
    let flood = pair.flood(&format!("python3 -c \"{CONNECTING}\""));
    // Streams that nobody reads, at the same time: each waits in the guest for room.
    let stuck = "for n in 1 2 3 4 5 6 7 8; do \"$COFFERDAM\" exec abused cat /dev/zero | sleep 1000 & done; wait";
    let stuck = sandbox.program("sh", ["-c", stuck]).start();
    pair.goes_on();
    // Nothing is connected but what the host has offered.
    assert_eq!(pair.abused.verb("exec", &[], &["touch", "/tmp/stop"]).end().succeeded(), "");
    flood.wait_for("kept 0 refused 1\n");
    assert_eq!(flood.end().code(), 0);
    assert_eq!(pair.abused.verb("exec", &[], &["echo", "alive"]).end().succeeded(), "alive\n");
    pair.goes_on();
    // They end with their VM; who holds their output does with the test.
    assert_eq!(pair.abused.verb("kill", &[], &[]).end().succeeded(), "abused\n");
    assert_eq!(pair.neighbour.verb("kill", &[], &[]).end().succeeded(), "neighbour\n");
    for container in [&pair.abused, &pair.neighbour] {
        assert_eq!(container.verb("wait", &[], &[]).end().code(), 0);
    }
    drop(stuck);
    let stuck = sandbox.processes().into_iter().filter_map(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
    for process in stuck {
        // Some have ended with those that they wrote to.
        _ = kill_process(process, Signal::KILL);
    }
}

/// A VM with a disk, in front of a script that has it as `$disk` in the guest.
fn with_disk(sandbox: &Sandbox) -> (PathBuf, Value) {
    let path = sandbox.files().join("disk");
    fs::File::create(&path).unwrap().set_len(DISK).unwrap();
    let more = json!({ "drives": [{ "file": { "path": path } }] });
    (path, more)
}

const FIND_DISK: &str = "IFS=: read major minor < /sys/block/vdb/dev; disk=/tmp/disk; mknod $disk b $major $minor";

#[test]
fn a_guest_fills_its_own_disk_and_no_more() {
    let sandbox = Sandbox::new();
    let (path, more) = with_disk(&sandbox);
    let pair = Pair::new(&sandbox, &more, &[], "busybox", &["sleep", "1000"]);
    // All of it again and again, and places that are behind its end.
    let flood = pair.flood(&format!(
        "{FIND_DISK}; echo flooding; n=0; while $GO; do n=$(((n * 1103515245 + 12345) % 2147483648)); \
         dd if=/dev/urandom of=$disk bs=64k count=16 seek=$((n / 65536 % 1024)) conv=notrunc 2> /dev/null; \
         dd if=/dev/zero of=$disk bs=64k seek=504 conv=notrunc 2> /dev/null; done; sync"
    ));
    pair.goes_on();
    pair.stop(flood);
    let threads: Value = serde_json::from_str(&pair.abused.inspect("jail.threads")).unwrap();
    let of_disk = |thread: &&Value| thread["name"] == "disk 0";
    assert_eq!(threads.as_array().unwrap().iter().find(of_disk).unwrap()["system_calls"], "filtered", "{threads}");
    let disk = fs::metadata(&path).unwrap();
    assert_eq!(disk.len(), DISK);
    // What the file system needs to say where it is comes on top.
    assert!(disk.blocks() * 512 <= DISK + (1 << 20), "{} bytes", disk.blocks() * 512);
    assert!(disk.blocks() > 0, "nothing was written");
}

#[test]
fn a_storm_of_notifications_and_interrupts_holds_up_nobody() {
    let sandbox = Sandbox::new();
    let (_, more) = with_disk(&sandbox);
    let pair = Pair::new(&sandbox, &more, &[], "busybox", &["sleep", "1000"]);
    let events = || pair.metrics("cofferdam_device_events{");
    let before = events();
    // Each read of 512 bytes past the page cache, and each of entropy, is a notification and an interrupt.
    let flood = pair.flood(&format!(
        "{FIND_DISK}; mknod /tmp/entropy c 10 183; echo flooding; \
         read_disk() {{ while $GO; do dd if=$disk of=/dev/null bs=512 count=2048 iflag=direct 2> /dev/null; done; }}; \
         read_entropy() {{ while $GO; do dd if=/tmp/entropy of=/dev/null bs=64 count=256 2> /dev/null; done; }}; \
         read_disk & read_disk & read_entropy & read_entropy & wait"
    ));
    // A device that is at work may show what it had counted before, and never less.
    let mut last = before;
    until("a storm", || {
        let now = events();
        assert!(now >= last, "{now} events after {last}");
        last = now;
        (now > before + STORM).then_some(())
    });
    pair.goes_on();
    pair.stop(flood);
}

#[test]
fn a_storm_of_flushes_holds_up_nobody() {
    let sandbox = Sandbox::new();
    let path = sandbox.files().join("memory");
    fs::File::create(&path).unwrap().set_len(DISK).unwrap();
    let more =
        json!({ "pmem": [{ "file": { "path": path }, "limits": { "operations": { "size": 1, "refill_ms": 20 } } }] });
    let pair = Pair::new(&sandbox, &more, &[], "busybox", &["sleep", "1000"]);
    let flood = pair.flood(
        "IFS=: read major minor < /sys/block/pmem0/dev; mknod /tmp/memory b $major $minor; echo flooding; \
         flush() { while $GO; do dd if=/dev/zero of=/tmp/memory bs=4k count=1 conv=notrunc,fsync 2> /dev/null; done; }; \
         flush & flush & flush & wait",
    );
    let counted = |what: &str| pair.metrics(&format!("cofferdam_device_{what}{{device=\"pmem\""));
    until("a device that waits", || (counted("throttled") > 0 && counted("flushes") > 10).then_some(()));
    pair.goes_on();
    pair.stop(flood);
    let threads: Value = serde_json::from_str(&pair.abused.inspect("jail.threads")).unwrap();
    let waits = |thread: &Value| thread["name"] == "disk 0" && thread["system_calls"] == "filtered";
    assert!(threads.as_array().unwrap().iter().any(waits), "{threads}");
    assert_eq!(fs::metadata(&path).unwrap().len(), DISK);
}

/// How many events of devices are a storm.
const STORM: u64 = 1000;
/// How many bytes a guest may send in a second, and at once.
const SENT: u64 = 256 << 10;
/// What it sends above that at most: the frame that uses up what is left may be as long as one that its device cuts into many,
/// and the headers of those are added by the host.
const FRAMES: u64 = 128 << 10;

/// Takes whatever is sent to a port of the host's in this thread's network namespace, and forgets it.
fn swallow(port: u16) {
    let listener = TcpListener::bind(("10.9.0.1", port)).unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // It ends as its guest does.
            thread::spawn(move || copy(&mut stream, &mut sink()));
        }
    });
}

#[test]
fn a_flood_of_frames_is_held_to_its_limit() {
    let sandbox = Sandbox::new();
    let network = Network::new("tap");
    swallow(5000);
    let more = json!({ "networks": [{
        "tap": { "name": "tap0" },
        "mac": "02:00:00:00:00:02",
        "tx_limits": { "bytes": { "size": SENT, "refill_ms": 1000 } },
    }] });
    let monitor = with(&sandbox, &network.inside(), &more);
    let began = Instant::now();
    let pair = Pair::by(&sandbox, &monitor, &["--cap-add", "NET_ADMIN"], "busybox", &["sleep", "1000"]);
    let flood = pair.flood(&format!(
        "{UP}; senders=; for n in 1 2 3 4; do nc 10.9.0.1 5000 < /dev/zero & senders=\"$senders $!\"; done; \
         echo flooding; while $GO; do sleep 0.2; done; kill $senders"
    ));
    // More than it may send at once, and it would send more.
    let sent = || network.moved()[0];
    until("a flood", || (sent() > 2 * SENT).then_some(()));
    pair.goes_on();
    // A device that is at work shows no figures.
    let throttled = || pair.metrics("cofferdam_device_transmit_throttled{device=\"network\"");
    until("a device that waits", || (throttled() > 0).then_some(()));
    let bytes = sent();
    // Looked at before the clock: the time is longer than that in which it was sent.
    let allowed = SENT + SENT * (began.elapsed().as_millis() as u64).div_ceil(1000) + FRAMES;
    assert!(bytes <= allowed, "{bytes} bytes were sent, and not more than {allowed} may be");
    pair.stop(flood);
}

#[test]
fn a_balloon_that_is_blown_up_and_let_down_all_the_time_harms_nobody() {
    let sandbox = Sandbox::new();
    let more = json!({ "balloon": true });
    let pair = Pair::new(&sandbox, &more, &["--shm-size", "128m"], "busybox", &["sleep", "1000"]);
    // The guest takes memory and frees it, so that it is reported, while the host asks for it and gives it back.
    let flood = pair.flood(
        "echo flooding; while $GO; do dd if=/dev/zero of=/dev/shm/file bs=1M count=48 2> /dev/null; \
         rm -f /dev/shm/file; done",
    );
    for round in 0..8 {
        for target in [96, 0, 64, 3] {
            let (code, answer) = pair.patch("/v1/vm/balloon", &json!({ "target_mib": target }));
            assert_eq!(code, 200, "round {round}: {answer}");
        }
    }
    pair.goes_on();
    assert_eq!(pair.patch("/v1/vm/balloon", &json!({ "target_mib": 0 })).0, 200);
    pair.stop(flood);
    let actual = || json_of(curl(&sandbox, &pair.abused, &[], "/v1/vm/balloon")).1["actual_mib"].clone();
    until("an empty balloon", || (actual() == 0).then_some(()));
}
