//! OPEN and what is done with open files.

use std::sync::Arc;

use fuse_abi::linux as abi;
use nix::libc;
use rustix::fd::AsFd;
use rustix::fs::{FallocateFlags, FileType, OFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use super::{Call, Done, Outcome};
use crate::export::Cache;
use crate::handle::OpenFile;
use crate::node::Node;
use crate::server::Server;
use crate::wire::{DATA_MAX, REPLY_HEADER, put};

/// What a guest's kernel adds to the flags when it opens a file to execute it (`__FMODE_EXEC`).
const FOR_EXECUTION: u32 = 0x20;
/// The most bytes copied for one request: less was copied than asked for then, which the guest knows of.
const COPY_MAX: u64 = 16 << 20;

/// What a guest wants to do with a file that it opens.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Opening {
    pub flags: OFlags,
    pub truncate: bool,
}

impl Server {
    /// Takes flags apart; only what is known is passed on.
    pub(crate) fn opening(&mut self, flags: u32) -> Result<Opening, Errno> {
        if flags & FOR_EXECUTION != 0 && self.export.options.noexec {
            self.counters.noexec_refusals += 1;
            return Err(Errno::ACCESS);
        }
        let given = OFlags::from_bits_retain(flags);
        let (access, writable) = match given & OFlags::ACCMODE {
            OFlags::RDONLY => (OFlags::RDONLY, false),
            OFlags::WRONLY => (OFlags::WRONLY, true),
            OFlags::RDWR => (OFlags::RDWR, true),
            _ => return Err(Errno::INVAL),
        };
        let truncate = given.contains(OFlags::TRUNC);
        if self.export.options.read_only && (writable || truncate) {
            return Err(self.read_only());
        }
        // Not O_APPEND: each write says whether it appends. Not O_DIRECT: the guest's buffers lie as they lie.
        let kept = given & (OFlags::SYNC | OFlags::DSYNC);
        Ok(Opening { flags: access | kept, truncate })
    }

    pub(super) fn open(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_open_in = call.arguments.take()?;
        let opening = self.opening(request.flags)?;
        let node = self.node(call.header.nodeid)?;
        let handle = self.open_node(node, opening)?;
        put(call.reply, &self.opened(handle));
        Ok(Done::Reply)
    }

    /// Opens a file that the guest knows of and gives the number to tell.
    pub(super) fn open_node(&mut self, node: Arc<Node>, opening: Opening) -> Result<u64, Errno> {
        match node.file_type() {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            _ => return Err(Errno::NXIO),
        }
        self.handles.check()?;
        let account = self.export.account.clone().filter(|_| opening.truncate);
        let before = account.as_ref().map(|account| account.before(&node)).transpose()?;
        let truncate = if opening.truncate { OFlags::TRUNC } else { OFlags::empty() };
        let fd = self.export.open(&node, opening.flags | truncate)?;
        if let (Some(account), Some(before)) = (account, before) {
            account.settle(&node, before);
        }
        Ok(self.handles.add_file(OpenFile::new(fd, node, opening.flags)))
    }

    /// What the guest is told of an open file.
    pub(super) fn opened(&self, fh: u64) -> abi::fuse_open_out {
        let open_flags = match self.export.options.cache {
            Cache::Never => abi::FOPEN_DIRECT_IO | abi::FOPEN_PARALLEL_DIRECT_WRITES,
            Cache::Auto => 0,
            Cache::Always => abi::FOPEN_KEEP_CACHE,
        };
        abi::fuse_open_out { fh, open_flags, backing_id: 0 }
    }

    pub(super) fn read(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_read_in = call.arguments.take()?;
        let file = self.handles.file(request.fh)?;
        check_offset(request.offset)?;
        let room = call.message.room().checked_sub(REPLY_HEADER).ok_or(Errno::RANGE)?;
        let length = (request.size.min(DATA_MAX) as usize).min(room);
        let read = call.message.read_from(file.as_fd(), request.offset, length)?;
        self.counters.read_bytes += read as u64;
        Ok(Done::Data(read))
    }

    pub(super) fn write(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_write_in = call.arguments.take()?;
        let file = self.handles.file(request.fh)?;
        check_offset(request.offset)?;
        let given = request.size as usize;
        if given > call.message.remaining() || request.size > DATA_MAX {
            return Err(Errno::INVAL);
        }
        let cached = request.write_flags & abi::FUSE_WRITE_CACHE != 0;
        let flags = write_flags(request.flags, cached);
        let append = flags.contains(ReadWriteFlags::APPEND);
        let account = self.export.account.clone();
        let offset = (!append).then_some(request.offset);
        let allowance = account.as_ref().map(|account| account.allow(&file.fd, offset, request.size.into()));
        let allowance = self.quota(allowance.transpose())?;
        let length = allowance.map_or(given, |allowance| usize::try_from(allowance.length).unwrap_or(given).min(given));
        if length < given {
            self.counters.quota_refusals += 1;
        }
        let written = call.message.write_to(file.as_fd(), request.offset, length, flags);
        if let (Some(account), Some(allowance)) = (account, allowance) {
            account.settle(&file.fd, allowance);
        }
        let written = written?;
        self.counters.written_bytes += written as u64;
        if cached && written < given {
            // A guest takes what it wrote from its cache to be in the file, however little the reply says was.
            return Err(Errno::NOSPC);
        }
        put(call.reply, &abi::fuse_write_out { size: u32::try_from(written).unwrap_or(u32::MAX), padding: 0 });
        Ok(Done::Reply)
    }

    pub(super) fn flush(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_flush_in = call.arguments.take()?;
        // Without locks there is nothing to do, and the guest does not ask again.
        self.check_locks()?;
        // As on the host, a process loses its locks of a file when it closes any descriptor of it.
        self.locks.release(call.header.nodeid, request.lock_owner);
        Ok(Done::Reply)
    }

    pub(super) fn release(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_release_in = call.arguments.take()?;
        if request.release_flags & abi::FUSE_RELEASE_FLUSH != 0 {
            self.locks.release(call.header.nodeid, request.lock_owner);
        }
        self.locks.closed(call.header.nodeid, request.fh);
        self.handles.close(request.fh);
        Ok(Done::Reply)
    }

    pub(super) fn fsync(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_fsync_in = call.arguments.take()?;
        let file = self.handles.file(request.fh)?;
        if self.export.options.read_only {
            return Ok(Done::Reply);
        }
        if request.fsync_flags & abi::FUSE_FSYNC_FDATASYNC != 0 {
            rustix::fs::fdatasync(&file.fd)?;
        } else {
            rustix::fs::fsync(&file.fd)?;
        }
        Ok(Done::Reply)
    }

    pub(super) fn lseek(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_lseek_in = call.arguments.take()?;
        let file = self.handles.file(request.fh)?;
        let to = match i32::try_from(request.whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(request.offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(request.offset),
            // The others are the guest's own affair.
            _ => return Err(Errno::INVAL),
        };
        put(call.reply, &abi::fuse_lseek_out { offset: rustix::fs::seek(&file.fd, to)? });
        Ok(Done::Reply)
    }

    pub(super) fn fallocate(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_fallocate_in = call.arguments.take()?;
        let file = self.handles.file(request.fh)?;
        let mode = FallocateFlags::from_bits_retain(request.mode);
        let keep = FallocateFlags::KEEP_SIZE;
        let punch = mode == FallocateFlags::PUNCH_HOLE | keep;
        let known = punch || mode.difference(keep) == FallocateFlags::ZERO_RANGE || mode.difference(keep).is_empty();
        // Behind the end of a file nothing is counted.
        if !known || (self.export.account.is_some() && !punch && mode.contains(keep)) {
            return Err(Errno::OPNOTSUPP);
        }
        let account = self.export.account.clone();
        let length = if punch { 0 } else { request.length };
        let allowance = account.as_ref().map(|account| account.allow(&file.fd, Some(request.offset), length));
        let allowance = self.quota(allowance.transpose())?;
        if allowance.is_some_and(|allowance| allowance.length < length) {
            return self.quota(Err(Errno::NOSPC));
        }
        let outcome = rustix::fs::fallocate(&file.fd, mode, request.offset, request.length);
        if let (Some(account), Some(allowance)) = (account, allowance) {
            account.settle(&file.fd, allowance);
        }
        outcome.map(|()| Done::Reply)
    }

    pub(super) fn copy_file_range(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_copy_file_range_in = call.arguments.take()?;
        if request.flags != 0 {
            return Err(Errno::INVAL);
        }
        let (from, to) = (self.handles.file(request.fh_in)?, self.handles.file(request.fh_out)?);
        let length = request.len.min(COPY_MAX);
        let account = self.export.account.clone();
        let allowance = account.as_ref().map(|account| account.allow(&to.fd, Some(request.off_out), length));
        let allowance = self.quota(allowance.transpose())?;
        let length = usize::try_from(allowance.map_or(length, |allowance| allowance.length)).unwrap_or(usize::MAX);
        let (mut read_at, mut write_at) = (request.off_in, request.off_out);
        let outcome = rustix::fs::copy_file_range(&from.fd, Some(&mut read_at), &to.fd, Some(&mut write_at), length);
        if let (Some(account), Some(allowance)) = (account, allowance) {
            account.settle(&to.fd, allowance);
        }
        let copied = outcome?;
        self.counters.written_bytes += copied as u64;
        put(call.reply, &abi::fuse_write_out { size: u32::try_from(copied).unwrap_or(u32::MAX), padding: 0 });
        Ok(Done::Reply)
    }
}

/// How a write is to be done by the flags of the file in the guest, and of this one write.
fn write_flags(given: u32, cached: bool) -> ReadWriteFlags {
    let has = |flag: libc::c_int| given & flag.cast_unsigned() == flag.cast_unsigned();
    let mut flags = ReadWriteFlags::empty();
    // What comes from the guest's cache goes where it was in the file, whoever opened it how.
    flags.set(ReadWriteFlags::APPEND, has(libc::O_APPEND) && !cached);
    // O_SYNC has the bit of O_DSYNC as well.
    flags.set(ReadWriteFlags::SYNC, has(libc::O_SYNC));
    flags.set(ReadWriteFlags::DSYNC, has(libc::O_DSYNC));
    flags
}

/// The system takes all ones for the place where a descriptor stands.
fn check_offset(offset: u64) -> Result<(), Errno> {
    i64::try_from(offset).map(drop).map_err(|_| Errno::INVAL)
}
