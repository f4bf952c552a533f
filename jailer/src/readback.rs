//! The jail that a monitor is in, read back from the kernel: /proc/PID and the cgroup's own files, nothing of what was meant.
//!
//! Ids are those of the namespaces of whoever asks. A file that the kernel does not have, or does not show to whoever asks,
//! leaves its field empty; one that is not there because the process has ended is an error.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::process::Pid;
use serde::Serialize;

use crate::cgroup::hierarchy;
use crate::error::JailError;

/// Namespaces that a process can be in, as /proc names them.
const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];
/// Sets of capabilities, as /proc and people name them.
const SETS: [(&str, &str); 5] = [
    ("CapInh", "inheritable"),
    ("CapPrm", "permitted"),
    ("CapEff", "effective"),
    ("CapBnd", "bounding"),
    ("CapAmb", "ambient"),
];

/// A jail that is in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InForce {
    /// The process.
    pub pid: i32,
    /// Its real, effective, saved and file system user.
    pub uid: Vec<u32>,
    /// Its groups of these kinds.
    pub gid: Vec<u32>,
    /// Its further groups.
    pub groups: Vec<u32>,
    /// The lines of its user namespace's map: inside, outside, how many.
    pub uid_map: Vec<String>,
    /// The namespaces it is in.
    pub namespaces: BTreeMap<&'static str, Namespace>,
    /// Its sets of capabilities, as 64-bit masks in hexadecimal.
    pub capabilities: BTreeMap<&'static str, String>,
    /// Whether nothing it executes can give it privileges.
    pub no_new_privs: bool,
    /// Its threads.
    pub threads: Vec<Thread>,
    /// What is mounted below its root.
    pub mounts: Vec<Mount>,
    /// How many bytes its environment has.
    pub environment_bytes: Option<usize>,
    /// Its resource limits, soft and hard, in the kernel's words.
    pub limits: BTreeMap<String, [String; 2]>,
    /// The groups that it is in, and their limits.
    pub cgroups: Vec<Group>,
    /// Landlock.
    pub landlock: Landlock,
}

/// A namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Namespace {
    /// Its number.
    pub id: u64,
    /// Whether it is another one than that of whoever asks.
    pub own: bool,
}

/// A thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Thread {
    /// Its id.
    pub id: i32,
    /// Its name.
    pub name: String,
    /// What its system calls are: `filtered`, `strict` or `free`.
    pub system_calls: &'static str,
    /// How many filters it has.
    pub filters: u32,
}

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mount {
    /// Where, in the jail.
    pub path: String,
    /// The file system.
    pub file_system: String,
    /// How it is mounted.
    pub options: Vec<String>,
}

/// A group in one hierarchy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Group {
    /// Its folder.
    pub path: PathBuf,
    /// Whether it is another one than that of whoever asks. The limits of one that is not are not the monitor's.
    pub own: bool,
    /// Its limits, by the file that tells them.
    pub limits: BTreeMap<&'static str, String>,
}

/// What the kernel tells of Landlock. It does not tell which process is restricted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Landlock {
    /// Whether a monitor is restricted that is started on this kernel, which has it: without, it is not.
    pub supported: bool,
}

impl Landlock {
    /// What a monitor that is started now would have.
    #[must_use]
    pub fn of_this_kernel() -> Self {
        Self { supported: crate::landlock::is_supported() }
    }
}

/// Reads the jail of a process back.
///
/// # Errors
/// [`JailError::Path`]: the process has ended, or is not to be looked at.
pub fn read(pid: Pid) -> Result<InForce, JailError> {
    let process = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
    let status = Status::read(&process.join("status"))?;
    Ok(InForce {
        pid: pid.as_raw_nonzero().get(),
        uid: status.numbers("Uid"),
        gid: status.numbers("Gid"),
        groups: status.numbers("Groups"),
        uid_map: lines(&process.join("uid_map"), |line| {
            Some(line.split_ascii_whitespace().collect::<Vec<_>>().join(" "))
        }),
        namespaces: namespaces(&process),
        capabilities: SETS
            .into_iter()
            .filter_map(|(name, shown)| Some((shown, status.value(name)?.to_owned())))
            .collect(),
        no_new_privs: status.value("NoNewPrivs") == Some("1"),
        threads: threads(&process)?,
        mounts: lines(&process.join("mountinfo"), mount),
        environment_bytes: fs::read(process.join("environ")).ok().map(|environment| environment.len()),
        limits: lines(&process.join("limits"), limit).into_iter().collect(),
        cgroups: groups(&process)?,
        landlock: Landlock::of_this_kernel(),
    })
}

/// A `status` file: names and values.
pub(crate) struct Status(pub(crate) String);

impl Status {
    fn read(path: &Path) -> Result<Self, JailError> {
        fs::read_to_string(path).map(Self).map_err(failed(path))
    }

    pub(crate) fn value(&self, name: &str) -> Option<&str> {
        let values = self.0.lines().filter_map(|line| line.split_once(':'));
        values.into_iter().find(|(key, _)| *key == name).map(|(_, value)| value.trim())
    }

    pub(crate) fn numbers(&self, name: &str) -> Vec<u32> {
        let words = self.value(name).unwrap_or_default().split_ascii_whitespace();
        words.filter_map(|word| word.parse().ok()).collect()
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> JailError {
    move |source| JailError::Path { step: "read", path: path.to_owned(), source }
}

/// What the lines of a file say; one that cannot be read says nothing.
fn lines<T>(path: &Path, parse: impl Fn(&str) -> Option<T>) -> Vec<T> {
    fs::read_to_string(path).unwrap_or_default().lines().filter_map(parse).collect()
}

fn namespaces(process: &Path) -> BTreeMap<&'static str, Namespace> {
    let id = |process: &Path, name: &str| -> Option<u64> {
        let link = fs::read_link(process.join("ns").join(name)).ok()?;
        link.to_str()?.split_once('[')?.1.strip_suffix(']')?.parse().ok()
    };
    let read = |name: &'static str| {
        let theirs = id(process, name)?;
        Some((name, Namespace { id: theirs, own: id(Path::new("/proc/self"), name) != Some(theirs) }))
    };
    NAMESPACES.into_iter().filter_map(read).collect()
}

fn threads(process: &Path) -> Result<Vec<Thread>, JailError> {
    let folder = process.join("task");
    let mut threads = Vec::new();
    for entry in fs::read_dir(&folder).map_err(failed(&folder))? {
        let path = entry.map_err(failed(&folder))?.path();
        // One that has ended meanwhile is none of its threads.
        let Ok(status) = Status::read(&path.join("status")) else { continue };
        let id = path.file_name().and_then(|name| name.to_str()?.parse().ok());
        threads.push(Thread {
            id: id.unwrap_or_default(),
            name: status.value("Name").unwrap_or_default().to_owned(),
            system_calls: match status.value("Seccomp") {
                Some("2") => "filtered",
                Some("1") => "strict",
                _ => "free",
            },
            filters: status.numbers("Seccomp_filters").first().copied().unwrap_or_default(),
        });
    }
    threads.sort_by_key(|thread| thread.id);
    Ok(threads)
}

/// A line of a table of mounts (proc_pid_mountinfo(5)).
pub(crate) fn mount(line: &str) -> Option<Mount> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mut words = mount.split(' ').skip(4);
    Some(Mount {
        path: words.next()?.to_owned(),
        options: words.next()?.split(',').map(str::to_owned).collect(),
        file_system: file_system.split(' ').next()?.to_owned(),
    })
}

/// A line of a table of limits, whose columns are parted by at least two spaces: `Max open files  1024  4096  files`.
pub(crate) fn limit(line: &str) -> Option<(String, [String; 2])> {
    let name = line.strip_prefix("Max ")?;
    let mut columns = name.split("  ").map(str::trim).filter(|column| !column.is_empty());
    let name = columns.next()?.replace(' ', "_");
    Some((name, [columns.next()?.to_owned(), columns.next()?.to_owned()]))
}

fn groups(process: &Path) -> Result<Vec<Group>, JailError> {
    let read = |path: PathBuf| fs::read_to_string(path).unwrap_or_default();
    let (theirs, ours) = (read(process.join("cgroup")), read(PathBuf::from("/proc/self/cgroup")));
    let mut groups = Vec::new();
    for (kind, root) in hierarchy::mounted()? {
        let find = |text: &str| text.lines().find_map(|line| kind.group(line)).map(str::to_owned);
        let Some(group) = find(&theirs) else { continue };
        let path = root.join(group.trim_start_matches('/'));
        let tell = |file: &'static str| Some((file, fs::read_to_string(path.join(file)).ok()?.trim().to_owned()));
        let limits: BTreeMap<_, _> = kind.files().into_iter().filter_map(tell).collect();
        let own = find(&ours).is_none_or(|ours| ours != group);
        // A hierarchy without a limit limits nothing, whoever is in it.
        if !limits.is_empty() {
            groups.push(Group { path, own, limits });
        }
    }
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_by_name() {
        let told = limit("Max open files            1024                 524288               files     ");
        assert_eq!(told, Some(("open_files".to_owned(), ["1024".to_owned(), "524288".to_owned()])));
        let told = limit("Max nice priority         0                    0                    ");
        assert_eq!(told, Some(("nice_priority".to_owned(), ["0".to_owned(), "0".to_owned()])));
        assert_eq!(limit("Limit                     Soft Limit           Hard Limit           Units     "), None);
    }

    #[test]
    fn mounts_are_read() {
        let told = mount("65 42 0:40 / / ro,nosuid shared:3 - tmpfs none rw,size=4k").unwrap();
        assert_eq!((&*told.path, &*told.file_system, told.options.len()), ("/", "tmpfs", 2));
        assert_eq!(mount("garbage"), None);
    }

    #[test]
    fn a_process_without_a_jail_is_told_as_one() {
        let us = read(rustix::process::getpid()).unwrap();
        assert!(us.namespaces.values().all(|namespace| !namespace.own) && us.namespaces.len() >= 7);
        assert!(us.threads.iter().all(|thread| thread.system_calls == "free" && thread.filters == 0));
        assert!(us.mounts.len() > 1 && us.environment_bytes.is_some_and(|bytes| bytes > 0));
        assert!(us.cgroups.iter().all(|group| !group.own));
        assert_eq!(us.uid[0], rustix::process::getuid().as_raw());
    }

    #[test]
    fn a_process_that_is_not_there_is_an_error() {
        assert!(read(Pid::from_raw(i32::MAX).unwrap()).is_err());
    }
}
