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
    /// An inode, opened for the attribute of a name or for all of them.
    fn with_xattrs(&self, number: u64, name: Option<&CStr>) -> Result<OwnedFd, Errno> {
        if !self.export.options.xattrs {
            // The guest does not ask again.
            return Err(Errno::NOSYS);
        }
        // A guest's kernel asks for capabilities and access control lists with each file.
        name.map_or(Ok(()), check)?;
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
        let file = self.with_xattrs(call.header.nodeid, Some(name))?;
        if request.size == 0 {
            return answer_length(call, rustix::fs::fgetxattr_query(&file, name)?);
        }
        let mut value = vec![0; SIZE_MAX.min(request.size as usize)];
        let length = rustix::fs::fgetxattr(&file, name, &mut value[..])?;
        answer(call, request.size, &value[..length])
    }

    pub(super) fn listxattr(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_getxattr_in = call.arguments.take()?;
        let file = self.with_xattrs(call.header.nodeid, None)?;
        let mut names = vec![0; SIZE_MAX];
        let length = rustix::fs::flistxattr(&file, &mut names[..])?;
        let shown = names[..length].split_inclusive(|byte| *byte == 0).filter(|name| name.starts_with(b"user."));
        answer(call, request.size, &shown.flatten().copied().collect::<Vec<u8>>())
    }

    pub(super) fn setxattr(&mut self, mut call: Call<'_>) -> Outcome {
        // Without FUSE_SETXATTR_EXT it has the first two fields only.
        let [size, flags]: [u32; 2] = call.arguments.take()?;
        let name = call.arguments.text()?;
        let file = self.with_xattrs(call.header.nodeid, Some(name))?;
        let length = usize::try_from(size).ok().filter(|size| *size <= SIZE_MAX).ok_or(Errno::TOOBIG)?;
        let value = call.arguments.bytes(length)?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let Some(account) = self.export.account.clone() else {
            return rustix::fs::fsetxattr(&file, name, value, flags).map(|()| Done::Reply);
        };
        let (before, after) = (counted(&file, name)?, (length + name.count_bytes()) as u64);
        let added = after.saturating_sub(before);
        self.quota(account.add_bytes(added))?;
        let set = rustix::fs::fsetxattr(&file, name, value, flags);
        account.subtract_bytes(if set.is_ok() { before.saturating_sub(after) } else { added });
        set.map(|()| Done::Reply)
    }

    pub(super) fn removexattr(&mut self, mut call: Call<'_>) -> Outcome {
        let name = call.arguments.text()?;
        let file = self.with_xattrs(call.header.nodeid, Some(name))?;
        let account = self.export.account.clone();
        let before = if account.is_some() { counted(&file, name)? } else { 0 };
        rustix::fs::fremovexattr(&file, name)?;
        if let Some(account) = account {
            account.subtract_bytes(before);
        }
        Ok(Done::Reply)
    }
}

/// What an attribute counts, its name and its value: what it takes on the disk is not known. Nothing where there is none.
fn counted(file: &OwnedFd, name: &CStr) -> Result<u64, Errno> {
    match rustix::fs::fgetxattr_query(file, name) {
        Ok(length) => Ok((length + name.count_bytes()) as u64),
        Err(Errno::NODATA) => Ok(0),
        Err(error) => Err(error),
    }
}

fn check(name: &CStr) -> Result<(), Errno> {
    let name = name.to_bytes();
    if name.starts_with(b"user.") && name.len() <= NAME_MAX { Ok(()) } else { Err(Errno::OPNOTSUPP) }
}

/// Answers with a value, or with its length when the guest has no room yet.
fn answer(call: Call<'_>, room: u32, value: &[u8]) -> Outcome {
    match room as usize {
        0 => return answer_length(call, value.len()),
        room if room < value.len() => return Err(Errno::RANGE),
        _ => call.reply.extend_from_slice(value),
    }
    Ok(Done::Reply)
}

fn answer_length(call: Call<'_>, length: usize) -> Outcome {
    let size = u32::try_from(length).map_err(|_| Errno::RANGE)?;
    put(call.reply, &abi::fuse_getxattr_out { size, padding: 0 });
    Ok(Done::Reply)
}
