//! Guest-physical memory, all of which is this program's: what is where, and access to it by address.
//!
//! ```text
//!         0 ..    1 MiB   what the monitor wrote: zero page, command line; only read
//!     2 MiB ..    8 MiB   the program, with all that Rust knows of
//!     8 MiB ..    9 MiB   rings and buffers of honest requests
//!     9 MiB ..   10 MiB   a pattern that no device was ever given: whoever changes it went out of bounds
//!    10 MiB ..   12 MiB   page tables, descriptor tables, stack of interrupts
//!    16 MiB ..  RAM's end the arena: what devices are pointed at, as far as they are pointed at RAM
//!  1 GiB·N               registers, memory that can be plugged, persistent memory
//! ```
//!
//! UNSAFETY: nothing but addresses says what a device is to use. Only such are read and written here as no object of Rust's
//! has.

#![expect(unsafe_code, reason = "memory is accessed by address")]

use core::arch::asm;
use core::ops::Range;
use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering, fence};

/// A MiB.
pub const MIB: u64 = 1 << 20;
/// What the monitor wrote, for the program to read.
const TOLD: Range<u64> = 0x1000..0xa_0000;
/// Where the program ends at the latest.
pub const PROGRAM_END: u64 = 8 * MIB;
/// Rings and buffers of honest requests.
pub const HONEST: u64 = 8 * MIB;
/// The pattern.
const CANARY: Range<u64> = 9 * MIB..9 * MIB + 0x1_0000;
/// Page tables: see [`crate::paging`].
pub const PAGE_TABLES: u64 = 10 * MIB;
/// Descriptor tables and the stack of interrupts: see [`crate::interrupt`].
pub const DESCRIPTOR_TABLES: u64 = 11 * MIB;
/// What devices are pointed at.
pub const ARENA: u64 = 16 * MIB;
/// The end of what is mapped.
pub const MAPPED: u64 = 16 << 30;

static RAM_END: AtomicU64 = AtomicU64::new(ARENA);

/// The end of RAM below the device hole.
pub fn ram_end() -> u64 {
    RAM_END.load(Ordering::Relaxed)
}

/// Learns from the zero page how much RAM there is (Linux `Documentation/arch/x86/zero-page.rst`: `e820_entries` at 0x1e8,
/// `e820_table` at 0x2d0).
pub fn learn(zero_page: u64) {
    let count = u64::from(read::<u8>(zero_page + 0x1e8));
    for entry in (0..count).map(|index| zero_page + 0x2d0 + 20 * index) {
        let (start, length) = (read::<u64>(entry), read::<u64>(entry + 8));
        if start <= ARENA && start + length > ARENA {
            RAM_END.store(start + length, Ordering::Relaxed);
        }
    }
}

mod plain {
    /// An integer, of which any bytes are a value.
    pub trait Plain: Copy {}
    impl Plain for u8 {}
    impl Plain for u16 {}
    impl Plain for u32 {}
    impl Plain for u64 {}
}
use plain::Plain;

fn check(address: u64, size: usize, told: bool) {
    let end = address.saturating_add(size as u64);
    let ours = address >= PROGRAM_END && end <= MAPPED || told && address >= TOLD.start && end <= TOLD.end;
    assert!(ours, "this program has no business at {address:#x}");
}

/// Reads an integer, which may be a register.
pub fn read<T: Plain>(address: u64) -> T {
    check(address, size_of::<T>(), true);
    // SAFETY: the address is mapped, no object of Rust's is there, and any bytes are a value of the type. x86 reads
    // unaligned integers as well; one instruction of the same width is what `read_volatile` makes of aligned ones only.
    unsafe { ptr::read_volatile(address as *const Unaligned<T>) }.0
}

/// Writes an integer, which may be a register.
pub fn write<T: Plain>(address: u64, value: T) {
    check(address, size_of::<T>(), false);
    // SAFETY: as for reading.
    unsafe { ptr::write_volatile(address as *mut Unaligned<T>, Unaligned(value)) };
}

/// An integer anywhere.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned<T>(T);

/// Writes bytes.
pub fn write_bytes(address: u64, bytes: &[u8]) {
    for (at, byte) in (address..).zip(bytes) {
        write(at, *byte);
    }
}

/// Writes zeroes: whole words, as many as there are.
pub fn clear(address: u64, length: u64) {
    check(address, length as usize, false);
    // SAFETY: the range is mapped, and no object of Rust's is there.
    unsafe {
        asm!("rep stosq", inout("rdi") address => _, inout("rcx") length / 8 => _, in("rax") 0u64,
            options(nostack, preserves_flags));
    }
}

/// What was written is there for others before what follows.
pub fn barrier() {
    fence(Ordering::SeqCst);
}

/// Writes the pattern.
pub fn lay_canary() {
    CANARY.step_by(8).for_each(|at| write(at, pattern(at)));
}

/// The first address at which the pattern is not what it was.
pub fn canary() -> Option<u64> {
    CANARY.step_by(8).find(|at| read::<u64>(*at) != pattern(*at))
}

fn pattern(at: u64) -> u64 {
    at.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
