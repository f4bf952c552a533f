//! The jail that monitors are in, as `inspect` tells it, which reads it back from the kernel.

use std::fs;
use std::path::Path;

use rustix::process::Signal;
use serde_json::Value;
use tests::process::kill;
use tests::sandbox::{Sandbox, registry};

/// Somebody without privileges.
const SOMEBODY: u32 = 54_321;

/// The jail in what `inspect` wrote.
fn jail(told: &str) -> Value {
    let told: Value = serde_json::from_str(told).expect("inspect writes JSON");
    told[0]["jail"].clone()
}

fn inspect(sandbox: &Sandbox, name: &str) -> Value {
    jail(sandbox.cofferdam(["inspect", name]).end().succeeded())
}

fn list(value: &Value) -> Vec<Value> {
    value.as_array().unwrap_or_else(|| panic!("{value} is no list")).clone()
}

/// What holds of every jail.
fn check(jail: &Value) {
    for name in ["ipc", "mnt", "net", "pid", "user", "uts"] {
        assert_eq!(jail["namespaces"][name]["own"], true, "{name}: {jail}");
    }
    let sets = jail["capabilities"].as_object().expect("there are sets");
    assert!(sets.len() == 5 && sets.values().all(|set| set == "0000000000000000"), "{sets:?}");
    assert_eq!((&jail["no_new_privs"], &jail["environment_bytes"]), (&Value::from(true), &Value::from(0)));
    let mounts = list(&jail["mounts"]);
    assert!(mounts.len() == 1 && mounts[0]["file_system"] == "tmpfs", "{mounts:?}");
    assert!(list(&mounts[0]["options"]).contains(&Value::from("ro")), "{mounts:?}");
    let threads = list(&jail["threads"]);
    for name in ["cofferdam-vmm", "api", "vcpu 0"] {
        assert!(threads.iter().any(|thread| thread["name"] == name), "{name}: {threads:?}");
    }
    assert!(threads.iter().all(|thread| thread["system_calls"] == "filtered"), "{threads:?}");
    assert_eq!(jail["limits"]["core_file_size"][1], "0");
}

#[test]
fn every_monitor_is_in_a_jail_and_its_cgroup_goes_with_the_container() {
    let sandbox = Sandbox::new();
    let caged = sandbox.detached("caged", &["-m", "64m"], "busybox", &["sleep", "1000"]);
    let jail = inspect(&sandbox, "caged");
    check(&jail);
    let user = jail["uid"][0].as_u64().expect("it has a user");
    assert!((0x7000_0000..0x7100_0000).contains(&user), "{user}");
    let groups: Vec<Value> = list(&jail["cgroups"]).into_iter().filter(|group| group["own"] == true).collect();
    assert!(!groups.is_empty(), "{jail}");
    let limits = |name: &str| groups.iter().any(|group| group["limits"].get(name).is_some_and(|limit| limit != "max"));
    assert!(limits("pids.max") && (limits("memory.max") || limits("memory.limit_in_bytes")), "{groups:?}");
    let path = groups[0]["path"].as_str().expect("a group has a path").to_owned();
    assert!(Path::new(&path).exists(), "{path}");
    // As another crash: its monitor is killed, and the container removed.
    kill(sandbox.monitor(), Signal::KILL);
    drop(caged);
    assert!(!Path::new(&path).exists(), "{path} is left");
}

#[test]
fn one_that_is_restarted_is_in_a_jail_again() {
    let sandbox = Sandbox::new();
    let again = sandbox.detached("again", &["--restart", "always"], "busybox", &["sleep", "1000"]);
    check(&inspect(&sandbox, "again"));
    assert_eq!(again.verb("kill", &[], &[]).end().code(), 0);
}

#[test]
fn what_a_monitor_writes_is_its_own_and_nothing_else_is() {
    use std::os::unix::fs::MetadataExt as _;

    let sandbox = Sandbox::new();
    let caged = sandbox.detached("caged", &[], "busybox", &["sh", "-c", "echo said; exec sleep 1000"]);
    let state = caged.inspect("state_directory");
    let owner = |name: &str| fs::metadata(Path::new(&state).join(name)).map(|file| file.uid());
    let user = inspect(&sandbox, "caged")["uid"][0].as_u64();
    assert_eq!(owner("monitor").ok().map(u64::from), user);
    assert_eq!(owner("monitor/log").ok().map(u64::from), user);
    for name in ["", "container.json", "config.json", "lock", "api.sock"] {
        assert_eq!(owner(name).expect("it is there"), 0, "{name}");
    }
    assert_eq!(caged.verb("logs", &[], &[]).end().succeeded(), "said\n");
}

#[test]
fn an_ordinary_users_monitor_is_in_the_same_jail() {
    let sandbox = Sandbox::with_empty_store();
    sandbox.give(SOMEBODY);
    let registry = registry();
    let reference = format!("{}/busybox", registry.address());
    let as_somebody = |words: &[&str]| sandbox.cofferdam_as(SOMEBODY, words).end();
    let started = as_somebody(&[
        "run",
        "-d",
        "--quiet",
        "--name",
        "theirs",
        &reference,
        "sh",
        "-c",
        "echo said; exec sleep 1000",
    ]);
    assert_eq!(started.succeeded().trim().len(), 32, "{started:?}");
    let jail = jail(as_somebody(&["inspect", "theirs"]).succeeded());
    check(&jail);
    assert_eq!(jail["uid"], Value::from(vec![SOMEBODY; 4]));
    // He was given no cgroup, and is not told of one.
    assert!(list(&jail["cgroups"]).iter().all(|group| group["own"] == false), "{jail}");
    assert_eq!(as_somebody(&["exec", "theirs", "echo", "hello"]).succeeded(), "hello\n");
    assert_eq!(as_somebody(&["logs", "theirs"]).succeeded(), "said\n");
    assert_eq!(as_somebody(&["rm", "-f", "theirs"]).succeeded(), "theirs\n");
    assert_eq!(as_somebody(&["rmi", &reference]).code(), 0);
}
