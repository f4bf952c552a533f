//! What is in force is what the kernel tells.

use std::fs;
use std::process::Command;

use jailer::readback::{self, InForce};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, Resource, getrlimit};

use super::{CALLERS, Caller, FILTERS, Host, SOMEBODY, Waiting};

fn look(caller: Caller, filter: &str) -> (Host, InForce) {
    let host = Host::new(caller);
    let waiting = Waiting::new(host.command(filter, &["wait"]));
    let told = readback::read(waiting.pid).unwrap();
    (host, told)
}

#[test]
fn a_jail_is_told_as_the_kernel_has_it() {
    for caller in CALLERS {
        let (host, told) = look(caller, "none");
        let user = match caller {
            Caller::Root => jailer::identity::user(host.path("own").to_str().unwrap()),
            Caller::Somebody => SOMEBODY,
        };
        assert_eq!((told.uid, told.gid), (vec![user; 4], vec![user; 4]), "{caller:?}");
        assert!(told.groups.is_empty(), "{:?}", told.groups);
        for name in ["ipc", "mnt", "net", "pid", "user", "uts"] {
            assert!(told.namespaces[name].own, "{caller:?} {name}");
        }
        assert_eq!(told.uid_map.len(), 1);
        assert!(told.uid_map[0].ends_with(" 1"), "{:?}", told.uid_map);
        assert_eq!(told.capabilities.len(), 5);
        assert!(told.capabilities.values().all(|set| set == "0000000000000000"), "{:?}", told.capabilities);
        assert!(told.no_new_privs);
        assert_eq!(told.environment_bytes, Some(0));
        assert_eq!(told.mounts.len(), 1, "{:?}", told.mounts);
        let root = &told.mounts[0];
        assert_eq!((&*root.path, &*root.file_system), ("/", "tmpfs"));
        assert!(["ro", "nosuid", "nodev", "noexec"].iter().all(|one| root.options.iter().any(|has| has == one)));
        // A caller that may have fewer has no more in his jail.
        let files = getrlimit(Resource::Nofile).maximum.map_or(16384, |most| most.min(16384)).to_string();
        let space = jailer::Limits::new(1, 64, 0).address_space.to_string();
        let limits =
            [("address_space", &*space), ("file_size", "16777216"), ("core_file_size", "0"), ("open_files", &*files)];
        for (limit, most) in limits.into_iter().chain([("processes", "17")]) {
            assert_eq!(told.limits[limit], [most, most], "{limit}");
        }
        assert_eq!(told.threads.len(), 1);
        assert_eq!((told.threads[0].system_calls, told.threads[0].filters), ("free", 0));
    }
}

#[test]
fn a_filter_is_told_of_its_thread() {
    for filter in FILTERS {
        let (_host, told) = look(Caller::Root, filter);
        // The first one waits for the one that is confined, and ends the process.
        let threads: Vec<_> = told.threads.iter().map(|thread| (thread.system_calls, thread.filters)).collect();
        assert_eq!(threads, [("free", 0), ("filtered", 1)], "{filter}");
    }
}

#[test]
fn the_limits_of_a_cgroup_are_told() {
    let host = Host::new(Caller::Root);
    let name = format!("force-{}", std::process::id());
    let mut command = host.command("none", &["wait"]);
    command.env("INMATE_GROUP", &name).env("INMATE_THREADS", "9");
    let told = readback::read(Waiting::new(command).pid).unwrap();
    let own: Vec<_> = told.cgroups.iter().filter(|group| group.own).collect();
    assert!(own.iter().all(|group| group.path.ends_with(format!("cofferdam/{name}"))), "{own:?}");
    let limit = |names: [&str; 2]| {
        let told = own.iter().flat_map(|group| &group.limits);
        told.filter(|(name, _)| names.contains(name)).map(|(_, value)| value.clone()).next().unwrap()
    };
    assert_eq!(limit(["pids.max", "pids.max"]), "9");
    let memory: u64 = limit(["memory.max", "memory.limit_in_bytes"]).parse().unwrap();
    assert_eq!(memory, (64 + 1 + 128) << 20);
    assert!(limit(["cpu.max", "cpu.cfs_quota_us"]).starts_with("200000"));
}

/// The numbers of a disk of this machine.
fn disk() -> String {
    // That loads the driver of some that need no hardware.
    _ = fs::File::open("/dev/loop-control");
    let mut disks = fs::read_dir("/sys/block").unwrap().flatten();
    let disk = disks.next().expect("this machine has no disk, not even one in memory");
    fs::read_to_string(disk.path().join("dev")).unwrap().trim().to_owned()
}

#[test]
fn the_limits_of_a_disk_are_told() {
    let (host, disk) = (Host::new(Caller::Root), disk());
    let mut command = host.command("none", &["wait"]);
    command.env("INMATE_GROUP", format!("force-disk-{}", std::process::id())).env("INMATE_DISK", &disk);
    let told = readback::read(Waiting::new(command).pid).unwrap();
    let own = told.cgroups.iter().filter(|group| group.own);
    let limits: Vec<(&str, &str)> =
        own.flat_map(|group| &group.limits).map(|(name, value)| (*name, value.as_str())).collect();
    let expected = [
        ("io.max", format!("{disk} rbps=1048576 wbps=max riops=max wiops=7")),
        ("blkio.throttle.read_bps_device", format!("{disk} 1048576")),
        ("blkio.throttle.write_iops_device", format!("{disk} 7")),
    ];
    let found = expected.iter().filter(|(name, value)| limits.contains(&(name, value)));
    // One file of the unified hierarchy, or two of the other.
    let all = if limits.iter().any(|(name, _)| *name == "io.max") { 1 } else { 2 };
    assert_eq!(found.count(), all, "{limits:?}");
}

#[test]
fn nothing_that_its_starter_has_open_is_open_in_a_jail() {
    for caller in CALLERS {
        let host = Host::new(caller);
        // Without the flag that closes it at an execution: the starter has it.
        let file = fs::File::open("/etc/passwd").unwrap();
        let open = rustix::io::dup(&file).unwrap();
        let waiting = Waiting::new(host.command("none", &["wait"]));
        let targets = |pid: &str| {
            let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
            let links = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
            links.map(|link| link.display().to_string()).collect::<Vec<_>>()
        };
        assert!(targets(&waiting.starter.id().to_string()).iter().any(|target| target == "/etc/passwd"));
        drop(open);
        let mut inside = targets(&waiting.pid.as_raw_nonzero().to_string());
        // Its streams, and what leads to its folder.
        inside.retain(|target| !target.starts_with("pipe:") && target != "/dev/null");
        assert_eq!(inside, ["/"], "{caller:?}");
    }
}

#[test]
fn a_network_namespace_can_be_named_by_who_owns_it() {
    let mut other = Command::new("unshare").args(["--net", "sleep", "600"]).spawn().unwrap();
    let path = format!("/proc/{}/ns/net", other.id());
    let id = || fs::read_link(&path).unwrap();
    let ours = fs::read_link("/proc/self/ns/net").unwrap();
    while id() == ours {
        std::thread::yield_now();
    }
    let theirs = id();
    let host = Host::new(Caller::Root);
    let mut command = host.command("none", &["wait"]);
    command.env("INMATE_NETWORK", &path);
    let told = readback::read(Waiting::new(command).pid).unwrap();
    assert_eq!(theirs.to_str(), Some(&*format!("net:[{}]", told.namespaces["net"].id)));
    // Who has no right to it is refused, and gets no other one instead.
    let host = Host::new(Caller::Somebody);
    let output = host.command("none", &["work"]).env("INMATE_NETWORK", &path).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(99) && said.contains("enter the network namespace"), "{said}");
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn one_that_is_tied_to_its_starter_ends_with_it() {
    for caller in CALLERS {
        let host = Host::new(caller);
        let mut waiting = Waiting::new(host.command("tied", &["wait"]));
        let process = rustix::process::pidfd_open(waiting.pid, PidfdFlags::empty()).unwrap();
        waiting.starter.kill().unwrap();
        let mut ended = [PollFd::new(&process, PollFlags::IN)];
        let patience = Timespec { tv_sec: 60, tv_nsec: 0 };
        assert_eq!(poll(&mut ended, Some(&patience)).unwrap(), 1, "{caller:?}: it lives on");
    }
}
