//! Reads file trees to compare them: from a directory (a mounted image, an unpacked layer) and from an EROFS image
//! through a reader that is not ours.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use image::Digest;

/// What can be seen of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, i64),
    pub links: u64,
    /// Size and digest of a file's data, target of a link, number of a device.
    pub content: Content,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Paths with the same inode number are the same file.
    pub inode: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    Data(u64, Digest),
    Target(Vec<u8>),
    Device(u64),
    None,
}

/// A tree by path; the root is the empty path.
pub type Tree = BTreeMap<PathBuf, Seen>;

/// Reads a directory and everything below it.
pub fn directory(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(path) = pending.pop() {
        let full = root.join(&path);
        let metadata = std::fs::symlink_metadata(&full).unwrap();
        let kind = metadata.file_type();
        let content = if kind.is_file() {
            let mut bytes = Vec::new();
            File::open(&full).unwrap().read_to_end(&mut bytes).unwrap();
            Content::Data(metadata.len(), Digest::of(&bytes))
        } else if kind.is_symlink() {
            Content::Target(std::fs::read_link(&full).unwrap().as_os_str().as_bytes().to_vec())
        } else if kind.is_block_device() || kind.is_char_device() {
            Content::Device(metadata.rdev())
        } else {
            Content::None
        };
        if kind.is_dir() {
            let children = std::fs::read_dir(&full).unwrap();
            pending.extend(children.map(|child| path.join(child.unwrap().file_name())));
        }
        let seen = Seen {
            mode: metadata.mode(),
            uid: metadata.uid(),
            gid: metadata.gid(),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            links: metadata.nlink(),
            content,
            xattrs: xattrs(&full),
            inode: metadata.ino(),
        };
        tree.insert(path, seen);
    }
    tree
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 64 << 10];
    let Ok(length) = rustix::fs::llistxattr(path, &mut names) else { return BTreeMap::new() };
    names.truncate(length);
    let names = names.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let mut value = vec![0; 64 << 10];
    names
        .map(|name| {
            let length = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
            (name.to_vec(), value[..length].to_vec())
        })
        .collect()
}

/// Mounts an EROFS image with the kernel's own driver and reads it. `None` where that is not permitted.
pub fn mounted(image: &Path) -> Option<Tree> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let point = tempfile::tempdir().unwrap();
    let run = |command: &mut Command| command.output().map(|output| output.status.success()).unwrap_or(false);
    if !run(Command::new("mount").args(["-t", "erofs", "-o", "loop,ro"]).arg(image).arg(point.path())) {
        return None;
    }
    let tree = directory(point.path());
    assert!(run(Command::new("umount").arg(point.path())), "cannot unmount {}", point.path().display());
    Some(tree)
}

/// Checks an image with erofs-utils.
pub fn fsck(image: &Path) {
    let output = Command::new("fsck.erofs").arg("--extract").arg(image).output();
    let output = output.expect("fsck.erofs is missing: install the Debian package erofs-utils");
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "fsck.erofs: {text}");
}

/// Reads an image with the crate erofs-rs. Inode numbers are those of the image.
pub fn read_by_crate(image: &Path) -> Tree {
    let bytes = std::fs::read(image).unwrap();
    let filesystem = erofs_rs::EroFS::new(erofs_rs::backend::SliceImage::new(&bytes)).unwrap();
    let mut tree = Tree::new();
    let root = filesystem.get_inode(filesystem.super_block().root_inode_id()).unwrap();
    let mut pending = vec![(PathBuf::new(), root)];
    while let Some((path, inode)) = pending.pop() {
        let content = if inode.is_file() {
            let mut data = Vec::new();
            filesystem.open_inode_file(inode).unwrap().read_to_end(&mut data).unwrap();
            Content::Data(inode.data_size(), Digest::of(&data))
        } else if inode.is_symlink() {
            Content::Target(filesystem.read_link_inode(inode).unwrap().as_bytes().to_vec())
        } else if let Some((major, minor)) = inode.device() {
            Content::Device(rustix::fs::makedev(major, minor))
        } else {
            Content::None
        };
        if inode.is_dir() {
            let unix_path = Path::new("/").join(&path);
            for entry in filesystem.read_dir(unix_path.as_os_str().as_bytes()).unwrap() {
                let entry = entry.unwrap();
                let name = entry.dir_entry.file_name();
                if name != b"." && name != b".." {
                    let child = filesystem.get_inode(entry.dir_entry.nid()).unwrap();
                    pending.push((path.join(std::ffi::OsStr::from_bytes(name)), child));
                }
            }
        }
        let (seconds, nanoseconds) = inode.modified_unix();
        let seen = Seen {
            mode: inode.file_type().as_raw_mode() | inode.permissions().mode(),
            uid: inode.uid(),
            gid: inode.gid(),
            mtime: (seconds, i64::from(nanoseconds)),
            links: u64::from(inode.nlink()),
            content,
            xattrs: filesystem.xattrs_inode(inode).unwrap().into_iter().collect(),
            inode: inode.id(),
        };
        tree.insert(path, seen);
    }
    tree
}
