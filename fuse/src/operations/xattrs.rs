//! Extended attributes: those of `user.`, where the mount has any. The others belong to the host: capabilities, access control
//! lists and security labels mean something to it.

use std::ffi::CStr;

use fuse_abi::linux as abi;
use rustix::fd::OwnedFd;
use rustix::fs::{FileType, OFlags, XattrFlags};
use rustix::io::Errno;

use super::{Call, Done, Outcome};
use crate::server::Server;
use crate::wire::put;

/// The longest value and the longest list of names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const SIZE_MAX: usize = 64 << 10;
const NAME_MAX: usize = 255;

impl Server {
    /// An inode, opened for its attributes.
    fn with_xattrs(&self, number: u64) -> Result<OwnedFd, Errno> {
        if !self.export.options.xattrs {
            // The guest does not ask again.
            return Err(Errno::NOSYS);
        }
        if self.is_shown(number) {
            return Err(Errno::OPNOTSUPP);
        }
        let node = self.node(number)?;
        match node.file_type() {
            FileType::RegularFile | FileType::Directory => self.export.open(&node, OFlags::RDONLY),
            // Others cannot have attributes of a user's.
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    pub(super) fn getxattr(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_getxattr_in = call.arguments.take()?;
        let name = call.arguments.text()?;
        let file = self.with_xattrs(call.header.nodeid)?;
        check(name)?;
        let mut value = vec![0; SIZE_MAX];
        let length = rustix::fs::fgetxattr(&file, name, &mut value[..])?;
        answer(call, request.size, &value[..length])
    }

    pub(super) fn listxattr(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_getxattr_in = call.arguments.take()?;
        let file = self.with_xattrs(call.header.nodeid)?;
        let mut names = vec![0; SIZE_MAX];
        let length = rustix::fs::flistxattr(&file, &mut names[..])?;
        let shown = names[..length].split_inclusive(|byte| *byte == 0).filter(|name| name.starts_with(b"user."));
        answer(call, request.size, &shown.flatten().copied().collect::<Vec<u8>>())
    }

    pub(super) fn setxattr(&mut self, mut call: Call<'_>) -> Outcome {
        // Without FUSE_SETXATTR_EXT it has the first two fields only.
        let [size, flags]: [u32; 2] = call.arguments.take()?;
        let name = call.arguments.text()?;
        let file = self.with_xattrs(call.header.nodeid)?;
        check(name)?;
        let length = usize::try_from(size).ok().filter(|size| *size <= SIZE_MAX).ok_or(Errno::TOOBIG)?;
        let value = call.arguments.bytes(length)?;
        // Not credited when it is removed: what it took on the disk is not known.
        let account = self.export.account.clone();
        let counted = account.map(|account| account.add_bytes((length + name.count_bytes()) as u64)).transpose();
        self.quota(counted)?;
        rustix::fs::fsetxattr(&file, name, value, XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?)?;
        Ok(Done::Reply)
    }

    pub(super) fn removexattr(&mut self, mut call: Call<'_>) -> Outcome {
        let name = call.arguments.text()?;
        let file = self.with_xattrs(call.header.nodeid)?;
        check(name)?;
        rustix::fs::fremovexattr(&file, name)?;
        Ok(Done::Reply)
    }
}

fn check(name: &CStr) -> Result<(), Errno> {
    let name = name.to_bytes();
    if name.starts_with(b"user.") && name.len() <= NAME_MAX { Ok(()) } else { Err(Errno::OPNOTSUPP) }
}

/// Answers with a value, or with its length when the guest has no room yet.
fn answer(call: Call<'_>, room: u32, value: &[u8]) -> Outcome {
    let length = u32::try_from(value.len()).map_err(|_| Errno::RANGE)?;
    match room {
        0 => put(call.reply, &abi::fuse_getxattr_out { size: length, padding: 0 }),
        room if room < length => return Err(Errno::RANGE),
        _ => call.reply.extend_from_slice(value),
    }
    Ok(Done::Reply)
}
