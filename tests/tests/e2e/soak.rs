//! Rounds of whole lives: nothing grows. `COFFERDAM_SOAK` says how many rounds; without it there are a few.

use std::fs;
use std::ops::Range;

use serde_json::{Value, json};
use tests::sandbox::{Detached, Sandbox};

/// The rounds after which everything that is made once was made.
const WARM: usize = 4;
/// How much more memory the monitor may have after all rounds than after the first ones, in KiB: the allocator's slack, and
/// what is remembered of the last events and processes.
const GROWTH_KIB: u64 = 1024;

fn rounds(few: usize) -> usize {
    std::env::var(tests::SOAK_VARIABLE).map_or(few, |text| text.parse().expect("the number of rounds is a number"))
}

/// The memory that is the own of a container's monitor, in KiB: all that is private, but for its guest's. That is in parts beside
/// each other, of which the last one is the monitor's largest mapping.
pub(crate) fn private_kib(pid: u32, container: &Detached<'_>) -> u64 {
    let guest_kib = container.inspect("vm.memory_mib").parse::<u64>().unwrap() << 10;
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut mappings: Vec<(Range<u64>, u64)> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        let address = |text| u64::from_str_radix(text, 16).ok();
        if let Some((Some(start), Some(end))) = first.split_once('-').map(|(start, end)| (address(start), address(end)))
        {
            mappings.push((start..end, 0));
        } else if let ("Private_Clean:" | "Private_Dirty:", Some((_, private))) = (first, mappings.last_mut()) {
            *private += words.next().and_then(|word| word.parse::<u64>().ok()).unwrap();
        }
    }
    let length = |range: &Range<u64>| range.end - range.start;
    let (largest, _) = mappings.iter().max_by_key(|(range, _)| length(range)).unwrap();
    assert!(length(largest) > guest_kib << 9, "no mapping is most of {guest_kib} KiB: {mappings:?}");
    let guest = largest.end - (guest_kib << 10)..largest.end;
    mappings.iter().filter(|(range, _)| !guest.contains(&range.start)).map(|(_, private)| private).sum()
}

#[test]
fn containers_that_come_and_go_leave_nothing_in_their_vm() {
    let sandbox = Sandbox::new();
    let pod = sandbox.detached("pod", &["-m", "256m"], "busybox", &["sleep", "1000000"]);
    let socket = format!("{}/api.sock", pod.inspect("state_directory"));
    let mut spec: Value = serde_json::from_str(&pod.inspect("container.spec")).unwrap();
    (spec["id"], spec["hostname"]) = (json!("side"), json!("side"));
    fs::write(sandbox.files().join("side.json"), json!({"spec": spec}).to_string()).unwrap();
    // One process of curl a round, since starting one takes most of the time.
    let side = "http://vm/v1/containers/side";
    let script = format!(
        "curl --silent --show-error --fail --unix-socket {socket} \
         --json @side.json http://vm/v1/containers --output /dev/null \
         --next --fail --unix-socket {socket} --request POST {side}/start --output /dev/null \
         --next --fail --unix-socket {socket} --json '{{\"id\":\"p\",\"args\":[\"true\"]}}' {side}/processes --output /dev/null \
         --next --fail --unix-socket {socket} {side}/processes/p/wait \
         --next --fail --unix-socket {socket} --json '{{\"signal\":9}}' {side}/kill --output /dev/null \
         --next --fail --unix-socket {socket} {side}/wait --output /dev/null \
         --next --fail --unix-socket {socket} --request DELETE {side} --output /dev/null"
    );
    let monitor = sandbox.monitor();
    let measure = || {
        let descriptors = fs::read_dir(format!("/proc/{monitor}/fd")).unwrap().count();
        let threads = fs::read_dir(format!("/proc/{monitor}/task")).unwrap().count();
        (descriptors, threads, private_kib(monitor, &pod))
    };
    let mut before = (0, 0, 0);
    for round in 0..rounds(12) {
        let ended = sandbox.program("sh", ["-c", &script]).end();
        assert!(ended.succeeded().contains("\"exit_code\":0"), "round {round}: {ended:?}");
        if round + 1 == WARM {
            before = measure();
        }
    }
    let after = measure();
    eprintln!("descriptors, threads, private KiB of the monitor: {before:?}, then {after:?}");
    assert_eq!((after.0, after.1), (before.0, before.1));
    assert!(after.2 <= before.2 + GROWTH_KIB, "{} KiB became {} KiB", before.2, after.2);
    let guest = "ls /proc | grep -c '^[0-9]'; mount | wc -l";
    assert_eq!(pod.verb("exec", &[], &["sh", "-c", guest]).end().code(), 0);
}

#[test]
fn vms_that_come_and_go_leave_nothing_on_the_host() {
    let sandbox = Sandbox::new();
    let image = Sandbox::reference("busybox");
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count();
    let before = mounts();
    for round in 0..rounds(3) {
        for (words, told) in [
            (&["create", "--name", "brief", &image, "sleep", "1000"][..], None),
            (&["start", "brief"], Some("brief\n")),
            (&["exec", "brief", "echo", "alive"], Some("alive\n")),
            (&["kill", "brief"], Some("brief\n")),
            (&["rm", "-f", "brief"], Some("brief\n")),
        ] {
            let ended = sandbox.cofferdam(words).end();
            assert_eq!(ended.code(), 0, "round {round}: {words:?}: {ended:?}");
            assert!(told.is_none_or(|told| ended.text() == told), "round {round}: {words:?}: {ended:?}");
        }
        assert!(sandbox.leftovers().is_empty(), "round {round}: {:?}", sandbox.leftovers());
    }
    assert_eq!(mounts(), before);
}

#[test]
fn an_idle_vm_wakes_nobody() {
    let sandbox = Sandbox::new();
    let pod = sandbox.detached("pod", &[], "busybox", &["sleep", "1000000"]);
    let tasks = format!("/proc/{}/task", sandbox.monitor());
    let pause = || std::thread::sleep(std::time::Duration::from_secs(5));
    // The vCPUs are the guest's: its kernel's timers are its own business.
    let switches = || -> Vec<(String, String)> {
        let read = |folder: &std::path::Path, file| fs::read_to_string(folder.join(file)).unwrap_or_default();
        let entries = fs::read_dir(&tasks).unwrap().flatten().map(|entry| entry.path());
        let ours = entries.filter(|folder| !read(folder, "comm").starts_with("vcpu"));
        let count = |folder: std::path::PathBuf| {
            let status = read(&folder, "status");
            let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches")).unwrap_or_default();
            (read(&folder, "comm"), line.to_owned())
        };
        ours.map(count).collect()
    };
    // The guest has things to do for a while after its boot, and then none; a monitor that polls never has such a time.
    let quiet = (0..12).any(|_| {
        let before = switches();
        pause();
        switches() == before
    });
    assert!(quiet, "{:?}", switches());
    drop(pod);
}
