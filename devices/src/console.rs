//! The console device (VIRTIO 1.2 §5.3, "Console Device", device ID 3), one port, output only.
//!
//! What the guest's kernel prints is kept as a bounded tail, so that a guest that dies can be explained; buffers on the
//! receive queue are never used. The text is untrusted.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

use crate::device::{Broken, Event, Resources, VirtioDevice, read_config_bytes};

/// How much of the end of the output is kept: a kernel oops with its stack is about 4 KiB.
const TAIL_MAX: usize = 16 << 10;
/// The most bytes taken from one buffer; the rest is dropped. Linux sends at most a page.
const REQUEST_MAX: usize = 64 << 10;
const TRANSMIT: usize = 1;
const QUEUE_SIZES: [u16; 2] = [64, 64];

/// Where console output goes: the tail, and a copy for whoever watches.
#[derive(Debug, Clone, Default)]
pub struct ConsoleOutput {
    tail: Arc<Mutex<VecDeque<u8>>>,
    echo: bool,
}

impl ConsoleOutput {
    /// Keeps the tail; with `echo`, also copies everything to the monitor's standard error as it comes.
    pub fn new(echo: bool) -> Self {
        Self { tail: Arc::default(), echo }
    }

    /// The end of the output so far.
    pub fn tail(&self) -> Vec<u8> {
        self.tail.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }
}

impl Write for ConsoleOutput {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = &bytes[bytes.len().saturating_sub(TAIL_MAX)..];
        let excess = (tail.len() + kept.len()).saturating_sub(TAIL_MAX);
        tail.drain(..excess);
        tail.extend(kept);
        if self.echo {
            let _ = std::io::stderr().write_all(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The console device.
#[derive(Debug)]
pub struct Console {
    output: ConsoleOutput,
}

impl Console {
    /// A console that writes to `output`.
    pub fn new(output: ConsoleOutput) -> Self {
        Self { output }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&[], offset, data);
    }

    fn start(&mut self, _: u64) {}

    fn process(&mut self, resources: Resources<'_>, event: Event) -> Result<(), Broken> {
        if event != Event::Queue(TRANSMIT as u16) {
            return Ok(());
        }
        let Resources { memory, queues } = resources;
        let Some(queue) = queues.get_mut(TRANSMIT) else { return Ok(()) };
        queue.for_each(memory, |chain| {
            let Ok(reader) = chain.reader(memory) else { return Ok(0) };
            let mut reader = reader.take(REQUEST_MAX as u64);
            let mut piece = [0; 512];
            while let Ok(count @ 1..) = reader.read(&mut piece) {
                let _ = self.output.write_all(&piece[..count]);
            }
            Ok(0)
        })
    }

    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_keeps_the_end() {
        let mut output = ConsoleOutput::default();
        for line in 0..10_000 {
            writeln!(output, "line {line}").unwrap();
        }
        output.write_all(&[b'x'; 3 * TAIL_MAX]).unwrap();
        output.write_all(b"last words").unwrap();
        let tail = output.tail();
        assert_eq!(tail.len(), TAIL_MAX);
        assert!(tail.ends_with(b"xxlast words"));
    }
}
