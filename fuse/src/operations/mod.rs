//! What the guest can ask for.

mod attributes;
mod data;
mod directories;
mod locks;
mod names;
mod session;
mod xattrs;

use std::sync::Arc;

use fuse_abi::linux::{self as abi, FUSE_ROOT_ID, fuse_opcode};
use rustix::fs::{FileType, Statx};
use rustix::io::Errno;

use crate::export::Root;
use crate::lock::Ticket;
use crate::node::{Key, Node};
use crate::owner::Ownership;
use crate::server::Server;
use crate::wire::{Arguments, Message, attributes};

/// A request, and where its reply goes.
pub(crate) struct Call<'c> {
    pub header: &'c abi::fuse_in_header,
    pub arguments: Arguments<'c>,
    pub message: &'c mut dyn Message,
    /// The reply so far: room for its header.
    pub reply: &'c mut Vec<u8>,
}

/// How a request ended that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Done {
    /// The reply is what it holds.
    Reply,
    /// So many bytes are in place behind the reply's header.
    Data(usize),
    /// There is no reply.
    Nothing,
    /// The reply comes when this wait is over.
    Waiting(Ticket),
}

pub(crate) type Outcome = Result<Done, Errno>;

/// Numbers of operations, as constants for patterns.
mod opcode {
    use super::fuse_opcode as op;

    macro_rules! opcodes {
        ($($name:ident = $of:ident),* $(,)?) => { $(pub const $name: u32 = op::$of as u32;)* };
    }

    opcodes! {
        LOOKUP = FUSE_LOOKUP, FORGET = FUSE_FORGET, GETATTR = FUSE_GETATTR, SETATTR = FUSE_SETATTR,
        READLINK = FUSE_READLINK, SYMLINK = FUSE_SYMLINK, MKNOD = FUSE_MKNOD, MKDIR = FUSE_MKDIR,
        UNLINK = FUSE_UNLINK, RMDIR = FUSE_RMDIR, RENAME = FUSE_RENAME, LINK = FUSE_LINK, OPEN = FUSE_OPEN,
        READ = FUSE_READ, WRITE = FUSE_WRITE, STATFS = FUSE_STATFS, RELEASE = FUSE_RELEASE, FSYNC = FUSE_FSYNC,
        SETXATTR = FUSE_SETXATTR, GETXATTR = FUSE_GETXATTR, LISTXATTR = FUSE_LISTXATTR,
        REMOVEXATTR = FUSE_REMOVEXATTR, FLUSH = FUSE_FLUSH, INIT = FUSE_INIT, OPENDIR = FUSE_OPENDIR,
        READDIR = FUSE_READDIR, RELEASEDIR = FUSE_RELEASEDIR, FSYNCDIR = FUSE_FSYNCDIR, GETLK = FUSE_GETLK,
        SETLK = FUSE_SETLK, SETLKW = FUSE_SETLKW, ACCESS = FUSE_ACCESS, CREATE = FUSE_CREATE,
        INTERRUPT = FUSE_INTERRUPT, BMAP = FUSE_BMAP, DESTROY = FUSE_DESTROY, IOCTL = FUSE_IOCTL, POLL = FUSE_POLL,
        BATCH_FORGET = FUSE_BATCH_FORGET, FALLOCATE = FUSE_FALLOCATE, READDIRPLUS = FUSE_READDIRPLUS,
        RENAME2 = FUSE_RENAME2, LSEEK = FUSE_LSEEK, COPY_FILE_RANGE = FUSE_COPY_FILE_RANGE, SYNCFS = FUSE_SYNCFS,
        TMPFILE = FUSE_TMPFILE, STATX = FUSE_STATX, SETUPMAPPING = FUSE_SETUPMAPPING,
        REMOVEMAPPING = FUSE_REMOVEMAPPING,
    }
}

/// Whether an operation changes nothing of an export, or decides by its arguments (OPEN). What is not listed may change
/// something.
fn changes_nothing(operation: u32) -> bool {
    use opcode::*;
    matches!(
        operation,
        LOOKUP | FORGET | BATCH_FORGET | GETATTR | STATX | READLINK | ACCESS | STATFS | OPEN | READ | RELEASE | FLUSH
            | LSEEK | FSYNC | FSYNCDIR | SYNCFS | GETXATTR | LISTXATTR | OPENDIR | READDIR | READDIRPLUS | RELEASEDIR
            | GETLK | SETLK | SETLKW | INIT | DESTROY | INTERRUPT
            // Not served at all.
            | BMAP | IOCTL | POLL | SETUPMAPPING | REMOVEMAPPING
    )
}

impl Server {
    pub(crate) fn dispatch(&mut self, call: Call<'_>) -> Outcome {
        use opcode::*;
        let operation = call.header.opcode;
        if !self.session && !matches!(operation, INIT | FORGET | BATCH_FORGET | INTERRUPT | DESTROY) {
            return Err(Errno::IO);
        }
        if self.export.options.read_only && !changes_nothing(operation) {
            return Err(self.read_only());
        }
        match operation {
            INIT => self.init(call),
            DESTROY => self.destroy(),
            // A wait cannot be called off, see `lock`; nothing else takes long.
            INTERRUPT => Ok(Done::Nothing),
            LOOKUP => self.lookup(call),
            FORGET => self.forget(call),
            BATCH_FORGET => self.batch_forget(call),
            GETATTR => self.getattr(call),
            SETATTR => self.setattr(call),
            READLINK => self.readlink(call),
            ACCESS => self.access(call),
            STATFS => self.statfs(call),
            CREATE => self.create(call),
            TMPFILE => self.tmpfile(call),
            MKNOD => self.mknod(call),
            MKDIR => self.mkdir(call),
            SYMLINK => self.symlink(call),
            LINK => self.link(call),
            UNLINK => self.unlink(call, false),
            RMDIR => self.unlink(call, true),
            RENAME => self.rename(call),
            RENAME2 => self.rename2(call),
            OPEN => self.open(call),
            READ => self.read(call),
            WRITE => self.write(call),
            FLUSH => self.flush(call),
            RELEASE => self.release(call),
            FSYNC => self.fsync(call),
            LSEEK => self.lseek(call),
            FALLOCATE => self.fallocate(call),
            COPY_FILE_RANGE => self.copy_file_range(call),
            OPENDIR => self.opendir(call),
            READDIR => self.readdir(call, false),
            READDIRPLUS => self.readdir(call, true),
            RELEASEDIR => self.releasedir(call),
            FSYNCDIR => self.fsyncdir(call),
            SYNCFS => self.syncfs(),
            GETXATTR => self.getxattr(call),
            LISTXATTR => self.listxattr(call),
            SETXATTR => self.setxattr(call),
            REMOVEXATTR => self.removexattr(call),
            GETLK => self.getlk(call),
            SETLK => self.setlk(call, false),
            SETLKW => self.setlk(call, true),
            _ => Err(Errno::NOSYS),
        }
    }

    /// The refusal of a change.
    fn read_only(&mut self) -> Errno {
        self.counters.read_only_refusals += 1;
        Errno::ROFS
    }

    /// Counts a refusal for lack of room.
    fn quota<T>(&mut self, outcome: Result<T, Errno>) -> Result<T, Errno> {
        if outcome.as_ref().is_err_and(|error| *error == Errno::NOSPC) {
            self.counters.quota_refusals += 1;
        }
        outcome
    }

    /// Whether a number is that of the directory that shows a single file.
    fn is_shown(&self, number: u64) -> bool {
        number == FUSE_ROOT_ID && matches!(self.export.root, Root::Shown { .. })
    }

    /// The inode with a number.
    fn node(&self, number: u64) -> Result<Arc<Node>, Errno> {
        match &self.export.root {
            Root::Directory(root) if number == FUSE_ROOT_ID => Ok(Arc::clone(root)),
            // It is no inode of the host: nothing that acts on one can mean it.
            Root::Shown { .. } if number == FUSE_ROOT_ID => Err(Errno::PERM),
            _ => self.nodes.get(number),
        }
    }

    /// The directory with a number.
    fn directory(&self, number: u64) -> Result<Arc<Node>, Errno> {
        let node = self.node(number)?;
        if node.file_type() == FileType::Directory { Ok(node) } else { Err(Errno::NOTDIR) }
    }

    /// The device that the root is on.
    fn device(&self) -> (u32, u32) {
        match &self.export.root {
            Root::Directory(node) | Root::Shown { file: node, .. } => node.key().device,
        }
    }

    /// What the guest is told of an inode.
    fn attributes(&self, stat: &Statx) -> abi::fuse_attr {
        let key = Key::of(stat);
        let ino = if key.device == self.device() {
            key.ino
        } else {
            // One mount can have several devices (btrfs, overlayfs), whose numbers must not seem to be the same inode.
            let device = u64::from(key.device.0) << 32 | u64::from(key.device.1);
            key.ino ^ (device.wrapping_mul(0x9e37_79b9_7f4a_7c15) & !0xff_ffff_ffff)
        };
        let mut attributes = attributes(stat, ino);
        (attributes.uid, attributes.gid) = self.export.options.ownership.shown(attributes.uid, attributes.gid);
        if self.export.options.ownership != Ownership::Mapped {
            // Whoever it belongs to on the host, it would run as the one user that it seems to belong to.
            attributes.mode &= !SET_UID;
            if attributes.mode & FileType::MASK != DIRECTORY {
                attributes.mode &= !SET_GID;
            }
        }
        if self.export.options.noexec && attributes.mode & FileType::MASK == REGULAR {
            attributes.mode &= !EXECUTE;
        }
        attributes
    }
}

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const SET_UID: u32 = 0o4000;
const SET_GID: u32 = 0o2000;
const EXECUTE: u32 = 0o111;

/// The mask of a mode's file type (`S_IFMT`).
trait Mask {
    const MASK: u32 = 0o170_000;
}

impl Mask for FileType {}
