//! File systems and mounts by descriptor (fsopen(2), fsmount(2), open_tree(2), move_mount(2)): what is mounted and
//! where are never paths that the image could bend.

use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

/// What no file system of the container's own `/proc`, `/sys` and `/dev` allows but for devices: no set-user-id
/// programs, no programs at all, no device nodes.
pub const NO_SUID_EXEC_DEV: MountAttrFlags =
    MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NOEXEC).union(MountAttrFlags::MOUNT_ATTR_NODEV);

/// Makes a file system and a mount of it that is not attached anywhere yet. `source` is what it is made of, or for one
/// made of nothing, how it is shown. An option without a value is a flag.
///
/// # Errors
/// What the kernel says of the type, an option or the whole.
pub fn create(
    kind: &str,
    source: &str,
    options: &[(&str, &str)],
    attributes: MountAttrFlags,
) -> Result<OwnedFd, Errno> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "source", source)?;
    for &(key, value) in options {
        if value.is_empty() {
            fsconfig_set_flag(context.as_fd(), key)?;
        } else {
            fsconfig_set_string(context.as_fd(), key, value)?;
        }
    }
    fsconfig_create(context.as_fd())?;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Attaches a mount on top of what `target` refers to.
///
/// # Errors
/// What move_mount(2) says.
pub fn attach(mount: impl AsFd, target: impl AsFd) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount.as_fd(), "", target.as_fd(), "", flags)
}

/// Makes a mount, not attached yet, of the file or directory that `source` refers to (a bind mount), with the mounts
/// below it.
///
/// # Errors
/// What open_tree(2) says.
pub fn bind(source: impl AsFd) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    open_tree(source.as_fd(), "", flags)
}
