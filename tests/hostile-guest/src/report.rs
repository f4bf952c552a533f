//! What the program says: lines on the serial port (16550A), which the monitor passes on.

use core::fmt::{self, Write};

use crate::cpu;

const PORT: u16 = 0x3f8;
const INTERRUPTS: u16 = 1;
const LINE_CONTROL: u16 = 3;
const MODEM_CONTROL: u16 = 4;
const EIGHT_BITS: u8 = 3;

struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| cpu::port_write(PORT, byte));
        Ok(())
    }
}

/// Says a line, on one of its own: others print on the console as well. The port may have been left in any state.
pub fn say(arguments: fmt::Arguments<'_>) {
    cpu::port_write(PORT + LINE_CONTROL, EIGHT_BITS);
    cpu::port_write(PORT + INTERRUPTS, 0);
    cpu::port_write(PORT + MODEM_CONTROL, 0);
    // A port cannot fail.
    let _ = writeln!(Serial, "\nhostile: {arguments}");
}
