//! Locks that hold for everybody who uses the files.
//!
//! flock(2) is taken on the guest's own open file. POSIX locks belong to a process and an inode: each such pair has an open file
//! description here, and its locks are that description's (`F_OFD_SETLK`). So the host's kernel arbitrates, and a file that is
//! closed is unlocked. Who has to wait does so in a thread, which only tells that it is over: [`Locks::event`].
//!
//! The host's kernel keeps each range that is locked in memory of its own, charged to nobody: how many there are is counted and
//! bounded.
//!
//! A wait cannot be called off. Its thread, which holds the open file, ends when it has the lock; after a reset it lets go of
//! it at once.

mod ranges;

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use fuse_abi::linux::fuse_file_lock;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use self::ranges::Ranges;
use crate::export::Limits;
use crate::handle::OpenFile;
use crate::node::Node;

/// The stack of a thread that waits: it makes one call.
const STACK: usize = 64 << 10;

/// A number that names a wait.
pub type Ticket = u64;

/// An open file whose locks are those of one process of the guest.
#[derive(Debug)]
pub struct Owner {
    /// The descriptor.
    pub fd: OwnedFd,
    /// What was opened.
    pub node: Arc<Node>,
}

/// A lock to be taken.
#[derive(Debug, Clone)]
pub enum Wanted {
    /// A POSIX lock.
    Range(Arc<Owner>, libc::flock),
    /// A lock of flock(2).
    Whole(Arc<OpenFile>, Kind),
}

/// What kind of lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Several may have it.
    Shared,
    /// One may have it.
    Exclusive,
    /// None.
    Unlock,
}

impl Wanted {
    /// Takes the lock if it is free.
    ///
    /// # Errors
    /// `EAGAIN` when it is not; what the system says.
    pub fn try_take(&self) -> Result<(), Errno> {
        let outcome = match self {
            Self::Range(owner, range) => control(owner.fd.as_fd(), FcntlArg::F_OFD_SETLK(range)),
            Self::Whole(file, kind) => rustix::fs::flock(
                &**file,
                match kind {
                    Kind::Shared => FlockOperation::NonBlockingLockShared,
                    Kind::Exclusive => FlockOperation::NonBlockingLockExclusive,
                    Kind::Unlock => FlockOperation::NonBlockingUnlock,
                },
            ),
        };
        self.note(outcome)
    }

    /// Notes what is locked now. A lock that is to be of another kind may be lost when it is not had at once.
    fn note(&self, outcome: Result<(), Errno>) -> Result<(), Errno> {
        if let (Self::Whole(file, kind), Ok(())) = (self, outcome) {
            file.set_locked(*kind != Kind::Unlock);
        }
        outcome
    }

    fn wait(&self) -> Result<(), Errno> {
        loop {
            let outcome = match self {
                Self::Range(owner, range) => control(owner.fd.as_fd(), FcntlArg::F_OFD_SETLKW(range)),
                Self::Whole(file, kind) => rustix::fs::flock(
                    &**file,
                    match kind {
                        Kind::Shared => FlockOperation::LockShared,
                        Kind::Exclusive => FlockOperation::LockExclusive,
                        Kind::Unlock => FlockOperation::Unlock,
                    },
                ),
            };
            if outcome != Err(Errno::INTR) {
                return self.note(outcome);
            }
        }
    }
}

fn control(fd: BorrowedFd<'_>, argument: FcntlArg<'_>) -> Result<(), Errno> {
    fcntl(fd, argument).map(drop).map_err(|error| Errno::from_raw_os_error(error as i32))
}

/// The kind of lock that the guest means.
///
/// # Errors
/// `EINVAL` when it means none.
pub fn kind(lock: &fuse_file_lock) -> Result<Kind, Errno> {
    match libc::c_int::try_from(lock.type_) {
        Ok(libc::F_RDLCK) => Ok(Kind::Shared),
        Ok(libc::F_WRLCK) => Ok(Kind::Exclusive),
        Ok(libc::F_UNLCK) => Ok(Kind::Unlock),
        _ => Err(Errno::INVAL),
    }
}

/// The range that the guest means; both of its ends belong to it.
///
/// # Errors
/// `EINVAL` when it is none.
pub fn range(lock: &fuse_file_lock) -> Result<libc::flock, Errno> {
    let invalid = |_| Errno::INVAL;
    let (start, end) = (i64::try_from(lock.start).map_err(invalid)?, i64::try_from(lock.end).map_err(invalid)?);
    let length = match end.checked_sub(start) {
        _ if end == i64::MAX => 0,
        Some(distance @ 0..) => distance + 1,
        _ => return Err(Errno::INVAL),
    };
    let l_type = match kind(lock)? {
        Kind::Shared => libc::F_RDLCK,
        Kind::Exclusive => libc::F_WRLCK,
        Kind::Unlock => libc::F_UNLCK,
    };
    let l_type = i16::try_from(l_type).map_err(|_| Errno::INVAL)?;
    let l_whence = i16::try_from(libc::SEEK_SET).map_err(|_| Errno::INVAL)?;
    Ok(libc::flock { l_type, l_whence, l_start: start, l_len: length, l_pid: 0 })
}

/// Who is in the way of a lock, in the guest's words.
///
/// # Errors
/// What the system says.
pub fn conflict(owner: &Owner, mut wanted: libc::flock) -> Result<fuse_file_lock, Errno> {
    control(owner.fd.as_fd(), FcntlArg::F_OFD_GETLK(&mut wanted))?;
    let start = u64::try_from(wanted.l_start).unwrap_or(0);
    let end = match u64::try_from(wanted.l_len) {
        Ok(length @ 1..) => start.saturating_add(length - 1),
        _ => i64::MAX.cast_unsigned(),
    };
    // Whoever it is has no number in the guest.
    Ok(fuse_file_lock { start, end, type_: wanted.l_type.cast_unsigned().into(), pid: 0 })
}

/// What the threads that wait tell.
#[derive(Debug)]
struct Over {
    tickets: Mutex<Vec<(Ticket, Result<(), Errno>)>>,
    event: OwnedFd,
    threads: AtomicUsize,
}

/// An owner of locks as the guest names it: a process, or one open file.
#[derive(Debug)]
struct Named {
    owner: Arc<Owner>,
    /// The open file by which it has locked, if it is one alone.
    handle: Option<u64>,
    ranges: Ranges,
}

/// A POSIX lock that is waited for.
#[derive(Debug)]
struct Awaited {
    inode: u64,
    process: u64,
    range: libc::flock,
    /// Whether its process has locked or unlocked something meanwhile: who knows whether before it was granted or afterwards.
    disturbed: bool,
}

/// The locks of a guest.
#[derive(Debug)]
pub struct Locks {
    /// By inode, then by process.
    owners: HashMap<u64, HashMap<u64, Named>>,
    count: usize,
    /// How many ranges they have locked.
    ranges: usize,
    awaited: HashMap<Ticket, Awaited>,
    over: Arc<Over>,
    next: Ticket,
    limits: Limits,
}

impl Locks {
    /// No locks, and room for as many as `limits` say.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new(limits: Limits) -> Result<Self, Errno> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let over = Over { tickets: Mutex::default(), event, threads: AtomicUsize::new(0) };
        let (owners, awaited) = (HashMap::new(), HashMap::new());
        Ok(Self { owners, count: 0, ranges: 0, awaited, over: Arc::new(over), next: 0, limits })
    }

    /// The descriptor that is readable when waits are over.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.over.event.as_fd()
    }

    /// The open file of a process on an inode, if it has one.
    pub fn owner(&self, inode: u64, process: u64) -> Option<Arc<Owner>> {
        self.owners.get(&inode)?.get(&process).map(|named| Arc::clone(&named.owner))
    }

    /// The open file of a process on an inode, made by `open` if it has none, to be locked by something that the guest has open.
    ///
    /// # Errors
    /// `ENOLCK` when there are as many as there may be; what `open` says.
    pub fn owner_or(
        &mut self,
        inode: u64,
        process: u64,
        handle: u64,
        open: impl FnOnce() -> Result<Owner, Errno>,
    ) -> Result<Arc<Owner>, Errno> {
        if let Some(named) = self.owners.get_mut(&inode).and_then(|processes| processes.get_mut(&process)) {
            named.handle = named.handle.filter(|first| *first == handle);
            return Ok(Arc::clone(&named.owner));
        }
        if self.count >= self.limits.lock_owners {
            return Err(Errno::NOLCK);
        }
        let owner = Arc::new(open()?);
        let named = Named { owner: Arc::clone(&owner), handle: Some(handle), ranges: Ranges::default() };
        self.owners.entry(inode).or_default().insert(process, named);
        self.count += 1;
        Ok(owner)
    }

    /// Releases all that a process has locked of an inode.
    pub fn release(&mut self, inode: u64, process: u64) {
        self.disturb(inode, process);
        let Some(processes) = self.owners.get_mut(&inode) else { return };
        let Some(Named { owner, ranges, .. }) = processes.get_mut(&process) else { return };
        self.ranges -= ranges.clear();
        if Arc::strong_count(owner) > 1 {
            // It waits for more, which it will have by the same open file.
            if let Ok(everything) = range(&fuse_file_lock { end: i64::MAX.cast_unsigned(), ..UNLOCK }) {
                let _ = control(owner.fd.as_fd(), FcntlArg::F_OFD_SETLK(&everything));
            }
            return;
        }
        processes.remove(&process);
        self.count -= 1;
        if processes.is_empty() {
            self.owners.remove(&inode);
        }
    }

    /// Releases all that was locked of an inode by something that the guest had open, and by nothing else: nobody is left that
    /// could have those locks. Those of a process are gone by then. Those of an open file (`F_OFD_SETLK` in the guest) are
    /// not, since what a guest says when a file is closed is which process does that.
    pub fn closed(&mut self, inode: u64, handle: u64) {
        let Some(processes) = self.owners.get(&inode) else { return };
        let by_it = processes.iter().filter(|(_, named)| named.handle == Some(handle));
        for process in by_it.map(|(process, _)| *process).collect::<Vec<_>>() {
            self.release(inode, process);
        }
    }

    /// Releases all locks of an inode that the guest does not know of any more.
    pub fn forget(&mut self, inode: u64) {
        if let Some(processes) = self.owners.remove(&inode) {
            self.count -= processes.len();
            self.ranges -= processes.values().map(|named| named.ranges.count()).sum::<usize>();
        }
    }

    /// Gives what holds the locks, to be released.
    pub(crate) fn take(&mut self) -> impl Send + Debug + use<> {
        (self.count, self.ranges) = (0, 0);
        // Who is granted one from now on is nobody that is known here.
        self.awaited.clear();
        // Not another map, which would ask the system for randomness.
        self.owners.drain().collect::<Vec<_>>()
    }

    /// Whether a process may have a lock besides those that there are.
    ///
    /// # Errors
    /// `ENOLCK` when more ranges might be locked then than may be.
    pub fn check(&self, inode: u64, process: u64, range: &libc::flock) -> Result<(), Errno> {
        let named = self.owners.get(&inode).and_then(|processes| processes.get(&process));
        let growth = named.map_or(0, |named| named.ranges.growth(range));
        if growth > 0 && self.ranges + growth > self.limits.lock_ranges { Err(Errno::NOLCK) } else { Ok(()) }
    }

    /// Notes that a process was granted a lock, or has let go of one.
    pub fn granted(&mut self, inode: u64, process: u64, range: &libc::flock) {
        self.disturb(inode, process);
        if let Some(named) = self.owners.get_mut(&inode).and_then(|processes| processes.get_mut(&process)) {
            self.ranges -= named.ranges.count();
            named.ranges.note(range);
            self.ranges += named.ranges.count();
        }
    }

    fn disturb(&mut self, inode: u64, process: u64) {
        for awaited in self.awaited.values_mut() {
            awaited.disturbed |= (awaited.inode, awaited.process) == (inode, process);
        }
    }

    /// Notes what was waited for, and gives what it has come to. Where nobody knows what the kernel has by now, it is locked once
    /// more, as if what came meanwhile had come before; if that cannot be had any more, nothing of it is.
    fn had(&mut self, Awaited { inode, process, mut range, disturbed }: Awaited) -> Result<(), Errno> {
        let mut outcome = Ok(());
        if disturbed && let Some(owner) = self.owner(inode, process) {
            let again = Wanted::Range(Arc::clone(&owner), range).try_take();
            if again.is_err() {
                range.l_type = UNLOCK.type_ as i16;
                outcome = control(owner.fd.as_fd(), FcntlArg::F_OFD_SETLK(&range)).and(Err(Errno::NOLCK));
            }
        }
        self.granted(inode, process, &range);
        outcome
    }

    /// Notes that a wait is for a lock of a process, which is noted when it is granted.
    pub fn awaits(&mut self, ticket: Ticket, inode: u64, process: u64, range: libc::flock) {
        self.awaited.insert(ticket, Awaited { inode, process, range, disturbed: false });
    }

    /// Makes [`Locks::event`] readable.
    pub(crate) fn wake(&self) {
        // Fails when the counter is at its maximum, and then it is readable already.
        let _ = rustix::io::write(&self.over.event, &1u64.to_ne_bytes());
    }

    /// Waits for a lock in a thread. When that is over, [`Locks::over`] tells.
    ///
    /// # Errors
    /// `ENOLCK` when as many wait as may, or the system has no thread left.
    pub fn wait(&mut self, wanted: Wanted) -> Result<Ticket, Errno> {
        if self.over.threads.load(Ordering::Acquire) >= self.limits.lock_waiters {
            return Err(Errno::NOLCK);
        }
        self.over.threads.fetch_add(1, Ordering::AcqRel);
        let ticket = self.next;
        self.next += 1;
        let over = Arc::clone(&self.over);
        let wait = move || {
            let outcome = wanted.wait();
            // Before it is told: what is told may lead to the file being closed.
            drop(wanted);
            over.threads.fetch_sub(1, Ordering::AcqRel);
            over.tickets.lock().unwrap_or_else(PoisonError::into_inner).push((ticket, outcome));
            // Fails when the counter is at its maximum, and then it is readable already.
            let _ = rustix::io::write(&over.event, &1u64.to_ne_bytes());
        };
        match thread::Builder::new().name("lock".into()).stack_size(STACK).spawn(wait) {
            Ok(_) => Ok(ticket),
            Err(_) => {
                self.over.threads.fetch_sub(1, Ordering::AcqRel);
                Err(Errno::NOLCK)
            }
        }
    }

    /// The waits that are over since the last call.
    pub fn over(&mut self) -> Vec<(Ticket, Result<(), Errno>)> {
        let _ = rustix::io::read(&self.over.event, &mut [0u8; 8]);
        let mut over = std::mem::take(&mut *self.over.tickets.lock().unwrap_or_else(PoisonError::into_inner));
        for (ticket, outcome) in &mut over {
            if let Some(awaited) = self.awaited.remove(ticket)
                && outcome.is_ok()
            {
                *outcome = self.had(awaited);
            }
        }
        over
    }

    /// How many processes have locks, each with an inode.
    pub(crate) fn owners(&self) -> usize {
        self.count
    }

    /// How many ranges are locked.
    pub(crate) fn ranges(&self) -> usize {
        self.ranges
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.over.threads.load(Ordering::Relaxed)
    }
}

const UNLOCK: fuse_file_lock = fuse_file_lock { start: 0, end: 0, type_: libc::F_UNLCK as u32, pid: 0 };
