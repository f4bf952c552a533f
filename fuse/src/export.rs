//! What is exported, and how names below it are resolved and opened.

use std::ffi::CString;
use std::sync::Arc;
use std::time::Duration;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Statx, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::path::DecInt;
use thiserror::Error;

use crate::node::{Node, file_type, stat};
use crate::owner::Ownership;
use crate::quota::{Account, Quota};
use crate::wire::Name;

/// What a procfs says that it is (`PROC_SUPER_MAGIC`).
const PROCFS: i64 = 0x9fa0;
/// A name is one component; that it is resolved as one does not depend on that check alone.
const RESOLVE: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_XDEV);

/// What the guest may keep of what it was told, when others can change it meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// Nothing: every access comes to the host.
    Never,
    /// Names and attributes for a second; data until the file is opened again or seen to have changed.
    Auto,
    /// Everything: for exports that nobody else changes.
    Always,
}

impl Cache {
    /// For how long names and attributes are good.
    pub fn valid(self) -> Duration {
        match self {
            Self::Never => Duration::ZERO,
            Self::Auto => Duration::from_secs(1),
            Self::Always => Duration::from_secs(24 * 3600),
        }
    }
}

/// The most ranges of files that are locked. Programs that lock parts of files have a few at a time.
const LOCK_RANGES: usize = 1 << 14;

/// How much the guest may hold. Each inode and each handle is a descriptor of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Inodes that it holds: that it knows of, or has open or locked without knowing of them any more.
    pub inodes: usize,
    /// Files and directories that it has open.
    pub handles: usize,
    /// Open files that hold POSIX locks: one for each process and file.
    pub lock_owners: usize,
    /// Ranges of files that are locked. Each is memory of the host's kernel that is charged to nobody.
    pub lock_ranges: usize,
    /// Programs that wait for a lock at the same time, each with a thread of this process.
    pub lock_waiters: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { inodes: 1 << 16, handles: 1 << 12, lock_owners: 1 << 10, lock_ranges: LOCK_RANGES, lock_waiters: 64 }
    }
}

/// What is shown to the guest.
#[derive(Debug)]
pub enum Source {
    /// A directory, with everything below it on the same mount. An `O_PATH` descriptor will do.
    Directory(OwnedFd),
    /// One file, under this name, in a directory that has nothing else.
    File {
        /// The file. An `O_PATH` descriptor will do.
        file: OwnedFd,
        /// The name that the guest sees.
        name: CString,
    },
}

/// How it is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Whether everything that changes something is refused.
    pub read_only: bool,
    /// Whether no file is executable.
    pub noexec: bool,
    /// What the guest may keep.
    pub cache: Cache,
    /// Whether locks hold for everybody who uses the files, or among the guest's own programs only.
    pub shared_locks: bool,
    /// Whether there are extended attributes (those of `user.`).
    pub xattrs: bool,
    /// Whose files they are.
    pub ownership: Ownership,
    /// How much may be added.
    pub quota: Quota,
    /// How much the guest may hold.
    pub limits: Limits,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            read_only: false,
            noexec: false,
            cache: Cache::Auto,
            shared_locks: true,
            xattrs: false,
            ownership: Ownership::Squash { uid: 0, gid: 0 },
            quota: Quota::default(),
            limits: Limits::default(),
        }
    }
}

/// Why something cannot be exported.
#[derive(Debug, Error)]
pub enum ExportError {
    /// The system refused a step.
    #[error("cannot {step}")]
    System {
        /// What was tried.
        step: &'static str,
        /// What the system says.
        #[source]
        source: Errno,
    },
    /// What was given is of another type.
    #[error("what is exported is no {expected}, but a {actual:?}")]
    Type {
        /// What it should be.
        expected: &'static str,
        /// What it is.
        actual: FileType,
    },
    /// A file is shown under a name that no file can have.
    #[error("a file cannot be shown as {name:?}: give a name without '/'")]
    Name {
        /// The name.
        name: CString,
    },
    /// What `/proc/self/fd` should be is something else.
    #[error("/proc/self/fd is not part of a procfs: mount one at /proc")]
    NotProcfs,
}

fn system(step: &'static str) -> impl FnOnce(Errno) -> ExportError {
    move |source| ExportError::System { step, source }
}

/// Opens `/proc/self/fd`, in the process that will serve.
///
/// # Errors
/// What the system says.
pub fn descriptors() -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, c"/proc/self/fd", flags, Mode::empty())
}

/// The root of an export.
#[derive(Debug)]
pub enum Root {
    /// A directory of the host.
    Directory(Arc<Node>),
    /// A directory that exists nowhere, with one file in it.
    Shown {
        /// The file.
        file: Arc<Node>,
        /// Its name.
        name: CString,
    },
}

/// What is exported.
#[derive(Debug)]
pub struct Export {
    /// Its root.
    pub root: Root,
    /// How it is shown.
    pub options: Options,
    /// What the guest has added, if that is limited.
    pub account: Option<Arc<Account>>,
    /// `/proc/self/fd`, by which an inode that is held is opened.
    descriptors: OwnedFd,
}

impl Export {
    /// Exports a directory or a file. `descriptors` is the serving process's `/proc/self/fd`, as [`descriptors`] opens it.
    ///
    /// # Errors
    /// [`ExportError`].
    pub fn new(source: Source, options: Options, descriptors: OwnedFd) -> Result<Self, ExportError> {
        let node = |fd: OwnedFd, wanted: FileType, expected| {
            let stat = stat(&fd).map_err(system("look at what is exported"))?;
            match file_type(&stat) {
                actual if actual == wanted => Ok(Arc::new(Node::new(fd, &stat))),
                actual => Err(ExportError::Type { expected, actual }),
            }
        };
        let root = match source {
            Source::Directory(fd) => Root::Directory(node(fd, FileType::Directory, "directory")?),
            Source::File { name, .. } if Name::new(&name).is_err() => return Err(ExportError::Name { name }),
            Source::File { file, name } => {
                Root::Shown { file: node(file, FileType::RegularFile, "regular file")?, name }
            }
        };
        let kind = rustix::fs::fstatfs(&descriptors).map_err(system("look at /proc/self/fd"))?.f_type;
        if kind != PROCFS {
            return Err(ExportError::NotProcfs);
        }
        let account = (options.quota != Quota::default()).then(|| Arc::new(Account::new(options.quota)));
        Ok(Self { root, options, account, descriptors })
    }

    /// Finds an entry of a directory. A symbolic link is found, not followed.
    ///
    /// # Errors
    /// What the system says; `EXDEV` where something is mounted.
    pub fn find(&self, directory: &Node, name: Name<'_>) -> Result<(Node, Statx), Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat2(directory, name.get(), flags, Mode::empty(), RESOLVE)?;
        let stat = stat(&fd)?;
        Ok((Node::new(fd, &stat), stat))
    }

    /// Looks at an entry of a directory without holding it: at a symbolic link, not at where it leads. Nothing where something is
    /// mounted, or would be, or where the system does not tell.
    ///
    /// What was looked at may be another inode by the time that the name is resolved again. It is of use only where it is known
    /// already, and then it is in the export as surely as the directory is.
    ///
    /// # Errors
    /// `ENOENT` when there is nothing of that name.
    pub fn look(&self, directory: &Node, name: Name<'_>) -> Result<Option<Statx>, Errno> {
        // One component, so that nothing but a mount leads out of the directory.
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let stat = match rustix::fs::statx(directory, name.get(), flags, StatxFlags::BASIC_STATS) {
            Err(Errno::NOENT) => return Err(Errno::NOENT),
            stat => stat.ok(),
        };
        let mounts = StatxAttributes::MOUNT_ROOT | StatxAttributes::AUTOMOUNT;
        Ok(stat.filter(|stat| {
            stat.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT) && !stat.stx_attributes.intersects(mounts)
        }))
    }

    /// Creates a file that was not there, and opens it.
    ///
    /// # Errors
    /// What the system says; `EEXIST` when there is anything of that name.
    pub fn create(&self, directory: &Node, name: Name<'_>, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat2(directory, name.get(), flags, mode, RESOLVE)
    }

    /// Opens the data of a file or a directory; nothing else is ever opened, since that can wait or act.
    ///
    /// # Errors
    /// What the system says; `ENXIO` for other types.
    pub fn open(&self, node: &Node, flags: OFlags) -> Result<OwnedFd, Errno> {
        match node.file_type() {
            FileType::RegularFile | FileType::Directory => self.reopen(node, flags),
            _ => Err(Errno::NXIO),
        }
    }

    /// Holds what an open file is, without a right to its data.
    ///
    /// # Errors
    /// What the system says.
    pub fn hold(&self, file: impl AsFd) -> Result<(Node, Statx), Errno> {
        let fd = self.reopen(file, OFlags::PATH)?;
        let stat = stat(&fd)?;
        Ok((Node::new(fd, &stat), stat))
    }

    /// What the system has as the path of something that is open.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn path(&self, file: impl AsFd) -> Result<Vec<u8>, Errno> {
        rustix::fs::readlinkat(&self.descriptors, DecInt::from_fd(file), Vec::new()).map(CString::into_bytes)
    }

    fn reopen(&self, file: impl AsFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        // The link of procfs leads to the very inode, whatever has become of its names. It is held by a descriptor of ours,
        // which stays open meanwhile.
        let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        rustix::fs::openat(&self.descriptors, DecInt::from_fd(file), flags, Mode::empty())
    }

    /// Calls `act` with a directory and a name in it that lead to an inode, for calls that take nothing else.
    ///
    /// # Errors
    /// What `act` says.
    pub fn by_link<T>(&self, node: &Node, act: impl FnOnce(&OwnedFd, DecInt) -> Result<T, Errno>) -> Result<T, Errno> {
        act(&self.descriptors, DecInt::from_fd(node))
    }
}
