//! Frames for the guest (VIRTIO 1.2 §5.1.6.3, "Setting Up Receive Buffers", and §5.1.6.4, "Processing of Incoming Packets").
//!
//! Buffers for a frame as long as those before it are gathered, one call reads a frame into them, and those that it did not
//! reach are the next frame's. Should the frame need more, the rest of it lands in memory of the device's own, where the frame
//! is kept until there are enough: nothing that was taken from the tap is lost for want of buffers.

use std::io;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP,
};
use virtio_queue::QueueT;
use vm_memory::VolatileSlice;

use super::tap::{HEADER, Tap};
use super::{BUDGET, FRAME_MAX, has};
use crate::GuestMemory;
use crate::device::Broken;
use crate::guest_io::PIECES_MAX;
use crate::limit::Limiter;
use crate::queue::{VirtQueue, walk};

/// The most slices gathered, so that with those of one more chain, the header and the device's own memory there are no more
/// than a call takes (`UIO_MAXIOV`).
const SLICES_MAX: usize = 1024 - 2 - PIECES_MAX;
/// How many buffers of a page the longest frame takes.
const PAGES: usize = FRAME_MAX.div_ceil(4096);

/// What all receive queues have in common, and what is kept of each tap.
#[derive(Debug)]
pub(super) struct Receiver {
    pub(super) limiter: Option<Limiter>,
    spills: Vec<Spill>,
    frames: u64,
    bytes: u64,
    dropped: u64,
    stalls: u64,
}

/// Memory for what guest buffers have no room for. Until it is used for the first time it is no more than addresses.
#[derive(Debug)]
struct Spill {
    memory: Box<[u8]>,
    /// The length of the frame that is kept in it; 0 for none.
    kept: usize,
    /// How long the next frame is going to be, by those before it: buffers for the longest one are many, and to gather them
    /// is most of the work on a short one.
    expected: usize,
}

impl Receiver {
    pub(super) fn new(limiter: Option<Limiter>, taps: usize) -> Self {
        let spill = || Spill { memory: vec![0; FRAME_MAX].into_boxed_slice(), kept: 0, expected: FRAME_MAX };
        let spills = std::iter::repeat_with(spill).take(taps).collect();
        Self { limiter, spills, frames: 0, bytes: 0, dropped: 0, stalls: 0 }
    }

    /// Frames that were kept for the driver that is gone are lost.
    pub(super) fn reset(&mut self) {
        for spill in &mut self.spills {
            self.dropped += u64::from(spill.kept != 0);
            spill.kept = 0;
        }
    }

    pub(super) fn metrics(&self) -> [(&'static str, u64); 5] {
        [
            ("received_frames", self.frames),
            ("received_bytes", self.bytes),
            ("receive_dropped_frames", self.dropped),
            ("receive_throttled", self.limiter.as_ref().map_or(0, Limiter::throttled)),
            ("receive_stalls", self.stalls),
        ]
    }

    /// Moves frames of a tap to a queue, as long as there are both frames and buffers, and gives how often the tap failed.
    /// `asked` says that there is a frame.
    pub(super) fn receive(
        &mut self,
        memory: &GuestMemory,
        queue: &mut VirtQueue,
        (index, tap): (usize, &Tap),
        features: u64,
        asked: bool,
    ) -> Result<u64, Broken> {
        let mut room = Room::new(memory, features);
        queue.disarm(memory)?;
        let mut waiting = asked;
        for _ in 0..BUDGET {
            if !Limiter::admits(&mut self.limiter) {
                return room.leave(queue, 0);
            }
            let Some(spill) = self.spills.get_mut(index) else { return room.leave(queue, 0) };
            room.gather(queue, spill.needed())?;
            if spill.kept > room.length || room.length == 0 {
                // Looked at again once the driver is going to tell of more.
                if room.is_whole_queue(queue) {
                    // There is never going to be more room than this.
                    (spill.kept, self.dropped) = (0, self.dropped + 1);
                } else if !queue.rearm(memory)? {
                    self.stalls += u64::from(waiting || spill.kept != 0);
                    return room.leave(queue, 0);
                }
                continue;
            }
            match spill.next(tap, &room) {
                Ok(Frame::There(header, length)) => {
                    spill.learn(length);
                    let payload = (length - HEADER) as u64;
                    self.limiter.iter_mut().for_each(|limiter| limiter.charge(payload));
                    match admissible(header, features) {
                        Some(header) => {
                            room.fill(queue, header, length)?;
                            self.frames += 1;
                            self.bytes += payload;
                        }
                        None => self.dropped += 1,
                    }
                }
                Ok(Frame::Kept) => {}
                Ok(Frame::TooLong) => self.dropped += 1,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return room.leave(queue, 0),
                // Not tried again before something happens: the interface may be gone.
                Err(_) => return room.leave(queue, 1),
            }
            waiting = true;
        }
        // There may be more, after the others' turn.
        let _ = queue.kick().write(1);
        room.leave(queue, 0)
    }
}

/// What reading the tap gave.
enum Frame {
    /// A frame in the buffers, but for its header; its length with it.
    There([u8; HEADER], usize),
    /// A frame that is kept until there is room.
    Kept,
    /// A frame that has no end, or will never have room.
    TooLong,
}

impl Spill {
    /// How much room the next frame is given.
    fn needed(&self) -> usize {
        self.kept.max(self.expected).max(HEADER)
    }

    /// Takes into account how long a frame was.
    fn learn(&mut self, length: usize) {
        // Long ones are expected for a while after one: to be wrong about them costs a copy.
        self.expected = length.max(self.expected - self.expected.saturating_sub(length).div_ceil(8));
    }

    /// Takes the frame that is kept, which has room, or else the next one from the tap.
    fn next(&mut self, tap: &Tap, room: &Room<'_>) -> io::Result<Frame> {
        let mut header = [0; HEADER];
        if self.kept != 0 {
            let length = std::mem::take(&mut self.kept);
            header.copy_from_slice(&self.memory[..HEADER]);
            write(room.after_header(), &self.memory[HEADER..length]);
            return Ok(Frame::There(header, length));
        }
        let length = tap.read(&mut header, room.after_header(), &mut self.memory)?;
        if length < HEADER {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if length <= room.length {
            return Ok(Frame::There(header, length));
        }
        // Longer than anything, or cut off; or for a driver that does not put buffers together.
        if length > FRAME_MAX || !room.mergeable {
            return Ok(Frame::TooLong);
        }
        // What the buffers hold goes before it. The guest can have changed it: then it has a broken frame.
        self.memory.copy_within(..length - room.length, room.length);
        self.memory[..HEADER].copy_from_slice(&header);
        read(room.after_header(), &mut self.memory[HEADER..room.length]);
        self.kept = length;
        self.expected = FRAME_MAX;
        Ok(Frame::Kept)
    }
}

/// Whether the driver can take a frame with this header, and what it is to see of it (§5.1.6.4.1). A tap may hold frames from
/// before it knew the driver.
pub(super) fn admissible(mut header: [u8; HEADER], features: u64) -> Option<[u8; HEADER]> {
    let [flags, segmentation, ..] = &mut header;
    if !has(features, VIRTIO_NET_F_GUEST_CSUM) {
        if u32::from(*flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 {
            return None;
        }
        *flags &= !(VIRTIO_NET_HDR_F_DATA_VALID as u8);
    }
    let segmentation = u32::from(*segmentation);
    let feature = match segmentation & !VIRTIO_NET_HDR_GSO_ECN {
        VIRTIO_NET_HDR_GSO_NONE => return Some(header),
        VIRTIO_NET_HDR_GSO_TCPV4 => VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_HDR_GSO_TCPV6 => VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_HDR_GSO_UDP => VIRTIO_NET_F_GUEST_UFO,
        _ => return None,
    };
    let ecn = segmentation & VIRTIO_NET_HDR_GSO_ECN == 0 || has(features, VIRTIO_NET_F_GUEST_ECN);
    (ecn && has(features, feature)).then_some(header)
}

/// Chains that were taken from a queue and are not used yet.
struct Room<'m> {
    memory: &'m GuestMemory,
    mergeable: bool,
    chains: Vec<Place>,
    slices: Vec<VolatileSlice<'m>>,
    /// How much fits into them.
    length: usize,
}

/// A chain: its head, how many slices it has, and how much fits into it.
struct Place {
    head: u16,
    slices: usize,
    length: usize,
}

impl<'m> Room<'m> {
    fn new(memory: &'m GuestMemory, features: u64) -> Self {
        let mergeable = has(features, VIRTIO_NET_F_MRG_RXBUF);
        let (chains, slices) = (Vec::with_capacity(PAGES), Vec::with_capacity(PAGES));
        Self { memory, mergeable, chains, slices, length: 0 }
    }

    /// Takes chains until a frame of this length fits: one, unless the driver puts several together.
    fn gather(&mut self, queue: &mut VirtQueue, needed: usize) -> Result<(), Broken> {
        while self.length < needed && !self.is_whole_queue(queue) && !self.is_one_chain() {
            if self.slices.len() > SLICES_MAX {
                break;
            }
            let Some(chain) = queue.pop(self.memory)? else { break };
            let head = chain.head_index();
            let mut place = Place { head, slices: 0, length: 0 };
            let found = walk(self.memory, chain, |descriptor, slice| {
                if descriptor.is_write_only() {
                    place.slices += 1;
                    place.length += slice.len();
                    self.slices.push(slice);
                }
            });
            found.map_err(|reason| queue.malformed(reason))?;
            if place.length < HEADER {
                return Err(queue.malformed("a receive buffer has no room for a header"));
            }
            self.length += place.length;
            self.chains.push(place);
        }
        Ok(())
    }

    /// Whether no more chains are ever to come before some are used.
    fn is_whole_queue(&self, queue: &mut VirtQueue) -> bool {
        self.chains.len() >= usize::from(queue.ring().size()) || self.slices.len() > SLICES_MAX
    }

    /// Whether this is all that one frame can have.
    fn is_one_chain(&self) -> bool {
        !self.mergeable && !self.chains.is_empty()
    }

    /// The buffers of a frame without the place of its header.
    fn after_header(&self) -> impl Iterator<Item = VolatileSlice<'m>> {
        let mut skip = HEADER;
        self.slices.iter().filter_map(move |slice| {
            let passed = skip.min(slice.len());
            skip -= passed;
            slice.offset(passed).ok().filter(|rest| !rest.is_empty())
        })
    }

    /// Hands a frame of this length to the driver, whose content is in its place already.
    fn fill(&mut self, queue: &mut VirtQueue, mut header: [u8; HEADER], length: usize) -> Result<(), Broken> {
        let (mut rest, mut slices) = (length, 0);
        let mut used = Vec::with_capacity(self.chains.len());
        for place in &self.chains {
            let part = rest.min(place.length);
            used.push((place.head, u32::try_from(part).unwrap_or(u32::MAX)));
            slices += place.slices;
            self.length -= place.length;
            rest -= part;
            if rest == 0 {
                break;
            }
        }
        // num_buffers is 1 for a driver that does not put buffers together, too (§5.1.6.4.1).
        header[10..12].copy_from_slice(&u16::try_from(used.len()).unwrap_or(u16::MAX).to_le_bytes());
        write(self.slices.iter().copied(), &header);
        self.chains.drain(..used.len());
        self.slices.drain(..slices);
        queue.push_together(self.memory, &used)
    }

    /// Gives back what was not used.
    fn leave(self, queue: &mut VirtQueue, errors: u64) -> Result<u64, Broken> {
        for _ in &self.chains {
            queue.unpop();
        }
        Ok(errors)
    }
}

/// Writes `bytes`, which fit, to the beginning of `slices`.
fn write<'m>(slices: impl Iterator<Item = VolatileSlice<'m>>, mut bytes: &[u8]) {
    for slice in slices {
        let (now, later) = bytes.split_at(slice.len().min(bytes.len()));
        slice.copy_from(now);
        bytes = later;
        if bytes.is_empty() {
            break;
        }
    }
}

/// Reads `bytes`, which are there, from the beginning of `slices`.
fn read<'m>(slices: impl Iterator<Item = VolatileSlice<'m>>, mut bytes: &mut [u8]) {
    for slice in slices {
        let count = slice.copy_to(bytes);
        bytes = &mut bytes[count..];
        if bytes.is_empty() {
            break;
        }
    }
}
