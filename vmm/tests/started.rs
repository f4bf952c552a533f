//! The monitor as a program that is started by hand: it is in a jail all the same, and says there what is wrong.
//!
//! These tests need /dev/kvm, which they open, but no guest that runs, and root, since the folder is to become another
//! user's.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

fn start(config: &Value, place: &Path) -> Output {
    assert!(Path::new("/dev/kvm").exists(), "there is no /dev/kvm: these tests open it");
    assert!(rustix::process::geteuid().is_root(), "these tests give a folder to another user: run them as root");
    let path = place.join("vm.json");
    fs::write(&path, config.to_string()).unwrap();
    Command::new(env!("CARGO_BIN_EXE_cofferdam-vmm")).arg("--config").arg(path).output().unwrap()
}

fn error(folder: &Path) -> String {
    let record: Value = serde_json::from_slice(&fs::read(folder.join("exit.json")).unwrap()).unwrap();
    assert_eq!(record["exit_code"], 125);
    record["error"].as_str().unwrap().to_owned()
}

#[test]
fn what_is_wrong_outside_of_the_jail_is_said_and_recorded() {
    let place = tempfile::tempdir().unwrap();
    let config = json!({ "vm": { "kernel": "/no/kernel", "memory_mib": 64 }, "folder": place.path() });
    let output = start(&config, place.path());
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert!(said.contains("cannot open the kernel /no/kernel"), "{said}");
    assert!(error(place.path()).contains("cannot open the kernel /no/kernel"));
}

#[test]
fn what_is_wrong_in_the_jail_is_said_and_recorded_by_its_user() {
    let place = tempfile::tempdir().unwrap();
    let (kernel, folder) = (place.path().join("kernel"), place.path().join("own"));
    fs::write(&kernel, "no kernel").unwrap();
    fs::create_dir(&folder).unwrap();
    let config = json!({ "vm": { "kernel": kernel, "memory_mib": 64 }, "folder": folder });
    let output = start(&config, place.path());
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert!(said.contains("it is not an uncompressed x86-64 ELF kernel"), "{said}");
    assert!(error(&folder).contains("it is not an uncompressed x86-64 ELF kernel"));
    let user = fs::metadata(folder.join("exit.json")).unwrap().uid();
    assert!((0x7000_0000..0x7100_0000).contains(&user), "{user}");
}

#[test]
fn a_port_that_nobody_listens_at_is_said() {
    let place = tempfile::tempdir().unwrap();
    let kernel = place.path().join("kernel");
    fs::write(&kernel, "no kernel").unwrap();
    let vsock = json!([{ "port": 5000, "socket": { "path": "/no/socket" } }]);
    let output = start(&json!({ "vm": { "kernel": kernel, "memory_mib": 64, "vsock": vsock } }), place.path());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(125) && said.contains("cannot connect port 5000 to /no/socket"), "{said}");
}
