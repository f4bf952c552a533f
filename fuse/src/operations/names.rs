//! What makes, moves and removes names.

use std::sync::Arc;

use fuse_abi::linux as abi;
use rustix::fs::{AtFlags, FileType, OFlags, RenameFlags};
use rustix::io::Errno;

use super::{Call, Done, Outcome};
use crate::handle::OpenFile;
use crate::node::Node;
use crate::server::Server;
use crate::wire::{Name, put};

/// The longest target of a symbolic link, its NUL included (`PATH_MAX`).
const TARGET_MAX: usize = 4096;

impl Server {
    /// Makes an inode in a directory: counts it, acts as the guest's user, and takes the count back if that fails.
    fn make<T>(
        &mut self,
        call: &Call<'_>,
        directory: &Node,
        make: impl FnOnce(&Self) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        self.nodes.check()?;
        let account = self.export.account.clone();
        let counted = account.as_ref().map(|account| account.add_inode()).transpose();
        self.quota(counted)?;
        let acting = self.export.options.ownership.act_as(call.header.uid, call.header.gid);
        let made = acting.and_then(|acting| {
            let made = self.in_directories(&[directory], || make(self));
            drop(acting);
            made
        });
        if let (Err(_), Some(account)) = (&made, account) {
            account.cancel_inode();
        }
        made
    }

    /// Changes the names in directories, and counts what those take more or less then.
    fn in_directories<T>(&self, directories: &[&Node], change: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        let Some(account) = &self.export.account else { return change() };
        let before = directories.iter().map(|directory| account.before(directory)).collect::<Result<Vec<_>, _>>()?;
        let changed = change();
        for (directory, before) in directories.iter().zip(before) {
            account.settle(directory, before);
        }
        changed
    }

    /// Whether there is room for a name that comes without an inode.
    fn allow_name(&mut self) -> Result<(), Errno> {
        let allowed = self.export.account.as_ref().map_or(Ok(()), |account| account.allow_name());
        self.quota(allowed)
    }

    pub(super) fn create(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_create_in = call.arguments.take()?;
        let name = call.arguments.name()?;
        let directory = self.directory(call.header.nodeid)?;
        let opening = self.opening(request.flags)?;
        self.handles.check()?;
        let mode = self.permissions(request.mode, FileType::RegularFile);
        // Always as a new one first: what is there already is looked at before it is opened.
        let made = self.make(&call, &directory, |server| server.export.create(&directory, name, opening.flags, mode));
        let (node, stat, fd) = match made {
            Ok(fd) => {
                let (node, stat) = self.export.hold(&fd)?;
                (node, stat, Some(fd))
            }
            // Nor does one that is known take any room.
            Err(error @ (Errno::EXIST | Errno::NFILE))
                if !OFlags::from_bits_retain(request.flags).contains(OFlags::EXCL) =>
            {
                let found = self.export.find(&directory, name);
                let (node, stat) = found.map_err(|missing| if error == Errno::NFILE { error } else { missing })?;
                (node, stat, None)
            }
            Err(error) => return Err(error),
        };
        let entry = self.tell(node, &stat)?;
        let opened = self.nodes.get(entry.nodeid).and_then(|node| match fd {
            Some(fd) => Ok(self.handles.add_file(OpenFile::new(fd, node, opening.flags))),
            None => self.open_node(node, opening),
        });
        let handle = opened.inspect_err(|_| {
            self.nodes.forget(entry.nodeid, 1);
        })?;
        put(call.reply, &entry);
        put(call.reply, &self.opened(handle));
        Ok(Done::Reply)
    }

    pub(super) fn tmpfile(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_create_in = call.arguments.take()?;
        let directory = self.directory(call.header.nodeid)?;
        let opening = self.opening(request.flags)?;
        self.handles.check()?;
        let mode = self.permissions(request.mode, FileType::RegularFile);
        let exclusive = OFlags::from_bits_retain(request.flags) & OFlags::EXCL;
        let flags = opening.flags | exclusive | OFlags::TMPFILE | OFlags::CLOEXEC;
        let fd = self.make(&call, &directory, |_| rustix::fs::openat(&*directory, c".", flags, mode))?;
        let (node, stat) = self.export.hold(&fd)?;
        let entry = self.tell(node, &stat)?;
        let node = self.nodes.get(entry.nodeid)?;
        // It has no name to begin with.
        node.name_removed();
        let handle = self.handles.add_file(OpenFile::new(fd, node, opening.flags));
        put(call.reply, &entry);
        put(call.reply, &self.opened(handle));
        Ok(Done::Reply)
    }

    pub(super) fn mknod(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_mknod_in = call.arguments.take()?;
        let name = call.arguments.name()?;
        let directory = self.directory(call.header.nodeid)?;
        let file_type = FileType::from_raw_mode(request.mode);
        let mode = self.permissions(request.mode, file_type);
        match file_type {
            FileType::RegularFile => {
                self.make(&call, &directory, |server| {
                    server.export.create(&directory, name, OFlags::WRONLY, mode).map(drop)
                })?;
            }
            FileType::Fifo | FileType::Socket => {
                self.make(&call, &directory, |_| rustix::fs::mknodat(&*directory, name.get(), file_type, mode, 0))?;
            }
            _ => return Err(Errno::PERM),
        }
        self.tell_made(call, &directory, name)
    }

    pub(super) fn mkdir(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_mkdir_in = call.arguments.take()?;
        let name = call.arguments.name()?;
        let directory = self.directory(call.header.nodeid)?;
        let mode = self.permissions(request.mode, FileType::Directory);
        self.make(&call, &directory, |_| rustix::fs::mkdirat(&*directory, name.get(), mode))?;
        self.tell_made(call, &directory, name)
    }

    pub(super) fn symlink(&mut self, mut call: Call<'_>) -> Outcome {
        let name = call.arguments.name()?;
        let target = call.arguments.text()?;
        if target.to_bytes_with_nul().len() > TARGET_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        let directory = self.directory(call.header.nodeid)?;
        self.make(&call, &directory, |_| rustix::fs::symlinkat(target, &*directory, name.get()))?;
        self.tell_made(call, &directory, name)
    }

    fn tell_made(&mut self, call: Call<'_>, directory: &Node, name: Name<'_>) -> Outcome {
        let (node, stat) = self.export.find(directory, name)?;
        if let Some(account) = &self.export.account {
            account.add_made(&stat);
        }
        put(call.reply, &self.tell(node, &stat)?);
        Ok(Done::Reply)
    }

    pub(super) fn link(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_link_in = call.arguments.take()?;
        let name = call.arguments.name()?;
        let directory = self.directory(call.header.nodeid)?;
        let node = self.node(request.oldnodeid)?;
        self.allow_name()?;
        self.in_directories(&[&directory], || {
            self.export.by_link(&node, |descriptors, link| {
                rustix::fs::linkat(descriptors, link, &*directory, name.get(), AtFlags::SYMLINK_FOLLOW)
            })
        })?;
        let (node, stat) = self.export.find(&directory, name)?;
        put(call.reply, &self.tell(node, &stat)?);
        Ok(Done::Reply)
    }

    pub(super) fn unlink(&mut self, mut call: Call<'_>, is_directory: bool) -> Outcome {
        let name = call.arguments.name()?;
        let directory = self.directory(call.header.nodeid)?;
        let victim = self.leaving(&directory, name)?;
        let flags = if is_directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        self.in_directories(&[&directory], || rustix::fs::unlinkat(&*directory, name.get(), flags))?;
        if let Some(victim) = victim {
            victim.name_removed();
        }
        Ok(Done::Reply)
    }

    /// Finds what is about to lose its name, if there is anything. If another one takes its place meanwhile, it keeps its link and
    /// is not credited.
    ///
    /// What the host has mounted there keeps its name: the exported tree belongs to no mount namespace, so that the kernel would
    /// not see that the name is in use, and would take the mount away with it.
    fn leaving(&self, directory: &Node, name: Name<'_>) -> Result<Option<Arc<Node>>, Errno> {
        // Where nobody counts, it does not matter what it is.
        if self.export.account.is_none() && matches!(self.export.look(directory, name), Ok(Some(_)) | Err(Errno::NOENT))
        {
            return Ok(None);
        }
        match self.export.find(directory, name) {
            Ok((node, _)) => Ok(Some(self.nodes.adopt_briefly(Arc::new(node)))),
            Err(Errno::NOENT) => Ok(None),
            Err(Errno::XDEV) => Err(Errno::BUSY),
            Err(error) => Err(error),
        }
    }

    pub(super) fn rename(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_rename_in = call.arguments.take()?;
        self.move_name(call, request.newdir, RenameFlags::empty())
    }

    pub(super) fn rename2(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_rename2_in = call.arguments.take()?;
        let flags = RenameFlags::from_bits_retain(request.flags);
        // A whiteout is a device node.
        if !(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE).contains(flags) {
            return Err(Errno::INVAL);
        }
        self.move_name(call, request.newdir, flags)
    }

    fn move_name(&mut self, mut call: Call<'_>, new_directory: u64, flags: RenameFlags) -> Outcome {
        let (old, new) = (call.arguments.name()?, call.arguments.name()?);
        let (from, to) = (self.directory(call.header.nodeid)?, self.directory(new_directory)?);
        self.leaving(&from, old)?;
        let victim = self.leaving(&to, new)?;
        if victim.is_none() {
            self.allow_name()?;
        }
        let directories = if from.key() == to.key() { &[&*from][..] } else { &[&*from, &*to] };
        self.in_directories(directories, || rustix::fs::renameat_with(&*from, old.get(), &*to, new.get(), flags))?;
        if let Some(victim) = victim.filter(|_| flags.is_empty()) {
            victim.name_removed();
        }
        Ok(Done::Reply)
    }
}
