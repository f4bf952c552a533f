//! The memory of a VM: what its guest gives up of it, and what it says of it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The balloon of a VM: memory that the guest has given up, and that the host uses otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Balloon {
    /// How much memory the guest is asked to give up, in MiB.
    pub target_mib: u32,
    /// How much the guest says that it has given up, in MiB. A guest in need of memory takes it back.
    pub actual_mib: u32,
    /// What the guest said last of its memory, if it ever did.
    pub statistics: Option<BalloonStatistics>,
}

/// What a guest says of its memory. It need not say all of it, and nothing of it need be true.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BalloonStatistics {
    /// Swapped in since it booted, in bytes.
    pub swap_in_bytes: Option<u64>,
    /// Swapped out since it booted, in bytes.
    pub swap_out_bytes: Option<u64>,
    /// The number of page faults that read from a disk.
    pub major_faults: Option<u64>,
    /// The number of other page faults.
    pub minor_faults: Option<u64>,
    /// Memory that is used for nothing, in bytes.
    pub free_bytes: Option<u64>,
    /// All memory, in bytes.
    pub total_bytes: Option<u64>,
    /// Memory that programs could be given without swapping, in bytes.
    pub available_bytes: Option<u64>,
    /// Caches of files that could be dropped, in bytes.
    pub disk_cache_bytes: Option<u64>,
    /// The number of huge pages that programs were given on request.
    pub hugetlb_allocations: Option<u64>,
    /// How often there was none for a program.
    pub hugetlb_failures: Option<u64>,
}

/// What is asked of the balloon of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    /// How much memory the guest is asked to give up, in MiB: at most what the VM has.
    pub target_mib: u32,
}
