//! The devices of guest memory, and what the API can do with them.

use api::config::VmConfig;
use api::model::{Balloon, BalloonStatistics};
use api::server::Plugged;
use devices::GuestMemory;
use devices::balloon::host::{HostBalloon, Statistics};
use devices::mem::host::HostMem;

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

impl Controls {
    /// Those of the devices that the configuration asks for, and RAM together with the memory that they need.
    ///
    /// # Errors
    /// [`MachineError`] names the device or the size.
    pub fn new(config: &VmConfig, ram: &GuestMemory) -> Result<(GuestMemory, Self), MachineError> {
        let failed = |device| move |source| MachineError::Device { device, source };
        let balloon = config.balloon.then(HostBalloon::new).transpose().map_err(failed("balloon"))?;
        let Some(most_mib) = config.memory_max_mib else {
            return Ok((ram.clone(), Self { balloon, mem: None }));
        };
        let size = u64::from(most_mib.saturating_sub(config.memory_mib)) << 20;
        let (all, start) = memory::reserve_behind(ram, size)?;
        let mem = HostMem::new(size).map_err(failed("memory"))?;
        Ok((all, Self { balloon, mem: Some((mem, start)) }))
    }

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
