//! Accesses of what is no device: I/O ports, registers that nobody has, memory that the guest may only read or should not
//! touch.

use crate::cpu;
use crate::memory::{self, MIB, ram_end};
use crate::random::Random;

/// COM1, the keyboard controller, the reset port, PCI, the real-time clock, the timer, POST codes, and nothing. Not the
/// interrupt controllers: those are the host kernel's, and interrupts have to arrive.
const PORTS: [u16; 12] = [0x3f8, 0x3fc, 0x60, 0x64, 0xcf9, 0xcf8, 0x70, 0x43, 0x80, 0x92, 0x1234, 0xffff];

/// Accesses some.
pub fn wander(random: &mut Random) {
    for _ in 0..1 + random.below(16) {
        let port = random.pick(&PORTS).wrapping_add(random.below(4) as u16);
        match random.below(6) {
            0 => cpu::port_write(port, random.word() as u8),
            1 => cpu::port_write_word(port, random.word()),
            2 => drop(cpu::port_read(port)),
            _ => touch(random),
        }
    }
}

fn touch(random: &mut Random) {
    let little = random.below(0x3000);
    let address = match random.below(6) {
        0 => ram_end() + little,
        1 => 0xc000_0000 + little,
        2 => 0xd000_0000 + random.below(0x20_0000),
        // Memory that can be plugged, and persistent memory, which may be read-only.
        3 | 4 => (1 + random.below(7)) << 31 | random.below(4 * MIB),
        _ => 0xfed0_0000 + little,
    };
    match random.below(4) {
        0 => memory::write(address, random.long()),
        1 => memory::write(address, random.word() as u8),
        2 => drop(memory::read::<u64>(address)),
        _ => drop(memory::read::<u16>(address)),
    }
}
