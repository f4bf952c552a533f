//! Files of the host that a monitor shows to its guest, and whose they are to it.
//!
//! Each tree is a mount of its own that only a descriptor leads to: `..` ends at it, nothing in it can be executed or used as a
//! device, no link in it is followed, and it is read-only if it is to be, whoever asks.
//!
//! A monitor that could choose its user ([`crate::identity`]) is nobody to the host, and could do nothing with files of the
//! host's users. Its user namespace therefore has the host's users, under their numbers, but as users that nothing outside
//! of those trees belongs to: the trees' mounts are mapped to the same ones (idmapped mounts). Capabilities in that namespace
//! reach the files in the trees, and nothing else.
//!
//! Some file systems cannot be mapped (overlayfs, most that are on a network). Then the host's users have their own numbers in
//! the namespace, and it is for Landlock that nothing but the trees can be opened. So it is for a monitor that could not choose
//! its user. Without Landlock there is no such monitor.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::error::{JailError, step};
use crate::identity::{self, Users};
use crate::landlock;
use crate::sys::{self, Attributes};

/// Files that are shown.
#[derive(Debug, Clone, Copy)]
pub struct Tree<'a> {
    /// A directory, with all below it, or a file.
    pub path: &'a Path,
    /// Whether nothing can be changed.
    pub read_only: bool,
}

/// What leads to them.
#[derive(Debug)]
pub(crate) struct Taken {
    /// The trees, in their order.
    pub trees: Vec<OwnedFd>,
    /// This process's `/proc/self/fd`, if there are any.
    pub descriptors: Option<OwnedFd>,
    /// The user namespace to be in, where it has the host's users.
    pub namespace: Option<OwnedFd>,
}

/// Takes trees out of the host's, for a monitor that is to be `user`, if it can choose.
///
/// # Errors
/// [`JailError`] names the step or the path.
pub(crate) fn take(trees: &[Tree<'_>], user: Option<u32>) -> Result<Taken, JailError> {
    let clones = || trees.iter().map(clone).collect::<Result<Vec<_>, _>>();
    if trees.is_empty() {
        return Ok(Taken { trees: Vec::new(), descriptors: None, namespace: None });
    }
    // The directory alone, by which nothing of another process can be found.
    let descriptors = Some(clone_of(Path::new("/proc/self/fd"))?);
    let Some(user) = user else {
        // What it inherited is its caller's, as it is itself: by its number it could be opened for more than it was opened for.
        if !landlock::is_supported() {
            return Err(step("show files without Landlock (Linux 5.13), unless root does")(Errno::OPNOTSUPP));
        }
        return Ok(Taken { trees: clones()?, descriptors, namespace: None });
    };
    let (namespace, taken) = (identity::namespace(user, Users::Apart)?, clones()?);
    let map = |tree: &OwnedFd| sys::set_mount(tree.as_fd(), Attributes::Mapped(namespace.as_fd()));
    match taken.iter().try_for_each(map) {
        Ok(()) => Ok(Taken { trees: taken, descriptors, namespace: Some(namespace) }),
        Err(Errno::INVAL) if landlock::is_supported() => {
            // What was mapped stays mapped.
            let (namespace, trees) = (identity::namespace(user, Users::Same)?, clones()?);
            Ok(Taken { trees, descriptors, namespace: Some(namespace) })
        }
        Err(errno) => {
            Err(step("map the owners of files: their file system cannot (idmapped mounts, Linux 5.12)")(errno))
        }
    }
}

fn clone(tree: &Tree<'_>) -> Result<OwnedFd, JailError> {
    let clone = clone_of(tree.path)?;
    match sys::set_mount(clone.as_fd(), Attributes::Harmless { read_only: tree.read_only }) {
        // That nothing is written is for the host's kernel to see to, whoever the server obeys.
        Err(errno) if tree.read_only => Err(JailError::Path {
            step: "make read-only the files of",
            path: tree.path.to_owned(),
            source: errno.into(),
        }),
        // The server sees to all the rest, too: a kernel that is too old does without.
        _ => Ok(clone),
    }
}

fn clone_of(path: &Path) -> Result<OwnedFd, JailError> {
    // With what is mounted below it, although that is not shown: it would uncover what lies beneath.
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    open_tree(CWD, path, flags).map_err(|errno| JailError::Path {
        step: "take over the files of",
        path: path.to_owned(),
        source: errno.into(),
    })
}
