//! File system devices.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;

use api::config::{CachePolicy, FilesystemConfig, LOCK_OWNERS, LOCK_WAITERS, LockScope, OwnershipConfig};
use devices::fs::Fs;
use fuse::{Cache, Export, Limits, Options, Ownership, Quota, Server, Source};
use rustix::fs::{FileType, Stat};
use rustix::process::{Resource, getrlimit};

use super::limits::limiter;

/// The queues of requests. A device is served by one thread, so that more would only be more to look at.
const REQUEST_QUEUES: usize = 1;
/// Descriptors that are not the file systems' to use: devices, clients, containers' streams.
const RESERVED: u64 = 1024;
/// What a guest may hold of each kind at least, however few descriptors there are.
const LEAST: u64 = 64;

/// Makes the device of a file system.
///
/// # Errors
/// When the system has no descriptor left.
pub(super) fn attach(config: &FilesystemConfig, export: Export) -> io::Result<Fs> {
    let server = Server::new(export)?;
    Fs::new(server, &config.tag, REQUEST_QUEUES, limiter(config.limits)?).map_err(io::Error::other)
}

/// How a file system is shown.
pub(crate) fn options(config: &FilesystemConfig, limits: Limits) -> Options {
    Options {
        read_only: config.read_only,
        noexec: config.noexec,
        cache: match config.cache {
            CachePolicy::Never => Cache::Never,
            CachePolicy::Auto => Cache::Auto,
            CachePolicy::Always => Cache::Always,
        },
        shared_locks: config.locks == LockScope::Shared,
        xattrs: config.xattrs,
        ownership: match config.ownership {
            OwnershipConfig::Squash { uid, gid } => Ownership::Squash { uid, gid },
            OwnershipConfig::Mapped => Ownership::Mapped,
        },
        quota: Quota { bytes: config.quota.bytes, inodes: config.quota.inodes },
        limits,
    }
}

/// What the guest may hold of each file system, in their order: what the configuration says, or less where this process may not
/// have as many descriptors.
pub(crate) fn limits(filesystems: &[FilesystemConfig]) -> Vec<Limits> {
    limits_of(filesystems, getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX))
}

fn limits_of(filesystems: &[FilesystemConfig], descriptors: u64) -> Vec<Limits> {
    let wanted: u128 = filesystems.iter().map(|config| u128::from(config.descriptors())).sum();
    let left = u128::from(descriptors.saturating_sub(RESERVED)).min(wanted);
    let part = |number: u64| {
        let share = u64::try_from(u128::from(number) * left / wanted.max(1)).unwrap_or(number);
        usize::try_from(share.max(LEAST.min(number))).unwrap_or(usize::MAX)
    };
    let limits = |config: &FilesystemConfig| Limits {
        inodes: part(config.inodes()),
        handles: part(config.handles()),
        lock_owners: part(LOCK_OWNERS),
        lock_ranges: Limits::default().lock_ranges,
        lock_waiters: usize::try_from(LOCK_WAITERS).unwrap_or(usize::MAX),
    };
    filesystems.iter().map(limits).collect()
}

/// What `tree` leads to.
pub(crate) fn source(config: &FilesystemConfig, tree: OwnedFd, stat: &Stat) -> Source {
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        return Source::Directory(tree);
    }
    // What is neither is refused where it is exported, and so is a path that names nothing.
    let name = config.name.as_deref().map(OsStr::new).or(config.path.file_name()).unwrap_or_default();
    Source::File { file: tree, name: CString::new(name.as_bytes()).unwrap_or_default() }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rustix::fs::{CWD, Mode, OFlags, fstat, openat};

    use super::*;

    fn config(path: &Path, more: &str) -> FilesystemConfig {
        let config = format!(
            r#"{{"vm":{{"kernel":"/k","memory_mib":128,"filesystems":[{{"tag":"t","path":{path:?}{more}}}]}}}}"#
        );
        api::config::LaunchConfig::parse(config.as_bytes()).unwrap().vm.filesystems.remove(0)
    }

    #[test]
    fn guests_share_the_descriptors_that_there_are() {
        let one = config(Path::new("/"), "");
        let small = config(Path::new("/"), r#","max_inodes":10,"max_handles":20"#);
        let held = limits_of(&[one.clone(), small.clone()], u64::MAX);
        assert_eq!((held[0].inodes, held[0].handles, held[1].inodes, held[1].handles), (1 << 17, 1 << 14, 10, 20));
        let few = limits_of(&[one.clone(), small], 1024);
        assert_eq!((few[0].inodes, few[0].handles, few[1].inodes), (64, 64, 10));
        for count in [1, 4, 16] {
            let held = limits_of(&vec![one.clone(); count], 100_000);
            let sum: usize = held.iter().map(|held| held.inodes + held.handles + held.lock_owners).sum();
            assert!((90_000..=100_000).contains(&sum), "{held:?}");
        }
    }

    #[test]
    fn what_is_exported_is_told_by_what_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("hosts");
        std::fs::write(&file, "").unwrap();
        let source_of = |path: &Path, more: &str| {
            let tree = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
            let stat = fstat(&tree).unwrap();
            source(&config(path, more), tree, &stat)
        };
        assert!(matches!(source_of(folder.path(), ""), Source::Directory(_)));
        let Source::File { name, .. } = source_of(&file, "") else { panic!("it is a file") };
        assert_eq!(&*name, c"hosts");
        let Source::File { name, .. } = source_of(&file, r#","name":"other""#) else { panic!("it is a file") };
        assert_eq!(&*name, c"other");
    }
}
