//! Locks: POSIX ones by process and inode, those of flock(2) by open file.

use std::sync::Arc;

use fuse_abi::linux as abi;
use nix::libc::flock;
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::{Call, Done, Outcome};
use crate::lock::{Kind, Owner, Wanted, conflict, kind, range};
use crate::server::Server;
use crate::wire::put;

impl Server {
    /// Opens an inode for the locks of one process, which it asks for by a handle.
    fn lock_owner(&mut self, number: u64, process: u64, handle: u64) -> Result<Arc<Owner>, Errno> {
        let node = self.node(number)?;
        if node.file_type() != FileType::RegularFile {
            return Err(Errno::BADF);
        }
        let Self { export, locks, .. } = self;
        locks.owner_or(number, process, handle, || {
            // Writable where that is possible: a lock for writing needs it. A program that is being executed, or somebody
            // else's file, may still be locked for reading.
            let writable = if export.options.read_only { Err(Errno::ROFS) } else { export.open(&node, OFlags::RDWR) };
            let fd = writable.or_else(|_| export.open(&node, OFlags::RDONLY))?;
            Ok(Owner { fd, node: Arc::clone(&node) })
        })
    }

    pub(super) fn check_locks(&self) -> Result<(), Errno> {
        if self.export.options.shared_locks { Ok(()) } else { Err(Errno::NOSYS) }
    }

    pub(super) fn getlk(&mut self, mut call: Call<'_>) -> Outcome {
        let request: abi::fuse_lk_in = call.arguments.take()?;
        self.check_locks()?;
        let wanted = range(&request.lk)?;
        if kind(&request.lk)? == Kind::Unlock {
            return Err(Errno::INVAL);
        }
        let known = self.locks.owner(call.header.nodeid, request.owner).is_some();
        let owner = self.lock_owner(call.header.nodeid, request.owner, request.fh)?;
        let found = conflict(&owner, wanted);
        drop(owner);
        if !known {
            // Who only asks holds nothing.
            self.locks.release(call.header.nodeid, request.owner);
        }
        put(call.reply, &abi::fuse_lk_out { lk: found? });
        Ok(Done::Reply)
    }

    pub(super) fn setlk(&mut self, mut call: Call<'_>, wait: bool) -> Outcome {
        let request: abi::fuse_lk_in = call.arguments.take()?;
        self.check_locks()?;
        let kind = kind(&request.lk)?;
        if request.lk_flags & abi::FUSE_LK_FLOCK != 0 {
            let wanted = Wanted::Whole(self.handles.file(request.fh)?, kind);
            return match wanted.try_take() {
                Err(Errno::AGAIN) if wait => self.locks.wait(wanted).map(Done::Waiting),
                outcome => outcome.map(|()| Done::Reply),
            };
        }
        let (inode, range) = (call.header.nodeid, range(&request.lk)?);
        let known = self.locks.owner(inode, request.owner);
        let is_new = known.is_none();
        let owner = match (kind, known) {
            (Kind::Unlock, Some(owner)) => owner,
            (Kind::Unlock, None) => return Ok(Done::Reply),
            _ => self.lock_owner(inode, request.owner, request.fh)?,
        };
        let outcome = self.take_range(owner, (inode, request.owner), range, wait);
        let has_none = match kind {
            Kind::Unlock => outcome.is_ok() && (range.l_start, range.l_len) == (0, 0),
            _ => outcome.is_err() && is_new,
        };
        if has_none {
            // Whoever has no lock is no owner: he would keep a descriptor, and the VM from being saved.
            self.locks.release(inode, request.owner);
        }
        outcome
    }

    fn take_range(&mut self, owner: Arc<Owner>, (inode, process): (u64, u64), range: flock, wait: bool) -> Outcome {
        self.locks.check(inode, process, &range)?;
        let wanted = Wanted::Range(owner, range);
        match wanted.try_take() {
            Ok(()) => {
                self.locks.granted(inode, process, &range);
                Ok(Done::Reply)
            }
            Err(Errno::AGAIN | Errno::ACCESS) if wait => {
                let ticket = self.locks.wait(wanted)?;
                self.locks.awaits(ticket, inode, process, range);
                Ok(Done::Waiting(ticket))
            }
            Err(error) => Err(error),
        }
    }
}
