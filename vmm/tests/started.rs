//! The monitor as a program that is started by hand: it is in a jail all the same, and says there what is wrong.
//!
//! These tests need /dev/kvm, which they open, but hardly a guest that runs, and root, since the folder is to become another
//! user's.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

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

#[test]
fn a_file_system_that_is_not_there_or_is_none_is_said() {
    let place = tempfile::tempdir().unwrap();
    let kernel = place.path().join("kernel");
    fs::write(&kernel, "no kernel").unwrap();
    for (path, expected) in
        [("/no/files", "cannot take over the files of /no/files"), ("/dev/null", "cannot export the file system \"t\"")]
    {
        let filesystems = json!([{ "tag": "t", "path": path }]);
        let vm = json!({ "kernel": kernel, "memory_mib": 64, "filesystems": filesystems });
        let output = start(&json!({ "vm": vm }), place.path());
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(125) && said.contains(expected), "{said}");
    }
}

/// A kernel that waits for interrupts, of which none come: `cli; hlt; jmp` back to it.
fn sleeping_kernel() -> Vec<u8> {
    const PLACE: u64 = 0x100_0000;
    let header = [
        &b"\x7fELF\x02\x01\x01"[..],
        &[0; 9],
        // An executable for x86-64, its entry, its program headers, no sections.
        &[2, 0, 62, 0, 1, 0, 0, 0],
        &PLACE.to_le_bytes(),
        &64u64.to_le_bytes(),
        &[0; 12],
        &[64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0],
    ];
    // Loadable, and to be read, written and executed.
    let kind = [1u32, 7].map(u32::to_le_bytes).concat();
    let segment = [120, PLACE, PLACE, 4, 4096, 4096].map(u64::to_le_bytes).concat();
    [header.concat(), kind, segment, vec![0xfa, 0xf4, 0xeb, 0xfd]].concat()
}

/// The process above a monitor, and with it the monitor, for as long as this value lives.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The files of a monitor's threads, by the threads' names.
fn threads(above: u32) -> Vec<(String, PathBuf)> {
    let children = fs::read_to_string(format!("/proc/{above}/task/{above}/children")).unwrap_or_default();
    let Some(monitor) = children.split_whitespace().next() else { return Vec::new() };
    let entries = fs::read_dir(format!("/proc/{monitor}/task")).into_iter().flatten().flatten();
    let named = |path: PathBuf| Some((fs::read_to_string(path.join("comm")).ok()?.trim().to_owned(), path));
    entries.filter_map(|entry| named(entry.path())).collect()
}

/// What the kernel says of a thread under a name.
fn status(thread: &Path, name: &str) -> String {
    let text = fs::read_to_string(thread.join("status")).unwrap_or_default();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.unwrap_or_default().trim().to_owned()
}

#[test]
fn only_a_thread_that_maps_owners_has_capabilities_and_every_thread_has_a_filter() {
    let place = tempfile::tempdir().unwrap();
    let kernel = place.path().join("kernel");
    fs::write(&kernel, sleeping_kernel()).unwrap();
    let filesystems = json!([
        { "tag": "squashed", "path": place.path() },
        { "tag": "mapped", "path": place.path(), "ownership": "mapped" },
        { "tag": "file", "path": kernel, "read_only": true },
    ]);
    let config = json!({ "vm": { "kernel": kernel, "memory_mib": 64, "filesystems": filesystems } });
    let path = place.path().join("vm.json");
    fs::write(&path, config.to_string()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_cofferdam-vmm"));
    let mut running = Running(command.arg("--config").arg(path).stderr(Stdio::piped()).spawn().unwrap());
    let began = Instant::now();
    let names = ["cofferdam-vmm", "files 0", "files 1", "files 2", "vcpu 0"];
    let found = loop {
        let mut found = threads(running.0.id());
        // KVM adds one of its own, which never leaves the kernel.
        found.retain(|(name, thread)| !name.starts_with("kvm-") && status(thread, "Seccomp") == "2");
        found.sort();
        if found.iter().map(|(name, _)| &**name).eq(names) {
            break found;
        }
        let ended = running.0.try_wait().unwrap();
        assert!(ended.is_none() && began.elapsed() < Duration::from_secs(60), "{ended:?}: {found:?}");
        std::thread::sleep(Duration::from_millis(10));
    };
    // CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER, CAP_SETGID and CAP_SETUID.
    let some = "00000000000000cf";
    let none = "0000000000000000";
    for set in ["CapPrm", "CapEff"] {
        let sets: Vec<_> = found.iter().map(|(_, thread)| status(thread, set)).collect();
        assert_eq!(sets, [none, none, some, none, none], "{set}");
    }
    for (name, thread) in &found {
        assert_eq!((&*status(thread, "CapBnd"), &*status(thread, "CapInh")), (none, none), "{name}");
    }
    // Those that squash act as the owner, whom root's namespace knows under his own number.
    let ids: Vec<_> =
        found.iter().map(|(_, thread)| status(thread, "Uid").split('\t').next_back().map(str::to_owned)).collect();
    assert!(ids[1] == ids[3] && ids[1] != ids[0] && ids[2] == ids[0], "{ids:?}");
}
