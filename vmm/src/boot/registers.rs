//! The registers of the first vCPU at the 64-bit entry point (Linux `Documentation/arch/x86/boot.rst`, "64-bit Boot
//! Protocol"): long mode, the first GiB mapped to itself, flat segments, interrupts off, RSI at the zero page.

use devices::GuestMemory;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use crate::layout::{GDT, IDT, PAGE, PAGE_TABLES, STACK, ZERO_PAGE};
use crate::memory::{self, MemoryError};

const CR0_PROTECTED: u64 = 1;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE_ENABLE: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
const FLAGS_RESERVED: u64 = 1 << 1;

const PAGE_PRESENT: u64 = 1;
const PAGE_WRITABLE: u64 = 1 << 1;
const PAGE_LARGE: u64 = 1 << 7;
const LARGE_PAGE: u64 = 2 << 20;
const ENTRIES: u64 = 512;

/// Descriptors as the processor reads them: null, unused, code (`__BOOT_CS`), data (`__BOOT_DS`), task.
const DESCRIPTORS: [u64; 5] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff];
const CODE: u16 = 2;
const DATA: u16 = 3;
const TASK: u16 = 4;

/// The general registers at entry.
pub fn general(entry: u64) -> kvm_regs {
    kvm_regs { rip: entry, rsi: ZERO_PAGE, rsp: STACK, rbp: STACK, rflags: FLAGS_RESERVED, ..Default::default() }
}

/// Writes the tables that the special registers point to and changes those registers from their reset values.
///
/// # Errors
/// When guest memory ends before the tables do.
pub fn special(guest: &GuestMemory, registers: &mut kvm_sregs) -> Result<(), MemoryError> {
    write_tables(guest)?;
    registers.gdt.base = GDT;
    registers.gdt.limit = size_of_val(&DESCRIPTORS) as u16 - 1;
    registers.idt.base = IDT;
    registers.idt.limit = 7;
    registers.cs = segment(CODE);
    for data in [&mut registers.ds, &mut registers.es, &mut registers.fs, &mut registers.gs, &mut registers.ss] {
        *data = segment(DATA);
    }
    registers.tr = segment(TASK);
    registers.cr0 |= CR0_PROTECTED | CR0_PAGING;
    registers.cr3 = PAGE_TABLES;
    registers.cr4 |= CR4_PHYSICAL_ADDRESS_EXTENSION;
    registers.efer |= EFER_LONG_MODE_ENABLE | EFER_LONG_MODE_ACTIVE;
    Ok(())
}

fn write_tables(guest: &GuestMemory) -> Result<(), MemoryError> {
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    memory::write(guest, &words(&DESCRIPTORS), GDT)?;
    let (level4, level3, level2) = (PAGE_TABLES, PAGE_TABLES + PAGE, PAGE_TABLES + 2 * PAGE);
    memory::write(guest, &words(&[level3 | PAGE_PRESENT | PAGE_WRITABLE]), level4)?;
    memory::write(guest, &words(&[level2 | PAGE_PRESENT | PAGE_WRITABLE]), level3)?;
    let pages: Vec<u64> = (0..ENTRIES).map(|i| (i * LARGE_PAGE) | PAGE_PRESENT | PAGE_WRITABLE | PAGE_LARGE).collect();
    memory::write(guest, &words(&pages), level2)
}

/// A segment register's hidden part, from its descriptor.
fn segment(index: u16) -> kvm_segment {
    let descriptor = DESCRIPTORS[usize::from(index)];
    let bits = |from: u32, count: u32| (descriptor >> from & ((1 << count) - 1)) as u8;
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index * 8,
        type_: bits(40, 4),
        s: bits(44, 1),
        dpl: bits(45, 2),
        present: bits(47, 1),
        avl: bits(52, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g: bits(55, 1),
        unusable: 0,
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_segment_is_64_bit() {
        let code = segment(CODE);
        assert_eq!(
            (code.selector, code.type_, code.s, code.l, code.db, code.g, code.present),
            (0x10, 11, 1, 1, 0, 1, 1)
        );
    }
}
