//! Instructions that only a kernel needs.
//!
//! UNSAFETY: they are instructions.

#![expect(unsafe_code, reason = "instructions have no other name")]

use core::arch::asm;

/// Writes a byte to an I/O port.
pub fn port_write(port: u16, value: u8) {
    // SAFETY: a port is a device's, and devices are to be attacked; none of them knows of Rust's objects.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) };
}

/// Writes 4 bytes to an I/O port.
pub fn port_write_word(port: u16, value: u32) {
    // SAFETY: as for a byte.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) };
}

/// Reads a byte from an I/O port.
pub fn port_read(port: u16) -> u8 {
    let value;
    // SAFETY: as for writing.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags)) };
    value
}

/// The time in cycles.
pub fn cycles() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: it reads a counter.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Uses other page tables.
pub(crate) fn set_page_tables(level4: u64) {
    // SAFETY: the caller has written tables that map all of the program to where it is.
    unsafe { asm!("mov cr3, {}", in(reg) level4, options(nostack, preserves_flags)) };
}

/// What LGDT and LIDT take.
#[repr(C, packed)]
struct Table {
    limit: u16,
    base: u64,
}

/// Uses other descriptor tables, and a task state.
pub(crate) fn set_descriptor_tables(descriptors: (u64, u16), interrupts: (u64, u16), task: u16) {
    let [descriptors, interrupts] = [descriptors, interrupts].map(|(base, limit)| Table { limit, base });
    // SAFETY: the caller has written tables in which the selectors in use are what they were.
    unsafe {
        asm!("lgdt [{}]", "lidt [{}]", "ltr {2:x}", in(reg) &raw const descriptors, in(reg) &raw const interrupts,
            in(reg) task, options(readonly, nostack, preserves_flags));
    }
}

/// Takes interrupts from now on.
pub(crate) fn enable_interrupts() {
    // SAFETY: the caller has set them up.
    unsafe { asm!("sti", options(nostack)) };
}

/// Powers off: the monitor takes a triple fault for it.
pub fn power_off() -> ! {
    let nothing = Table { limit: 0, base: 0 };
    // SAFETY: nothing runs after it.
    unsafe { asm!("lidt [{}]", "ud2", "2: hlt", "jmp 2b", in(reg) &raw const nothing, options(noreturn)) };
}
