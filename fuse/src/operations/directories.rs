//! Open directories.

use std::mem::MaybeUninit;
use std::sync::Arc;

use fuse_abi::linux as abi;
use rustix::fd::OwnedFd;
use rustix::fs::{FileType, OFlags, RawDir, SeekFrom};
use rustix::io::Errno;
use zerocopy::FromZeros as _;

use super::{Call, Done, Outcome};
use crate::export::{Cache, Root};
use crate::handle::Directory;
use crate::node::Node;
use crate::server::Server;
use crate::wire::{ENTRIES_MAX, Name, REPLY_HEADER, entry_length, put, put_entry};

/// How many bytes of entries are asked of the host at once.
const BUFFER: usize = 32 << 10;
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
        let mut buffer = vec![MaybeUninit::uninit(); BUFFER];
        let mut entries = RawDir::new(fd, &mut buffer);
        let mut next = offset;
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name();
            let extra = if plus { size_of::<abi::fuse_entry_out>() } else { 0 };
            if reply.len() + extra + entry_length(name.count_bytes()) > most {
                return Ok(None);
            }
            let component = Name::new(name);
            let mut file_type = entry.file_type();
            if plus {
                let found = component.and_then(|name| {
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
            next = entry.next_entry_cookie();
            put_entry(reply, ino, next, file_type, name.to_bytes());
        }
        Ok(Some(next))
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
