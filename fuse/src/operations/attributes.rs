//! LOOKUP, GETATTR, SETATTR, READLINK, ACCESS and STATFS.

use std::os::fd::AsFd as _;
use std::sync::Arc;

use fuse_abi::linux as abi;
use rustix::fs::{Access, AtFlags, FileType, Mode, OFlags, StatVfs, Statx, Timespec, Timestamps};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use zerocopy::FromZeros as _;

use super::{Call, Done, EXECUTE, Outcome, SET_GID, SET_UID};
use crate::export::Root;
use crate::node::{Key, Node, stat};
use crate::server::Server;
use crate::wire::{NAME_MAX, Name, entry, put};

/// The permissions of the directory that shows a single file.
const SHOWN_MODE: u32 = 0o040_555;
/// `UTIME_NOW`, as a timestamp's nanoseconds.
const NOW: i64 = 0x3fff_ffff;
/// `UTIME_OMIT`.
const OMIT: i64 = 0x3fff_fffe;

impl Server {
    pub(super) fn lookup(&mut self, mut call: Call<'_>) -> Outcome {
        let name = call.arguments.name()?;
        let found = if self.is_shown(call.header.nodeid) {
            self.find_shown(name)
        } else {
            let directory = self.directory(call.header.nodeid)?;
            self.find_and_tell(&directory, name, self.expects_held)
        };
        let valid = self.export.options.cache.valid();
        let entry = match found {
            // That there is nothing is kept as well: an entry without an inode.
            Err(Errno::NOENT) if !valid.is_zero() => entry(0, abi::fuse_attr::new_zeroed(), valid),
            found => found?,
        };
        put(call.reply, &entry);
        Ok(Done::Reply)
    }

    /// The one entry of a directory that shows a single file.
    pub(super) fn find_shown(&mut self, wanted: Name<'_>) -> Result<abi::fuse_entry_out, Errno> {
        let Root::Shown { file, name } = &self.export.root else { return Err(Errno::NOENT) };
        if wanted.get() != &**name {
            return Err(Errno::NOENT);
        }
        let stat = stat(file)?;
        let number = self.nodes.remember(Arc::clone(file))?;
        Ok(entry(number, self.attributes(&stat), self.export.options.cache.valid()))
    }

    /// Finds an entry of a directory, and notes that the guest is told of it. What is expected to be held already is looked at first,
    /// by one call instead of three; for what is not held, it would be one more.
    pub(super) fn find_and_tell(
        &mut self,
        directory: &Node,
        name: Name<'_>,
        expected: bool,
    ) -> Result<abi::fuse_entry_out, Errno> {
        if expected
            && let Some(stat) = self.export.look(directory, name)?
            && let Some(node) = self.nodes.find(Key::of(&stat))
        {
            let number = self.nodes.remember(node)?;
            return Ok(entry(number, self.attributes(&stat), self.export.options.cache.valid()));
        }
        let (node, stat) = self.export.find(directory, name)?;
        self.expects_held = self.nodes.find(node.key()).is_some();
        self.tell(node, &stat)
    }

    /// Notes that the guest is told of an inode, and what it is told.
    pub(super) fn tell(&mut self, node: Node, stat: &Statx) -> Result<abi::fuse_entry_out, Errno> {
        let number = self.nodes.remember(Arc::new(node))?;
        Ok(entry(number, self.attributes(stat), self.export.options.cache.valid()))
    }

    pub(super) fn getattr(&mut self, call: Call<'_>) -> Outcome {
        let attributes = if self.is_shown(call.header.nodeid) {
            self.shown_attributes()
        } else {
            self.attributes(&stat(self.node(call.header.nodeid)?)?)
        };
        put(call.reply, &self.attributes_reply(attributes));
        Ok(Done::Reply)
    }

    fn attributes_reply(&self, attr: abi::fuse_attr) -> abi::fuse_attr_out {
        let valid = self.export.options.cache.valid();
        abi::fuse_attr_out { attr_valid: valid.as_secs(), attr_valid_nsec: valid.subsec_nanos(), dummy: 0, attr }
    }

    fn shown_attributes(&self) -> abi::fuse_attr {
        let (uid, gid) = self.export.options.ownership.shown(0, 0);
        abi::fuse_attr {
            ino: abi::FUSE_ROOT_ID,
            size: 0,
            blocks: 0,
            atime: 0,
            mtime: 0,
            ctime: 0,
            atimensec: 0,
            mtimensec: 0,
            ctimensec: 0,
            mode: SHOWN_MODE,
            nlink: 2,
            uid,
            gid,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    /// The permissions that a file gets when the guest asks for these.
    pub(super) fn permissions(&self, mode: u32, file_type: FileType) -> Mode {
        // Whoever on the host runs a program of the guest's must not become its owner.
        let mut mode = mode & 0o7777 & !SET_UID;
        if file_type != FileType::Directory {
            mode &= !SET_GID;
        }
        if self.export.options.noexec && file_type == FileType::RegularFile {
            mode &= !EXECUTE;
        }
        Mode::from_raw_mode(mode)
    }

    pub(super) fn setattr(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_setattr_in = call.arguments.take()?;
        let node = self.node(call.header.nodeid)?;
        let asked = |flag| request.valid & flag != 0;
        if asked(abi::FATTR_MODE) {
            self.set_mode(&node, request.mode)?;
        }
        if asked(abi::FATTR_UID | abi::FATTR_GID) {
            let owner = asked(abi::FATTR_UID).then_some(request.uid);
            let group = asked(abi::FATTR_GID).then_some(request.gid);
            self.set_owner(&node, owner, group)?;
        }
        if asked(abi::FATTR_SIZE) {
            let handle = asked(abi::FATTR_FH).then_some(request.fh);
            self.set_size(&node, handle, request.size)?;
        }
        if asked(abi::FATTR_ATIME | abi::FATTR_MTIME) {
            set_times(&node, &request)?;
        }
        let attributes = self.attributes(&stat(&node)?);
        put(call.reply, &self.attributes_reply(attributes));
        Ok(Done::Reply)
    }

    fn set_mode(&self, node: &Node, mode: u32) -> Result<(), Errno> {
        let mode = self.permissions(mode, node.file_type());
        // Only who is of a directory's group keeps its set-group-ID bit, or who has a capability that this thread has not.
        let acting = if mode.contains(Mode::SGID) {
            Some(self.export.options.ownership.act_in(stat(node)?.stx_gid)?)
        } else {
            None
        };
        let set = self
            .export
            .by_link(node, |descriptors, link| rustix::fs::chmodat(descriptors, link, mode, AtFlags::empty()));
        drop(acting);
        set
    }

    fn set_owner(&self, node: &Node, owner: Option<u32>, group: Option<u32>) -> Result<(), Errno> {
        let ownership = self.export.options.ownership;
        if ownership != crate::Ownership::Mapped {
            let (uid, gid) = ownership.shown(0, 0);
            let same = owner.is_none_or(|owner| owner == uid) && group.is_none_or(|group| group == gid);
            return if same { Ok(()) } else { Err(Errno::PERM) };
        }
        // All ones means to leave it, for the system as well.
        if owner == Some(u32::MAX) || group == Some(u32::MAX) {
            return Err(Errno::INVAL);
        }
        let (owner, group) = (owner.map(Uid::from_raw), group.map(Gid::from_raw));
        rustix::fs::chownat(node, c"", owner, group, AtFlags::EMPTY_PATH)
    }

    fn set_size(&mut self, node: &Node, handle: Option<u64>, size: u64) -> Result<(), Errno> {
        if node.file_type() != FileType::RegularFile {
            return Err(Errno::INVAL);
        }
        let account = self.export.account.clone();
        let before = account.as_ref().map(|account| account.before(node)).transpose()?;
        let opened = handle.and_then(|handle| self.handles.file(handle).ok());
        let opened = opened.filter(|file| file.is_writable() && file.node.key() == node.key());
        let reopened;
        let file = if let Some(file) = &opened {
            file.fd.as_fd()
        } else {
            reopened = self.export.open(node, OFlags::WRONLY)?;
            reopened.as_fd()
        };
        let (Some(account), Some(before)) = (account, before) else { return rustix::fs::ftruncate(file, size) };
        let old_size = stat(node)?.stx_size;
        let outcome = rustix::fs::ftruncate(file, size).and_then(|()| {
            // Where a file has no holes, growing it takes the space at once.
            if size <= old_size || account.has_room_since(node, before)? {
                return Ok(());
            }
            rustix::fs::ftruncate(file, old_size)?;
            Err(Errno::NOSPC)
        });
        account.settle(node, before);
        outcome
    }

    pub(super) fn readlink(&mut self, call: Call<'_>) -> Outcome {
        let node = self.node(call.header.nodeid)?;
        if node.file_type() != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let target = rustix::fs::readlinkat(&*node, c"", Vec::new())?;
        call.reply.extend_from_slice(target.as_bytes());
        Ok(Done::Reply)
    }

    /// Who may do what is decided in the guest, which knows the groups of its users; here it is what nobody may.
    pub(super) fn access(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_access_in = call.arguments.take()?;
        let wanted = Access::from_bits_truncate(request.mask & 7);
        if self.is_shown(call.header.nodeid) {
            return if wanted.contains(Access::WRITE_OK) { Err(Errno::ACCESS) } else { Ok(Done::Reply) };
        }
        let node = self.node(call.header.nodeid)?;
        if wanted.contains(Access::WRITE_OK) && self.export.options.read_only {
            return Err(self.read_only());
        }
        let regular = node.file_type() == FileType::RegularFile;
        if wanted.contains(Access::EXEC_OK) && self.export.options.noexec && regular {
            self.counters.noexec_refusals += 1;
            return Err(Errno::ACCESS);
        }
        Ok(Done::Reply)
    }

    pub(super) fn statfs(&mut self, call: Call<'_>) -> Outcome {
        let node = match &self.export.root {
            Root::Shown { file, .. } if call.header.nodeid == abi::FUSE_ROOT_ID => Arc::clone(file),
            _ => self.node(call.header.nodeid)?,
        };
        let host = rustix::fs::fstatvfs(&*node)?;
        put(call.reply, &abi::fuse_statfs_out { st: self.space(&host) });
        Ok(Done::Reply)
    }

    /// The space of the host's file system, as far as the VM may use it.
    fn space(&self, host: &StatVfs) -> abi::fuse_kstatfs {
        let unit = host.f_frsize.max(1);
        let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        let mut space = abi::fuse_kstatfs {
            blocks: host.f_blocks,
            bfree: host.f_bfree,
            bavail: host.f_bavail,
            files: host.f_files,
            ffree: host.f_ffree,
            bsize: narrow(host.f_bsize),
            namelen: NAME_MAX as u32,
            frsize: narrow(unit),
            padding: 0,
            spare: [0; 6],
        };
        if let Some(account) = &self.export.account {
            let (bytes, inodes) = (account.bytes_left(), account.inodes_left());
            space.bfree = space.bfree.min(bytes / unit);
            space.bavail = space.bavail.min(bytes / unit);
            space.ffree = space.ffree.min(inodes);
            space.blocks = space.blocks.min(account.quota().bytes.map_or(u64::MAX, |bytes| bytes / unit));
            space.files = space.files.min(account.quota().inodes.unwrap_or(u64::MAX));
        }
        space
    }
}

fn set_times(node: &Node, request: &abi::fuse_setattr_in) -> Result<(), Errno> {
    let time = |given, now, seconds: u64, nanoseconds: u32| {
        let (tv_sec, tv_nsec) = match (request.valid & given, request.valid & now) {
            (0, _) => (0, OMIT),
            (_, 0) if nanoseconds < 1_000_000_000 => (seconds.cast_signed(), nanoseconds.into()),
            (_, 0) => return Err(Errno::INVAL),
            _ => (0, NOW),
        };
        Ok(Timespec { tv_sec, tv_nsec })
    };
    let last_access = time(abi::FATTR_ATIME, abi::FATTR_ATIME_NOW, request.atime, request.atimensec)?;
    let last_modification = time(abi::FATTR_MTIME, abi::FATTR_MTIME_NOW, request.mtime, request.mtimensec)?;
    let times = Timestamps { last_access, last_modification };
    rustix::fs::utimensat(node, c"", &times, AtFlags::EMPTY_PATH)
}
