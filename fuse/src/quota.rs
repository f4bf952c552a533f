//! How much a VM may add to an export.
//!
//! What counts is what a file takes on the disk, up to its end, and what a directory does besides its first block. They are asked
//! for before and after whatever can allocate: for directories, that is whatever makes, moves or removes a name. A file's space is
//! credited when its last name was removed by the guest and nothing of the guest holds it any more: one that is removed and still
//! open takes its space as before. Never is more credited than was added, so that removing what was there before gives no room.
//!
//! What a file takes is what the host's file system says of it. Overlayfs says the same of a file before and after it is copied
//! to the upper layer, and file systems that share blocks between files the same of one whose blocks are its own by now: on
//! those, what was there before may be taken once more.

use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fd::AsFd;
use rustix::fs::{FileType, Statx};
use rustix::io::Errno;

use crate::node::{file_type, stat};

/// The unit in which the host's file systems allocate.
const BLOCK: u64 = 4096;
/// What an inode counts besides its data: itself, its name, a link's target, a directory's first block.
const INODE: u64 = 4096;

/// What may be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Quota {
    /// Bytes on the disk.
    pub bytes: Option<u64>,
    /// Files, directories and others.
    pub inodes: Option<u64>,
}

/// What was added so far. Shared with the inodes, which tell it when they are gone.
#[derive(Debug)]
pub struct Account {
    quota: Quota,
    bytes: AtomicU64,
    inodes: AtomicU64,
}

/// What a write may do, and what the file took before.
#[derive(Debug, Clone, Copy)]
pub struct Allowance {
    /// How many bytes may be written.
    pub length: u64,
    before: u64,
}

impl Account {
    /// Nothing added yet.
    pub fn new(quota: Quota) -> Self {
        Self { quota, bytes: AtomicU64::new(0), inodes: AtomicU64::new(0) }
    }

    /// How many bytes may still be added.
    pub fn bytes_left(&self) -> u64 {
        self.quota.bytes.map_or(u64::MAX, |max| max.saturating_sub(self.bytes.load(Ordering::Relaxed)))
    }

    /// How many inodes may still be added.
    pub fn inodes_left(&self) -> u64 {
        self.quota.inodes.map_or(u64::MAX, |max| max.saturating_sub(self.inodes.load(Ordering::Relaxed)))
    }

    /// How many inodes were added.
    pub(crate) fn inodes(&self) -> u64 {
        self.inodes.load(Ordering::Relaxed)
    }

    /// Takes over what was added before.
    pub(crate) fn go_on_at(&self, bytes: u64, inodes: u64) {
        self.bytes.store(bytes, Ordering::Relaxed);
        self.inodes.store(inodes, Ordering::Relaxed);
    }

    /// An account of its own that stands where this one does.
    pub(crate) fn copy(&self) -> Self {
        let copy = Self::new(self.quota);
        copy.go_on_at(self.bytes(), self.inodes());
        copy
    }

    /// What may be added in all.
    pub fn quota(&self) -> Quota {
        self.quota
    }

    /// How many bytes were added.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Counts an inode that is about to be made.
    ///
    /// # Errors
    /// `ENOSPC` when it would be one too many.
    pub fn add_inode(&self) -> Result<(), Errno> {
        if self.inodes_left() == 0 || self.bytes_left() < INODE {
            return Err(Errno::NOSPC);
        }
        self.inodes.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(INODE, Ordering::Relaxed);
        Ok(())
    }

    /// Takes back an inode that was not made.
    pub fn cancel_inode(&self) {
        subtract(&self.inodes, 1);
        subtract(&self.bytes, INODE);
    }

    /// Counts bytes that belong to no file's data.
    ///
    /// # Errors
    /// `ENOSPC` when they would be too many.
    pub fn add_bytes(&self, bytes: u64) -> Result<(), Errno> {
        if self.bytes_left() < bytes {
            return Err(Errno::NOSPC);
        }
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Takes bytes back that belonged to no file's data.
    pub fn subtract_bytes(&self, bytes: u64) {
        subtract(&self.bytes, bytes);
    }

    /// How many of `length` bytes may be written to a file at an offset (at its end without one).
    ///
    /// # Errors
    /// `ENOSPC` when none.
    pub fn allow(&self, file: impl AsFd, offset: Option<u64>, length: u64) -> Result<Allowance, Errno> {
        let stat = stat(file)?;
        let before = taken(&stat);
        let end = offset.unwrap_or(stat.stx_size).saturating_add(length);
        let left = self.bytes_left();
        let whole = length.saturating_add(2 * BLOCK) <= left
            // What is there is only overwritten; a file with holes takes less than its size.
            || (end <= stat.stx_size && stat.stx_blocks.saturating_mul(512) >= stat.stx_size);
        let allowed = if whole { length } else { length.min(left.saturating_sub(BLOCK)) };
        if allowed == 0 && length > 0 { Err(Errno::NOSPC) } else { Ok(Allowance { length: allowed, before }) }
    }

    /// What a file takes now, to be settled after something that frees.
    ///
    /// # Errors
    /// What the system says.
    pub fn before(&self, file: impl AsFd) -> Result<Allowance, Errno> {
        Ok(Allowance { length: 0, before: taken(&stat(file)?) })
    }

    /// Whether there is room for what a file took since then.
    ///
    /// # Errors
    /// What the system says.
    pub fn has_room_since(&self, file: impl AsFd, allowance: Allowance) -> Result<bool, Errno> {
        Ok(taken(&stat(file)?).saturating_sub(allowance.before) <= self.bytes_left())
    }

    /// Counts what a file took or gave back since then.
    pub fn settle(&self, file: impl AsFd, allowance: Allowance) {
        // If it cannot be asked, what could have been added was.
        let after = stat(file).map_or(allowance.before.saturating_add(allowance.length), |stat| taken(&stat));
        match after.checked_sub(allowance.before) {
            Some(added) => drop(self.bytes.fetch_add(added, Ordering::Relaxed)),
            None => subtract(&self.bytes, allowance.before - after),
        }
    }

    /// Counts what an inode takes that was just made.
    pub fn add_made(&self, stat: &Statx) {
        self.bytes.fetch_add(taken(stat), Ordering::Relaxed);
    }

    /// Whether a name may be added to a directory, which can take a block more then.
    ///
    /// # Errors
    /// `ENOSPC` when it may not.
    pub fn allow_name(&self) -> Result<(), Errno> {
        if self.bytes_left() < BLOCK { Err(Errno::NOSPC) } else { Ok(()) }
    }

    /// Credits an inode that is gone.
    pub fn credit(&self, stat: &Statx) {
        subtract(&self.inodes, 1);
        subtract(&self.bytes, taken(stat).saturating_add(INODE));
    }
}

/// What an inode takes on the disk besides what each one counts.
fn taken(stat: &Statx) -> u64 {
    let blocks = stat.stx_blocks.saturating_mul(512);
    match file_type(stat) {
        // What is allocated behind a file's end is the host's own doing and does not stay.
        FileType::RegularFile => blocks.min(stat.stx_size.saturating_add(BLOCK - 1) / BLOCK * BLOCK),
        FileType::Directory => blocks.saturating_sub(BLOCK),
        _ => 0,
    }
}

fn subtract(value: &AtomicU64, amount: u64) {
    // Always succeeds.
    let _ = value.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |value| Some(value.saturating_sub(amount)));
}
