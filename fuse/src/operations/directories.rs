//! Open directories.

use std::mem::MaybeUninit;
use std::sync::Arc;

use fuse_abi::linux as abi;
use rustix::fd::OwnedFd;
use rustix::fs::{FileType, OFlags, RawDir, RawDirEntry, SeekFrom};
use rustix::io::Errno;
use zerocopy::FromZeros as _;

use super::{Call, Done, Outcome};
use crate::export::{Cache, Root};
use crate::handle::Directory;
use crate::node::{Key, Node};
use crate::server::Server;
use crate::wire::{ENTRIES_MAX, Name, REPLY_HEADER, entry_length, put, put_entry};

/// How many bytes of entries are asked of the host at once, at most.
const BUFFER: usize = 32 << 10;
/// How long an entry is that the host gives (`struct linux_dirent64`), at least; and at most, with the longest name.
const HOST_ENTRY: usize = 24;
const HOST_ENTRY_MAX: usize = 280;
/// The number of an entry whose inode has none for the guest (`FUSE_UNKNOWN_INO`).
const UNKNOWN_INO: u64 = u32::MAX as u64;

impl Server {
    pub(super) fn opendir(&mut self, call: Call<'_>) -> Outcome {
        self.handles.check()?;
        let directory = if self.is_shown(call.header.nodeid) {
            Directory::Shown
        } else {
            let node = self.directory(call.header.nodeid)?;
            let fd = self.export.open(&node, OFlags::RDONLY | OFlags::DIRECTORY)?;
            Directory::Host { fd: Arc::new(fd), position: Some(0) }
        };
        let fh = self.handles.add_directory(directory);
        let open_flags = match self.export.options.cache {
            Cache::Always => abi::FOPEN_KEEP_CACHE | abi::FOPEN_CACHE_DIR,
            _ => 0,
        };
        put(call.reply, &abi::fuse_open_out { fh, open_flags, backing_id: 0 });
        Ok(Done::Reply)
    }

    pub(super) fn readdir(&mut self, mut call: Call<'_>, plus: bool) -> Outcome {
        let request: abi::fuse_read_in = call.arguments.take()?;
        let room = call.message.room().saturating_sub(REPLY_HEADER);
        let most = REPLY_HEADER + (request.size as usize).min(room).min(ENTRIES_MAX);
        match self.handles.directory(request.fh)? {
            Directory::Shown => self.list_shown(request.offset, most, plus, call.reply),
            Directory::Host { fd, position } => {
                let fd = Arc::clone(fd);
                if position.take() != Some(request.offset) {
                    rustix::fs::seek(&fd, SeekFrom::Start(request.offset))?;
                }
                let directory = self.directory(call.header.nodeid)?;
                let next = self.list(&directory, &fd, request.offset, most, plus, call.reply)?;
                if let Ok(Directory::Host { position, .. }) = self.handles.directory(request.fh) {
                    *position = next;
                }
                Ok(Done::Reply)
            }
        }
    }

    /// Lists a directory until the reply is `most` bytes long. Gives where the descriptor stands, if the reply ends there.
    fn list(
        &mut self,
        directory: &Node,
        fd: &OwnedFd,
        offset: u64,
        most: usize,
        plus: bool,
        reply: &mut Vec<u8>,
    ) -> Result<Option<u64>, Errno> {
        let (begin, mut next) = (reply.len(), offset);
        let mut length = fitting(most.saturating_sub(begin), plus).unwrap_or(HOST_ENTRY_MAX);
        loop {
            let mut buffer = vec![MaybeUninit::uninit(); length];
            let mut entries = RawDir::new(fd, &mut buffer);
            loop {
                let entry = match entries.next() {
                    None => return Ok(Some(next)),
                    Some(Ok(entry)) => entry,
                    // What is listed is, and what is wrong will be so when the guest goes on.
                    Some(Err(_)) if reply.len() > begin => return Ok(Some(next)),
                    // Some file systems have longer names.
                    Some(Err(Errno::INVAL)) if length < BUFFER => break,
                    Some(Err(error)) => return Err(error),
                };
                let extra = if plus { size_of::<abi::fuse_entry_out>() } else { 0 };
                if reply.len() + extra + entry_length(entry.file_name().count_bytes()) > most {
                    return Ok(None);
                }
                next = entry.next_entry_cookie();
                self.list_entry(directory, &entry, plus, reply);
                if entries.is_buffer_empty() {
                    break;
                }
            }
            length = match fitting(most - reply.len(), plus) {
                _ if reply.len() == begin => BUFFER,
                Some(length) => length,
                None => return Ok(Some(next)),
            };
        }
    }

    /// Adds an entry of a directory of the host.
    fn list_entry(&mut self, directory: &Node, entry: &RawDirEntry<'_>, plus: bool, reply: &mut Vec<u8>) {
        let name = entry.file_name();
        let component = Name::new(name);
        let mut file_type = entry.file_type();
        if plus {
            // The number that the directory has of it is a hint only.
            let key = Key { ino: entry.ino(), ..directory.key() };
            let is_held = self.nodes.find(key).is_some();
            let found = component.and_then(|name| {
                if is_held {
                    return self.find_and_tell(directory, name, true);
                }
                let (node, stat) = self.export.find(directory, name)?;
                self.tell(node, &stat)
            });
            if let Ok(found) = &found {
                // Not every file system has types in its directories.
                file_type = FileType::from_raw_mode(found.attr.mode);
            }
            // An entry that is told by name only is looked up when it is used.
            put(reply, &found.unwrap_or_else(|_| abi::fuse_entry_out::new_zeroed()));
        }
        // What is above the root is nobody's business.
        let ino = if component.is_ok() { entry.ino() } else { UNKNOWN_INO };
        put_entry(reply, ino, entry.next_entry_cookie(), file_type, name.to_bytes());
    }

    /// Lists a directory that shows a single file.
    fn list_shown(&mut self, offset: u64, most: usize, plus: bool, reply: &mut Vec<u8>) -> Outcome {
        let Root::Shown { name, .. } = &self.export.root else { return Err(Errno::BADF) };
        let name = name.clone();
        let entries = [(c".", FileType::Directory), (c"..", FileType::Directory), (&name, FileType::RegularFile)];
        for (next, (name, file_type)) in (1u64..).zip(entries).skip(usize::try_from(offset).unwrap_or(usize::MAX)) {
            let extra = if plus { size_of::<abi::fuse_entry_out>() } else { 0 };
            if reply.len() + extra + entry_length(name.count_bytes()) > most {
                break;
            }
            if plus {
                let found = Name::new(name).and_then(|name| self.find_shown(name));
                put(reply, &found.unwrap_or_else(|_| abi::fuse_entry_out::new_zeroed()));
            }
            put_entry(reply, UNKNOWN_INO, next, file_type, name.to_bytes());
        }
        Ok(Done::Reply)
    }

    pub(super) fn releasedir(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_release_in = call.arguments.take()?;
        self.handles.close(request.fh);
        Ok(Done::Reply)
    }

    pub(super) fn fsyncdir(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_fsync_in = call.arguments.take()?;
        if let Directory::Host { fd, .. } = self.handles.directory(request.fh)?
            && !self.export.options.read_only
        {
            rustix::fs::fsync(&**fd)?;
        }
        Ok(Done::Reply)
    }

    pub(super) fn syncfs(&mut self) -> Outcome {
        if self.export.options.read_only {
            return Ok(Done::Reply);
        }
        match &self.export.root {
            Root::Directory(node) => rustix::fs::syncfs(self.export.open(node, OFlags::RDONLY)?)?,
            Root::Shown { file, .. } => rustix::fs::fsync(self.export.open(file, OFlags::RDONLY)?)?,
        }
        Ok(Done::Reply)
    }
}

/// How many bytes of entries to ask of the host, so that all of them fit `left` bytes of a reply: what is left over would have to be
/// read again, from where not every file system finds it again. Nothing where that could be too few for an entry.
fn fitting(left: usize, plus: bool) -> Option<usize> {
    let extra = if plus { size_of::<abi::fuse_entry_out>() } else { 0 };
    // An entry is 8 bytes longer in a reply, at most, besides attributes: the shortest one grows the most.
    let length = left / (HOST_ENTRY + 8 + extra) * HOST_ENTRY;
    (length >= HOST_ENTRY_MAX).then(|| length.min(BUFFER))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_the_host_lists_in_a_buffer_fits_the_reply() {
        for plus in [false, true] {
            let extra = if plus { size_of::<abi::fuse_entry_out>() } else { 0 };
            for left in (0..5000).chain([32 << 10, 1 << 20]) {
                let Some(length) = fitting(left, plus) else { continue };
                for name in 1..=255usize {
                    let host = (19 + name + 1).next_multiple_of(8);
                    assert!((HOST_ENTRY..=HOST_ENTRY_MAX).contains(&host));
                    assert!(length / host * (extra + entry_length(name)) <= left, "{left} {name} {plus}");
                }
            }
        }
    }
}
