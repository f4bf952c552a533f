//! The guest's clock since the kernel began, in which the start of a container is measured.

use rustix::time::{ClockId, clock_gettime};

/// CLOCK_BOOTTIME in microseconds.
pub fn boot_us() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    // Neither part of a time since the boot is negative.
    now.tv_sec.unsigned_abs() * 1_000_000 + now.tv_nsec.unsigned_abs() / 1000
}
