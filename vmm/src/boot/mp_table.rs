//! The MP table (Intel MultiProcessor Specification 1.4): which CPUs there are, and which pin of the I/O APIC is which
//! interrupt. A kernel reads it in a few thousand instructions, where ACPI tables would take it millions.

use devices::GuestMemory;

use std::ops::Range;

use crate::layout::{IO_APIC, LOCAL_APIC, LOW_MEMORY_END, MP_TABLE};
use crate::memory::{self, MemoryError};

const SPECIFICATION: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const CPU_ENABLED: u8 = 1;
const CPU_IS_BOOTSTRAP: u8 = 2;
const IO_APIC_USABLE: u8 = 1;
const ISA_BUS: u8 = 0;

const POINTER_LENGTH: u64 = 16;
const HEADER_LENGTH: usize = 44;
const ENTRY_CPU: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IO_APIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;
const INTERRUPT_VECTORED: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTERNAL: u8 = 3;

/// Writes the table for `vcpus` CPUs with the APIC ids 0, 1, …, and the interrupts `irqs`, each on the pin of its number.
/// Pins that nothing is connected to are left out: the kernel sets each one up with a dozen accesses to the I/O APIC,
/// every one of which leaves the guest.
///
/// # Errors
/// When the table is too long for its place, which has room for 43 CPUs and every pin, or guest memory is too small.
pub fn write(guest: &GuestMemory, vcpus: u8, irqs: Range<u8>) -> Result<(), MemoryError> {
    let table = table(vcpus, irqs);
    let mut pointer = [0u8; POINTER_LENGTH as usize];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&((MP_TABLE + POINTER_LENGTH) as u32).to_le_bytes());
    pointer[8] = 1; // its length in units of 16 bytes
    pointer[9] = SPECIFICATION;
    pointer[10] = checksum(&pointer);
    let length = POINTER_LENGTH + table.len() as u64;
    if MP_TABLE + length > LOW_MEMORY_END {
        return Err(MemoryError::OutOfBounds { address: MP_TABLE, length });
    }
    memory::write(guest, &pointer, MP_TABLE)?;
    memory::write(guest, &table, MP_TABLE + POINTER_LENGTH)
}

fn table(vcpus: u8, irqs: Range<u8>) -> Vec<u8> {
    let io_apic_id = vcpus;
    let mut entries = Vec::new();
    let mut count = 0u16;
    let mut push = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = CPU_ENABLED | if id == 0 { CPU_IS_BOOTSTRAP } else { 0 };
        // CPU signature and feature flags: the kernel asks CPUID instead.
        push(&[ENTRY_CPU, id, APIC_VERSION, flags, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
    push(&[ENTRY_BUS, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = IO_APIC.to_le_bytes();
    push(&[ENTRY_IO_APIC, io_apic_id, APIC_VERSION, IO_APIC_USABLE, a, b, c, d]);
    for pin in irqs {
        push(&[ENTRY_INTERRUPT, INTERRUPT_VECTORED, 0, 0, ISA_BUS, pin, io_apic_id, pin]);
    }
    push(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_EXTERNAL, 0, 0, ISA_BUS, 0, 0, 0]);
    push(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, ISA_BUS, 0, 0xff, 1]);

    let mut table = Vec::with_capacity(HEADER_LENGTH + entries.len());
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&u16::try_from(HEADER_LENGTH + entries.len()).unwrap_or(u16::MAX).to_le_bytes());
    table.extend_from_slice(&[SPECIFICATION, 0]);
    table.extend_from_slice(b"COFFERDMMICROVM     ");
    table.extend_from_slice(&[0; 6]);
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&[0; 4]);
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);
    table
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_sums_to_zero_and_tells_its_length() {
        for vcpus in [1, 2, 32] {
            let table = table(vcpus, 4..9);
            assert_eq!(table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            assert_eq!(table[HEADER_LENGTH..][..4], [ENTRY_CPU, 0, APIC_VERSION, CPU_ENABLED | CPU_IS_BOOTSTRAP]);
        }
    }

    #[test]
    fn more_cpus_than_the_place_has_room_for_are_refused() {
        let guest = memory::reserve(48).unwrap();
        assert!(write(&guest, 32, 0..24).is_ok());
        assert!(write(&guest, 60, 0..24).is_err());
    }
}
