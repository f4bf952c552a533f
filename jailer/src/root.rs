//! The root of a jail: an empty, read-only file system, and one folder of the host's that is in no tree.
//!
//! The folder is a mount of its own that only a descriptor leads to (`OPEN_TREE_CLONE`): what is resolved below it does not
//! get out by `..`, and it has no name in the jail. The host's tree is taken out of the namespace, so that nothing of it
//! is held: an unmounted disk of the host's stays unmounted.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, fchdir, pivot_root};

use crate::error::{JailError, step};
use crate::sys;

/// Takes the folder out of the host's tree.
///
/// # Errors
/// [`JailError::Path`].
pub(crate) fn folder(path: &Path) -> Result<OwnedFd, JailError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    let tree = open_tree(CWD, path, flags).map_err(|errno| JailError::Path {
        step: "take over the folder",
        path: path.to_owned(),
        source: errno.into(),
    })?;
    // Nothing in it could be used for anything without it, but for a kernel that is too old for it.
    _ = sys::set_mount(tree.as_fd(), sys::Attributes::Harmless { read_only: false });
    Ok(tree)
}

/// Replaces the root of the mount namespace, which is this process's own, by an empty one.
///
/// # Errors
/// [`JailError::Step`].
pub(crate) fn empty() -> Result<(), JailError> {
    // What happens here must not happen to the host.
    mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(step("part from the host's mounts"))?;
    let root = tmpfs().map_err(step("make an empty root"))?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(root.as_fd(), c"", CWD, c"/", flags).map_err(step("mount an empty root"))?;
    fchdir(&root).map_err(step("enter the empty root"))?;
    // The old root comes to lie on the new one, from where it is taken away (pivot_root(2)).
    pivot_root(c".", c".").map_err(step("change roots"))?;
    unmount(c".", UnmountFlags::DETACH).map_err(step("take the host's tree away"))?;
    chdir(c"/").map_err(step("enter the empty root"))
}

fn tmpfs() -> rustix::io::Result<OwnedFd> {
    let context = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [(c"size", c"4096"), (c"nr_inodes", c"1"), (c"mode", c"0555")] {
        fsconfig_set_string(context.as_fd(), key, value)?;
    }
    fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}
