//! The console device (VIRTIO 1.2 §5.3, "Console Device", device ID 3), one port, output only.
//!
//! What the guest's kernel prints is kept as a bounded tail, so that a guest that dies can be explained; buffers on the
//! receive queue are never used. The text is untrusted.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::GuestMemory;
use crate::device::{Broken, Event, Resources, VirtioDevice, Watch, read_config_bytes};
use crate::limit::Limiter;
use crate::queue::{Buffers, Chain, Served};
use crate::state::{self, StateError};

/// How much of the end of the output is kept: a kernel oops with its stack is about 4 KiB.
const TAIL_MAX: usize = 16 << 10;
/// The most bytes taken from one buffer; the rest is dropped. Linux sends at most a page.
const REQUEST_MAX: usize = 64 << 10;
const TRANSMIT: usize = 1;
const QUEUE_SIZES: [u16; 2] = [64, 64];

/// The longest piece of a line that is held back from whoever watches.
const LINE_MAX: usize = 512;

/// Where console output goes: the tail, and a copy for whoever watches.
#[derive(Debug, Clone, Default)]
pub struct ConsoleOutput {
    kept: Arc<Mutex<Kept>>,
    echo: bool,
}

#[derive(Debug, Default)]
struct Kept {
    tail: VecDeque<u8>,
    /// A line that has begun: a serial port gives one byte at a time, and the guest waits for each write.
    line: Vec<u8>,
}

impl ConsoleOutput {
    /// Keeps the tail; with `echo`, also copies everything to the monitor's standard error, line by line.
    pub fn new(echo: bool) -> Self {
        Self { kept: Arc::default(), echo }
    }

    /// The end of the output so far.
    pub fn tail(&self) -> Vec<u8> {
        self.kept().tail.iter().copied().collect()
    }

    /// The line that has begun and is not shown yet.
    #[cfg(test)]
    pub(crate) fn line(&self) -> Vec<u8> {
        self.kept().line.clone()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes from `line`, which `bytes` continue, what is to be written now.
fn take_lines(line: &mut Vec<u8>, bytes: &[u8]) -> Vec<u8> {
    line.extend_from_slice(bytes);
    let complete = line.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    let count = if line.len() - complete >= LINE_MAX { line.len() } else { complete };
    line.drain(..count).collect()
}

impl Write for ConsoleOutput {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut kept = self.kept();
        let end = &bytes[bytes.len().saturating_sub(TAIL_MAX)..];
        let excess = (kept.tail.len() + end.len()).saturating_sub(TAIL_MAX);
        kept.tail.drain(..excess);
        kept.tail.extend(end);
        if self.echo {
            let lines = take_lines(&mut kept.line, bytes);
            if !lines.is_empty() {
                let _ = std::io::stderr().write_all(&lines);
            }
        }
        Ok(bytes.len())
    }

    /// Shows whoever watches a line that was not ended.
    fn flush(&mut self) -> std::io::Result<()> {
        let line = std::mem::take(&mut self.kept().line);
        std::io::stderr().write_all(&line)
    }
}

/// The console device.
#[derive(Debug)]
pub struct Console {
    output: ConsoleOutput,
    limiter: Option<Limiter>,
    requests: u64,
    bytes: u64,
    dropped: u64,
}

impl Console {
    /// A console that writes to `output` as much as `limiter` admits.
    pub fn new(output: ConsoleOutput, limiter: Option<Limiter>) -> Self {
        Self { output, limiter, requests: 0, bytes: 0, dropped: 0 }
    }

    /// Takes what the guest prints.
    fn take(&mut self, memory: &GuestMemory, chain: Chain<'_>) {
        self.requests += 1;
        let Ok(mut buffers) = Buffers::of(memory, chain) else { return };
        let length = buffers.readable_length();
        let mut piece = [0; 512];
        let mut taken = 0;
        loop {
            let piece = &mut piece[..(length.min(REQUEST_MAX) - taken).min(512)];
            if piece.is_empty() || buffers.take(piece).is_none() {
                break;
            }
            let _ = self.output.write_all(piece);
            taken += piece.len();
        }
        self.bytes += taken as u64;
        self.dropped += length.saturating_sub(taken) as u64;
        if let Some(limiter) = &mut self.limiter {
            limiter.charge(taken as u64);
        }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&[], offset, data);
    }

    fn start(&mut self, _: u64) {}

    fn process(&mut self, resources: Resources<'_>, event: Event) -> Result<(), Broken> {
        match (event, &mut self.limiter) {
            (Event::Queue(queue), _) if usize::from(queue) == TRANSMIT => {}
            (Event::Backend(_), Some(limiter)) => limiter.wake(),
            _ => return Ok(()),
        }
        let Resources { memory, queues, .. } = resources;
        let Some(queue) = queues.get_mut(TRANSMIT) else { return Ok(()) };
        queue.serve(memory, |chain| {
            if !Limiter::admits(&mut self.limiter) {
                return Ok(Served::Refused);
            }
            self.take(memory, chain);
            Ok(Served::Used(0))
        })
    }

    fn reset(&mut self) {
        self.limiter.iter_mut().for_each(Limiter::reset);
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(state::encode(&Limiter::save(&self.limiter)))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        Limiter::restore(&mut self.limiter, state::decode("console", state)?);
        Ok(())
    }

    fn watched(&self) -> Vec<Watch> {
        self.limiter.iter().map(Limiter::watch).collect()
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let Self { requests, bytes, dropped, limiter, .. } = self;
        let throttled = limiter.as_ref().map_or(0, Limiter::throttled);
        vec![("requests", *requests), ("output_bytes", *bytes), ("dropped_bytes", *dropped), ("throttled", throttled)]
    }

    fn hurry(&mut self) {
        self.limiter.iter_mut().for_each(Limiter::lift);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::limit::Rate;
    use crate::testing::{BUFFERS, Buffer, Driver};

    #[test]
    fn lines_are_shown_whole_and_long_ones_in_pieces() {
        let mut line = Vec::new();
        assert_eq!(take_lines(&mut line, b"one"), b"");
        assert_eq!(take_lines(&mut line, b"\ntwo\nthr"), b"one\ntwo\n");
        assert_eq!(take_lines(&mut line, b"ee\n"), b"three\n");
        assert_eq!(take_lines(&mut line, &[b'x'; LINE_MAX]).len(), LINE_MAX);
        assert_eq!(line, b"");
    }

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

    #[test]
    fn a_guest_that_prints_too_much_waits_and_what_it_said_last_is_kept() {
        let rate = Rate { size: 4, refill: Duration::from_secs(3600), burst: 0 };
        let output = ConsoleOutput::default();
        let console = Console::new(output.clone(), Some(Limiter::new(Some(rate), None).unwrap()));
        let mut driver = Driver::new(Box::new(console)).start();
        driver.memory.write_slice(b"firstlast", GuestAddress(BUFFERS)).unwrap();
        driver.offer(TRANSMIT, &[Buffer { address: BUFFERS, length: 5, writable: false }]);
        driver.offer(TRANSMIT, &[Buffer { address: BUFFERS + 5, length: 4, writable: false }]);
        driver.device.dispatch(Event::Queue(1));
        assert_eq!((output.tail(), driver.metric("throttled")), (b"first".to_vec(), 1));
        driver.device.flush();
        assert_eq!(output.tail(), b"firstlast");
    }
}
