//! Network devices: what goes over a tap arrives as it was sent, both ways, with all that host and guest leave to each
//! other.
//!
//! The command line has no word for them yet. A monitor of the test's own (`network.py`) adds them to the configuration, and
//! is then the real one. Each test has a network namespace of its own, with one end of the tap in it.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use tests::process::{Ended, Invocation};
use tests::sandbox::{Sandbox, programs};

/// What a test moves, in bytes: many times what a socket buffers.
const LENGTH: usize = 4 << 20;
/// How long the host waits for it once the guest has ended.
const PATIENCE: Duration = Duration::from_secs(60);
/// The longest frame that is not cut later by somebody else.
const FRAME: u64 = 1514;

/// A network namespace in which this thread is, and with it all that it starts.
pub(crate) struct Network;

impl Network {
    /// Makes one, and a tap in it.
    pub(crate) fn new(tap: &str) -> Self {
        // Loads the module, which has a name for its device only when it is there.
        shell("modprobe -q tun; [ -e /dev/net/tun ] || { mkdir -p /dev/net && mknod /dev/net/tun c 10 200; }");
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace needs root");
        shell(&format!("ip tuntap add dev tap0 mode {tap}"));
        shell("ip addr add 10.9.0.1/24 dev tap0 && ip link set tap0 up");
        Self
    }

    /// `cofferdam run` with a network device in the VM. The monitor, which is born in a network namespace of its own, is
    /// brought into this one.
    fn run(&self, sandbox: &Sandbox, network: &Value, handed_down: usize, flags: &[&str], script: &str) -> Invocation {
        let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/network.py");
        let (python, real) = (python.display(), programs().join("cofferdam-vmm"));
        let monitor = sandbox.files().join("monitor");
        let text = format!(
            "#!/bin/sh\nexec {} /usr/bin/python3 {python} '{network}' {handed_down} {} \"$@\"\n",
            self.inside(),
            real.display()
        );
        fs::write(&monitor, text).unwrap();
        fs::set_permissions(&monitor, fs::Permissions::from_mode(0o755)).unwrap();
        let flags: Vec<_> = ["--cap-add", "NET_ADMIN"].iter().chain(flags).copied().collect();
        sandbox.run(&flags, "busybox", &["sh", "-ec", script]).env("COFFERDAM_VMM", monitor)
    }

    /// What brings a program into this namespace, in front of its name.
    pub(crate) fn inside(&self) -> String {
        format!("nsenter --net=/proc/{}/task/{}/ns/net", std::process::id(), nix::unistd::gettid())
    }

    /// What went over the tap: bytes and frames from the guest, bytes and frames to it.
    pub(crate) fn moved(&self) -> [u64; 4] {
        let text = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        let line = text.lines().find_map(|line| line.trim().strip_prefix("tap0:")).unwrap();
        let numbers: Vec<u64> = line.split_whitespace().map(|number| number.parse().unwrap()).collect();
        [numbers[0], numbers[1], numbers[8], numbers[9]]
    }

    /// The mean length of frames over the tap: from the guest, and to it.
    fn frames(&self) -> (u64, u64) {
        let [from, frames_from, to, frames_to] = self.moved();
        (from / frames_from, to / frames_to)
    }
}

fn shell(script: &str) {
    let output = Command::new("sh").args(["-c", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Bytes that look like none of their neighbours.
fn noise(mut seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&(seed ^ seed >> 29).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Gives `bytes` to whoever connects to this port, takes what comes to the next one, and tells whether it is the same.
fn echoed(port: u16, bytes: Vec<u8>) -> Receiver<Result<(), String>> {
    let listeners = [port, port + 1].map(|port| TcpListener::bind(("10.9.0.1", port)).unwrap());
    let (sender, outcome) = channel();
    thread::spawn(move || {
        let moved = || -> std::io::Result<Vec<u8>> {
            let [from, to] = listeners;
            from.accept()?.0.write_all(&bytes)?;
            let mut back = Vec::new();
            to.accept()?.0.read_to_end(&mut back)?;
            Ok(back)
        };
        let outcome = match moved() {
            Ok(back) if back == bytes => Ok(()),
            Ok(back) => Err(format!("{} bytes came back, and others than the {} sent", back.len(), bytes.len())),
            Err(error) => Err(error.to_string()),
        };
        // Nobody listens when the test has failed already.
        let _ = sender.send(outcome);
    });
    outcome
}

pub(crate) const UP: &str = "ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up";

#[test]
fn what_is_sent_over_a_tap_arrives_whole_in_both_directions() {
    let sandbox = Sandbox::new();
    let network = Network::new("tap");
    let echo = echoed(5000, noise(1, LENGTH));
    let device = json!({"tap": {"name": "tap0"}, "mac": "02:00:00:00:00:02", "mtu": 1500});
    let script = format!(
        "{UP}; cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu; \
         nc 10.9.0.1 5000 > /tmp/data; nc 10.9.0.1 5001 < /tmp/data; ping -c 1 10.9.0.1 > /dev/null; echo done"
    );
    let ended = network.run(&sandbox, &device, 0, &[], &script).end();
    assert_eq!(ended.succeeded(), "02:00:00:00:00:02\n1500\ndone\n");
    assert_eq!(echo.recv_timeout(PATIENCE), Ok(Ok(())));
    // Neither side has cut what the other one can.
    let (from, to) = network.frames();
    assert!(from > FRAME && to > FRAME, "{from} and {to} bytes a frame");
}

#[test]
fn several_queues_serve_several_connections_at_once() {
    let sandbox = Sandbox::new();
    let network = Network::new("tap multi_queue");
    let ports = [5000, 5010, 5020, 5030];
    let echoes = ports.map(|port| echoed(port, noise(port.into(), LENGTH / 4)));
    let device = json!({"tap": {"name": "tap0"}, "queue_pairs": 2});
    let script = format!(
        "{UP}; ls -d /sys/class/net/eth0/queues/rx-* | wc -l; for port in 500 501 502 503; do \
         {{ nc 10.9.0.1 ${{port}}0 > /tmp/$port; nc 10.9.0.1 ${{port}}1 < /tmp/$port; }} & done; wait; echo done"
    );
    let ended = network.run(&sandbox, &device, 2, &["--cpus", "2"], &script).end();
    assert_eq!(ended.succeeded(), "2\ndone\n");
    for (port, echo) in ports.iter().zip(echoes) {
        assert_eq!(echo.recv_timeout(PATIENCE), Ok(Ok(())), "{port}");
    }
}

#[test]
fn a_guest_that_takes_another_address_is_not_heard() {
    let sandbox = Sandbox::new();
    let network = Network::new("tap");
    let script = format!(
        "{UP}; ping -c 1 -w 20 10.9.0.1 > /dev/null; ip link set eth0 address 02:00:00:00:00:03; \
         ip neigh flush dev eth0 > /dev/null; ! ping -c 2 -w 3 10.9.0.1 > /dev/null; echo $?"
    );
    let device = json!({"tap": {"name": "tap0"}, "mac": "02:00:00:00:00:02"});
    assert_eq!(network.run(&sandbox, &device, 0, &[], &script).end().succeeded(), "0\n");
}

#[test]
fn what_is_no_tap_is_an_error_that_says_what_to_do() {
    let sandbox = Sandbox::new();
    let network = Network::new("tun");
    let refused = |device: &Value, part: &str| {
        let Ended { stderr, .. } = &network.run(&sandbox, device, 0, &[], "true").end();
        assert!(stderr.contains(part), "{device}: {stderr}");
    };
    refused(&json!({"tap": {"name": "tap0"}}), "it is no tap");
    refused(&json!({"tap": {"descriptors": [77]}}), "77");
    refused(&json!({"tap": {"name": "tap0"}, "mac": "01:00:00:00:00:02"}), "01:00:00:00:00:02");
}
