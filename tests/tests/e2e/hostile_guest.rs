//! A guest that attacks every device that it has, as its driver and by every rule that can be broken: the monitor goes on
//! until the guest powers off, within its bounds, and a VM beside it does not notice.
//!
//! The guest is the kernel in `tests/hostile-guest`, which says itself what it found to be wrong.
//! `COFFERDAM_HOSTILE_CASES` says how many cases of each seed there are; without it there are a few thousand.

use std::collections::HashMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use tests::process::{Ended, ends, watch};
use tests::sandbox::{Detached, Sandbox, programs};

use crate::network::Network;

/// Which cases are played.
const SEEDS: [u64; 4] = [1, 2, 3, 4];
/// How many of each.
const CASES: u64 = 600;
/// How long the guest may take for a hundred cases in the slowest lab.
const PATIENCE: Duration = Duration::from_secs(60);
/// The guest's memory in MiB, and what it can be plugged with.
const MEMORY: u64 = 64;
const MEMORY_MAX: u64 = 192;
/// The size of a drive and of a persistent memory in MiB.
const DRIVE: usize = 8;
const PMEM: usize = 2;
/// How much of what it can be plugged with the guest touches, in MiB (`aim.rs` and `elsewhere.rs` in `tests/hostile-guest/src`):
/// huge pages with either end in them.
const TOUCHED: u64 = 8;
/// What the monitor may take for itself, in MiB.
const OWN: u64 = 16;
/// How many devices it has.
const DEVICES: usize = 12;
/// What the guest may add to a directory: bytes, and inodes.
const QUOTA: (u64, u64) = (4 << 20, 200);
/// Whom the directory belongs to that it may write to; what it finds there is somebody else's.
const OWNER: u32 = 1000;
/// The file that it asks for in each directory, and how long it is (`KNOWN` in `tests/hostile-guest/src/devices/files.rs`).
const KNOWN: (&str, usize) = ("known", 4096);
/// The host's ports that somebody listens at, from 1 on, and those of the guest's that somebody calls.
const PORTS: u32 = 16;
/// How long a caller waits for an answer.
const CALLS: Duration = Duration::from_millis(50);

fn cases() -> u64 {
    let told = std::env::var(tests::HOSTILE_CASES_VARIABLE);
    told.map_or(CASES, |text| text.parse().expect("the number of cases is a number"))
}

/// A VM beside the attacked one, with something in its memory.
struct Bystander<'a> {
    pod: Detached<'a>,
    sum: String,
}

impl<'a> Bystander<'a> {
    fn start(sandbox: &'a Sandbox) -> Self {
        let pod = sandbox.detached("bystander", &["-m", "100m"], "busybox", &["sleep", "1000000"]);
        let fill = ["dd", "if=/dev/urandom", "of=/dev/shm/kept", "bs=1M", "count=8"];
        assert_eq!(pod.verb("exec", &[], &fill).end().code(), 0);
        let mut bystander = Self { pod, sum: String::new() };
        bystander.sum = bystander.memory();
        bystander
    }

    fn memory(&self) -> String {
        self.pod.verb("exec", &[], &["sha256sum", "/dev/shm/kept"]).end().succeeded().to_owned()
    }

    fn is_undisturbed(&self) {
        assert_eq!(self.memory(), self.sum);
    }
}

/// The files of the attacked VM, all with the same pattern in them.
struct Files {
    read_only: [PathBuf; 2],
    writable: [PathBuf; 2],
    /// Directories, of which the first is read-only, with a secret beside them.
    exports: [PathBuf; 2],
    secret: PathBuf,
}

/// What is in the first `length` bytes of each of them.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7 + (at >> 12) * 13 + 3) as u8).collect()
}

impl Files {
    fn make(folder: &Path) -> Self {
        let make = |name: &str, length: usize| {
            let path = folder.join(name);
            fs::write(&path, pattern(length)).unwrap();
            path
        };
        // A file that does not fill its last page.
        let read_only = [make("read-only.img", DRIVE << 20), make("read-only.pmem", (PMEM << 20) - 1000)];
        let writable = [make("writable.img", DRIVE << 20), make("writable.pmem", PMEM << 20)];
        let exports = ["read-only", "writable"].map(|name| folder.join(name));
        for export in &exports {
            fs::create_dir(export).unwrap();
            let known = export.join(KNOWN.0);
            fs::write(&known, pattern(KNOWN.1)).unwrap();
            fs::set_permissions(&known, fs::Permissions::from_mode(0o444)).unwrap();
            // Names that it tries.
            fs::create_dir(export.join("d")).unwrap();
            symlink("../secret", export.join("e")).unwrap();
        }
        chown(&exports[1], Some(OWNER), Some(OWNER)).unwrap();
        let secret = folder.join("secret");
        fs::write(&secret, "secret").unwrap();
        Self { read_only, writable, exports, secret }
    }

    /// What is read-only holds what it did, and the rest is as long as it was.
    fn check(&self, seed: u64) {
        for path in &self.read_only {
            let content = fs::read(path).unwrap();
            assert!(content == pattern(content.len()), "seed {seed}: {} has changed", path.display());
        }
        let lengths = self.writable.each_ref().map(|path| fs::metadata(path).unwrap().len());
        assert_eq!(lengths, [(DRIVE as u64) << 20, (PMEM as u64) << 20], "seed {seed}");
        self.check_exports(seed);
    }

    /// What is shown is there as it was, and no more was added than may be.
    fn check_exports(&self, seed: u64) {
        for export in &self.exports {
            let known = export.join(KNOWN.0);
            assert!(fs::read(&known).unwrap() == pattern(KNOWN.1), "seed {seed}: {} has changed", known.display());
            let stat = fs::metadata(&known).unwrap();
            assert_eq!((stat.uid(), stat.mode() & 0o7777), (0, 0o444), "seed {seed}: {}", known.display());
        }
        let mut names: Vec<_> =
            fs::read_dir(&self.exports[0]).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["d", "e", KNOWN.0], "seed {seed}: the read-only directory has changed");
        assert_eq!(fs::read_dir(self.exports[0].join("d")).unwrap().count(), 0, "seed {seed}");
        assert_eq!(fs::read(&self.secret).unwrap(), b"secret", "seed {seed}: the secret has changed");
        // What it found there is not counted.
        let inodes = taken(&self.exports[1]);
        let (count, bytes) = (inodes.len() as u64, inodes.values().sum::<u64>());
        assert!(count <= QUOTA.1 + 3 && bytes <= QUOTA.0 + (16 << 10), "seed {seed}: {count} inodes, {bytes} bytes");
    }
}

/// What is in a directory and below it: how many bytes each inode takes, as far as quotas count.
fn taken(directory: &Path) -> HashMap<u64, u64> {
    let mut inodes = HashMap::new();
    for entry in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap()) {
        let stat = entry.metadata().unwrap();
        if stat.is_dir() {
            inodes.extend(taken(&entry.path()));
        }
        let bytes = if stat.is_file() { (stat.blocks() * 512).min(stat.size().next_multiple_of(4096)) } else { 0 };
        inodes.insert(stat.ino(), bytes);
    }
    inodes
}

/// Listens at a socket, and gives everybody who connects what they send.
fn echo(path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().take(PORTS as usize).flatten() {
            thread::spawn(move || returned(stream));
        }
    });
}

fn returned(mut stream: UnixStream) {
    let mut buffer = [0; 4096];
    // The guest may end a connection at any time, which ends this as well.
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
}

/// Asks for connections to the guest again and again, for as long as there is a monitor to ask.
fn call(socket: PathBuf) {
    thread::spawn(move || {
        while UnixStream::connect(&socket).is_err() {
            thread::sleep(CALLS);
        }
        for port in (1..=PORTS).cycle() {
            let Ok(mut stream) = UnixStream::connect(&socket) else { return };
            // What is answered is the guest's affair, and whether.
            _ = stream.set_read_timeout(Some(CALLS));
            _ = stream.write_all(format!("CONNECT {port}\nsomething to say").as_bytes());
            _ = stream.read(&mut [0; 256]);
        }
    });
}

/// A VM with every device there is, which plays the cases of a seed.
struct Attack {
    sandbox: Sandbox,
    files: Files,
    seed: u64,
}

impl Attack {
    fn new(seed: u64) -> Self {
        let sandbox = Sandbox::new();
        let files = Files::make(&sandbox.files());
        Self { sandbox, files, seed }
    }

    /// Writes the monitor's configuration.
    fn config(&self) -> PathBuf {
        let kernel =
            std::env::var_os(tests::HOSTILE_GUEST_VARIABLE).expect("`cargo xtask e2e` names the hostile guest");
        let socket = self.sandbox.files().join("echo");
        echo(&socket);
        let callers = self.sandbox.files().join("callers");
        call(callers.clone());
        let Files { read_only: [disk, memory], writable: [own_disk, own_memory], exports, .. } = &self.files;
        let (bytes, inodes) = QUOTA;
        let ports: Vec<_> = (1..=PORTS).map(|port| json!({"port": port, "socket": {"path": socket}})).collect();
        let (process, thread) = (std::process::id(), nix::unistd::gettid());
        let document = json!({
            "vm": {
                "kernel": PathBuf::from(kernel),
                "memory_mib": MEMORY,
                "memory_max_mib": MEMORY_MAX,
                "command_line": format!("hostile.seed={} hostile.cases={}", self.seed, cases()),
                "drives": [{"file": {"path": disk}, "read_only": true}, {"file": {"path": own_disk}}],
                "pmem": [{"file": {"path": memory}, "read_only": true}, {"file": {"path": own_memory}}],
                "filesystems": [
                    {"tag": "read-only", "path": exports[0], "read_only": true, "noexec": true},
                    {"tag": "writable", "path": exports[1], "xattrs": true, "quota": {"bytes": bytes, "inodes": inodes}},
                ],
                "networks": [{"tap": {"name": "tap0"}, "mac": "02:00:00:00:00:02", "queue_pairs": 2}],
                "vsock": ports,
                "vsock_socket": {"path": callers},
                "balloon": true,
                "serial": true,
            },
            "jail": {"network_namespace": format!("/proc/{process}/task/{thread}/ns/net")},
        });
        let path = self.sandbox.files().join("config.json");
        fs::write(&path, document.to_string()).unwrap();
        path
    }

    /// The most memory that a monitor of this VM has had, in KiB, as long as there is one.
    fn peak_kib(&self) -> u64 {
        let peak = |pid: u32| -> Option<u64> {
            let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
            line.trim().trim_end_matches(" kB").parse().ok()
        };
        self.sandbox.monitors().into_iter().filter_map(peak).max().unwrap_or(0)
    }

    /// Runs it to its end, and looks at what is beside it meanwhile; gives its end, and the most memory that it had.
    fn run(&self, beside: &Bystander<'_>) -> (Ended, u64) {
        let (monitor, config) = (programs().join("cofferdam-vmm"), self.config());
        let running = self.sandbox.program(monitor.to_str().unwrap(), ["--config", config.to_str().unwrap()]).start();
        let (process, began) = (watch(running.pid()), Instant::now());
        let limit = PATIENCE * u32::try_from(cases().div_ceil(100)).unwrap();
        let mut peak = 0;
        while !ends(&process, Duration::from_millis(300)) {
            peak = peak.max(self.peak_kib());
            beside.is_undisturbed();
            assert!(began.elapsed() < limit, "seed {}: does not end within {limit:?}", self.seed);
        }
        (running.end(), peak)
    }
}

#[test]
fn a_guest_that_attacks_every_device_harms_only_itself() {
    let _network = Network::new("tap multi_queue");
    let quiet = Sandbox::new();
    let beside = Bystander::start(&quiet);
    for seed in SEEDS {
        let attack = Attack::new(seed);
        let (ended, peak) = attack.run(&beside);
        let said = &ended.stderr;
        let lines = || said.lines().filter(|line| line.starts_with("hostile: "));
        let last = lines().next_back().unwrap_or_default();
        // Not by a signal, and not by an error: the guest has powered off.
        let end = said.get(said.len().saturating_sub(2000)..).unwrap_or(said);
        assert_eq!((ended.code(), ended.text()), (0, ""), "seed {seed}: {end}");
        assert!(!said.contains("panicked"), "seed {seed}: {last}");
        let faults: Vec<_> = lines().filter(|line| line.contains("FAULT")).collect();
        assert!(faults.is_empty(), "{faults:#?}");
        let expected = format!("hostile: {0} cases, {0} survived, ", cases());
        assert!(last.starts_with(&expected), "seed {seed}: the guest shut down before its end: {last}");
        let found = format!("hostile: {DEVICES} devices, ");
        assert!(lines().any(|line| line.starts_with(&found)), "seed {seed}: not {DEVICES} devices: {said}");
        // Something broke, something was answered, and something interrupted.
        let counts = last.split(", ").skip(2).map(|count| count.split(' ').next().unwrap().parse::<u64>().unwrap());
        let counts: Vec<_> = counts.collect();
        assert!(counts.len() == 3 && counts.iter().all(|count| *count > 0), "seed {seed}: {last}");
        eprintln!("seed {seed}: {last}; the monitor had {peak} KiB");
        let bound = MEMORY + TOUCHED + 2 * PMEM as u64 + OWN;
        assert!(peak > 0 && peak < bound << 10, "seed {seed}: the monitor had {peak} KiB, not below {bound} MiB");
        attack.files.check(seed);
        beside.is_undisturbed();
    }
}
