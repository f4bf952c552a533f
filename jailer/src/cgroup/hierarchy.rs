//! The kernel's hierarchies of groups: which there are, where they are mounted, and how each is told a limit.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, accessat, fstatfs, statfs};

use super::{Bounds, CPU_PERIOD_US};
use crate::birth::is_privileged;
use crate::error::{JailError, step};

/// The file system of the unified hierarchy (`CGROUP2_SUPER_MAGIC`).
const UNIFIED_MAGIC: i64 = 0x6367_7270;
/// Where a system that has only the unified hierarchy has it.
const USUAL_PLACE: &str = "/sys/fs/cgroup";
/// What leads from a group to those below it, in the unified hierarchy.
const BELOW: &str = "cgroup.subtree_control";

/// What is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Controller {
    Memory,
    Cpu,
    Pids,
    Io,
}

impl Controller {
    pub(crate) const ALL: [Self; 4] = [Self::Memory, Self::Cpu, Self::Pids, Self::Io];

    /// Its name in the unified hierarchy.
    pub(crate) fn unified(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Cpu => "cpu",
            Self::Pids => "pids",
            Self::Io => "io",
        }
    }

    /// Its name in a hierarchy of the older kind.
    pub(crate) fn older(self) -> &'static str {
        match self {
            Self::Io => "blkio",
            other => other.unified(),
        }
    }
}

/// A kind of hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The unified one.
    Unified,
    /// One of the older kind, with these controllers.
    Older(Vec<Controller>),
}

impl Kind {
    /// Makes a group, and the one that it is in.
    pub(super) fn make(&self, path: &Path) -> io::Result<()> {
        let parent = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        for folder in [parent, path] {
            match fs::create_dir(folder) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => made?,
            }
            if *self == Self::Unified && folder == parent {
                parent.parent().map_or(Ok(()), hand_down)?;
                hand_down(parent)?;
            }
        }
        Ok(())
    }

    /// The files that tell the limits.
    pub(crate) fn files(&self) -> Vec<&'static str> {
        let of = |one: &Controller| -> &[&str] {
            match one {
                Controller::Memory => &["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"],
                Controller::Cpu => &["cpu.cfs_quota_us", "cpu.cfs_period_us"],
                Controller::Pids => &["pids.max"],
                Controller::Io => &[
                    "blkio.throttle.read_bps_device",
                    "blkio.throttle.write_bps_device",
                    "blkio.throttle.read_iops_device",
                    "blkio.throttle.write_iops_device",
                ],
            }
        };
        match self {
            Self::Unified => vec!["memory.max", "memory.swap.max", "cpu.max", "pids.max", "io.max"],
            Self::Older(controllers) => controllers.iter().flat_map(of).copied().collect(),
        }
    }

    /// Whether a line of /proc/PID/cgroup is about this hierarchy, and the group that it names.
    pub(crate) fn group<'a>(&self, line: &'a str) -> Option<&'a str> {
        let (number, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let matches = match self {
            Self::Unified => number == "0" && controllers.is_empty(),
            Self::Older(ours) => controllers.split(',').any(|one| ours.iter().any(|ours| ours.older() == one)),
        };
        matches.then_some(path)
    }

    /// The files that take the limits, and what to write to them.
    pub(super) fn settings(&self, bounds: &Bounds) -> Vec<(String, String)> {
        match self {
            Self::Unified => unified(bounds),
            Self::Older(controllers) => controllers.iter().flat_map(|one| older(*one, bounds)).collect(),
        }
    }
}

/// Lets the groups below one have its controllers. Those that it cannot hand down it does not: who looks at a limit is told.
fn hand_down(group: &Path) -> io::Result<()> {
    let read = |name| fs::read_to_string(group.join(name));
    let (has, gives) = (read("cgroup.controllers")?, read(BELOW)?);
    for controller in Controller::ALL.map(Controller::unified) {
        let names = |text: &str| text.split_ascii_whitespace().any(|word| word == controller);
        if names(&has) && !names(&gives) {
            // A group with processes of its own may not (EBUSY).
            _ = fs::write(group.join(BELOW), format!("+{controller}"));
        }
    }
    Ok(())
}

fn number(value: Option<u64>) -> String {
    value.map_or_else(|| "max".to_owned(), |value| value.to_string())
}

fn unified(bounds: &Bounds) -> Vec<(String, String)> {
    let mut settings = vec![
        ("memory.max".to_owned(), number(bounds.memory)),
        ("memory.swap.max".to_owned(), number(bounds.memory)),
        ("cpu.max".to_owned(), format!("{} {CPU_PERIOD_US}", number(bounds.cpu_us))),
        ("pids.max".to_owned(), number(bounds.threads.map(u64::from))),
    ];
    for io in &bounds.io {
        let values = [("rbps", io.read_bps), ("wbps", io.write_bps), ("riops", io.read_iops), ("wiops", io.write_iops)];
        let values: Vec<_> = values.iter().map(|(key, value)| format!("{key}={}", number(*value))).collect();
        settings.push(("io.max".to_owned(), format!("{} {}", io.device, values.join(" "))));
    }
    settings
}

fn older(controller: Controller, bounds: &Bounds) -> Vec<(String, String)> {
    // No limit is -1 there, and 0 for a disk.
    let number = |value: Option<u64>| value.map_or_else(|| "-1".to_owned(), |value| value.to_string());
    let named = |name: &str, value: String| (name.to_owned(), value);
    match controller {
        Controller::Memory => {
            let both = bounds.memory.map(|memory| memory.saturating_mul(2));
            // In this order, since the second is never below the first.
            vec![
                named("memory.limit_in_bytes", number(bounds.memory)),
                named("memory.memsw.limit_in_bytes", number(both)),
            ]
        }
        Controller::Cpu => vec![
            named("cpu.cfs_period_us", CPU_PERIOD_US.to_string()),
            named("cpu.cfs_quota_us", number(bounds.cpu_us)),
        ],
        Controller::Pids => vec![named("pids.max", super::hierarchy::number(bounds.threads.map(u64::from)))],
        Controller::Io => bounds
            .io
            .iter()
            .flat_map(|io| {
                let values = [
                    ("read_bps", io.read_bps),
                    ("write_bps", io.write_bps),
                    ("read_iops", io.read_iops),
                    ("write_iops", io.write_iops),
                ];
                values.map(|(key, value)| {
                    (format!("blkio.throttle.{key}_device"), format!("{} {}", io.device, value.unwrap_or(0)))
                })
            })
            .collect(),
    }
}

/// Whether a folder is in the unified hierarchy.
pub(crate) fn is_unified(folder: impl AsFd) -> io::Result<bool> {
    Ok(fstatfs(folder)?.f_type == UNIFIED_MAGIC)
}

/// The groups in which this process may make others, one for each hierarchy that limits something.
pub(super) fn places() -> Result<Vec<(Kind, PathBuf)>, JailError> {
    let privileged = is_privileged().map_err(step("read this process's capabilities"))?;
    let mounted = mounted()?;
    let mut missing = Controller::ALL.to_vec();
    let mut places = Vec::new();
    if let Some(root) = mounted.iter().find_map(|(kind, path)| (*kind == Kind::Unified).then_some(path)) {
        let base = if privileged { Some(root.clone()) } else { given(root)? };
        if let Some(base) = base {
            let has = fs::read_to_string(base.join("cgroup.controllers")).unwrap_or_default();
            let before = missing.len();
            missing.retain(|one| !has.split_ascii_whitespace().any(|word| word == one.unified()));
            if missing.len() < before {
                places.push((Kind::Unified, base));
            }
        }
    }
    // Nobody but root is given groups of the older kind.
    for (kind, path) in mounted.into_iter().filter(|_| privileged) {
        let Kind::Older(mut controllers) = kind else { continue };
        controllers.retain(|one| missing.contains(one));
        if !controllers.is_empty() {
            places.push((Kind::Older(controllers), path));
        }
    }
    Ok(places)
}

/// The hierarchies and where they are mounted.
pub(crate) fn mounted() -> Result<Vec<(Kind, PathBuf)>, JailError> {
    if statfs(USUAL_PLACE).is_ok_and(|place| place.f_type == UNIFIED_MAGIC) {
        return Ok(vec![(Kind::Unified, PathBuf::from(USUAL_PLACE))]);
    }
    let table = fs::read_to_string("/proc/self/mountinfo").map_err(step("read the table of mounts"))?;
    Ok(table.lines().filter_map(hierarchy).collect())
}

/// The hierarchy that a line of the table of mounts is about (proc_pid_mountinfo(5)).
pub(crate) fn hierarchy(line: &str) -> Option<(Kind, PathBuf)> {
    let (mount, file_system) = line.split_once(" - ")?;
    let path = PathBuf::from(mount.split(' ').nth(4)?);
    let mut words = file_system.split(' ');
    match words.next()? {
        "cgroup2" => Some((Kind::Unified, path)),
        "cgroup" => {
            let options: Vec<&str> = words.nth(1)?.split(',').collect();
            let has = |one: &Controller| options.contains(&one.older());
            let controllers: Vec<Controller> = Controller::ALL.into_iter().filter(has).collect();
            (!controllers.is_empty()).then_some((Kind::Older(controllers), path))
        }
        _ => None,
    }
}

/// The topmost group above this process that it was given.
fn given(root: &Path) -> Result<Option<PathBuf>, JailError> {
    let text = fs::read_to_string("/proc/self/cgroup").map_err(step("read this process's cgroup"))?;
    let Some(own) = text.lines().find_map(|line| line.strip_prefix("0::/")) else { return Ok(None) };
    let may = |path: &Path| accessat(CWD, path, Access::WRITE_OK, AtFlags::EACCESS).is_ok();
    let own = root.join(own);
    let above = own.ancestors().take_while(|path| path.starts_with(root));
    // To move a process one has to be allowed to in all that is between.
    let given = above.take_while(|path| may(&path.join("cgroup.procs")) && may(path));
    Ok(given.last().map(Path::to_owned))
}

#[cfg(test)]
mod tests {
    use super::super::IoBound;
    use super::*;

    #[test]
    fn hierarchies_are_found_in_the_table_of_mounts() {
        let older = "36 24 0:31 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct";
        assert_eq!(hierarchy(older), Some((Kind::Older(vec![Controller::Cpu]), "/sys/fs/cgroup/cpu".into())));
        let disks = "36 24 0:31 / /c/blkio rw - cgroup cgroup rw,blkio";
        assert_eq!(hierarchy(disks), Some((Kind::Older(vec![Controller::Io]), "/c/blkio".into())));
        let unified = "30 24 0:26 / /sys/fs/cgroup/unified rw,nosuid shared:4 - cgroup2 cgroup2 rw";
        assert_eq!(hierarchy(unified), Some((Kind::Unified, "/sys/fs/cgroup/unified".into())));
        for other in
            ["36 24 0:31 / /c/systemd rw - cgroup cgroup rw,name=systemd", "30 24 0:26 / / rw - ext4 /dev/a rw", ""]
        {
            assert_eq!(hierarchy(other), None);
        }
    }

    #[test]
    fn limits_are_told_in_the_words_of_each_kind() {
        let io = vec![IoBound { device: "8:0".into(), read_bps: Some(1), ..IoBound::default() }];
        let bounds = Bounds { memory: Some(100), cpu_us: None, threads: Some(7), io };
        let told = |kind: Kind| {
            let settings = kind.settings(&bounds).into_iter();
            settings.map(|(file, value)| format!("{file}={value}")).collect::<Vec<_>>()
        };
        let unified = ["memory.max=100", "memory.swap.max=100", "cpu.max=max 100000", "pids.max=7"];
        let mut expected: Vec<String> = unified.map(str::to_owned).to_vec();
        expected.push("io.max=8:0 rbps=1 wbps=max riops=max wiops=max".to_owned());
        assert_eq!(told(Kind::Unified), expected);
        let memory = told(Kind::Older(vec![Controller::Memory, Controller::Pids]));
        assert_eq!(memory, ["memory.limit_in_bytes=100", "memory.memsw.limit_in_bytes=200", "pids.max=7"]);
        let rest = told(Kind::Older(vec![Controller::Cpu, Controller::Io]));
        assert_eq!(
            rest[..3],
            ["cpu.cfs_period_us=100000", "cpu.cfs_quota_us=-1", "blkio.throttle.read_bps_device=8:0 1"]
        );
    }
}
