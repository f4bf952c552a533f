//! What the guest has open: files and directories by the number it was told.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::node::Node;

/// An open file. Its open file description is the guest's, so that flock(2) works on it.
#[derive(Debug)]
pub struct OpenFile {
    /// The descriptor.
    pub fd: OwnedFd,
    /// What was opened.
    pub node: Arc<Node>,
    /// How it was opened: for reading, writing or both, and whether writes wait for the disk.
    pub flags: OFlags,
    /// Whether it has a lock of flock(2).
    locked: AtomicBool,
}

impl OpenFile {
    /// What is open without a lock.
    pub fn new(fd: OwnedFd, node: Arc<Node>, flags: OFlags) -> Self {
        Self { fd, node, flags, locked: AtomicBool::new(false) }
    }

    /// Whether it can be written to.
    pub fn is_writable(&self) -> bool {
        self.flags.intersects(OFlags::WRONLY | OFlags::RDWR)
    }

    /// Notes that it has a lock, or has none any more.
    pub fn set_locked(&self, locked: bool) {
        self.locked.store(locked, Ordering::Relaxed);
    }

    /// Whether it has a lock.
    pub fn is_locked(&self) -> bool {
        self.locked.load(Ordering::Relaxed)
    }
}

impl AsFd for OpenFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// An open directory.
#[derive(Debug)]
pub enum Directory {
    /// One of the host.
    Host {
        /// The descriptor.
        fd: Arc<OwnedFd>,
        /// Which offset its next entry has, if that is known.
        position: Option<u64>,
    },
    /// The one in which a single file is shown.
    Shown,
}

/// What a number stands for.
#[derive(Debug)]
pub(crate) enum Handle {
    File(Arc<OpenFile>),
    Directory(Directory),
}

/// What the guest has open.
#[derive(Debug)]
pub struct Handles {
    open: HashMap<u64, Handle>,
    next: u64,
    max: usize,
}

impl Handles {
    /// Nothing open, and room for `max`.
    pub fn new(max: usize) -> Self {
        Self { open: HashMap::new(), next: 1, max }
    }

    /// Whether there is room for one more: to be asked before anything is opened.
    ///
    /// # Errors
    /// `EMFILE` when there is not.
    pub fn check(&self) -> Result<(), Errno> {
        if self.open.len() < self.max { Ok(()) } else { Err(Errno::MFILE) }
    }

    fn insert(&mut self, handle: Handle) -> u64 {
        let number = self.next;
        self.next += 1;
        self.open.insert(number, handle);
        number
    }

    /// Notes an open file and gives the number to tell.
    pub fn add_file(&mut self, file: OpenFile) -> u64 {
        self.insert(Handle::File(Arc::new(file)))
    }

    /// Notes an open directory and gives the number to tell.
    pub fn add_directory(&mut self, directory: Directory) -> u64 {
        self.insert(Handle::Directory(directory))
    }

    /// The open file with this number.
    ///
    /// # Errors
    /// `EBADF` when there is none.
    pub fn file(&self, number: u64) -> Result<Arc<OpenFile>, Errno> {
        match self.open.get(&number) {
            Some(Handle::File(file)) => Ok(Arc::clone(file)),
            _ => Err(Errno::BADF),
        }
    }

    /// The open directory with this number.
    ///
    /// # Errors
    /// `EBADF` when there is none.
    pub fn directory(&mut self, number: u64) -> Result<&mut Directory, Errno> {
        match self.open.get_mut(&number) {
            Some(Handle::Directory(directory)) => Ok(directory),
            _ => Err(Errno::BADF),
        }
    }

    /// Closes what has this number, if anything.
    pub fn close(&mut self, number: u64) {
        self.open.remove(&number);
    }

    /// All that is open, with its number.
    pub(crate) fn each(&self) -> impl Iterator<Item = (u64, &Handle)> {
        self.open.iter().map(|(number, handle)| (*number, handle))
    }

    /// The number of what is opened next.
    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    /// Sets the number of what is opened next.
    pub(crate) fn go_on_at(&mut self, next: u64) {
        self.next = next;
    }

    /// Notes what is open by a number that the guest knows already. Says whether it is below the next one, and nothing else has
    /// it, and there is room.
    pub(crate) fn put_back(&mut self, number: u64, handle: Handle) -> bool {
        number < self.next && self.check().is_ok() && self.open.insert(number, handle).is_none()
    }

    /// How many are open.
    pub fn len(&self) -> usize {
        self.open.len()
    }

    /// Whether nothing is open.
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Gives all, to be closed. Their numbers are not used again.
    pub(crate) fn take(&mut self) -> impl Send + Debug + use<> {
        // Not another map, which would ask the system for randomness.
        self.open.drain().collect::<Vec<_>>()
    }
}
