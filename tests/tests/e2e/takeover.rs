//! Monitors that are taken over while their guests run: each kind of thread is made to call what leads out of its jail, by a
//! debugger, with all that a monitor holds at that time.

use std::ffi::CStr;
use std::fs;
use std::path::PathBuf;

use nix::libc::{self, c_long, user_regs_struct};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests::sandbox::{Detached, Sandbox};
use tests::until;

use crate::abuse::with;

/// The bytes of the instruction that makes a system call, as a number.
const SYSCALL: c_long = 0x050f;
/// Below the stack pointer, and what the System V ABI leaves alone there.
const BELOW_STACK: u64 = 4096;

/// A thread of a monitor's, stopped in a system call that is over for it.
struct Hijacked {
    thread: Pid,
    registers: user_regs_struct,
}

impl Hijacked {
    /// One of the monitor of a container.
    fn new(victim: &Detached<'_>, name: &str) -> Self {
        let monitor = victim.inspect("jail.pid");
        let tasks = fs::read_dir(format!("/proc/{monitor}/task")).unwrap().flatten();
        let mut threads = tasks.filter_map(|task| {
            let called = fs::read_to_string(task.path().join("comm")).ok()?;
            (called.trim_end() == name).then(|| task.file_name().to_str()?.parse().ok()).flatten()
        });
        let thread = Pid::from_raw(threads.next().unwrap_or_else(|| panic!("there is no thread {name}")));
        ptrace::seize(thread, ptrace::Options::empty()).unwrap();
        // It may be between two system calls.
        let registers = until("a thread in a system call", || {
            ptrace::interrupt(thread).unwrap();
            wait(thread);
            let registers = ptrace::getregs(thread).unwrap();
            let before = ptrace::read(thread, (registers.rip - 2) as ptrace::AddressType).unwrap();
            if before & 0xffff == SYSCALL {
                return Some(registers);
            }
            ptrace::cont(thread, None).unwrap();
            None
        });
        Self { thread, registers }
    }

    /// Makes a system call, and gives what the kernel answered, or what the process died of.
    fn call(&self, number: c_long, arguments: [u64; 3]) -> Result<i64, Signal> {
        let mut registers = self.registers;
        // Nothing is to be begun once more.
        registers.orig_rax = u64::MAX;
        registers.rip -= 2;
        registers.rax = number.cast_unsigned();
        [registers.rdi, registers.rsi, registers.rdx] = arguments;
        [registers.r10, registers.r8, registers.r9] = [0; 3];
        ptrace::setregs(self.thread, registers).unwrap();
        ptrace::step(self.thread, None).unwrap();
        match wait(self.thread) {
            WaitStatus::Stopped(_, Signal::SIGTRAP) => Ok(ptrace::getregs(self.thread).unwrap().rax.cast_signed()),
            WaitStatus::Signaled(_, signal, _) => Err(signal),
            other => panic!("call {number}: {other:?}"),
        }
    }

    /// Lets it go on where it was.
    fn let_go(self) {
        ptrace::setregs(self.thread, self.registers).unwrap();
        ptrace::detach(self.thread, None).unwrap();
    }

    /// Puts a text where its stack will be, and gives the address.
    fn put(&self, text: &CStr) -> u64 {
        let address = (self.registers.rsp - BELOW_STACK) & !7;
        let mut padded = text.to_bytes_with_nul().to_vec();
        padded.resize(padded.len().next_multiple_of(8), 0);
        for (word, to) in padded.as_chunks().0.iter().zip((address..).step_by(8)) {
            ptrace::write(self.thread, to as ptrace::AddressType, c_long::from_ne_bytes(*word)).unwrap();
        }
        address
    }
}

fn wait(thread: Pid) -> WaitStatus {
    waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap()
}

/// A VM whose monitor has every kind of thread.
fn all_kinds(sandbox: &Sandbox) -> Value {
    let (disk, folder) = (sandbox.files().join("disk"), sandbox.files().join("folder"));
    fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    fs::create_dir(&folder).unwrap();
    json!({ "drives": [{ "file": { "path": disk } }], "filesystems": [{ "tag": "t", "path": folder }] })
}

/// Threads, and whether they can open files.
const KINDS: [(&str, bool); 5] =
    [("cofferdam-vmm", false), ("vcpu 0", false), ("disk 0", false), ("api", true), ("files 0", true)];

#[test]
fn a_monitor_that_is_taken_over_dies_of_what_leads_out() {
    let sandbox = Sandbox::new();
    let monitor = with(&sandbox, "", &all_kinds(&sandbox));
    let neighbour = sandbox.detached("neighbour", &[], "busybox", &["sleep", "1000"]);
    let calls = [("openat", libc::SYS_openat), ("socket", libc::SYS_socket), ("execve", libc::SYS_execve)];
    for (kind, opens) in KINDS {
        for (name, number) in calls.into_iter().skip(usize::from(opens)) {
            let victim = sandbox.detached_by(&monitor, "victim", &["-m", "64m"], "busybox", &["sleep", "1000"]);
            let thread = Hijacked::new(&victim, kind);
            let path = thread.put(c"/etc/passwd");
            let at = libc::AT_FDCWD as u64;
            let arguments = match number {
                libc::SYS_openat => [at, path, 0],
                libc::SYS_socket => [libc::AF_UNIX as u64, libc::SOCK_DGRAM as u64, 0],
                _ => [path, 0, 0],
            };
            assert_eq!(thread.call(number, arguments), Err(Signal::SIGSYS), "{kind}: {name}");
            until("its end", || (victim.inspect("state.status") == "exited").then_some(()));
        }
    }
    assert_eq!(neighbour.verb("exec", &[], &["echo", "alive"]).end().succeeded(), "alive\n");
}

#[test]
fn a_monitor_that_is_taken_over_opens_nothing_of_the_hosts() {
    let sandbox = Sandbox::new();
    let monitor = with(&sandbox, "", &all_kinds(&sandbox));
    let victim = sandbox.detached_by(&monitor, "victim", &["-m", "64m"], "busybox", &["sleep", "1000"]);
    for (kind, _) in KINDS.into_iter().filter(|(_, opens)| *opens) {
        let thread = Hijacked::new(&victim, kind);
        let inherited = (0..24).map(|number| format!("/proc/self/fd/{number}\0"));
        let paths = ["/etc/passwd\0", "/dev/kvm\0", "/proc/1/root/etc/passwd\0", "../../../../../etc/passwd\0"];
        for path in paths.into_iter().map(str::to_owned).chain(inherited) {
            let text = thread.put(CStr::from_bytes_with_nul(path.as_bytes()).unwrap());
            let opened = thread.call(libc::SYS_openat, [libc::AT_FDCWD as u64, text, libc::O_RDWR as u64]);
            assert_eq!(opened, Ok(-i64::from(libc::ENOENT)), "{kind}: {path}");
        }
    }
}

#[test]
fn a_monitor_that_lets_go_of_its_lock_is_shown_and_ended() {
    let sandbox = Sandbox::new();
    let victim = sandbox.detached("victim", &["-m", "64m"], "busybox", &["sleep", "1000"]);
    let jail: Value = serde_json::from_str(&victim.inspect("jail")).unwrap();
    let monitor = PathBuf::from(format!("/proc/{}", jail["pid"]));
    let groups = jail["cgroups"].as_array().unwrap().iter().filter(|group| group["own"] == true);
    let groups: Vec<_> = groups.map(|group| PathBuf::from(group["path"].as_str().unwrap())).collect();
    assert!(!groups.is_empty() && monitor.exists());
    let lock = fs::read_dir(monitor.join("fd")).unwrap().flatten().find_map(|entry| {
        let file = fs::read_link(entry.path()).ok()?;
        file.ends_with("lock").then(|| entry.file_name().to_str()?.parse().ok()).flatten()
    });
    let thread = Hijacked::new(&victim, "cofferdam-vmm");
    assert_eq!(thread.call(libc::SYS_close, [lock.expect("it holds its lock"), 0, 0]), Ok(0));
    thread.let_go();
    let listed = sandbox.cofferdam(["ps"]).end();
    assert!(listed.succeeded().contains("victim"), "{listed:?}");
    assert_eq!(victim.verb("kill", &["-s", "KILL"], &[]).end().code(), 0);
    until("the end of the monitor", || (!monitor.exists()).then_some(()));
    drop(victim);
    assert!(groups.iter().all(|group| !group.exists()), "{groups:?}");
}
