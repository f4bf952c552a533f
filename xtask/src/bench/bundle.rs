//! The bundle for runc and crun (OCI runtime specification, `config.json`): the container that docker would ask for, with
//! the same capabilities, limits, hidden paths and system call filter that a container of ours has.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::paths;

/// What docker and podman give a container by default.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SYS_CHROOT",
    "CAP_MKNOD",
    "CAP_AUDIT_WRITE",
    "CAP_SETFCAP",
];

/// The configuration of a container that runs `program` in the directory `root`, with a network namespace of its own or
/// the host's.
pub fn config(root: &str, program: &str, own_network: bool) -> Result<Value> {
    let mount = |to: &str, kind: &str, source: &str, options: &str| {
        let options: Vec<&str> = options.split(',').collect();
        json!({ "destination": to, "type": kind, "source": source, "options": options })
    };
    let mut namespaces = vec!["pid", "ipc", "uts", "mount", "cgroup"];
    if own_network {
        namespaces.push("network");
    }
    let namespaces: Vec<Value> = namespaces.into_iter().map(|kind| json!({ "type": kind })).collect();
    let device = |kind: &str, major: Option<u32>, minor: Option<u32>, access: &str| json!({ "allow": true, "type": kind, "major": major, "minor": minor, "access": access });
    Ok(json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": [program],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"],
            "cwd": "/",
            "capabilities": {
                "bounding": CAPABILITIES,
                "effective": CAPABILITIES,
                "permitted": CAPABILITIES,
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 1 << 20, "hard": 1 << 20 }],
        },
        "root": { "path": root, "readonly": false },
        "hostname": "bench",
        "mounts": [
            mount("/proc", "proc", "proc", "nosuid,noexec,nodev"),
            mount("/dev", "tmpfs", "tmpfs", "nosuid,strictatime,mode=755,size=65536k"),
            mount("/dev/pts", "devpts", "devpts", "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5"),
            mount("/sys", "sysfs", "sysfs", "nosuid,noexec,nodev,ro"),
            mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid,noexec,nodev,ro"),
            mount("/dev/mqueue", "mqueue", "mqueue", "nosuid,noexec,nodev"),
            mount("/dev/shm", "tmpfs", "shm", "nosuid,noexec,nodev,mode=1777,size=67108864"),
        ],
        "linux": {
            "resources": {
                "devices": [
                    { "allow": false, "access": "rwm" },
                    device("c", Some(1), Some(5), "rwm"),
                    device("c", Some(1), Some(3), "rwm"),
                    device("c", Some(1), Some(9), "rwm"),
                    device("c", Some(1), Some(8), "rwm"),
                    device("c", Some(5), Some(0), "rwm"),
                    device("c", Some(5), Some(1), "rwm"),
                ],
                "memory": { "limit": 440 << 20 },
                "pids": { "limit": 2048 },
            },
            "namespaces": namespaces,
            "seccomp": seccomp()?,
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/sys/devices/virtual/powercap", "/sys/firmware",
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }))
}

/// The default filter of our containers in the words of the OCI specification.
fn seccomp() -> Result<Value> {
    let path = paths::root().join("resources/seccomp/container-default.json");
    let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let profile: Value = serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", path.display()))?;
    let rules = |name: &str| profile[name]["filter"].as_array().with_context(|| format!("no filter {name:?}"));
    let mut always = Vec::new();
    let mut calls = Vec::new();
    for rule in rules("allowed")? {
        match rule["args"].as_array() {
            None => always.push(&rule["syscall"]),
            Some(arguments) => {
                let arguments = arguments.iter().map(argument).collect::<Result<Vec<_>>>()?;
                calls.push(json!({ "names": [rule["syscall"]], "action": "SCMP_ACT_ALLOW", "args": arguments }));
            }
        }
    }
    let absent: Vec<&Value> = rules("absent")?.iter().map(|rule| &rule["syscall"]).collect();
    calls.push(json!({ "names": always, "action": "SCMP_ACT_ALLOW" }));
    calls.push(json!({
        "names": absent,
        "action": "SCMP_ACT_ERRNO",
        "errnoRet": profile["absent"]["match_action"]["errno"],
    }));
    Ok(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": profile["allowed"]["mismatch_action"]["errno"],
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": calls,
    }))
}

/// A condition on an argument.
fn argument(condition: &Value) -> Result<Value> {
    let (index, value) = (&condition["index"], &condition["val"]);
    if let Some(mask) = condition["op"].get("masked_eq") {
        return Ok(json!({ "index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ" }));
    }
    let operator = match condition["op"].as_str() {
        Some("eq") => "SCMP_CMP_EQ",
        Some("ne") => "SCMP_CMP_NE",
        Some("lt") => "SCMP_CMP_LT",
        Some("le") => "SCMP_CMP_LE",
        Some("gt") => "SCMP_CMP_GT",
        Some("ge") => "SCMP_CMP_GE",
        _ => bail!("the seccomp profile has an unknown condition {condition}"),
    };
    Ok(json!({ "index": index, "value": value, "op": operator }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_is_translated_whole() {
        let filter = seccomp().unwrap();
        let rules = filter["syscalls"].as_array().unwrap();
        let names: usize = rules.iter().map(|rule| rule["names"].as_array().unwrap().len()).sum();
        assert!(names > 300, "{names}");
        let clone = rules.iter().find(|rule| rule["names"][0] == "clone").unwrap();
        assert_eq!(clone["args"][0]["op"], "SCMP_CMP_MASKED_EQ");
        assert!(argument(&json!({ "index": 0, "op": "odd", "val": 1 })).is_err());
    }
}
