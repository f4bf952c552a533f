//! The devices of guest memory: what they need of it, and what the API can do with them.

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::ops::Range;

use api::config::{PmemConfig, VmConfig};
use api::model::{Balloon, BalloonStatistics};
use api::server::Plugged;
use devices::GuestMemory;
use devices::balloon::host::{HostBalloon, Statistics};
use devices::limit::Limiter;
use devices::mem::host::HostMem;

use super::limits::limiter;
use crate::layout::HUGE_PAGE;
use crate::machine::MachineError;
use crate::memory;

/// The pages of a MiB.
const PAGES_PER_MIB: u32 = 256;

/// The host's side of the devices of guest memory. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Controls {
    /// The balloon's, if there is one.
    pub balloon: Option<HostBalloon>,
    /// The memory device's, if there is one, and where its region begins.
    pub mem: Option<(HostMem, u64)>,
}

/// Guest memory with all that devices add to it.
pub(crate) struct Arranged {
    /// RAM and what is behind it.
    pub all: GuestMemory,
    /// The host's side of devices.
    pub controls: Controls,
    /// The persistent memory devices.
    pub persistent: Vec<Persistent>,
}

/// The file of a persistent memory device, and where it is mapped.
pub(crate) struct Persistent {
    /// To be flushed; `None` if it cannot be changed.
    pub file: Option<File>,
    /// Guest-physical addresses.
    pub range: Range<u64>,
    /// How often it may be flushed.
    pub limiter: Option<Limiter>,
}

impl Arranged {
    /// Arranges what the configuration asks for behind RAM, with these files behind the persistent memory devices.
    ///
    /// # Errors
    /// [`MachineError`] names the device or the size.
    pub fn new(config: &VmConfig, ram: &GuestMemory, files: Vec<File>) -> Result<Self, MachineError> {
        let failed = |device| move |source| MachineError::Device { device, source };
        let balloon = config.balloon.then(HostBalloon::new).transpose().map_err(failed("balloon"))?;
        let (mut all, mut mem) = (ram.clone(), None);
        if let Some(most_mib) = config.memory_max_mib {
            let size = u64::from(most_mib.saturating_sub(config.memory_mib)) << 20;
            let (more, start) = memory::reserve_behind(&all, size)?;
            all = more;
            mem = Some((HostMem::new(size).map_err(failed("memory"))?, start));
        }
        let mut persistent = Vec::new();
        for (PmemConfig { read_only, limits, .. }, file) in config.pmem.iter().zip(files) {
            let length = usable_length(&file, *read_only).map_err(failed("pmem"))?;
            let (more, range) = memory::map_behind(&all, &file, length, *read_only)?;
            all = more;
            let limiter = limiter(*limits).map_err(failed("pmem"))?;
            persistent.push(Persistent { file: (!read_only).then_some(file), range, limiter });
        }
        Ok(Self { all, controls: Controls { balloon, mem }, persistent })
    }

    /// Whether the guest may write to the memory that begins at an address.
    pub fn is_writable(&self, start: u64) -> bool {
        !self.persistent.iter().any(|device| device.file.is_none() && device.range.start == start)
    }
}

/// The length of what is behind a device. Seeking gives that of block devices too, where metadata says zero.
pub(crate) fn length(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// The length of a file that is to be memory.
fn usable_length(file: &File, read_only: bool) -> io::Result<u64> {
    let length = length(file)?;
    if length == 0 {
        return Err(io::Error::other("the file is empty"));
    }
    if !read_only {
        if !length.is_multiple_of(HUGE_PAGE) {
            let text =
                "the file is not whole 2 MiB pages long: extend it with `truncate --size=%2M`, or use it read-only";
            return Err(io::Error::other(text));
        }
        allocate(file, length)?;
    }
    Ok(length)
}

/// Has the file system find a place for all of the file: a write to memory cannot be told that the disk is full, it would
/// end the VM.
fn allocate(file: &File, length: u64) -> io::Result<()> {
    use rustix::io::Errno;
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, length) {
        // Block devices, and file systems that cannot.
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NODEV) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl Controls {
    /// The memory that was plugged, as the API shows it.
    pub fn show_plugged(&self) -> Plugged {
        let mib = |bytes: u64| u32::try_from(bytes >> 20).unwrap_or(u32::MAX);
        self.mem.as_ref().map_or(Plugged::default(), |(mem, _)| Plugged {
            requested_mib: mib(mem.requested()),
            plugged_mib: mib(mem.plugged()),
        })
    }

    /// Asks the guest to plug so many MiB in all.
    pub fn plug(&self, mib: u32) {
        if let Some((mem, _)) = &self.mem {
            mem.request(u64::from(mib) << 20);
        }
    }

    /// The balloon as the API shows it.
    pub fn show_balloon(&self) -> Option<Balloon> {
        self.balloon.as_ref().map(|balloon| Balloon {
            target_mib: balloon.target_pages() / PAGES_PER_MIB,
            actual_mib: balloon.actual_pages() / PAGES_PER_MIB,
            statistics: balloon.statistics().map(shown),
        })
    }

    /// Asks the guest for a balloon of so many MiB.
    pub fn set_balloon(&self, target_mib: u32) {
        if let Some(balloon) = &self.balloon {
            // The most is 1 TiB (`MEMORY_MIB_MAX`), which fits.
            balloon.set_target_pages(target_mib.saturating_mul(PAGES_PER_MIB));
        }
    }
}

fn shown(statistics: Statistics) -> BalloonStatistics {
    let Statistics {
        swap_in_bytes,
        swap_out_bytes,
        major_faults,
        minor_faults,
        free_bytes,
        total_bytes,
        available_bytes,
        disk_cache_bytes,
        hugetlb_allocations,
        hugetlb_failures,
    } = statistics;
    BalloonStatistics {
        swap_in_bytes,
        swap_out_bytes,
        major_faults,
        minor_faults,
        free_bytes,
        total_bytes,
        available_bytes,
        disk_cache_bytes,
        hugetlb_allocations,
        hugetlb_failures,
    }
}
