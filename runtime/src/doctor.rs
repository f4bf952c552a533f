//! Whether this host can run containers: one check a line, each with what to do where it fails.
//!
//! A `/dev/kvm` that is there and opens may still be of no use: some hosts emulate the guest's kernel instruction by
//! instruction, a thousand times too slowly, and without instructions that every kernel executes. So the monitor times
//! a loop in ring 0 of a tiny VM (`cofferdam-vmm --probe`), in a process of its own that is ended when it takes long.

mod jail;

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use image::Store;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Access, access, statvfs};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use crate::paths;
use crate::size::{Host, MIB};

/// The device that makes VMs.
const KVM: &str = "/dev/kvm";

/// Ring-0 instructions a microsecond below which a KVM is taken to emulate. One that does manages about 1; one on real
/// hardware hundreds even at the lowest clock; one inside QEMU's emulation of a virtualizing CPU about 200.
const MIPS_MIN: f64 = 50.0;

/// How long the probe, and entering a jail, may take. On a working host it takes milliseconds.
const PROBE_PATIENCE: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };

/// Free space below which pulling images will soon fail.
const DISK_MIN: u64 = 2 << 30;

/// Free memory in which a container of the default size starts.
const MEMORY_COMFORT: u64 = 512 * MIB;

/// What a check came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Nothing to do.
    Ok,
    /// Containers run, but something is missing or scarce.
    Warning,
    /// No container runs.
    Failure,
}

/// One check and its result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at: `kvm`, `cpu`, ….
    pub name: &'static str,
    /// What it came to.
    pub verdict: Verdict,
    /// What was found, in one line.
    pub finding: String,
    /// What to do about it, in one line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

type Report = (Verdict, String, Option<String>);

type NamedCheck = (&'static str, fn() -> Report);

fn good(finding: impl Into<String>) -> Report {
    (Verdict::Ok, finding.into(), None)
}

fn warning(finding: impl Into<String>, remedy: impl Into<String>) -> Report {
    (Verdict::Warning, finding.into(), Some(remedy.into()))
}

fn failure(finding: impl Into<String>, remedy: impl Into<String>) -> Report {
    (Verdict::Failure, finding.into(), Some(remedy.into()))
}

/// The checks, in the order in which they are made and shown.
const CHECKS: [NamedCheck; 10] = [
    ("kvm", kvm),
    ("cpu", cpu),
    ("memory", memory),
    ("kernel", kernel),
    ("initramfs", initramfs),
    ("store", store),
    ("userns", jail::namespaces),
    ("landlock", jail::landlock),
    ("cgroup", cgroup),
    ("tun", tun),
];

/// The names of all checks.
pub fn names() -> impl Iterator<Item = &'static str> {
    CHECKS.iter().map(|(name, _)| *name)
}

/// Makes the checks of these names, or all of them when there are none, and hands each to `show` as it is done.
pub fn examine(wanted: &[String], mut show: impl FnMut(&Check)) -> Vec<Check> {
    let asked = |name: &str| wanted.is_empty() || wanted.iter().any(|one| one == name);
    let checks = CHECKS.iter().filter(|(name, _)| asked(name));
    checks
        .map(|(name, check)| {
            let (verdict, finding, remedy) = check();
            let check = Check { name, verdict, finding, remedy };
            show(&check);
            check
        })
        .collect()
}

/// An error with its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        _ = write!(line, ": {source}");
        cause = source.source();
    }
    line
}

/// What the probe prints.
#[derive(Debug, Deserialize)]
struct Probe {
    api_version: i32,
    mips: f64,
}

fn kvm() -> Report {
    match File::options().read(true).write(true).open(KVM) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return failure(
                format!("{KVM} does not exist"),
                "load kvm_intel or kvm_amd (modprobe); in a virtual machine, enable nested virtualization for it; in a \
                 container, pass the device in",
            );
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return failure(
                format!("{KVM} may not be opened by this user"),
                "join the group that owns it: sudo usermod -aG kvm $USER, then log in again",
            );
        }
        Err(error) => {
            return failure(
                format!("{KVM} cannot be opened: {error}"),
                "turn on virtualization in the firmware's settings",
            );
        }
    }
    let monitor = match paths::monitor() {
        Ok(monitor) => monitor,
        Err(error) => return failure(chain(&error), "build or install all of cofferdam"),
    };
    match probe(&monitor) {
        Ok(probe) if probe.mips < MIPS_MIN => failure(
            format!(
                "{KVM} emulates guest kernels ({:.1} million instructions a second in ring 0): no Linux guest boots on it",
                probe.mips
            ),
            "use a machine with hardware virtualization, or cargo xtask lab to run inside an emulated one",
        ),
        Ok(probe) => good(format!(
            "{KVM} works (API {}, {:.0} million instructions a second in ring 0)",
            probe.api_version, probe.mips
        )),
        Err(error) => failure(
            format!("{KVM} cannot run a guest: {error}"),
            "use a machine with hardware virtualization, or cargo xtask lab to run inside an emulated one",
        ),
    }
}

/// Runs the monitor's probe, and ends it when it takes too long.
fn probe(monitor: &Path) -> Result<Probe, String> {
    let said = |error: io::Error| format!("cannot run {} --probe: {error}", monitor.display());
    let mut command = Command::new(monitor);
    command.arg("--probe").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(said)?;
    let ended = watch(&child).and_then(|process| ends(&process));
    if !matches!(ended, Ok(true)) {
        // It may have ended in between; either way it is waited for below.
        _ = child.kill();
    }
    let output = child.wait_with_output().map_err(said)?;
    match ended.map_err(said)? {
        false => Err("a loop of a few thousand instructions does not end".to_owned()),
        true if output.status.success() => serde_json::from_slice(&output.stdout)
            .map_err(|error| format!("the probe's answer makes no sense: {error}")),
        true => {
            let text = String::from_utf8_lossy(&output.stderr);
            let line = text.lines().next().unwrap_or_default();
            Err(line.strip_prefix("error: ").unwrap_or(line).to_owned())
        }
    }
}

fn watch(child: &Child) -> io::Result<OwnedFd> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Whether a process ends in time. Its output is a line, which the pipe holds.
fn ends(process: &OwnedFd) -> io::Result<bool> {
    let mut waits = [PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
    Ok(rustix::io::retry_on_intr(|| poll(&mut waits, Some(&PROBE_PATIENCE)))? > 0)
}

fn cpu() -> Report {
    let remedy =
        "turn on virtualization (VT-x or AMD-V) in the firmware's settings, or nested virtualization on the host";
    let Ok(text) = fs::read_to_string("/proc/cpuinfo") else { return warning("/proc/cpuinfo cannot be read", remedy) };
    cpu_features(&text)
}

fn cpu_features(cpuinfo: &str) -> Report {
    let remedy =
        "turn on virtualization (VT-x or AMD-V) in the firmware's settings, or nested virtualization on the host";
    let first_cpu = cpuinfo.split("\n\n").next().unwrap_or_default();
    let flags: Vec<&str> = first_cpu
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| name.contains("flags"))
        .flat_map(|(_, flags)| flags.split_whitespace())
        .collect();
    let has = |flag: &str| flags.contains(&flag);
    match (has("svm"), has("vmx"), has("npt") || has("ept")) {
        (true, _, true) => good("AMD-V with nested paging"),
        (_, true, true) => good("VT-x with extended page tables"),
        (false, false, _) => warning("the CPU shows neither VT-x (vmx) nor AMD-V (svm)", remedy),
        (..) => warning("the CPU has no nested paging: guests will be slow", "use a newer machine"),
    }
}

fn memory() -> Report {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let available = available.and_then(|rest| rest.trim().strip_suffix(" kB")).and_then(|kib| kib.parse::<u64>().ok());
    let total = Host::read().memory;
    let available = available.map_or(total, |kib| kib.saturating_mul(1024));
    let finding = format!("{} MiB available of {} MiB", available / MIB, total / MIB);
    if available < MEMORY_COMFORT {
        warning(finding, "run containers with a small -m, or free some memory")
    } else {
        good(finding)
    }
}

fn kernel() -> Report {
    let remedy = "build it with make build, install it, or name one with COFFERDAM_KERNEL";
    let path = match paths::kernel(None) {
        Ok(path) => path,
        Err(error) => return failure(chain(&error), remedy),
    };
    // ELF identification: magic, 64-bit class; then the machine, 62 for x86-64.
    match head::<20>(&path) {
        Ok(head) if head.starts_with(b"\x7fELF\x02") && head[18..] == [62, 0] => good(path.display().to_string()),
        Ok(_) => failure(format!("{} is not an uncompressed x86-64 kernel (vmlinux)", path.display()), remedy),
        Err(error) => failure(format!("{} cannot be read: {error}", path.display()), remedy),
    }
}

fn initramfs() -> Report {
    let remedy = "build it with make build, install it, or name one with COFFERDAM_INITRAMFS";
    let path = match paths::initramfs() {
        Ok(path) => path,
        Err(error) => return failure(chain(&error), remedy),
    };
    match head::<6>(&path) {
        Ok(head) if &head == b"070701" => good(path.display().to_string()),
        Ok(_) => failure(format!("{} is not an uncompressed newc archive", path.display()), remedy),
        Err(error) => failure(format!("{} cannot be read: {error}", path.display()), remedy),
    }
}

fn head<const N: usize>(path: &Path) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut file = File::open(path)?;
    match file.read_exact(&mut bytes) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok([0; N]),
        read => read.map(|()| bytes),
    }
}

fn store() -> Report {
    let root = Store::default_root();
    // The store may not have been made yet: its file system is that of the nearest directory above it.
    let Some(existing) = root.ancestors().find(|path| path.is_dir()) else {
        return failure(
            format!("{} has no directory above it", root.display()),
            "name a directory with COFFERDAM_DATA",
        );
    };
    if access(existing, Access::WRITE_OK | Access::EXEC_OK).is_err() {
        return failure(
            format!("images cannot be stored in {}: no permission", root.display()),
            "run it as the owner, or name another directory with COFFERDAM_DATA",
        );
    }
    match statvfs(existing) {
        Ok(space) => {
            let free = space.f_bavail.saturating_mul(space.f_frsize);
            let finding = format!("{} MiB free for images in {}", free / MIB, root.display());
            if free < DISK_MIN { warning(finding, "free some space, or cofferdam prune") } else { good(finding) }
        }
        Err(errno) => warning(
            format!("the free space of {} is unknown: {}", existing.display(), io::Error::from(errno)),
            "check the disk",
        ),
    }
}

fn cgroup() -> Report {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return good("cgroup v2");
    }
    warning(
        "the host has no unified cgroup v2 hierarchy: container engines cannot account micro-VMs",
        "boot with systemd.unified_cgroup_hierarchy=1; cofferdam run does not need it",
    )
}

fn tun() -> Report {
    match File::options().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => good("/dev/net/tun"),
        Err(error) => warning(
            format!("/dev/net/tun cannot be opened: {error}"),
            "load tun (modprobe tun) and give this user access; containers without a network do not need it",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_features_are_told_apart() {
        let verdict = |text: &str| cpu_features(text).0;
        assert_eq!(verdict("processor : 0\nflags\t\t: fpu svm npt\n\nprocessor : 1\n"), Verdict::Ok);
        assert_eq!(verdict("flags\t\t: fpu vmx\nvmx flags\t: vnmi ept\n"), Verdict::Ok);
        assert_eq!(verdict("flags\t\t: fpu svm\n"), Verdict::Warning);
        assert_eq!(verdict("flags\t\t: fpu\n"), Verdict::Warning);
        assert_eq!(verdict(""), Verdict::Warning);
    }

    #[test]
    fn a_file_that_is_too_short_is_of_no_kind() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), b"\x7fELF").unwrap();
        assert_eq!(head::<20>(file.path()).unwrap(), [0; 20]);
    }

    #[test]
    fn checks_can_be_chosen_and_are_shown_in_order() {
        let mut shown = Vec::new();
        let checks = examine(&["tun".to_owned(), "cpu".to_owned()], |check| shown.push(check.name));
        assert_eq!(shown, ["cpu", "tun"]);
        assert!(checks.iter().all(|check| check.remedy.is_some() || check.verdict == Verdict::Ok));
    }

    #[test]
    fn a_probe_that_does_not_end_is_ended() {
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("probe");
        fs::write(&script, "#!/bin/sh\nexec sleep 600\n").unwrap();
        let mut mode = fs::metadata(&script).unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o755);
        fs::set_permissions(&script, mode).unwrap();
        assert!(probe(&script).unwrap_err().contains("does not end"));
    }
}
