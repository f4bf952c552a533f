//! The cgroup of a monitor: limits on what it takes of the host's memory, CPU time, threads and disks, made by whoever starts
//! it, and in force from the monitor's first moment on.
//!
//! Each limit is in the hierarchy that has its controller ([`hierarchy`]): the unified one (cgroup v2), one of the older kind
//! (v1), or some here and some there. In each of them the group is `cofferdam/NAME`: below the root where the caller is
//! root, else below the topmost group that was given to the caller. Where a caller was given none, as an ordinary user without
//! systemd's delegation, there is no group; that is no failure, since the limits of [`crate::limits`] hold all the same, and
//! who looks at the jail is told.
//!
//! A group is known by its paths, which are written down before it is made, so that it can be removed whatever happens.

pub(crate) mod hierarchy;
mod removal;

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};

use crate::error::JailError;
use hierarchy::{Kind, is_unified};

pub use removal::{clear, is_inhabited, remove, remove_by};

/// What all groups of monitors are in.
const PARENT: &str = "cofferdam";
/// The length in microseconds of the period that CPU time is counted in.
pub const CPU_PERIOD_US: u64 = 100_000;

/// The monitor's memory beside its guest's, in bytes: its own, what is buffered for clients, the kernel's for both, and pages of
/// the image that it is the first to read.
const MEMORY_OVERHEAD: u64 = 128 << 20;
/// The kernel's tables for guest memory, as a part of that.
const MEMORY_TABLES: u64 = 64;
/// What the kernel takes for an inode that is held: itself, its name and the descriptor.
const MEMORY_INODE: u64 = 2 << 10;
/// Threads beside those of the vCPUs: the event loop, the API, the one that makes memory present, and KVM's own.
const OTHER_THREADS: u32 = 16;

/// How much a group may use. What is `None` is not limited.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bounds {
    /// Bytes of memory; as much again may be swapped out.
    pub memory: Option<u64>,
    /// Microseconds of CPU time in each [`CPU_PERIOD_US`].
    pub cpu_us: Option<u64>,
    /// Threads.
    pub threads: Option<u32>,
    /// Disks.
    pub io: Vec<IoBound>,
}

/// How much a group may read of and write to a disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IoBound {
    /// The disk's numbers, as `MAJOR:MINOR`.
    pub device: String,
    /// Bytes read in a second.
    pub read_bps: Option<u64>,
    /// Bytes written in a second.
    pub write_bps: Option<u64>,
    /// Reads in a second.
    pub read_iops: Option<u64>,
    /// Writes in a second.
    pub write_iops: Option<u64>,
}

impl Bounds {
    /// What the monitor of a VM of this size needs: the guest's memory and a part more; its vCPUs and one CPU for the other
    /// threads.
    pub fn new(vcpus: u8, memory_mib: u32) -> Self {
        let guest = u64::from(memory_mib) << 20;
        Self {
            memory: Some(guest + guest / MEMORY_TABLES + MEMORY_OVERHEAD),
            cpu_us: Some((u64::from(vcpus) + 1) * CPU_PERIOD_US),
            threads: Some(u32::from(vcpus) + OTHER_THREADS),
            io: Vec::new(),
        }
    }

    /// With what it takes to serve files: so many more threads, and the kernel's memory for so many inodes that are held.
    #[must_use]
    pub fn serving(self, threads: u32, inodes: u64) -> Self {
        Self {
            memory: self.memory.map(|memory| memory.saturating_add(inodes.saturating_mul(MEMORY_INODE))),
            threads: self.threads.map(|most| most.saturating_add(threads)),
            ..self
        }
    }
}

/// Where a group is to be.
#[derive(Debug)]
pub struct Plan {
    places: Vec<(Kind, PathBuf)>,
}

impl Plan {
    /// A group of this name, wherever this process may make one.
    ///
    /// # Errors
    /// [`JailError`]: the kernel does not tell what there is.
    pub fn new(name: &str) -> Result<Self, JailError> {
        let places = hierarchy::places()?.into_iter();
        Ok(Self { places: places.map(|(kind, base)| (kind, base.join(PARENT).join(name))).collect() })
    }

    /// Removes groups beside this one that are named after processes which are no more: `PREFIX` and a process id.
    pub fn sweep(&self, prefix: &str) {
        let parents = self.places.iter().filter_map(|(_, path)| path.parent());
        for entry in parents.filter_map(|parent| fs::read_dir(parent).ok()).flatten().flatten() {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|name| name.strip_prefix(prefix)).and_then(|pid| pid.parse().ok());
            if let Some(pid) = pid.and_then(Pid::from_raw)
                && test_kill_process(pid) == Err(Errno::SRCH)
            {
                // One with processes in it is not removed.
                _ = fs::remove_dir(entry.path());
            }
        }
    }

    /// Its folders, one for each hierarchy; none where there is none to be had.
    pub fn folders(&self) -> Vec<PathBuf> {
        self.places.iter().map(|(_, path)| path.clone()).collect()
    }

    /// Makes the group, with limits, or gives one that is there these limits. Where the kernel does not let this process, there
    /// is less of it.
    ///
    /// # Errors
    /// [`JailError::Path`]: the system is out of something, or refuses a number.
    pub fn make(&self, bounds: &Bounds) -> Result<Group, JailError> {
        for (kind, path) in &self.places {
            let failed = |source| JailError::Path { step: "make the cgroup", path: path.clone(), source };
            if allowed(kind.make(path)).map_err(failed)?.is_some() {
                for (file, value) in kind.settings(bounds) {
                    set(&path.join(&file), &value)?;
                }
            }
        }
        Group::open(&self.folders())
    }
}

/// Writes a limit. One whose controller the group does not have is not there, and is not in force.
fn set(path: &Path, value: &str) -> Result<(), JailError> {
    let failed = |source| JailError::Path { step: "set the limit", path: path.to_owned(), source };
    let file = match OpenOptions::new().write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file.map_err(failed)?,
    };
    (&file).write_all(value.as_bytes()).map_err(failed)
}

/// What a process without the right to it does without.
fn allowed<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    use io::ErrorKind::{NotFound, PermissionDenied, ReadOnlyFilesystem};
    match result {
        Err(error) if matches!(error.kind(), NotFound | PermissionDenied | ReadOnlyFilesystem) => Ok(None),
        result => result.map(Some),
    }
}

/// A group that processes can be born into.
#[derive(Debug, Default)]
pub struct Group {
    unified: Option<OwnedFd>,
    procs: Vec<OwnedFd>,
}

impl Group {
    /// The group with these folders, as far as they are there and can be used.
    ///
    /// # Errors
    /// [`JailError::Path`]: the system is out of something.
    pub fn open(folders: &[PathBuf]) -> Result<Self, JailError> {
        let mut group = Self::default();
        for path in folders {
            let failed = |source| JailError::Path { step: "open the cgroup", path: path.clone(), source };
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let folder = open(path, flags, Mode::empty()).map_err(io::Error::from);
            let Some(folder) = allowed(folder).map_err(failed)? else { continue };
            if is_unified(&folder).map_err(failed)? {
                group.unified = Some(folder);
            } else {
                let procs = OpenOptions::new().write(true).open(path.join("cgroup.procs"));
                group.procs.extend(allowed(procs).map_err(failed)?.map(OwnedFd::from));
            }
        }
        Ok(group)
    }

    /// Its folder in the unified hierarchy.
    pub(crate) fn unified(&self) -> Option<BorrowedFd<'_>> {
        self.unified.as_ref().map(OwnedFd::as_fd)
    }

    /// What moves a process into it in the others.
    pub(crate) fn procs(&self) -> &[OwnedFd] {
        &self.procs
    }
}
