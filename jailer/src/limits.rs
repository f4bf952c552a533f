//! Resource limits of a monitor (setrlimit(2)): what holds everywhere, also where there is no cgroup to be had.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::{JailError, step};
use crate::sys;

/// How much a monitor may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of address space.
    pub address_space: u64,
    /// Threads. The kernel counts those of the jail alone since Linux 5.14; before, all of a user's.
    pub threads: u64,
    /// Open descriptors.
    pub files: u64,
    /// The size of the largest file that it writes to, in bytes.
    pub file_size: u64,
}

/// Descriptors: a client of the API has one, a process in a container at most four of ours and three of the guest's, and each
/// of the guest's 2,048 connections at most two ends.
const FILES: u64 = 16 << 10;
/// A container's log goes on in another file before it is as large.
const FILE_SIZE: u64 = 16 << 20;
/// What is reserved beside guest memory: text, heaps, and the memory that the C library sets aside for each thread (128 MiB,
/// of which little is ever used).
const BASE_SPACE: u64 = 1 << 30;
const THREAD_SPACE: u64 = 160 << 20;
/// Threads beside those of the vCPUs: the event loop, the API, the one that makes memory present, and KVM's own.
const OTHER_THREADS: u64 = 16;

impl Limits {
    /// The limits of a VM of this size; `largest_drive` is the length of the largest file that its guest may write to.
    pub fn new(vcpus: u8, memory_mib: u32, largest_drive: u64) -> Self {
        let threads = u64::from(vcpus) + OTHER_THREADS;
        // Guest memory is aligned to huge pages: what is reserved for it is a little more.
        let address_space = (u64::from(memory_mib) << 20) + BASE_SPACE + threads * THREAD_SPACE;
        Self { address_space, threads, files: FILES, file_size: largest_drive.max(FILE_SIZE) }
    }

    /// With what it takes to serve files: so many more threads and descriptors, and files of any size if they are written to.
    #[must_use]
    pub fn serving(self, threads: u64, descriptors: u64, written: bool) -> Self {
        Self {
            address_space: self.address_space + threads * THREAD_SPACE,
            threads: self.threads + threads,
            files: self.files + descriptors,
            file_size: if written { u64::MAX } else { self.file_size },
        }
    }

    /// Puts them in force. None exceeds what the caller had.
    pub(crate) fn apply(&self) -> Result<(), JailError> {
        let limits = [
            (Resource::As, self.address_space),
            (Resource::Nproc, self.threads),
            (Resource::Nofile, self.files),
            (Resource::Fsize, self.file_size),
            // Guest memory would be in it.
            (Resource::Core, 0),
            (Resource::Memlock, 0),
            (Resource::Msgqueue, 0),
            (Resource::Rtprio, 0),
            (Resource::Nice, 0),
        ];
        for (resource, wanted) in limits {
            let most = getrlimit(resource).maximum.map_or(wanted, |most| most.min(wanted));
            setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })
                .map_err(step("limit its resources"))?;
        }
        // Who writes to a file that is as long as it may be is told so (EFBIG), and does not die of it.
        sys::ignore(libc::SIGXFSZ).map_err(step("ignore the signal of files that are too long"))
    }
}
