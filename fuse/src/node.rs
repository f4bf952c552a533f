//! What the guest knows of: inodes by the number it was told, each held open so that it stays the same one.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fuse_abi::linux::FUSE_ROOT_ID;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Statx, StatxFlags};
use rustix::io::Errno;

use crate::quota::Account;

/// Asks the host about what is behind a descriptor.
///
/// # Errors
/// What the system says.
pub fn stat(fd: impl AsFd) -> Result<Statx, Errno> {
    rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)
}

/// The type of what was asked about.
pub fn file_type(stat: &Statx) -> FileType {
    FileType::from_raw_mode(stat.stx_mode.into())
}

/// An inode of the host, by device and number. It cannot be another one's while a descriptor of it is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// The device: major and minor number.
    pub device: (u32, u32),
    /// The inode's number on it.
    pub ino: u64,
}

impl Key {
    /// The key of what was asked about.
    pub fn of(stat: &Statx) -> Self {
        Self { device: (stat.stx_dev_major, stat.stx_dev_minor), ino: stat.stx_ino }
    }
}

/// An inode that is held: by the guest's knowledge of it, by its open files, by its locks.
#[derive(Debug)]
pub struct Node {
    /// It, without a right to its data (`O_PATH`).
    fd: OwnedFd,
    key: Key,
    file_type: FileType,
    /// Whether the guest removed its last name.
    removed: AtomicBool,
    account: Option<Arc<Account>>,
}

impl Node {
    /// Holds what is behind `fd`.
    pub fn new(fd: OwnedFd, stat: &Statx, account: Option<Arc<Account>>) -> Self {
        Self { fd, key: Key::of(stat), file_type: file_type(stat), removed: AtomicBool::new(false), account }
    }

    /// Which inode it is.
    pub fn key(&self) -> Key {
        self.key
    }

    /// Its type, which never changes.
    pub fn file_type(&self) -> FileType {
        self.file_type
    }

    /// Notes that a name of it was removed: if it was the last one, its space is credited when nothing holds it any more.
    pub fn name_removed(&self) {
        self.removed.store(true, Ordering::Relaxed);
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(account) = &self.account
            && self.removed.load(Ordering::Relaxed)
            && let Ok(stat) = stat(&self.fd)
            && stat.stx_nlink == 0
        {
            account.credit(&stat);
        }
    }
}

#[derive(Debug)]
struct Known {
    node: Arc<Node>,
    /// How many replies have named it that were not taken back.
    lookups: u64,
}

/// The inodes that the guest knows.
#[derive(Debug)]
pub struct Nodes {
    known: HashMap<u64, Known>,
    numbers: HashMap<Key, u64>,
    next: u64,
    max: usize,
}

impl Nodes {
    /// No inodes yet, and room for `max`. The root is not one of them.
    pub fn new(max: usize) -> Self {
        Self { known: HashMap::new(), numbers: HashMap::new(), next: FUSE_ROOT_ID + 1, max }
    }

    /// The inode with this number.
    ///
    /// # Errors
    /// `ESTALE` when the guest does not know of it.
    pub fn get(&self, number: u64) -> Result<Arc<Node>, Errno> {
        self.known.get(&number).map(|known| Arc::clone(&known.node)).ok_or(Errno::STALE)
    }

    /// The inode with this key, if the guest knows it.
    pub fn find(&self, key: Key) -> Option<Arc<Node>> {
        let number = self.numbers.get(&key)?;
        self.known.get(number).map(|known| Arc::clone(&known.node))
    }

    /// Notes that the guest is told of an inode, and gives the number to tell.
    ///
    /// # Errors
    /// `ENFILE` when it knows of as many as it may.
    pub fn remember(&mut self, node: Arc<Node>) -> Result<u64, Errno> {
        if let Some(number) = self.numbers.get(&node.key())
            && let Some(known) = self.known.get_mut(number)
        {
            known.lookups = known.lookups.saturating_add(1);
            return Ok(*number);
        }
        if self.known.len() >= self.max {
            return Err(Errno::NFILE);
        }
        let number = self.next;
        self.next += 1;
        self.numbers.insert(node.key(), number);
        self.known.insert(number, Known { node, lookups: 1 });
        Ok(number)
    }

    /// The guest takes back that it was told of an inode, so many times. Says whether it does not know of it any more.
    pub fn forget(&mut self, number: u64, count: u64) -> bool {
        let Some(known) = self.known.get_mut(&number) else { return false };
        known.lookups = known.lookups.saturating_sub(count);
        if known.lookups > 0 {
            return false;
        }
        self.numbers.remove(&known.node.key());
        self.known.remove(&number);
        true
    }

    /// All of them, with their numbers and how many replies have named them.
    pub(crate) fn each(&self) -> impl Iterator<Item = (u64, &Arc<Node>, u64)> {
        self.known.iter().map(|(number, known)| (*number, &known.node, known.lookups))
    }

    /// The number of the next one.
    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    /// Sets the number of the next one.
    pub(crate) fn go_on_at(&mut self, next: u64) {
        self.next = next;
    }

    /// Notes one by a number that the guest knows already. Says whether that is below the next one, and neither the number nor
    /// the inode is there already, and there is room.
    pub(crate) fn put_back(&mut self, number: u64, node: Arc<Node>, lookups: u64) -> bool {
        let fits = (FUSE_ROOT_ID + 1..self.next).contains(&number) && lookups > 0 && self.known.len() < self.max;
        fits && self.numbers.insert(node.key(), number).is_none()
            && self.known.insert(number, Known { node, lookups }).is_none()
    }

    /// How many the guest knows.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether the guest knows none.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Forgets all of them, and gives them. Their numbers are not used again.
    pub(crate) fn take(&mut self) -> impl Send + Debug + use<> {
        self.numbers.clear();
        // Not another map, which would ask the system for randomness.
        self.known.drain().collect::<Vec<_>>()
    }
}
