//! Where a hostile driver points a device, and how far (VIRTIO 1.2 §2.7.5: a descriptor's `addr` and `len`).
//!
//! In RAM that is only the arena, which is behind everything that this program needs: a device that does as it is told then
//! harms nobody here, so that whatever else goes wrong is the device's fault.

use crate::memory::{ARENA, MIB, ram_end};
use crate::random::Random;

/// Where rings are, each with [`RING_ROOM`].
pub const RINGS: u64 = ARENA;
/// A ring, and an indirect table behind it.
pub const RING_ROOM: u64 = 0x1_0000;
/// Where the indirect table of a queue is, from its ring on.
pub const TABLE: u64 = 0x8000;
/// Where buffers are, which nothing else uses.
pub const BUFFERS: u64 = ARENA + MIB;
/// A place for a buffer of at most a MiB, which lies in the arena as a whole.
pub fn buffer(random: &mut Random) -> u64 {
    let end = ram_end() - 2 * MIB;
    let at = BUFFERS + random.below(end - BUFFERS);
    if random.one_in(4) { at } else { at & !0xfff }
}

/// Any place that can be told, except for RAM before the arena.
pub fn anywhere(random: &mut Random) -> u64 {
    let little = random.below(0x2000);
    match random.below(16) {
        // The end of RAM, and behind it.
        0 => ram_end() - little,
        1 => ram_end() + little,
        // Behind all RAM, and the device hole: registers of devices, of the I/O APIC, of the local APIC.
        2 => 0xc000_0000 + little,
        3 => 0xd000_0000 + random.below(0x2_0000),
        4 => 0xfec0_0000 + little,
        5 => 0xfee0_0000 + little,
        6 => 0xffff_ffff - little,
        // What may be plugged or is persistent, each from a multiple of 2 GiB, and the ends of it.
        7 => (1 + random.below(7)) << 31 | random.below(4 * MIB),
        8 => ((1 + random.below(7)) << 31).wrapping_sub(little),
        // The ends of what there is to tell, so that a sum wraps.
        9 => u64::MAX - little,
        10 => 1u64 << 63 | little,
        11 => random.long() | 1 << 40,
        // The rings themselves.
        12 => RINGS + random.below(8 * RING_ROOM),
        _ => buffer(random),
    }
}

/// Any length that can be told; `most` is the longest that is given out where it lies in memory.
pub fn length(random: &mut Random, most: u32) -> u32 {
    let told = match random.below(14) {
        0 => 0,
        1 => 1,
        2 => 15 + random.below(3) as u32,
        3 => 511 + random.below(3) as u32,
        4 => 4095 + random.below(3) as u32,
        5 => 0xfff0 + random.below(0x20) as u32,
        6 => random.below(MIB) as u32,
        7 => 4 << 20,
        // Beyond all RAM.
        8 => 0x7fff_fff0 + random.below(0x20) as u32,
        9 => u32::MAX - random.below(0x20) as u32,
        10 => 1 << 31 | random.word(),
        _ => random.below(0x400) as u32,
    };
    if told < 1 << 30 { told.min(most) } else { told }
}
