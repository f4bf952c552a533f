//! Holes that others had, by the numbers under which they are known (`docs/security/threat-model.md` lists all of them, and
//! which are tested elsewhere).

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};
use tests::layer::{Access, Layer};
use tests::layout::{Compression, Layout};
use tests::sandbox::{Detached, Sandbox, programs};

/// How often a process of the agent's is put in front of a container that wants to write to its program.
const ROUNDS: usize = 60;

/// An image layout with these layers, and the reference of its one image.
fn image(sandbox: &Sandbox, name: &str, config: &Value, layers: &[Vec<u8>]) -> String {
    let folder = sandbox.files().join(name);
    let mut layout = Layout::create(&folder).unwrap();
    let layers: Vec<_> = layers.iter().map(|layer| layout.layer(layer, Compression::None).unwrap()).collect();
    layout.image("latest", "amd64", config, &layers).unwrap();
    format!("oci:{}:latest", folder.display())
}

/// A layer with a shell and what it needs.
fn shell(more: impl FnOnce(&mut Layer)) -> Vec<u8> {
    let mut layer = Layer::new();
    layer.directory("bin", Access::root(0o755)).unwrap();
    layer.file("bin/busybox", Access::root(0o755), &fs::read("/bin/busybox").unwrap()).unwrap();
    for name in ["sh", "sleep", "dd"] {
        layer.symlink(&format!("bin/{name}"), "busybox").unwrap();
    }
    more(&mut layer);
    layer.finish().unwrap()
}

/// Starts a container of an image that is in no registry, and gives it by its name.
fn start<'a>(sandbox: &'a Sandbox, name: &'a str, reference: &str, words: &[&str]) -> Running<'a> {
    let given = ["run", "-d", "-q", "--name", name, reference];
    let started = sandbox.cofferdam(given.iter().chain(words)).end();
    assert_eq!(started.succeeded().trim().len(), 32, "{started:?}");
    Running { sandbox, name }
}

struct Running<'a> {
    sandbox: &'a Sandbox,
    name: &'a str,
}

impl Running<'_> {
    /// What its monitor was started with, without what is different each time: the number of the image's descriptor, and
    /// where its own folder is.
    fn configuration(&self) -> Value {
        let told = self.sandbox.cofferdam(["inspect", "--format", "state_directory", self.name]).end();
        let path = PathBuf::from(told.succeeded().trim()).join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let drives = config["vm"]["drives"].as_array().unwrap();
        assert_eq!(drives.len(), 1, "{config}");
        assert!(drives[0]["file"]["descriptor"].is_i64() && drives[0]["read_only"] == true, "{config}");
        config["vm"]["drives"] = json!(null);
        // Named after its id.
        assert_eq!(config["jail"]["cgroups"].as_array().map(Vec::len), Some(1), "{config}");
        config["jail"]["cgroups"] = json!(null);
        json!({ "vm": config["vm"], "jail": config["jail"], "restart": config["restart"] })
    }

    /// The file behind the VM's one drive.
    fn drive(&self) -> PathBuf {
        let told = self.sandbox.cofferdam(["inspect", "--format", "state_directory", self.name]).end();
        let path = PathBuf::from(told.succeeded().trim()).join("config.json");
        let config: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let number = &config["vm"]["drives"][0]["file"]["descriptor"];
        fs::read_link(format!("/proc/{}/fd/{number}", self.sandbox.monitor())).unwrap()
    }

    fn exec(&self, script: &str) -> tests::process::Ended {
        self.sandbox.cofferdam(["exec", self.name, "sh", "-c", script]).end()
    }

    fn remove(self) {
        assert_eq!(self.sandbox.cofferdam(["rm", "-f", self.name]).end().code(), 0);
    }
}

/// CVE-2025-24965 (crun with krun): the configuration of the VM was a file in the image, written through the image's links,
/// and what the image had there configured the VM.
#[test]
fn cve_2025_24965_nothing_in_an_image_configures_its_vm() {
    let sandbox = Sandbox::with_empty_store();
    let plain = image(&sandbox, "plain", &json!({}), &[shell(|_| {})]);
    let vm = start(&sandbox, "plain", &plain, &["sleep", "1000"]);
    let expected = vm.configuration();
    vm.remove();

    let wish = json!({ "vm": { "memory_mib": 4096, "vcpus": 8, "drives": [{ "file": { "path": "/etc/shadow" } }],
                               "kernel": "/tmp/kernel" }, "memory_mib": 4096, "cpus": 8, "ram_mib": 4096 })
    .to_string();
    let layer = shell(|layer| {
        for folder in ["etc", "etc/cofferdam", "run", "run/cofferdam", ".cofferdam"] {
            layer.directory(folder, Access::root(0o755)).unwrap();
        }
        for name in [".krun_vm.json", "config.json", "etc/cofferdam/config.json", "run/cofferdam/config.json"] {
            layer.file(name, Access::root(0o644), wish.as_bytes()).unwrap();
        }
        for (name, target) in [(".krun_config.json", "/etc/shadow"), (".cofferdam/config.json", "../../../etc/shadow")]
        {
            layer.symlink(name, target).unwrap();
        }
    });
    let words = [
        ("io.cofferdam.vm", &*wish),
        ("io.cofferdam.memory_mib", "4096"),
        ("io.katacontainers.config.hypervisor.kernel", "/tmp/kernel"),
        ("io.katacontainers.config.hypervisor.default_vcpus", "8"),
        ("run.oci.handler", "krun"),
        ("krun.ram_mib", "4096"),
    ];
    let labels: Value = words.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
    let environment: Vec<String> =
        ["COFFERDAM_KERNEL=/tmp/kernel", "COFFERDAM_VMM=/bin/sh"].map(str::to_owned).to_vec();
    let wishing = image(&sandbox, "wishing", &json!({ "Labels": labels, "Env": environment }), &[layer]);
    // The same words once more, where annotations are.
    let index = sandbox.files().join("wishing/index.json");
    let mut document: Value = serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
    for (name, value) in words {
        document["annotations"][name] = json!(value);
        document["manifests"][0]["annotations"][name] = json!(value);
    }
    fs::write(&index, document.to_string()).unwrap();
    let vm = start(&sandbox, "wishing", &wishing, &["sleep", "1000"]);
    assert_eq!(vm.configuration(), expected);
    vm.remove();
}

/// A layer with the special files that a host has its disks as, and with what leads to them.
fn disks() -> Vec<u8> {
    let mut archive = Builder::new(Vec::new());
    let add = |archive: &mut Builder<Vec<u8>>, kind, path: &str, (major, minor)| {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o666);
        header.set_size(0);
        header.set_device_major(major).unwrap();
        header.set_device_minor(minor).unwrap();
        archive.append_data(&mut header, path, &[][..]).unwrap();
    };
    for (number, major) in [(0, 8), (1, 3), (2, 259)] {
        add(&mut archive, EntryType::Block, &format!("disk{number}"), (major, 0));
    }
    add(&mut archive, EntryType::Char, "disk3", (1, 1));
    archive.into_inner().unwrap()
}

/// CVE-2026-24054 (Kata Containers): the root of an image without layers was taken for a block device, by its device number,
/// and a disk of the host was given to the guest.
#[test]
fn cve_2026_24054_no_image_gets_a_disk_of_the_host() {
    let sandbox = Sandbox::with_empty_store();
    let none = image(&sandbox, "none", &json!({ "Cmd": ["true"] }), &[]);
    // It has no program, and no device takes the place of its root.
    let ended = sandbox.run(&["-q"], &none, &[]).end();
    ended.failed(127, &["true"]);

    let special = image(&sandbox, "special", &json!({}), &[shell(|_| {}), disks()]);
    let vm = start(&sandbox, "special", &special, &["sleep", "1000"]);
    vm.configuration();
    let drive = vm.drive();
    assert!(drive.starts_with(sandbox.store()) && fs::metadata(&drive).unwrap().is_file(), "{drive:?}");
    // In the guest they are files that no device is behind.
    let look =
        "for n in 0 1 2 3; do dd if=/disk$n of=/dev/null bs=512 count=1 2> /dev/null && echo read $n; done; true";
    assert_eq!(vm.exec(look).succeeded(), "");
    vm.remove();
}

/// Looks at every process of the container, for one whose program is none of the image's, and writes to that as long as the
/// container lives: while it runs, and when it has ended. Tells what came of it when there is `/tmp/stop`.
const WRITER: &str = r#"
import hashlib, os
ours = {os.stat(path).st_dev for path in ("/usr/bin/python3", "/usr/bin/true", "/usr/bin/env", "/usr/bin/touch")}
kept, written, hashes, refusals, seen = [], 0, set(), set(), 0
def write(held):
    global written
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_TRUNC):
        try:
            file = os.open(f"/proc/self/fd/{held}", flags)
        except OSError as error:
            refusals.add(error.errno)
        else:
            os.write(file, b"evil")
            os.close(file)
            written += 1
print("ready", flush=True)
while not os.path.exists("/tmp/stop"):
    for process in os.listdir("/proc"):
        if not process.isdigit() or int(process) == os.getpid():
            continue
        try:
            held = os.open(f"/proc/{process}/exe", os.O_PATH)
        except OSError:
            continue
        if os.fstat(held).st_dev in ours:
            os.close(held)
            continue
        seen += 1
        write(held)
        with open(f"/proc/self/fd/{held}", "rb") as file:
            hashes.add(hashlib.sha256(file.read()).hexdigest())
        kept.append(held)
        while len(kept) > 64:
            os.close(kept.pop(0))
        open("/tmp/seen", "w").close()
for held in kept:
    write(held)
    with open(f"/proc/self/fd/{held}", "rb") as file:
        hashes.add(hashlib.sha256(file.read()).hexdigest())
print(f"seen {min(seen, 1)} written {written} contents {len(hashes)}", flush=True)
"#;

fn files(paths: &[PathBuf]) -> Vec<Vec<u8>> {
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

fn exec(host: &Detached<'_>, words: &[&str]) -> i32 {
    host.verb("exec", &[], words).end().code()
}

/// CVE-2019-5736 (runc): what is executed in a container could write to the runtime's own program through `/proc/self/exe`.
/// Here that is the agent, in the guest: nothing that a container has opens it for writing, and the host's programs are not
/// there at all. The container may even trace, without which the agent's processes cannot be looked at.
#[test]
fn cve_2019_5736_no_container_writes_to_the_agents_program() {
    let sandbox = Sandbox::new();
    let initramfs = std::env::var_os("COFFERDAM_INITRAMFS").map(PathBuf::from);
    let programs: Vec<PathBuf> = ["cofferdam", "cofferdam-vmm"].map(|name| programs().join(name)).to_vec();
    let programs: Vec<PathBuf> = programs.into_iter().chain(initramfs.filter(|path| Path::exists(path))).collect();
    let before = files(&programs);
    let host = sandbox.detached(
        "host",
        &["-m", "256m", "--cap-add", "SYS_PTRACE", "--cap-add", "DAC_READ_SEARCH"],
        "debian",
        &["python3", "-c", WRITER],
    );
    let following = host.verb("logs", &["-f"], &[]).start();
    following.wait_for("ready\n");
    let seen = (0..ROUNDS).any(|_| {
        // As the one who found it did: the program to be executed is whatever executes it.
        assert_ne!(exec(&host, &["/proc/self/exe"]), 0);
        exec(&host, &["test", "-e", "/tmp/seen"]) == 0
    });
    assert!(seen, "no process of the agent's was met in {ROUNDS} rounds");
    assert_eq!(exec(&host, &["touch", "/tmp/stop"]), 0);
    following.wait_for("seen 1 written 0 contents 1\n");
    assert_eq!(following.end().code(), 0);
    assert!(files(&programs) == before, "a program of the host's has changed");
}
