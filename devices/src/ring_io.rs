//! Input and output of one file, straight into and out of guest memory, that nobody waits for: by io_uring(7).
//!
//! A ring is made with everything that it will ever need, before its thread is confined. From then on it can read, write, sync and
//! allocate its one file and nothing else (`IORING_REGISTER_RESTRICTIONS`): what a ring is asked to do does not pass the
//! system call filter of the thread that asks. Where the host has no such ring (Linux before 5.11, or a sandbox that
//! forbids it), operations are done at once, and whoever starts one waits for the disk.
//!
//! UNSAFETY: the kernel reads and writes memory by address while the monitor goes on. The addresses are of guest memory,
//! which a ring keeps mapped as long as it may use it, and their list stays where it is until the kernel is done with it.

#![expect(unsafe_code, reason = "io_uring gets guest memory by address")]

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, types};
use rustix::fs::{FallocateFlags, fallocate};
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use crate::GuestMemory;
use crate::guest_io::{advance, read_vectors, write_vectors};

/// How many operations can be under way: enough to keep a fast disk busy, with a ring of two pages.
pub const DEPTH: u16 = 64;
/// The most kernel threads that work for a ring: operations that cannot be done without waiting, such as a sync, need one.
const WORKERS_MAX: u32 = 4;
/// A piece of what [`Operation::Zero`] writes.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
/// The file's place in the ring's table of files.
const FILE: types::Fixed = types::Fixed(0);

/// Names an operation under way: below [`DEPTH`], and free again when the operation is completed.
pub type Token = u16;

/// What can be done with a file.
#[derive(Debug, Clone, Copy)]
pub enum Operation<'a> {
    /// Fill buffers from an offset.
    Read {
        /// The buffers.
        buffers: &'a [VolatileSlice<'a>],
        /// Where in the file the first one begins.
        offset: u64,
        /// How many bytes of them are filled already.
        done: usize,
    },
    /// Write buffers at an offset.
    Write {
        /// The buffers.
        buffers: &'a [VolatileSlice<'a>],
        /// Where in the file the first one begins.
        offset: u64,
        /// Whether it is only complete when it is on the disk.
        durable: bool,
    },
    /// Write zeros at an offset.
    Zero {
        /// Where in the file.
        offset: u64,
        /// How many.
        length: u32,
        /// Whether it is only complete when it is on the disk.
        durable: bool,
    },
    /// Change how a range is allocated.
    Allocate {
        /// How.
        mode: FallocateFlags,
        /// Where in the file it begins.
        offset: u64,
        /// How long it is in bytes, not zero.
        length: u64,
    },
    /// Bring what was written to the disk.
    Sync,
}

/// What a slot is to do, or still to do.
#[derive(Debug, Clone, Copy)]
enum Task {
    Read,
    Write { durable: bool },
    Allocate { mode: FallocateFlags, length: u64 },
    Sync,
}

/// An operation under way.
#[derive(Debug)]
struct Slot {
    task: Task,
    offset: u64,
    /// Where the data is; those before `first` are done.
    vectors: Vec<libc::iovec>,
    first: usize,
}

// SAFETY: the vectors are addresses; they are only used by calls whose SAFETY notes say why that is sound.
unsafe impl Send for Slot {}

/// A file, and the operations on it that are under way.
pub struct RingIo {
    file: File,
    ring: Option<IoUring>,
    /// Whether the ring is only there for what it has taken.
    retired: bool,
    /// The memory that operations use.
    memory: Option<GuestMemory>,
    slots: Vec<Slot>,
    free: Vec<Token>,
    /// Tokens whose operations the kernel was not told of yet.
    unsubmitted: VecDeque<Token>,
    /// What was done without the ring.
    ready: VecDeque<(Token, io::Result<()>)>,
}

impl std::fmt::Debug for RingIo {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (file, under_way) = (&self.file, self.under_way());
        formatter.debug_struct("RingIo").field("file", file).field("under_way", &under_way).finish_non_exhaustive()
    }
}

impl RingIo {
    /// Does without a ring, until one is made.
    pub fn new(file: File) -> Self {
        let slot = || Slot { task: Task::Sync, offset: 0, vectors: Vec::new(), first: 0 };
        Self {
            file,
            ring: None,
            retired: false,
            memory: None,
            slots: (0..DEPTH).map(|_| slot()).collect(),
            free: (0..DEPTH).rev().collect(),
            unsubmitted: VecDeque::new(),
            ready: VecDeque::new(),
        }
    }

    /// Makes a ring, if there is none and the host lets us.
    pub fn make_ring(&mut self) {
        if self.ring.is_none() {
            self.ring = ring(&self.file).ok();
        }
    }

    /// Whether operations are done by a ring.
    pub fn has_ring(&self) -> bool {
        self.ring.is_some() && !self.retired
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Becomes readable with each completed operation of the ring, if there is one, and stays so until all were taken. What was
    /// taken already when somebody looks is not told of: nobody is woken up for what was done at once.
    pub fn descriptor(&self) -> Option<RawFd> {
        self.ring.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Whether another operation can be started.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// How many operations are started and not completed.
    pub fn under_way(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Starts an operation; the kernel hears of it with [`RingIo::submit`]. Buffers must be of `memory`,
    /// which is always the same. `None` when there is no room, or a buffer is elsewhere.
    pub fn start(&mut self, memory: &GuestMemory, operation: Operation<'_>) -> Option<Token> {
        let token = *self.free.last()?;
        let slot = &mut self.slots[usize::from(token)];
        slot.vectors.clear();
        slot.first = 0;
        match operation {
            Operation::Read { buffers, offset, done } => {
                slot.point_at(self.memory.get_or_insert_with(|| memory.clone()), buffers)?;
                (slot.task, slot.offset) = (Task::Read, offset);
                slot.done(done);
            }
            Operation::Write { buffers, offset, durable } => {
                slot.point_at(self.memory.get_or_insert_with(|| memory.clone()), buffers)?;
                (slot.task, slot.offset) = (Task::Write { durable }, offset);
            }
            Operation::Zero { offset, length, durable } => {
                slot.point_at_zeros(length as usize);
                (slot.task, slot.offset) = (Task::Write { durable }, offset);
            }
            Operation::Allocate { mode, offset, length } => {
                (slot.task, slot.offset) = (Task::Allocate { mode, length }, offset);
            }
            Operation::Sync => slot.task = Task::Sync,
        }
        self.free.pop();
        self.queue(token);
        Some(token)
    }

    /// Tells the kernel of everything that was started.
    pub fn submit(&mut self) {
        while let (Some(ring), false) = (&self.ring, self.unsubmitted.is_empty()) {
            match ring.submit() {
                Ok(count @ 1..) => drop(self.unsubmitted.drain(..count.min(self.unsubmitted.len()))),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Out of memory, say. What the kernel did not take is done otherwise, now and from now on: what is
                // left in the ring must never reach it.
                Ok(_) | Err(_) => self.retire(),
            }
        }
    }

    /// The next completed operation: its token, and what came of it. The token is free again.
    pub fn completed(&mut self) -> Option<(Token, io::Result<()>)> {
        let (token, outcome) = loop {
            if let Some(ready) = self.ready.pop_front() {
                break ready;
            }
            let Some(entry) = self.ring.as_mut().and_then(|ring| ring.completion().next()) else {
                // Operations that were only partly done go on.
                if self.unsubmitted.is_empty() {
                    return None;
                }
                self.submit();
                continue;
            };
            // We made the token, of 16 bits.
            let token = entry.user_data() as Token;
            if let Some(outcome) = self.judge(token, entry.result()) {
                break (token, outcome);
            }
        };
        self.free.push(token);
        Some((token, outcome))
    }

    /// Waits until nothing is under way, but not longer than `most`. Nobody hears of the outcomes.
    pub fn drain(&mut self, most: Duration) {
        let deadline = Instant::now() + most;
        self.submit();
        loop {
            while self.completed().is_some() {}
            if !self.wait(deadline) {
                return;
            }
        }
    }

    /// Waits until an operation is completed, when all of those that were are taken. Says whether there is any use in
    /// looking: nothing is under way, the deadline is over, or the ring fails otherwise.
    pub fn wait(&mut self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let Some(ring) = &self.ring else { return false };
        if self.under_way() == 0 || left.is_zero() || self.retired {
            return false;
        }
        let left = Timespec::new().sec(left.as_secs()).nsec(left.subsec_nanos());
        let waited = ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&left));
        !waited
            .is_err_and(|error| error.kind() != io::ErrorKind::Interrupted && error.raw_os_error() != Some(libc::ETIME))
    }

    /// Queues what a slot has still to do.
    fn queue(&mut self, token: Token) {
        let slot = &self.slots[usize::from(token)];
        let entry = slot.entry().user_data(token.into());
        let queued = match &mut self.ring {
            // There are as many places as tokens, and each is in the queue at most once.
            // SAFETY: the vectors stay in their slot until the operation is completed, since only then is its token free;
            // what they point at is zeros, or guest memory of which we hold a clone. Neither is let go of before.
            Some(ring) if !self.retired => unsafe { ring.submission().push(&entry) }.is_ok(),
            _ => false,
        };
        if queued {
            self.unsubmitted.push_back(token);
        } else {
            let outcome = self.perform(token);
            self.ready.push_back((token, outcome));
        }
    }

    /// What a result of the kernel means for an operation; `None` when it goes on.
    fn judge(&mut self, token: Token, result: i32) -> Option<io::Result<()>> {
        let slot = self.slots.get_mut(usize::from(token))?;
        let Ok(count) = usize::try_from(result) else {
            let error = io::Error::from_raw_os_error(-result);
            return match error.raw_os_error() {
                // The kernel found no thread to do it, or the thread was asked to end.
                Some(libc::ECANCELED | libc::EAGAIN | libc::EINTR) => Some(self.perform(token)),
                _ => Some(Err(error)),
            };
        };
        match slot.task {
            Task::Allocate { .. } | Task::Sync => Some(Ok(())),
            Task::Read | Task::Write { .. } => {
                slot.done(count);
                if slot.first == slot.vectors.len() {
                    return Some(Ok(()));
                }
                if count == 0 {
                    return Some(Err(io::ErrorKind::UnexpectedEof.into()));
                }
                self.queue(token);
                None
            }
        }
    }

    /// Does what a slot has still to do, and waits for it.
    fn perform(&mut self, token: Token) -> io::Result<()> {
        let Slot { task, offset, vectors, first, .. } = &mut self.slots[usize::from(token)];
        let vectors = vectors.get_mut(*first..).unwrap_or_default();
        match *task {
            // SAFETY: the vectors point at guest memory, of which we hold a clone, so that it stays mapped.
            Task::Read => unsafe { read_vectors(&self.file, vectors, *offset) },
            Task::Write { durable } => {
                // SAFETY: likewise, or at zeros, which are never changed.
                unsafe { write_vectors(&self.file, vectors, *offset) }?;
                if durable { self.file.sync_data() } else { Ok(()) }
            }
            Task::Allocate { mode, length } => Ok(fallocate(&self.file, mode, *offset, length)?),
            Task::Sync => self.file.sync_data(),
        }
    }

    /// Gives the ring up for what it did not take and for what comes. What it has taken is still completed by it.
    fn retire(&mut self) {
        self.retired = true;
        while let Some(token) = self.unsubmitted.pop_front() {
            let outcome = self.perform(token);
            self.ready.push_back((token, outcome));
        }
    }
}

impl Drop for RingIo {
    fn drop(&mut self) {
        if self.under_way() > 0 {
            // The kernel may still use both, for as long as a disk takes to answer.
            std::mem::forget((self.memory.take(), std::mem::take(&mut self.slots)));
        }
    }
}

impl Slot {
    /// Notes where buffers are, if all of them are in `memory`.
    fn point_at(&mut self, memory: &GuestMemory, buffers: &[VolatileSlice<'_>]) -> Option<()> {
        for buffer in buffers.iter().filter(|buffer| !buffer.is_empty()) {
            let guard = buffer.ptr_guard_mut();
            let start = guard.as_ptr() as usize;
            let inside = memory.iter().any(|region| {
                let region = region.as_ptr() as usize..region.as_ptr() as usize + region.size();
                region.start <= start && start <= region.end && guard.len() <= region.end - start
            });
            if !inside {
                return None;
            }
            self.vectors.push(libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() });
        }
        Some(())
    }

    /// Notes where so many zeros are.
    fn point_at_zeros(&mut self, mut length: usize) {
        while length > 0 {
            let piece = length.min(ZEROS.len());
            self.vectors.push(libc::iovec { iov_base: ZEROS.as_ptr().cast_mut().cast(), iov_len: piece });
            length -= piece;
        }
    }

    /// Notes that so many bytes more are done.
    fn done(&mut self, count: usize) {
        let rest = self.vectors.get_mut(self.first..).unwrap_or_default();
        let left = advance(rest, count).len();
        self.first = self.vectors.len() - left;
        self.offset += count as u64;
    }

    /// What the kernel is asked for.
    fn entry(&self) -> Entry {
        let vectors = self.vectors.get(self.first..).unwrap_or_default();
        // There are never more than a request has buffers.
        let count = u32::try_from(vectors.len()).unwrap_or(u32::MAX);
        match self.task {
            Task::Read => opcode::Readv::new(FILE, vectors.as_ptr(), count).offset(self.offset).build(),
            Task::Write { durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                opcode::Writev::new(FILE, vectors.as_ptr(), count).offset(self.offset).rw_flags(flags).build()
            }
            Task::Allocate { mode, length } => {
                opcode::Fallocate::new(FILE, length).offset(self.offset).mode(mode.bits().cast_signed()).build()
            }
            Task::Sync => opcode::Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build(),
        }
    }
}

/// Makes a ring that can work with one file only.
fn ring(file: &File) -> io::Result<IoUring> {
    let ring = IoUring::builder().setup_r_disabled().build(DEPTH.into())?;
    if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let submitter = ring.submitter();
    submitter.register_files(&[file.as_raw_fd()])?;
    // Since Linux 5.15; before, as many as four for each CPU.
    let _ = submitter.register_iowq_max_workers(&mut [WORKERS_MAX; 2]);
    let mut restrictions = [
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_op(opcode::Fallocate::CODE),
        Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
    ];
    submitter.register_restrictions(&mut restrictions)?;
    submitter.register_enable_rings()?;
    Ok(ring)
}

#[cfg(test)]
mod tests;
