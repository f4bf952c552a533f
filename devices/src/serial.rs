//! A 16550A serial port (COM1), output only, without interrupt: where a kernel prints before its console is up
//! (`earlyprintk=serial`). Off unless asked for. The register model is the `vm-superio` crate's.

use std::io::{self, Write};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial as Registers, Trigger};

use crate::console::ConsoleOutput;

/// The first I/O port.
pub const BASE: u16 = 0x3f8;
/// The number of I/O ports.
pub const PORTS: u16 = 8;

/// Nobody listens to the port's interrupt.
#[derive(Debug)]
struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

/// The output of a port whose registers flush it after each byte, which would show every line in as many pieces. Whoever
/// watches sees whole lines; the rest of the last one is shown at the monitor's end.
#[derive(Debug)]
struct Lines(ConsoleOutput);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The serial port.
#[derive(Debug)]
pub struct Serial(Registers<NoInterrupt, NoEvents, Lines>);

impl Serial {
    /// A port that writes to `output`.
    pub fn new(output: ConsoleOutput) -> Self {
        Self(Registers::new(NoInterrupt, Lines(output)))
    }

    /// Handles `in` from port [`BASE`] + `offset`.
    pub fn read(&mut self, offset: u16) -> u8 {
        u8::try_from(offset).map_or(0xff, |offset| self.0.read(offset))
    }

    /// Handles `out` to port [`BASE`] + `offset`.
    pub fn write(&mut self, offset: u16, value: u8) {
        if let Ok(offset) = u8::try_from(offset) {
            // Output cannot fail, and input does not exist.
            let _ = self.0.write(offset, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_held_back_until_it_is_whole_or_the_monitor_ends() {
        let mut output = ConsoleOutput::new(true);
        let mut serial = Serial::new(output.clone());
        let mut print = |text: &str| text.bytes().for_each(|byte| serial.write(0, byte));
        print("a line\nand half a ");
        assert_eq!((output.line(), output.tail()), (b"and half a ".to_vec(), b"a line\nand half a ".to_vec()));
        print("line");
        output.flush().unwrap();
        assert_eq!((output.line(), output.tail().len()), (Vec::new(), 22));
    }
}
