//! What a container finds mounted in its root: the OCI runtime specification's "Linux: Default Filesystems" and
//! "Default Devices" with the options that docker and podman use, then the mounts and files of the request, then masked
//! and read-only paths.

use std::os::fd::{AsFd, OwnedFd};

use protocol::container::{ContainerSpec, File, Mount, MountSource};
use rustix::fs::{self, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use super::error::{InStep, SetupError};
use super::filesystem::{NO_SUID_EXEC_DEV, attach, bind, create};
use super::root::{Missing, Root};
use crate::sys;

/// Character devices of every container: name, major and minor number.
const DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// Symbolic links in `/dev`: target and name.
const DEVICE_LINKS: [(&str, &str); 6] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("/proc/kcore", "core"),
    ("pts/ptmx", "ptmx"),
];

/// Options of a file system, as [`create`] takes them.
type Options<'a> = &'a [(&'a str, &'a str)];

/// What is at `/dev/shm`.
#[derive(Debug)]
pub enum Shm {
    /// A new tmpfs.
    New {
        /// Its size.
        bytes: u64,
    },
    /// A mount of another container's, not attached yet.
    Shared(OwnedFd),
}

/// The kernel's own file systems of a container.
#[derive(Debug)]
pub struct Standard {
    /// The mount of `/proc`.
    pub proc: OwnedFd,
    /// The mount of `/dev`.
    pub dev: OwnedFd,
}

impl Standard {
    /// The two as their descriptors come from the container's set-up, `/dev` first.
    pub fn from_descriptors(descriptors: Vec<OwnedFd>) -> Option<Self> {
        let [dev, proc] = descriptors.try_into().ok()?;
        Some(Self { proc, dev })
    }
}

/// Mounts `/proc`, `/dev` and below, `/sys` and `/sys/fs/cgroup`. Must run in the container's own namespaces.
///
/// # Errors
/// The step that the kernel refused.
pub fn mount_standard(root: &Root, shm: Shm) -> Result<Standard, SetupError> {
    let read_only = NO_SUID_EXEC_DEV | MountAttrFlags::MOUNT_ATTR_RDONLY;
    let proc = create("proc", "proc", &[], NO_SUID_EXEC_DEV).in_step("create a proc file system")?;
    attach_at(root, &proc, "/proc")?;
    let dev = mount_dev(root, shm)?;
    let sys = create("sysfs", "sysfs", &[], read_only).in_step("create a sysfs file system")?;
    attach_at(root, &sys, "/sys")?;
    let cgroup = create("cgroup2", "cgroup", &[], read_only).in_step("create a cgroup2 file system")?;
    let target = inside(&sys, "fs/cgroup").in_step("find /sys/fs/cgroup")?;
    attach(&cgroup, &target).in_step("mount /sys/fs/cgroup")?;
    Ok(Standard { proc, dev })
}

fn mount_dev(root: &Root, shm: Shm) -> Result<OwnedFd, SetupError> {
    let dev = create("tmpfs", "tmpfs", &[("mode", "755"), ("size", "65536k")], MountAttrFlags::MOUNT_ATTR_NOSUID)
        .in_step("create a tmpfs for /dev")?;
    for (name, major, minor) in DEVICES {
        let mode = Mode::from_raw_mode(0o666);
        fs::mknodat(&dev, name, FileType::CharacterDevice, mode, fs::makedev(major, minor))
            .at_path("make the device", name)?;
    }
    for (target, name) in DEVICE_LINKS {
        fs::symlinkat(target, &dev, name).at_path("make the link", name)?;
    }
    attach_at(root, &dev, "/dev")?;
    let no_suid_exec = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let pts_options = [("newinstance", ""), ("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5")];
    let shm = match shm {
        Shm::New { bytes } => {
            create_for("shm", "tmpfs", &[("mode", "1777"), ("size", &bytes.to_string())], NO_SUID_EXEC_DEV)?
        }
        Shm::Shared(mount) => mount,
    };
    let below = [
        ("pts", create_for("pts", "devpts", &pts_options, no_suid_exec)?),
        ("shm", shm),
        ("mqueue", create_for("mqueue", "mqueue", &[], NO_SUID_EXEC_DEV)?),
    ];
    for (name, mount) in below {
        fs::mkdirat(&dev, name, Mode::from_raw_mode(0o755)).at_path("make the directory", name)?;
        let target = inside(&dev, name).at_path("find", name)?;
        attach(&mount, &target).at_path("mount", name)?;
    }
    Ok(dev)
}

fn create_for(name: &str, kind: &str, options: Options<'_>, attributes: MountAttrFlags) -> Result<OwnedFd, SetupError> {
    let source = if kind == "tmpfs" { name } else { kind };
    create(kind, source, options, attributes).at_path("create the file system for", name)
}

/// Mounts what the request asks for besides.
///
/// # Errors
/// The mount that the kernel refused.
pub fn mount_requested(root: &Root, mounts: &[Mount]) -> Result<(), SetupError> {
    for Mount { destination, source: MountSource::Tmpfs { size_bytes, mode, exec, dev, suid }, read_only } in mounts {
        let mode = format!("{:o}", mode & 0o7777);
        let size = size_bytes.map_or_else(|| "50%".to_owned(), |bytes| bytes.to_string());
        let mut attributes = MountAttrFlags::empty();
        attributes.set(MountAttrFlags::MOUNT_ATTR_NOEXEC, !exec);
        attributes.set(MountAttrFlags::MOUNT_ATTR_NODEV, !dev);
        attributes.set(MountAttrFlags::MOUNT_ATTR_NOSUID, !suid);
        attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, *read_only);
        let mount = create("tmpfs", "tmpfs", &[("mode", &mode), ("size", &size)], attributes)
            .at_path("create a tmpfs for", destination)?;
        attach_at(root, &mount, destination)?;
    }
    Ok(())
}

/// Writes the files of the request into `directory`, which must be on a mount of this mount namespace, and gives a
/// mount of each, in order, to be attached with [`attach_files`].
///
/// # Errors
/// The file that could not be written.
pub fn write_files(directory: &OwnedFd, files: &[File], read_only: bool) -> Result<Vec<OwnedFd>, SetupError> {
    let write = |(number, File { path, content, mode }): (usize, &File)| {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = fs::openat(directory, number.to_string(), flags, Mode::from_raw_mode(mode & 0o7777))
            .at_path("create a file for", path)?;
        let mut rest = content.as_slice();
        while !rest.is_empty() {
            let written = rustix::io::write(&file, rest).at_path("write", path)?;
            rest = &rest[written..];
        }
        let mount = bind(&file).at_path("make a mount of", path)?;
        if read_only {
            sys::set_mount_attributes(&mount, libc::MOUNT_ATTR_RDONLY, false).at_path("make read-only", path)?;
        }
        Ok(mount)
    };
    files.iter().enumerate().map(write).collect()
}

/// Attaches the mounts of [`write_files`] to their paths.
///
/// # Errors
/// The path that the kernel refused.
pub fn attach_files(root: &Root, files: &[File], mounts: &[OwnedFd]) -> Result<(), SetupError> {
    for (File { path, .. }, mount) in files.iter().zip(mounts) {
        let target = root.find_or_make(path, Missing::File).at_path("make", path)?;
        attach(mount, &target).at_path("mount", path)?;
    }
    Ok(())
}

/// Makes paths read as empty, and others read-only; those that are not there need nothing.
///
/// # Errors
/// The path that the kernel refused.
pub fn hide_and_protect(root: &Root, dev: &OwnedFd, spec: &ContainerSpec) -> Result<(), SetupError> {
    for path in &spec.readonly_paths {
        let Some(target) = existing(root, path)? else { continue };
        let mount = bind(&target).at_path("make a mount of", path)?;
        sys::set_mount_attributes(&mount, libc::MOUNT_ATTR_RDONLY, true).at_path("make read-only", path)?;
        attach(&mount, &target).at_path("mount", path)?;
    }
    let mut empty_directory: Option<OwnedFd> = None;
    for path in &spec.masked_paths {
        let Some(target) = existing(root, path)? else { continue };
        let is_directory = FileType::from_raw_mode(fs::fstat(&target).at_path("look at", path)?.st_mode).is_dir();
        let mount = match &empty_directory {
            _ if !is_directory => inside(dev, "null").and_then(bind).at_path("make a mount of /dev/null for", path)?,
            Some(attached) => bind(attached).at_path("make an empty directory for", path)?,
            None => {
                let attributes = NO_SUID_EXEC_DEV | MountAttrFlags::MOUNT_ATTR_RDONLY;
                create("tmpfs", "tmpfs", &[("mode", "755")], attributes).at_path("create a tmpfs for", path)?
            }
        };
        attach(&mount, &target).at_path("mask", path)?;
        if is_directory {
            empty_directory.get_or_insert(mount);
        }
    }
    Ok(())
}

fn existing(root: &Root, path: &str) -> Result<Option<OwnedFd>, SetupError> {
    match root.find(path) {
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        result => result.map(Some).at_path("find", path),
    }
}

fn attach_at(root: &Root, mount: &OwnedFd, path: &str) -> Result<(), SetupError> {
    let target = root.find_or_make(path, Missing::Directory).at_path("make", path)?;
    attach(mount, &target).at_path("mount", path)
}

/// Refers to what is at `path` below `directory`, which the agent made or the kernel did: nothing in it is the image's.
fn inside(directory: impl AsFd, path: &str) -> Result<OwnedFd, Errno> {
    fs::openat(directory, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}
