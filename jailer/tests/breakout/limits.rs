//! What a monitor can use up: the resource limits hold in every jail, wherever it is and whoever's it is; those of the cgroup
//! where there is one, in whichever hierarchies the machine has.

use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use rustix::fs::statfs;

use super::{CALLERS, Caller, Host, REFUSED, SOMEBODY};

/// What an inmate ends with that the kernel has killed.
const KILLED: i32 = 128 + 9;

#[test]
fn memory_ends_at_the_limit() {
    for caller in CALLERS {
        let host = Host::new(caller);
        let (code, said) = host.attempt("none", &["memory", "16"]);
        assert_eq!(code, Some(0), "{said}");
        // What is only reserved counts, too: it is the limit that ends it, and not what the machine has.
        let most = jailer::Limits::new(1, 64, 0).address_space >> 20;
        let (code, said) = host.attempt("none", &["reserve", &(most - 256).to_string()]);
        assert_eq!(code, Some(0), "{said}");
        let (code, said) = host.attempt("none", &["reserve", &most.to_string()]);
        assert_eq!(code, Some(REFUSED), "{said}");
        assert!(said.contains("Cannot allocate memory"), "{said}");
    }
}

#[test]
fn a_file_ends_at_the_limit() {
    for caller in CALLERS {
        let host = Host::new(caller);
        let (code, said) = host.attempt("none", &["fill", "16"]);
        assert_eq!(code, Some(0), "{said}");
        let (code, said) = host.attempt("none", &["fill", "17"]);
        assert_eq!(code, Some(REFUSED), "{said}");
        assert!(said.contains("File too large"), "{said}");
        assert_eq!(fs::metadata(host.path("own/log")).unwrap().len(), 16 << 20);
    }
}

#[test]
fn threads_end_at_the_limit() {
    for caller in CALLERS {
        let host = Host::new(caller);
        let (code, said) = host.attempt("none", &["threads", "8"]);
        assert_eq!(code, Some(0), "{said}");
        let (code, said) = host.attempt("none", &["threads", "100"]);
        assert_eq!(code, Some(REFUSED), "{said}");
        assert!(said.contains("Resource temporarily unavailable"), "{said}");
    }
}

#[test]
fn descriptors_end_at_the_limit() {
    for caller in CALLERS {
        let host = Host::new(caller);
        let (code, said) = host.attempt("none", &["files", "100000"]);
        assert_eq!(code, Some(REFUSED), "{said}");
        assert!(said.contains("Too many open files"), "{said}");
    }
}

/// Whether this machine has the unified hierarchy alone.
fn is_unified() -> bool {
    statfs("/sys/fs/cgroup").is_ok_and(|place| place.f_type == 0x6367_7270)
}

/// A cgroup that its caller was given, as systemd gives one to a user, where there can be one; and in which a caller is then.
struct Given(PathBuf);

impl Given {
    fn new(name: &str) -> Self {
        let given = PathBuf::from(format!("/sys/fs/cgroup/{name}-{}", std::process::id()));
        fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory +pids +cpu").unwrap();
        let own = given.join("own");
        fs::create_dir_all(&own).unwrap();
        let files =
            ["", "cgroup.procs", "cgroup.subtree_control", "own", "own/cgroup.procs", "own/cgroup.subtree_control"];
        for file in files {
            chown(given.join(file), Some(SOMEBODY), Some(SOMEBODY)).unwrap();
        }
        Self(given)
    }

    fn own(&self) -> PathBuf {
        self.0.join("own/cgroup.procs")
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        for folder in ["own", "cofferdam", ""] {
            _ = fs::remove_dir(self.0.join(folder));
        }
    }
}

/// An attempt in a cgroup of its own; a caller that can be given groups is given some.
fn attempt(caller: Caller, threads: &str, words: &[&str]) -> (Option<i32>, String) {
    let host = Host::new(caller);
    let name = format!("breakout-{}-{}", std::process::id(), words[0]);
    let given = (caller == Caller::Somebody && is_unified()).then(|| Given::new(&name));
    let mut command = host.command("none", words);
    command.env("INMATE_GROUP", &name).env("INMATE_THREADS", threads);
    if let Some(given) = &given {
        super::in_group(&mut command, &given.own());
    }
    let output = command.output().unwrap();
    assert!(!Path::new("/sys/fs/cgroup/cofferdam").join(&name).exists(), "its cgroup is left");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Whether a caller has a cgroup: root everywhere, somebody else where the hierarchy can be given to him.
fn has_group(caller: Caller) -> bool {
    caller == Caller::Root || is_unified()
}

#[test]
fn memory_ends_at_the_limit_of_the_cgroup_where_there_is_one() {
    for caller in CALLERS {
        let (code, said) = attempt(caller, "100", &["memory", "100"]);
        assert_eq!(code, Some(0), "{caller:?}: {said}");
        // Less than the address space has room for, and more than twice the bound, so that swap does not help.
        let (code, said) = attempt(caller, "100", &["memory", "500"]);
        let expected = if has_group(caller) { KILLED } else { 0 };
        assert_eq!(code, Some(expected), "{caller:?}: {said}");
    }
}

#[test]
fn cpu_time_ends_at_the_limit_of_the_cgroup() {
    let host = Host::new(Caller::Root);
    let mut command = host.command("none", &["burn", "2000"]);
    // A fifth of a CPU.
    command.env("INMATE_GROUP", format!("breakout-{}-burn", std::process::id())).env("INMATE_CPU", "20000");
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let used: u64 = said.trim().parse().unwrap_or_else(|_| panic!("{said}"));
    // What is begun at the end of a tenth of a second is paid for in the next.
    assert!((1..700).contains(&used), "{used} ms of 2,000");
}

#[test]
fn threads_end_at_the_limit_of_the_cgroup_where_there_is_one() {
    for caller in CALLERS {
        // Fewer than the resource limits allow.
        let (code, said) = attempt(caller, "6", &["threads", "4"]);
        assert_eq!(code, Some(0), "{caller:?}: {said}");
        let (code, said) = attempt(caller, "6", &["threads", "10"]);
        let expected = if has_group(caller) { REFUSED } else { 0 };
        assert_eq!(code, Some(expected), "{caller:?}: {said}");
    }
}
