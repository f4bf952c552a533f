//! Directories and files of the host in a guest.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use serde_json::Value;
use tests::process::Invocation;
use tests::sandbox::{Sandbox, programs};

use crate::api::curl;

/// A sandbox whose VMs have file systems.
struct Host {
    sandbox: Sandbox,
    export: PathBuf,
}

impl Host {
    fn new() -> Self {
        let sandbox = Sandbox::new();
        let export = sandbox.files().join("export");
        fs::create_dir(&export).unwrap();
        fs::write(sandbox.files().join("secret"), "secret").unwrap();
        Self { sandbox, export }
    }

    /// A monitor that has been given file systems, as JSON: the command line has no word for them yet.
    fn monitor(&self, filesystems: &str) -> PathBuf {
        let path = self.sandbox.files().join("monitor");
        let real = programs().join("cofferdam-vmm");
        // `--born --config FILE` comes first.
        let script = format!(
            "#!/bin/sh\nsed -E -i 's|(\"filesystems\": *)\\[\\]|\\1{filesystems}|' \"$3\"\nexec {} \"$@\"\n",
            real.display()
        );
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// A container that mounts `data` at /mnt and runs a script.
    fn run(&self, monitor: &Path, script: &str) -> Invocation {
        self.run_in("busybox", monitor, script)
    }

    fn run_in(&self, image: &str, monitor: &Path, script: &str) -> Invocation {
        let script = format!("mkdir -p /mnt && mount -t virtiofs data /mnt && {script}");
        let flags = ["-i", "--cap-add", "SYS_ADMIN", "--security-opt", "seccomp=unconfined"];
        self.sandbox.run(&flags, image, &["sh", "-c", &script]).env("COFFERDAM_VMM", monitor)
    }

    fn data(&self, options: &str) -> String {
        format!(r#"[{{"tag":"data","path":"{}"{options}}}]"#, self.export.display())
    }
}

#[test]
fn a_directory_of_the_host_is_read_and_written() {
    let host = Host::new();
    fs::write(host.export.join("given"), "from the host\n").unwrap();
    symlink("../secret", host.export.join("link")).unwrap();
    fs::set_permissions(&host.export, fs::Permissions::from_mode(0o755)).unwrap();
    let monitor = host.monitor(&host.data(""));
    let script = "cat /mnt/given && mkdir /mnt/a && seq 1 40000 > /mnt/a/numbers && ln /mnt/a/numbers /mnt/b \
                  && mv /mnt/b /mnt/c && md5sum < /mnt/c && readlink /mnt/link && ls /mnt \
                  && stat -c '%u %a' /mnt/a && umount /mnt && mount -t virtiofs data /mnt && wc -l < /mnt/a/numbers \
                  && ! cat /mnt/link 2> /dev/null";
    let ended = host.run(&monitor, script).end();
    let numbers: String = (1..=40_000).map(|number| format!("{number}\n")).collect();
    assert_eq!(fs::read_to_string(host.export.join("a/numbers")).unwrap(), numbers);
    let lines: Vec<&str> = ended.succeeded().lines().collect();
    assert_eq!(lines[0], "from the host");
    assert_eq!(lines[2..], ["../secret", "a", "c", "given", "link", "0 755", "40000"]);
    // What the monitor made belongs to whom the directory belongs to, not to the monitor's user.
    let owner = |path: &Path| fs::metadata(path).unwrap().uid();
    assert_eq!(owner(&host.export.join("a/numbers")), owner(&host.export));
}

#[test]
fn read_only_and_noexec_hold_whatever_the_guest_mounts() {
    let host = Host::new();
    fs::write(host.export.join("program"), "#!/bin/sh\necho executed\n").unwrap();
    fs::set_permissions(host.export.join("program"), fs::Permissions::from_mode(0o755)).unwrap();
    let monitor = host.monitor(&host.data(r#","read_only":true,"noexec":true"#));
    let script = "mount -o remount,rw,exec /mnt; for try in 'touch /mnt/new' 'rm /mnt/program' 'chmod 777 /mnt/program' \
                  'sh -c \"echo x >> /mnt/program\"' 'mv /mnt/program /mnt/moved' 'mkdir /mnt/new'; do \
                  eval \"$try\" 2>&1 | grep -o 'Read-only file system'; done; /mnt/program 2>&1 | grep -o 'Permission denied'";
    let ended = host.run(&monitor, script).end();
    let expected = "Read-only file system\n".repeat(6) + "Permission denied\n";
    assert_eq!(ended.succeeded(), expected);
    assert_eq!(fs::read_dir(&host.export).unwrap().count(), 1);
}

#[test]
fn a_single_file_is_seen_without_its_directory() {
    let host = Host::new();
    let file = host.export.join("config");
    fs::write(&file, "one\n").unwrap();
    fs::write(host.export.join("beside"), "hidden\n").unwrap();
    let filesystems = format!(r#"[{{"tag":"data","name":"hosts","path":"{}"}}]"#, file.display());
    let monitor = host.monitor(&filesystems);
    let script = "ls -a /mnt && echo two >> /mnt/hosts && cat /mnt/hosts && ! touch /mnt/beside 2> /dev/null";
    let ended = host.run(&monitor, script).end();
    assert_eq!(ended.succeeded(), ".\n..\nhosts\none\ntwo\n");
    assert_eq!(fs::read_to_string(file).unwrap(), "one\ntwo\n");
    assert_eq!(fs::read_to_string(host.export.join("beside")).unwrap(), "hidden\n");
}

#[test]
fn a_quota_is_the_size_of_what_the_guest_sees() {
    let host = Host::new();
    let monitor = host.monitor(&host.data(r#","quota":{"bytes":4194304}"#));
    let script = "dd if=/dev/zero of=/mnt/file bs=64k count=200 2>&1 | grep -o 'No space left on device'; \
                  rm /mnt/file && dd if=/dev/zero of=/mnt/file bs=64k count=32 2> /dev/null && wc -c < /mnt/file";
    let ended = host.run(&monitor, script).end();
    assert_eq!(ended.succeeded(), "No space left on device\n2097152\n");
}

/// Takes a lock of the whole file, as flock(2) does, and one of a range, as fcntl(2) does, each of a file of its own.
const LOCKS: &str = r#"
import fcntl
files = [(open("/mnt/whole", "w"), fcntl.flock), (open("/mnt/range", "w"), fcntl.lockf)]

def hold():
    for file, lock in files:
        lock(file, fcntl.LOCK_EX)
    print("held", flush=True)
    input()
    open("/mnt/order", "a").write("first\n")

def wait():
    for file, lock in files:
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("taken", flush=True)
    for file, lock in files:
        lock(file, fcntl.LOCK_EX)
    open("/mnt/order", "a").write("second\n")
    print(open("/mnt/order").read(), end="")

"#;

#[test]
fn locks_hold_between_two_vms() {
    let host = Host::new();
    let monitor = host.monitor(&host.data(""));
    let mut holder = host.run_in("debian", &monitor, &format!("python3 -c '{LOCKS}hold()'")).open_input().start();
    // The name of a container is not needed, its input is.
    holder.wait_for("held\n");
    let waiter = host.run_in("debian", &monitor, &format!("python3 -c '{LOCKS}wait()'")).start();
    waiter.wait_for("taken\ntaken\n");
    holder.write("\n");
    assert_eq!(waiter.end().succeeded(), "taken\ntaken\nfirst\nsecond\n");
    assert_eq!(holder.end().succeeded(), "held\n");
}

/// CVE-2026-47243: what leads out of a shared directory was followed by the server. (A guest's kernel sends no names with a `/`
/// in them; `fuse/tests/server/containment.rs` does.)
#[test]
fn nothing_that_leads_out_of_an_export_leads_to_the_host() {
    let host = Host::new();
    let secret = host.sandbox.files().join("secret");
    for (name, target) in
        [("up", Path::new("../secret")), ("absolute", &secret), ("root", Path::new("/proc/self/root"))]
    {
        symlink(target, host.export.join(name)).unwrap();
    }
    symlink(host.sandbox.files(), host.export.join("folder")).unwrap();
    let monitor = host.monitor(&host.data(""));
    let (secret_path, files) = (secret.display(), host.sandbox.files());
    let script = format!(
        "cd /mnt; for path in up absolute folder/secret root{secret_path} ../secret ../../secret {secret_path}; do \
         cat $path 2> /dev/null && echo read $path; done; \
         mkdir -p {}; echo x > up; echo x > absolute; cat up absolute; ls; echo done",
        files.display()
    );
    let ended = host.run(&monitor, &script).end();
    // A guest that follows a link does so in its own file system.
    assert_eq!(ended.succeeded(), "x\nx\nabsolute\nfolder\nroot\nup\ndone\n");
    assert_eq!(fs::read_to_string(secret).unwrap(), "secret");
}

#[test]
fn what_is_mapped_belongs_to_the_guests_users_on_the_host_as_well() {
    let host = Host::new();
    fs::write(host.export.join("theirs"), "").unwrap();
    std::os::unix::fs::chown(host.export.join("theirs"), Some(1234), Some(5678)).unwrap();
    let monitor = host.monitor(&host.data(r#","ownership":"mapped""#));
    let script = "stat -c '%u %g' /mnt/theirs && echo x > /mnt/theirs && touch /mnt/given && chown 4321:8765 /mnt/given \
                  && mkdir -m 777 /mnt/all && chown 1000 /mnt/all && chmod 4755 /mnt/given && stat -c %a /mnt/given";
    let ended = host.run(&monitor, script).end();
    // A guest makes nobody on the host anybody else.
    assert_eq!(ended.succeeded().lines().next(), Some("1234 5678"));
    let made = |name: &str| fs::metadata(host.export.join(name)).unwrap();
    assert_eq!((made("given").uid(), made("given").gid(), made("all").uid()), (4321, 8765, 1000));
    assert_eq!(made("given").mode() & 0o7777, 0o755);
}

#[test]
fn what_a_file_system_counts_is_told_with_the_others() {
    let host = Host::new();
    fs::write(host.export.join("given"), "0123456789").unwrap();
    let monitor = host.monitor(&host.data(""));
    let flags = ["--cap-add", "SYS_ADMIN", "--security-opt", "seccomp=unconfined"];
    let script = "mkdir -p /mnt && mount -t virtiofs data /mnt && cat /mnt/given > /dev/null && sleep 1000";
    let pod = host.sandbox.detached_by(&monitor, "pod", &flags, "busybox", &["sh", "-c", script]);
    assert_eq!(pod.verb("exec", &[], &["sh", "-c", "until [ -e /mnt/given ]; do sleep 1; done"]).end().code(), 0);
    assert_eq!(pod.verb("exec", &[], &["cat", "/mnt/given"]).end().succeeded(), "0123456789");
    let (code, metrics) = curl(&host.sandbox, &pod, &[], "/v1/metrics");
    assert_eq!(code, 200, "{metrics}");
    let figure = |name: &str| {
        let name = format!("cofferdam_device_{name}{{device=\"file system\"");
        let line =
            metrics.lines().find(|line| line.starts_with(&name)).unwrap_or_else(|| panic!("no {name}: {metrics}"));
        line.rsplit(' ').next().and_then(|number| number.parse::<u64>().ok()).unwrap()
    };
    assert!(figure("read_bytes") >= 10 && figure("requests") > 3 && figure("inodes") >= 1, "{metrics}");
    let jail: Value = serde_json::from_str(host.sandbox.cofferdam(["inspect", "pod"]).end().succeeded()).unwrap();
    let threads = jail[0]["jail"]["threads"].as_array().unwrap();
    let files = threads.iter().find(|thread| thread["name"] == "files 0").expect("there is a thread that serves files");
    assert_eq!(files["system_calls"], "filtered");
}
