//! A monitor that was taken over does not get out of its jail: `examples/inmate` enters it by the very way that a monitor
//! takes, as root and as somebody without privileges, and tries everything there is to try, with and without a filter.
//!
//! The tests need root, since they become others. Whoever runs them as somebody else is told, not passed over.

mod force;
mod limits;
mod served;

use std::ffi::OsStr;
use std::fs;
use std::io::Read as _;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use rustix::process::Pid;

/// What an inmate ends with that has tried and failed.
const REFUSED: i32 = 10;
/// The signal of a filter, as an exit code.
const FILTERED: i32 = 128 + 31;
/// Somebody without privileges.
const SOMEBODY: u32 = 54_321;

/// Whose monitor it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Caller {
    Root,
    Somebody,
}

const CALLERS: [Caller; 2] = [Caller::Root, Caller::Somebody];
const FILTERS: [&str; 5] = ["event_loop", "vcpu", "api", "disk", "fs"];

/// A place on the host with the folder of one monitor and that of another.
struct Host {
    place: tempfile::TempDir,
    caller: Caller,
}

impl Host {
    fn new(caller: Caller) -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests become other users: run them as root");
        let host = Self { place: tempfile::tempdir().unwrap(), caller };
        fs::set_permissions(host.place.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["own", "other"] {
            let folder = host.path(name);
            fs::create_dir(&folder).unwrap();
            fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
            if caller == Caller::Somebody {
                chown(&folder, Some(SOMEBODY), Some(SOMEBODY)).unwrap();
            }
        }
        // Another VM's state, which its caller may read: nothing but the jail is in the way.
        let state = host.path("other/exit.json");
        fs::write(&state, "the state of another VM").unwrap();
        fs::set_permissions(&state, fs::Permissions::from_mode(0o644)).unwrap();
        fs::set_permissions(host.path("other"), fs::Permissions::from_mode(0o755)).unwrap();
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    fn command(&self, filter: &str, words: &[&str]) -> Command {
        let mut command = Command::new(inmate());
        command.arg("start").arg(self.path("own")).arg(filter).args(words);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if self.caller == Caller::Somebody {
            command.uid(SOMEBODY).gid(SOMEBODY);
        }
        command
    }

    /// Has an inmate try something; what it said and ended with.
    fn attempt(&self, filter: &str, words: &[&str]) -> (Option<i32>, String) {
        let Output { status, stderr, .. } = self.command(filter, words).output().unwrap();
        (status.code(), String::from_utf8_lossy(&stderr).into_owned())
    }

    /// It is refused without a filter, and dies of each filter that is not one of `allowed`.
    fn refuses(&self, words: &[&str], allowed: &[&str]) {
        let (code, said) = self.attempt("none", words);
        assert_eq!(code, Some(REFUSED), "{:?} {words:?}: {said}", self.caller);
        for filter in FILTERS {
            let expected = if allowed.contains(&filter) { REFUSED } else { FILTERED };
            let (code, said) = self.attempt(filter, words);
            assert_eq!(code, Some(expected), "{:?} {filter} {words:?}: {said}", self.caller);
        }
    }
}

/// Moves a command into a cgroup before it becomes another user, as a session's manager does.
fn in_group(command: &mut Command, procs: &Path) {
    // The standard library changes users before it would run anything of ours: a shell does both instead.
    let (program, words) =
        (command.get_program().to_owned(), command.get_args().map(OsStr::to_owned).collect::<Vec<_>>());
    let script = format!(
        "echo 0 > {}; exec setpriv --reuid {SOMEBODY} --regid {SOMEBODY} --clear-groups -- \"$@\"",
        procs.display()
    );
    let environment: Vec<_> =
        command.get_envs().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned()))).collect();
    *command = Command::new("sh");
    command.args(["-c", &script, "sh"]).arg(program).args(words).envs(environment);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
}

/// The program: beside the tests' own folder.
fn inmate() -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let path = tests.parent().and_then(Path::parent).unwrap().join("examples/inmate");
    assert!(path.exists(), "{} is not built: build the examples of this crate, too", path.display());
    path
}

/// The first address that a process has mapped.
fn mapped(pid: u32) -> String {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    usize::from_str_radix(maps.split('-').next().unwrap(), 16).unwrap().to_string()
}

/// A process of the host's, of the same user as an inmate's caller.
struct Bystander(Child);

impl Bystander {
    fn new(caller: Caller) -> Self {
        let mut command = Command::new("sleep");
        command.arg("600");
        if caller == Caller::Somebody {
            command.uid(SOMEBODY).gid(SOMEBODY);
        }
        Self(command.spawn().unwrap())
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }

    /// An address that it has mapped.
    fn address(&self) -> String {
        mapped(self.0.id())
    }

    fn lives(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

#[test]
fn what_a_monitor_has_to_do_it_can_do() {
    for caller in CALLERS {
        let host = Host::new(caller);
        for filter in ["none", "api"] {
            let (code, said) = host.attempt(filter, &["work"]);
            assert_eq!((code, said.trim()), (Some(0), "logged"), "{caller:?} {filter}");
        }
        assert_eq!(fs::read(host.path("own/log.1")).unwrap(), b"logged");
    }
}

#[test]
fn no_file_of_the_host_can_be_read() {
    for caller in CALLERS {
        let host = Host::new(caller);
        host.refuses(&["read", "/etc/passwd"], &["api", "fs"]);
        host.refuses(&["read", "/proc/self/status"], &["api", "fs"]);
    }
}

#[test]
fn nothing_of_another_vm_can_be_read() {
    for caller in CALLERS {
        let host = Host::new(caller);
        let other = host.path("other/exit.json");
        host.refuses(&["read", other.to_str().unwrap()], &["api", "fs"]);
    }
}

#[test]
fn nothing_can_be_made_outside_of_the_folder() {
    for caller in CALLERS {
        let host = Host::new(caller);
        host.refuses(&["write"], &[]);
        for (name, files) in [("own", 0), ("other", 1)] {
            assert_eq!(fs::read_dir(host.path(name)).unwrap().count(), files, "{caller:?}: {name}");
        }
    }
}

#[test]
fn no_process_of_the_host_can_be_signalled_or_traced() {
    for caller in CALLERS {
        let (host, mut bystander) = (Host::new(caller), Bystander::new(caller));
        host.refuses(&["signal", &bystander.pid()], &[]);
        host.refuses(&["trace", &bystander.pid(), &bystander.address()], &[]);
        assert!(bystander.lives(), "{caller:?}");
    }
}

/// An inmate that waits to be looked at, and its starter.
struct Waiting {
    starter: Child,
    pid: Pid,
}

impl Waiting {
    fn new(mut command: Command) -> Self {
        let mut starter = command.stderr(Stdio::null()).spawn().unwrap();
        let mut said = String::new();
        // It says so when it is in its jail.
        let stdout = starter.stdout.as_mut().unwrap();
        while !said.ends_with('\n') {
            let mut byte = [0];
            assert_eq!(stdout.read(&mut byte).unwrap(), 1, "it has ended");
            said.push(byte[0].into());
        }
        let children = format!("/proc/{0}/task/{0}/children", starter.id());
        let children = fs::read_to_string(children).unwrap();
        let pid = children.split_whitespace().next().unwrap().parse().unwrap();
        Self { starter, pid: Pid::from_raw(pid).unwrap() }
    }

    fn lives(&mut self) -> bool {
        self.starter.try_wait().unwrap().is_none()
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        _ = rustix::process::kill_process(self.pid, rustix::process::Signal::KILL);
        _ = self.starter.wait();
    }
}

#[test]
fn no_monitor_of_the_same_user_can_be_signalled_or_traced() {
    for caller in CALLERS {
        let (host, other) = (Host::new(caller), Host::new(caller));
        let mut waiting = Waiting::new(other.command("none", &["wait"]));
        let number = waiting.pid.as_raw_nonzero().get();
        let (pid, address) = (number.to_string(), mapped(number.unsigned_abs()));
        host.refuses(&["signal", &pid], &[]);
        host.refuses(&["trace", &pid, &address], &[]);
        assert!(waiting.lives(), "{caller:?}");
    }
}

#[test]
fn no_socket_leads_out() {
    for caller in CALLERS {
        let host = Host::new(caller);
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let name = format!("cofferdam-breakout-{}-{caller:?}", std::process::id());
        let local = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        let port = tcp.local_addr().unwrap().port().to_string();
        host.refuses(&["connect", &port, &name], &[]);
        let path = host.path("other/api.sock");
        let _named = UnixListener::bind(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        host.refuses(&["connect", &port, path.to_str().unwrap()], &[]);
        for filter in FILTERS {
            assert_eq!(host.attempt(filter, &["socket"]).0, Some(FILTERED), "{filter}");
        }
        local.set_nonblocking(true).unwrap();
        tcp.set_nonblocking(true).unwrap();
        assert!(local.accept().is_err() && tcp.accept().is_err());
    }
}

/// In an engine's namespace, whose network is there, the filters alone are in the way of all of it.
#[test]
fn no_socket_leads_out_in_the_network_of_an_engine() {
    let host = Host::new(Caller::Root);
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = tcp.local_addr().unwrap().port().to_string();
    let attempt = |filter, words: &[&str]| {
        let mut command = host.command(filter, words);
        command.env("INMATE_NETWORK", "/proc/self/ns/net").output().unwrap().status.code()
    };
    for filter in FILTERS {
        for words in [&["connect", &port, "none"][..], &["socket"]] {
            assert_eq!(attempt(filter, words), Some(FILTERED), "{filter} {words:?}");
        }
    }
    // There is something to be kept from.
    assert_eq!(attempt("none", &["socket"]), Some(0));
    tcp.set_nonblocking(true).unwrap();
    assert!(tcp.accept().is_err());
}

/// What has no business in a monitor, and was a way out of others: each is refused to each kind of thread, whatever its
/// arguments are.
#[test]
fn no_call_is_made_that_a_monitor_does_not_make() {
    let host = Host::new(Caller::Root);
    let calls = [
        ("fork", libc::SYS_fork),
        ("io_uring_setup", libc::SYS_io_uring_setup),
        ("bpf", libc::SYS_bpf),
        ("open_by_handle_at", libc::SYS_open_by_handle_at),
        ("userfaultfd", libc::SYS_userfaultfd),
        ("perf_event_open", libc::SYS_perf_event_open),
        ("keyctl", libc::SYS_keyctl),
        ("setns", libc::SYS_setns),
        ("pidfd_getfd", libc::SYS_pidfd_getfd),
        ("process_vm_writev", libc::SYS_process_vm_writev),
        ("memfd_create", libc::SYS_memfd_create),
        ("rt_sigreturn", libc::SYS_rt_sigreturn),
        ("sendmsg", libc::SYS_sendmsg),
        ("finit_module", libc::SYS_finit_module),
    ];
    for filter in FILTERS {
        for (name, number) in calls {
            let (code, said) = host.attempt(filter, &["call", &number.to_string(), "0"]);
            assert_eq!(code, Some(FILTERED), "{filter} {name}: {said}");
        }
    }
}

#[test]
fn who_may_start_threads_starts_no_process() {
    let host = Host::new(Caller::Root);
    let attempt = |filter, call: libc::c_long, first: libc::c_int| {
        host.attempt(filter, &["call", &call.to_string(), &first.to_string()])
    };
    for filter in FILTERS {
        assert_eq!(attempt(filter, libc::SYS_clone, libc::SIGCHLD).0, Some(FILTERED), "{filter}");
        // Its flags are in memory, where no filter sees them.
        let (code, said) = attempt(filter, libc::SYS_clone3, 0);
        match filter {
            "fs" => assert!(code == Some(REFUSED) && said.contains("Function not implemented"), "{said}"),
            _ => assert_eq!(code, Some(FILTERED), "{filter}"),
        }
    }
    assert_eq!(attempt("none", libc::SYS_clone, libc::SIGCHLD).0, Some(0));
}

#[test]
fn nothing_can_be_mounted_or_unmounted() {
    for caller in CALLERS {
        Host::new(caller).refuses(&["mount"], &[]);
    }
}

#[test]
fn no_privilege_can_be_had() {
    for caller in CALLERS {
        Host::new(caller).refuses(&["privilege"], &[]);
    }
}

#[test]
fn no_program_can_be_executed() {
    for caller in CALLERS {
        Host::new(caller).refuses(&["execute"], &[]);
    }
}

#[test]
fn who_was_not_born_in_a_jail_does_not_enter_one() {
    let host = Host::new(Caller::Root);
    let mut child = Command::new(inmate())
        .args(["--born", host.path("own").to_str().unwrap(), "none", "work"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(99));
    assert!(said.contains("is not the first one of a pid namespace"), "{said}");
}
