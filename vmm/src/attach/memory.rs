//! The devices of guest memory, and what the API can do with them.

use std::io;

use api::config::VmConfig;
use api::model::{Balloon, BalloonStatistics};
use devices::balloon::host::{HostBalloon, Statistics};

/// The pages of a MiB.
const PAGES_PER_MIB: u32 = 256;

/// The host's side of the devices of guest memory. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Controls {
    /// The balloon's, if there is one.
    pub balloon: Option<HostBalloon>,
}

impl Controls {
    /// Those of the devices that the configuration asks for.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new(config: &VmConfig) -> io::Result<Self> {
        Ok(Self { balloon: config.balloon.then(HostBalloon::new).transpose()? })
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
