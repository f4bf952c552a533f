//! What the guest knows of: inodes by the number it was told, each held open so that it stays the same one.
//!
//! Each inode has one [`Node`] as long as anything of the guest's holds it: what it knows, what it has open, its locks. So they
//! are counted whoever holds them, and what one takes on the disk is credited once, when the last one lets go.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

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
    /// Where it is noted, since it stands for its inode.
    noted: OnceLock<Arc<Held>>,
}

impl Node {
    /// Holds what is behind `fd`. It stands for its inode once it is adopted ([`Nodes::adopt`]).
    pub fn new(fd: OwnedFd, stat: &Statx) -> Self {
        Self { fd, key: Key::of(stat), file_type: file_type(stat), noted: OnceLock::new() }
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
        if let Some(held) = self.noted.get()
            && let Some(one) = held.lock().get_mut(&self.key)
        {
            one.removed = true;
        }
    }

    /// What is credited once nothing holds it any more, if the guest removed its last name.
    pub(crate) fn gone(&self) -> Option<Statx> {
        let removed = self.noted.get()?.lock().get(&self.key)?.removed;
        stat(self).ok().filter(|stat| removed && stat.stx_nlink == 0)
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(held) = self.noted.get() {
            held.let_go(self);
        }
    }
}

/// The inodes that anything of the guest's holds. Shared with the nodes, since the last to hold one may be a thread that waits
/// for a lock.
#[derive(Debug)]
struct Held {
    nodes: Mutex<HashMap<Key, One>>,
    account: Option<Arc<Account>>,
}

/// What stands for an inode.
#[derive(Debug)]
struct One {
    node: Weak<Node>,
    /// Whether the guest removed a name of it.
    removed: bool,
}

impl Held {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, One>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `node` stand for its inode, unless another one does; gives the one that does.
    fn adopt(self: &Arc<Self>, node: Arc<Node>, max: usize) -> Result<Arc<Node>, Errno> {
        let nodes = self.lock();
        if nodes.len() >= max && !nodes.contains_key(&node.key) {
            return Err(Errno::NFILE);
        }
        Ok(self.enter(nodes, node))
    }

    /// As [`Held::adopt`], without a limit.
    fn enter(self: &Arc<Self>, mut nodes: MutexGuard<'_, HashMap<Key, One>>, node: Arc<Node>) -> Arc<Node> {
        match nodes.entry(node.key) {
            Entry::Occupied(mut one) => match one.get().node.upgrade() {
                Some(node) => return node,
                // Another thread is about to let go of that one. What is known of the inode stays.
                None => one.get_mut().node = Arc::downgrade(&node),
            },
            Entry::Vacant(place) => drop(place.insert(One { node: Arc::downgrade(&node), removed: false })),
        }
        drop(nodes);
        // It may be noted here already.
        let _ = node.noted.set(Arc::clone(self));
        node
    }

    fn let_go(&self, node: &Node) {
        let mut nodes = self.lock();
        let Entry::Occupied(one) = nodes.entry(node.key) else { return };
        if !std::ptr::eq(one.get().node.as_ptr(), node) {
            // Another one stands for the inode by now, and will see to the rest.
            return;
        }
        let removed = one.remove().removed;
        // Still locked: before it is credited, no other one can stand for it and lose its last name.
        if let Some(account) = self.account.as_ref().filter(|_| removed)
            && let Ok(stat) = stat(node)
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
    held: Arc<Held>,
    next: u64,
    max: usize,
}

impl Nodes {
    /// No inodes yet, and room for `max` that are held. The root is not one of them. What is gone is credited to `account`.
    pub fn new(max: usize, account: Option<Arc<Account>>) -> Self {
        let held = Arc::new(Held { nodes: Mutex::default(), account });
        Self { known: HashMap::new(), numbers: HashMap::new(), held, next: FUSE_ROOT_ID + 1, max }
    }

    /// The inode with this number.
    ///
    /// # Errors
    /// `ESTALE` when the guest does not know of it.
    pub fn get(&self, number: u64) -> Result<Arc<Node>, Errno> {
        self.known.get(&number).map(|known| Arc::clone(&known.node)).ok_or(Errno::STALE)
    }

    /// Whether there is room for one more that nothing of the guest's holds yet: to be asked before it is made.
    ///
    /// # Errors
    /// `ENFILE` when there is not.
    pub fn check(&self) -> Result<(), Errno> {
        if self.held.lock().len() < self.max { Ok(()) } else { Err(Errno::NFILE) }
    }

    /// The node that stands for an inode, if anything of the guest's holds that.
    pub fn find(&self, key: Key) -> Option<Arc<Node>> {
        self.held.lock().get(&key)?.node.upgrade()
    }

    /// The node that stands for an inode: this one, if nothing of the guest's holds the inode yet.
    ///
    /// # Errors
    /// `ENFILE` when it holds as many as it may.
    pub fn adopt(&self, node: Arc<Node>) -> Result<Arc<Node>, Errno> {
        self.held.adopt(node, self.max)
    }

    /// As [`Nodes::adopt`], for what is held no longer than a request takes and so has room in any case.
    pub(crate) fn adopt_briefly(&self, node: Arc<Node>) -> Arc<Node> {
        self.held.enter(self.held.lock(), node)
    }

    /// Notes that the guest is told of an inode, and gives the number to tell.
    ///
    /// # Errors
    /// `ENFILE` when it holds as many as it may.
    pub fn remember(&mut self, node: Arc<Node>) -> Result<u64, Errno> {
        let node = self.adopt(node)?;
        if let Some(number) = self.numbers.get(&node.key())
            && let Some(known) = self.known.get_mut(number)
        {
            known.lookups = known.lookups.saturating_add(1);
            return Ok(*number);
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
        let fits = (FUSE_ROOT_ID + 1..self.next).contains(&number) && lookups > 0;
        let Some(node) = self.adopt(node).ok().filter(|_| fits) else { return false };
        self.numbers.insert(node.key(), number).is_none()
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
