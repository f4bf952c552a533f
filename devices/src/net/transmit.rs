//! Frames from the guest (VIRTIO 1.2 §5.1.6.2, "Packet Transmission").

use std::io;

use super::tap::{HEADER, Tap};
use super::{BUDGET, FRAME_MAX};
use crate::GuestMemory;
use crate::device::Broken;
use crate::limit::Limiter;
use crate::queue::{Buffers, VirtQueue};

/// The least frame: an Ethernet header, destination and source first.
const ETHERNET: usize = 14;
/// Where the source address is.
const SOURCE: std::ops::Range<usize> = HEADER + 6..HEADER + 12;

/// What all transmit queues have in common.
#[derive(Debug)]
pub(super) struct Transmitter {
    pub(super) limiter: Option<Limiter>,
    /// The only address that frames may come from.
    source: Option<[u8; 6]>,
    frames: u64,
    bytes: u64,
    dropped: u64,
    spoofed: u64,
    tap_full: u64,
}

/// What became of a frame.
enum Sent {
    /// It is on its way: so many bytes.
    Gone(usize),
    /// It makes no sense, to us or to the tap.
    Dropped,
    /// It comes from an address that is not the device's.
    Spoofed,
    /// The tap cannot take it now.
    Full,
    /// The tap is not able to take any.
    Failed,
}

impl Transmitter {
    pub(super) fn new(limiter: Option<Limiter>, source: Option<[u8; 6]>) -> Self {
        Self { limiter, source, frames: 0, bytes: 0, dropped: 0, spoofed: 0, tap_full: 0 }
    }

    pub(super) fn metrics(&self) -> [(&'static str, u64); 6] {
        [
            ("transmitted_frames", self.frames),
            ("transmitted_bytes", self.bytes),
            ("transmit_dropped_frames", self.dropped),
            ("transmit_spoofed_frames", self.spoofed),
            ("transmit_throttled", self.limiter.as_ref().map_or(0, Limiter::throttled)),
            ("transmit_tap_full", self.tap_full),
        ]
    }

    /// Moves what the guest has made available to the tap, and gives how often the tap failed. What has to wait, for the
    /// limits or for room in the tap, stays on the queue.
    pub(super) fn transmit(&mut self, memory: &GuestMemory, queue: &mut VirtQueue, tap: &Tap) -> Result<u64, Broken> {
        let mut errors = 0;
        queue.disarm(memory)?;
        for _ in 0..BUDGET {
            let chain = match queue.pop(memory)? {
                Some(chain) => chain,
                None if queue.rearm(memory)? => continue,
                None => return Ok(errors),
            };
            if !Limiter::admits(&mut self.limiter) {
                queue.unpop();
                return Ok(errors);
            }
            let head = chain.head_index();
            let buffers = Buffers::of(memory, chain).map_err(|reason| queue.malformed(reason))?;
            let length: usize = buffers.readable.iter().map(|slice| slice.len()).sum();
            match self.send(buffers, length, tap) {
                Sent::Full => {
                    self.tap_full += 1;
                    queue.unpop();
                    return Ok(errors);
                }
                Sent::Gone(length) => {
                    self.frames += 1;
                    self.bytes += (length - HEADER) as u64;
                }
                Sent::Spoofed => self.spoofed += 1,
                Sent::Dropped => self.dropped += 1,
                Sent::Failed => {
                    self.dropped += 1;
                    errors += 1;
                }
            }
            // Also of those that went nowhere: they are work too.
            let payload = (length.clamp(HEADER, FRAME_MAX) - HEADER) as u64;
            self.limiter.iter_mut().for_each(|limiter| limiter.charge(payload));
            queue.push(memory, head, 0)?;
        }
        // There may be more, after the others' turn.
        let _ = queue.kick().write(1);
        Ok(errors)
    }

    fn send(&self, mut buffers: Buffers<'_>, length: usize, tap: &Tap) -> Sent {
        // Copied, so that what is looked at is what is sent: the guest can change its memory at any time.
        let mut head = [0; HEADER + ETHERNET];
        if length > FRAME_MAX || buffers.take(&mut head).is_none() {
            return Sent::Dropped;
        }
        if self.source.is_some_and(|source| head[SOURCE] != source) {
            return Sent::Spoofed;
        }
        match tap.write(&head, &buffers.readable) {
            Ok(_) => Sent::Gone(length),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Sent::Full,
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Sent::Dropped,
            Err(_) => Sent::Failed,
        }
    }
}
