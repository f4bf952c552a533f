//! The container's root file system: the image's EROFS below, a tmpfs that takes writes above, an overlay of the two
//! in place of `/`.
//!
//! A read-only root is the same overlay with a read-only mount: an image need not have the mount points and the files
//! that a container is given, and the top layer is where they are made before the root is closed for writing.

use std::os::fd::{AsFd, OwnedFd};

use protocol::container::{ContainerSpec, File};
use rustix::fs::{self, Mode, OFlags};
use rustix::io;
use rustix::mount::{MountAttrFlags, UnmountFlags, unmount};
use rustix::process::{chdir, fchdir, pivot_root};

use super::error::{InStep, SetupError};
use super::filesystem::{attach, create};
use super::mounts;
use super::root::Root;

/// Empty directories of the agent's own file system that every container mounts on, each in its own mount namespace.
const IMAGE: &str = "/run/image";
const SCRATCH: &str = "/run/scratch";
const ROOT: &str = "/run/root";

/// Makes the directories that containers mount on. Once, when the agent starts.
///
/// # Errors
/// What mkdir(2) says.
pub fn make_mount_points() -> Result<(), io::Errno> {
    [IMAGE, SCRATCH, ROOT].into_iter().try_for_each(|path| fs::mkdir(path, Mode::from_raw_mode(0o700)))
}

/// A root that is mounted but not entered yet.
#[derive(Debug)]
pub struct Rootfs {
    root: OwnedFd,
    /// Mounts of the request's files.
    pub files: Vec<OwnedFd>,
}

/// Mounts the root file system in the caller's mount namespace, which must be the container's.
///
/// # Errors
/// The step that the kernel refused.
pub fn mount(spec: &ContainerSpec) -> Result<Rootfs, SetupError> {
    let device = &spec.rootfs.device;
    let image = create("erofs", device, &[("ro", "")], MountAttrFlags::MOUNT_ATTR_RDONLY)
        .map_err(|error| SetupError::Image { device: device.clone(), source: error.into() })?;
    attach(&image, &place(IMAGE)?).in_step("mount the image")?;
    let scratch = create("tmpfs", "tmpfs", &[("mode", "700"), ("size", "50%")], MountAttrFlags::empty())
        .in_step("create a tmpfs for the container's writes")?;
    attach(&scratch, &place(SCRATCH)?).in_step("mount the tmpfs for the container's writes")?;
    let files = write_files(&scratch, &spec.files, spec.rootfs.read_only)?;
    // The overlay's root directory takes owner and mode from the upper one.
    let status = fs::fstat(&image).in_step("look at the image's root directory")?;
    for name in ["upper", "work"] {
        fs::mkdirat(&scratch, name, Mode::from_raw_mode(status.st_mode & 0o7777))
            .in_step("make a directory of the overlay")?;
    }
    if (status.st_uid, status.st_gid) != (0, 0) {
        let (user, group) = (fs::Uid::from_raw(status.st_uid), fs::Gid::from_raw(status.st_gid));
        fs::chownat(&scratch, "upper", Some(user), Some(group), fs::AtFlags::empty())
            .in_step("give the overlay's root directory its owner")?;
    }
    let options = [("lowerdir", IMAGE), ("upperdir", "/run/scratch/upper"), ("workdir", "/run/scratch/work")];
    let root = create("overlay", "overlay", &options, MountAttrFlags::empty()).in_step("create the root's overlay")?;
    attach(&root, &place(ROOT)?).in_step("mount the root's overlay")?;
    Ok(Rootfs { root, files })
}

fn write_files(scratch: &OwnedFd, files: &[File], read_only: bool) -> Result<Vec<OwnedFd>, SetupError> {
    if files.is_empty() {
        return Ok(Vec::new());
    }
    fs::mkdirat(scratch, "files", Mode::from_raw_mode(0o700)).in_step("make a directory for files")?;
    let directory = fs::openat(scratch, "files", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .in_step("open the directory for files")?;
    mounts::write_files(&directory, files, read_only)
}

impl Rootfs {
    /// Makes it the root of the mount namespace and lets go of everything else that was mounted there.
    ///
    /// # Errors
    /// The step that the kernel refused.
    pub fn enter(&self) -> Result<Root, SetupError> {
        fchdir(&self.root).in_step("enter the root directory")?;
        // With both arguments the same, the old root ends up on top of the new one, and is the one unmounted.
        pivot_root(".", ".").in_step("change the root directory")?;
        unmount(".", UnmountFlags::DETACH).in_step("let go of the agent's root directory")?;
        chdir("/").in_step("enter the root directory")?;
        Root::of_process().in_step("open the root directory")
    }
}

fn place(path: &str) -> Result<OwnedFd, SetupError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    fs::open(path, flags, Mode::empty()).in_step("open one of the agent's mount points")
}

/// Closes the root for writing.
///
/// # Errors
/// What mount_setattr(2) says.
pub fn make_read_only(root: &impl AsFd) -> Result<(), SetupError> {
    crate::sys::set_mount_attributes(root, libc::MOUNT_ATTR_RDONLY, false).in_step("make the root read-only")
}
