//! The host's side of a balloon: how large it should be, how large the guest says it is, and what the guest says of its
//! memory.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The most that wait for statistics at a time. A guest need not answer, and then they stay here.
const WAITING_MAX: usize = 16;

/// What a guest says of its memory (VIRTIO 1.2 §5.5.6.4, "Memory Statistics Tags"). All of it is optional, and none of it
/// need be true.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Swapped in, in bytes.
    pub swap_in_bytes: Option<u64>,
    /// Swapped out, in bytes.
    pub swap_out_bytes: Option<u64>,
    /// The number of major page faults.
    pub major_faults: Option<u64>,
    /// The number of minor page faults.
    pub minor_faults: Option<u64>,
    /// Not used for anything, in bytes.
    pub free_bytes: Option<u64>,
    /// All that there is, in bytes.
    pub total_bytes: Option<u64>,
    /// What programs could be given without swapping, in bytes.
    pub available_bytes: Option<u64>,
    /// Caches of files that could be dropped, in bytes.
    pub disk_cache_bytes: Option<u64>,
    /// The number of huge pages given out by hugetlb.
    pub hugetlb_allocations: Option<u64>,
    /// How often hugetlb had none.
    pub hugetlb_failures: Option<u64>,
}

impl Statistics {
    /// Notes one; those of other tags are ignored, as the specification says.
    pub(super) fn set(&mut self, tag: u16, value: u64) {
        let field = match tag {
            0 => &mut self.swap_in_bytes,
            1 => &mut self.swap_out_bytes,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free_bytes,
            5 => &mut self.total_bytes,
            6 => &mut self.available_bytes,
            7 => &mut self.disk_cache_bytes,
            8 => &mut self.hugetlb_allocations,
            9 => &mut self.hugetlb_failures,
            _ => return,
        };
        *field = Some(value);
    }
}

/// Called once, by the event loop, when statistics have come in.
pub type Heard = Box<dyn FnOnce() + Send>;

/// The host's side of a balloon. Clones share it.
#[derive(Clone)]
pub struct HostBalloon(Arc<Shared>);

struct Shared {
    target_pages: AtomicU32,
    actual_pages: AtomicU32,
    answers: Mutex<Answers>,
    wake: EventFd,
}

#[derive(Default)]
struct Answers {
    last: Option<Statistics>,
    waiting: Vec<Heard>,
}

impl HostBalloon {
    /// One that should be empty.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let (target_pages, actual_pages) = (AtomicU32::new(0), AtomicU32::new(0));
        let wake = EventFd::new(EFD_NONBLOCK)?;
        Ok(Self(Arc::new(Shared { target_pages, actual_pages, answers: Mutex::default(), wake })))
    }

    /// How large the balloon should be, in pages of 4 KiB.
    pub fn target_pages(&self) -> u32 {
        self.0.target_pages.load(Ordering::SeqCst)
    }

    /// Asks the guest for a balloon of so many pages of 4 KiB.
    pub fn set_target_pages(&self, pages: u32) {
        self.0.target_pages.store(pages, Ordering::SeqCst);
        self.wake();
    }

    /// How large the guest says that the balloon is, in pages of 4 KiB.
    pub fn actual_pages(&self) -> u32 {
        self.0.actual_pages.load(Ordering::SeqCst)
    }

    /// The statistics that came in last.
    pub fn statistics(&self) -> Option<Statistics> {
        self.answers().last
    }

    /// Asks the guest for statistics. `heard` is called when they are there, and dropped uncalled when too many wait
    /// already.
    pub fn ask(&self, heard: Heard) {
        {
            let mut answers = self.answers();
            if answers.waiting.len() == WAITING_MAX {
                return;
            }
            answers.waiting.push(heard);
        }
        self.wake();
    }

    /// Whether somebody waits for statistics.
    pub(super) fn is_asked(&self) -> bool {
        !self.answers().waiting.is_empty()
    }

    /// Statistics have come in.
    pub(super) fn answer(&self, statistics: Statistics) {
        let waiting = {
            let mut answers = self.answers();
            answers.last = Some(statistics);
            std::mem::take(&mut answers.waiting)
        };
        waiting.into_iter().for_each(|heard| heard());
    }

    /// The guest says how large the balloon is.
    pub(super) fn set_actual_pages(&self, pages: u32) {
        self.0.actual_pages.store(pages, Ordering::SeqCst);
    }

    /// Becomes ready, as an edge, each time that there is something for the device to do.
    pub(super) fn descriptor(&self) -> RawFd {
        self.0.wake.as_raw_fd()
    }

    fn wake(&self) {
        // Never read, so that it can only be full after 2^64 calls.
        let _ = self.0.wake.write(1);
    }

    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.0.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for HostBalloon {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (target, actual) = (self.target_pages(), self.actual_pages());
        write!(formatter, "HostBalloon {{ target_pages: {target}, actual_pages: {actual} }}")
    }
}
