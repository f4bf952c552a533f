//! Guest memory: given up, reported, plugged, unplugged, and files as memory.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use serde_json::{Value, json};
use tests::sandbox::{Detached, Sandbox, programs};
use tests::until;

use crate::api::{curl, json_of};

/// The resident memory of the monitor, in MiB.
fn resident_mib(sandbox: &Sandbox) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", sandbox.monitor())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() >> 10
}

fn get(sandbox: &Sandbox, pod: &Detached<'_>, path: &str) -> Value {
    let (code, answer) = json_of(curl(sandbox, pod, &[], path));
    assert_eq!(code, 200, "{answer}");
    answer
}

fn patch(sandbox: &Sandbox, pod: &Detached<'_>, path: &str, body: &Value) -> (u16, Value) {
    json_of(curl(sandbox, pod, &["--request", "PATCH", "--json", &body.to_string()], path))
}

/// The guest's own word for a line of `/proc/meminfo`, in MiB.
fn meminfo_mib(pod: &Detached<'_>, name: &str) -> u64 {
    let text = pod.verb("exec", &[], &["cat", "/proc/meminfo"]).end().succeeded().to_owned();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
    line.trim_start_matches(':').trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() >> 10
}

#[test]
fn a_balloon_takes_memory_and_gives_it_back() {
    let sandbox = Sandbox::new();
    let pod = sandbox.detached_by(&with_balloon(&sandbox), "pod", &["-m", "200m"], "busybox", &["sleep", "1000"]);
    let balloon = || get(&sandbox, &pod, "/v1/vm/balloon");
    let free_mib = || balloon()["statistics"]["free_bytes"].as_u64().map(|bytes| bytes >> 20);
    assert_eq!((&balloon()["target_mib"], &balloon()["actual_mib"]), (&json!(0), &json!(0)));
    let before = until("the first statistics", free_mib);
    assert!(before > 150, "{before}");

    let (code, answer) = patch(&sandbox, &pod, "/v1/vm/balloon", &json!({"target_mib": 100}));
    assert_eq!((code, &answer["target_mib"]), (200, &json!(100)));
    until("a balloon of 100 MiB", || (balloon()["actual_mib"] == 100).then_some(()));
    // Statistics are the guest's of a moment ago.
    let during = until("less free memory", || free_mib().filter(|during| *during < before - 80));
    // The rest of the guest's memory is all that it can touch now.
    assert!(resident_mib(&sandbox) < 200, "{}", resident_mib(&sandbox));

    assert_eq!(patch(&sandbox, &pod, "/v1/vm/balloon", &json!({"target_mib": 0})).0, 200);
    until("an empty balloon", || (balloon()["actual_mib"] == 0).then_some(()));
    until("more free memory", || free_mib().filter(|after| *after > during + 80));
}

#[test]
fn a_balloon_larger_than_the_vm_is_refused() {
    let sandbox = Sandbox::new();
    let pod = sandbox.detached_by(&with_balloon(&sandbox), "pod", &["-m", "100m"], "busybox", &["sleep", "1000"]);
    let (code, problem) = patch(&sandbox, &pod, "/v1/vm/balloon", &json!({"target_mib": 100_000}));
    assert_eq!((code, &problem["type"]), (400, &json!("invalid-request")));
    assert!(problem["detail"].as_str().unwrap().contains("target_mib is 100000: give 0 to"), "{problem}");
    let (code, problem) = patch(&sandbox, &pod, "/v1/vm", &json!({"memory_mib": 1}));
    assert_eq!(code, 400, "{problem}");
    assert!(problem["detail"].as_str().unwrap().contains("memory_max_mib"), "{problem}");
}

#[test]
fn memory_that_a_container_frees_is_the_hosts_again() {
    let sandbox = Sandbox::new();
    let flags = ["-m", "300m", "--shm-size", "200m"];
    let pod = sandbox.detached_by(&with_balloon(&sandbox), "pod", &flags, "busybox", &["sleep", "1000"]);
    let before = resident_mib(&sandbox);
    let fill = ["dd", "if=/dev/zero", "of=/dev/shm/file", "bs=1M", "count=150"];
    assert_eq!(pod.verb("exec", &[], &fill).end().code(), 0);
    let full = resident_mib(&sandbox);
    assert!(full > before + 120, "{before} {full}");
    assert_eq!(pod.verb("exec", &[], &["rm", "/dev/shm/file"]).end().code(), 0);
    until("memory given back", || (resident_mib(&sandbox) < full - 100).then_some(()));
}

/// A monitor that runs with a changed configuration: an extended regular expression and what replaces it.
pub(crate) fn changing(sandbox: &Sandbox, pattern: &str, replacement: &str) -> PathBuf {
    let path = sandbox.files().join("monitor");
    let real = programs().join("cofferdam-vmm");
    // `--born --config FILE` comes first.
    let script = format!("#!/bin/sh\nsed -E -i 's|{pattern}|{replacement}|' \"$3\"\nexec {} \"$@\"\n", real.display());
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// A monitor whose VM has a balloon.
fn with_balloon(sandbox: &Sandbox) -> PathBuf {
    changing(sandbox, "(\"balloon\": *)false", "\\1true")
}

#[test]
fn a_vm_grows_and_shrinks_while_it_runs() {
    let sandbox = Sandbox::new();
    // What the VM of a container of 100 MiB has is even, and this more by a multiple of 128.
    let plain = sandbox.detached("plain", &["-m", "100m"], "busybox", &["sleep", "1000"]);
    let begins = get(&sandbox, &plain, "/v1/vm")["memory_mib"].as_u64().unwrap();
    drop(plain);
    let most = begins + 256;
    let monitor = changing(&sandbox, "(\"memory_max_mib\": *)null", &format!("\\1{most}"));
    let pod = sandbox.detached_by(&monitor, "pod", &["-m", "100m"], "busybox", &["sleep", "1000"]);
    let vm = || get(&sandbox, &pod, "/v1/vm");
    assert_eq!((&vm()["memory_mib"], &vm()["memory_max_mib"]), (&json!(begins), &json!(most)));
    let total = meminfo_mib(&pod, "MemTotal");

    let resize = |mib: u64| {
        let (code, answer) = patch(&sandbox, &pod, "/v1/vm", &json!({"memory_mib": mib}));
        assert_eq!((code, &answer["memory_requested_mib"]), (200, &json!(mib)), "{answer}");
        until("the memory asked for", || (vm()["memory_mib"] == mib).then_some(()));
    };
    resize(most);
    let grown = meminfo_mib(&pod, "MemTotal");
    assert!(grown >= total + 250, "{total} {grown}");
    resize(begins + 128);
    resize(begins);
    assert!(meminfo_mib(&pod, "MemTotal") < total + 10, "{total}");

    let (code, problem) = patch(&sandbox, &pod, "/v1/vm", &json!({"memory_mib": most + 1}));
    assert_eq!((code, &problem["type"]), (400, &json!("invalid-request")), "{problem}");
}

/// What a VM was booted with, after a script was its first program.
struct Booted {
    /// What the script printed.
    said: String,
    /// The image that it ran from.
    image: PathBuf,
    /// A copy of it, that was memory which the guest may only read.
    read_only: PathBuf,
    /// 2 MiB of dots, that were memory which the guest may write.
    writable: PathBuf,
}

/// Boots a VM without a container from the busybox image, and runs a script, without quotes, as its first program.
fn boot(sandbox: &Sandbox, script: &str) -> Booted {
    let pod = sandbox.detached("pod", &[], "busybox", &["sleep", "1000"]);
    let path = PathBuf::from(pod.inspect("state_directory")).join("config.json");
    let config: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let descriptor = &config["vm"]["drives"][0]["file"]["descriptor"];
    let image = fs::read_link(format!("/proc/{}/fd/{descriptor}", sandbox.monitor())).unwrap();
    drop(pod);
    let (read_only, writable) = (sandbox.files().join("read-only"), sandbox.files().join("writable"));
    fs::copy(&image, &read_only).unwrap();
    fs::write(&writable, vec![b'.'; 2 << 20]).unwrap();
    let document = json!({"vm": {
        "kernel": config["vm"]["kernel"],
        "memory_mib": 256,
        "command_line": format!("root=/dev/vda rootfstype=erofs init=/bin/sh -- -c \"{script}\""),
        "drives": [{"file": {"path": image}, "read_only": true}],
        "pmem": [{"file": {"path": read_only}, "read_only": true}, {"file": {"path": writable}}],
    }});
    let path = sandbox.files().join("config.json");
    fs::write(&path, document.to_string()).unwrap();
    let monitor = programs().join("cofferdam-vmm");
    let ended = sandbox.program(monitor.to_str().unwrap(), ["--config", path.to_str().unwrap()]).end();
    // Without an API, the guest's console is the monitor's standard error.
    assert_eq!((ended.code(), ended.text()), (0, ""), "{}", ended.stderr);
    Booted { said: ended.stderr, image, read_only, writable }
}

/// CVE-2026-24834, by a guest's own kernel (`vmm/src/machine/tests.rs` has it by hand).
#[test]
fn a_file_that_is_memory_of_the_guest_is_read_only_if_it_is_to_be() {
    let sandbox = Sandbox::new();
    let script = "mount -t devtmpfs dev /tmp; mkdir /tmp/m; mount -t erofs -o ro,dax /tmp/pmem0 /tmp/m && echo mounted; \
                  cmp /bin/busybox /tmp/m/bin/busybox && echo same; umount /tmp/m; \
                  for p in 0 1; do yes | dd of=/tmp/pmem$p bs=4k count=1 iflag=fullblock conv=fsync && echo wrote $p; done; \
                  dd if=/tmp/pmem0 of=/tmp/a bs=4k count=1 iflag=direct; dd if=/tmp/vda of=/tmp/b bs=4k count=1; \
                  cmp /tmp/a /tmp/b && echo unchanged; echo alive";
    let booted = boot(&sandbox, script);
    for line in ["mounted", "same", "wrote 0", "wrote 1", "unchanged", "alive"] {
        assert!(booted.said.lines().any(|said| said.trim_end() == line), "no {line}: {}", booted.said);
    }
    assert!(fs::read(booted.read_only).unwrap() == fs::read(booted.image).unwrap(), "the file has changed");
    let written = fs::read(booted.writable).unwrap();
    assert_eq!((&written[..4], &written[4096..4100], written.len()), (&b"y\ny\n"[..], &b"...."[..], 2 << 20));
}
