//! A virtqueue as devices use it (VIRTIO 1.2 §2.7, "Split Virtqueues"; the ring itself is the `virtio-queue` crate).

use std::io;
use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, Permissions, VolatileSlice};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::GuestMemory;
use crate::device::Broken;
use crate::guest_io::PIECES_MAX;
use crate::interrupt::Interrupt;
use crate::state::{QueueState, StateError, impossible};

/// The largest queue that any of our devices offers.
pub const QUEUE_SIZE_MAX: u16 = 256;

/// How many chains a device handles before it lets other devices have the event loop: as many as fit into the largest
/// ring, so that an honest driver never notices, and a hostile one that refills its ring all the time cannot starve
/// the rest.
const BUDGET: u32 = QUEUE_SIZE_MAX as u32;

/// A chain of buffers.
pub type Chain<'m> = DescriptorChain<&'m GuestMemory>;

/// What a device did with a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// It is done with it, and wrote so many bytes into it.
    Used(u32),
    /// It keeps it, and gives it back later by [`VirtQueue::push`].
    Kept,
    /// It takes none now: this one stays available. The device comes back by itself, nobody has to notify it.
    Refused,
}

/// The buffers of a chain, with no assumption about how the driver cut its request into descriptors (VIRTIO 1.2 §2.7.4,
/// "Message Framing").
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    /// What the driver wrote for the device.
    pub readable: Vec<VolatileSlice<'m>>,
    /// Room for the device to write to.
    pub writable: Vec<VolatileSlice<'m>>,
    /// Where the last byte of that room is.
    pub writable_end: Option<GuestAddress>,
}

/// Calls `found` with each piece of memory that the buffers of a chain are in, none of them empty, and with the descriptor that
/// it is of. The only way to walk a chain that its driver made as long as it liked: an indirect table may claim 65,535
/// descriptors, and a few that lead to each other are as many.
///
/// # Errors
/// What is wrong with the chain: it reaches out of memory, or has more buffers than a queue has places (§2.7.5.3.1), or these are
/// in more pieces than are moved in one call.
pub fn walk<'m>(
    memory: &'m GuestMemory,
    chain: Chain<'m>,
    mut found: impl FnMut(&Descriptor, VolatileSlice<'m>),
) -> Result<(), &'static str> {
    const OUTSIDE: &str = "a buffer lies outside of memory";
    const TOO_MANY: &str = "a request has too many buffers";
    let (mut descriptors, mut pieces) = (0u16, 0);
    for descriptor in chain {
        let (address, length) = (descriptor.addr(), descriptor.len() as usize);
        // Also of those that are empty.
        descriptors += 1;
        if descriptors > QUEUE_SIZE_MAX || pieces > PIECES_MAX {
            return Err(TOO_MANY);
        }
        if length == 0 {
            continue;
        }
        // Nearly always it is in one piece, which is found much faster.
        if let Ok(slice) = GuestMemoryBackend::get_slice(memory, address, length) {
            pieces += 1;
            found(&descriptor, slice);
            continue;
        }
        let access = if descriptor.is_write_only() { Permissions::Write } else { Permissions::Read };
        let slices = vm_memory::GuestMemory::get_slices(memory, address, length, access);
        for slice in slices.map_err(|_| OUTSIDE)? {
            pieces += 1;
            found(&descriptor, slice.map_err(|_| OUTSIDE)?);
        }
    }
    if pieces > PIECES_MAX { Err(TOO_MANY) } else { Ok(()) }
}

impl<'m> Buffers<'m> {
    /// Looks the buffers of a chain up in guest memory.
    ///
    /// # Errors
    /// As [`walk`].
    pub fn of(memory: &'m GuestMemory, chain: Chain<'m>) -> Result<Self, &'static str> {
        let mut buffers = Self::default();
        walk(memory, chain, |descriptor, slice| {
            if descriptor.is_write_only() {
                buffers.writable_end = descriptor.addr().checked_add(u64::from(descriptor.len()) - 1);
                buffers.writable.push(slice);
            } else {
                buffers.readable.push(slice);
            }
        })?;
        Ok(buffers)
    }

    /// Moves the first bytes of what the driver wrote into `bytes`; `None` when there are not as many.
    pub fn take(&mut self, bytes: &mut [u8]) -> Option<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            let first = self.readable.first_mut()?;
            let count = first.len().min(bytes.len() - filled);
            first.read_slice(&mut bytes[filled..filled + count], 0).ok()?;
            filled += count;
            if count == first.len() {
                self.readable.remove(0);
            } else {
                *first = first.offset(count).ok()?;
            }
        }
        Some(())
    }
}

impl Buffers<'_> {
    /// How many bytes the driver wrote.
    #[must_use]
    pub fn readable_length(&self) -> usize {
        length(&self.readable)
    }

    /// How many bytes there is room for.
    #[must_use]
    pub fn writable_length(&self) -> usize {
        length(&self.writable)
    }

    /// Writes `bytes` to the first of the room, which is none any more; `None` when there is less.
    pub fn put(&mut self, bytes: &[u8]) -> Option<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let first = self.writable.first_mut()?;
            let (now, later) = rest.split_at(first.len().min(rest.len()));
            first.write_slice(now, 0).ok()?;
            if now.len() == first.len() {
                self.writable.remove(0);
            } else {
                *first = first.offset(now.len()).ok()?;
            }
            rest = later;
        }
        Some(())
    }
}

fn length(slices: &[VolatileSlice<'_>]) -> usize {
    slices.iter().fold(0, |sum: usize, slice| sum.saturating_add(slice.len()))
}

/// A queue, the event that says it has buffers, and the interrupt that says they were used.
#[derive(Debug)]
pub struct VirtQueue {
    index: u16,
    ring: Queue,
    kick: EventFd,
    interrupt: Interrupt,
    /// How many chains were returned since the driver was last asked whether it wants to know. After a reset it may be too
    /// many, which is an interrupt too many.
    returned: Wrapping<u16>,
}

impl VirtQueue {
    /// A queue that the driver has not set up. `size` is a power of two, at most [`QUEUE_SIZE_MAX`].
    ///
    /// # Errors
    /// When the system has no descriptor left, or the size is not allowed.
    pub fn new(index: u16, size: u16, interrupt: Interrupt) -> io::Result<Self> {
        let ring = Queue::new(size.min(QUEUE_SIZE_MAX)).map_err(io::Error::other)?;
        Ok(Self { index, ring, kick: EventFd::new(EFD_NONBLOCK)?, interrupt, returned: Wrapping(0) })
    }

    /// The ring, for the transport's registers.
    pub fn ring(&mut self) -> &mut Queue {
        &mut self.ring
    }

    /// The eventfd to connect with the driver's notification (`KVM_IOEVENTFD`).
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Whether the driver made the queue ready and its rings lie in guest memory.
    pub fn is_usable(&self, memory: &GuestMemory) -> bool {
        self.ring.is_valid(memory)
    }

    /// What is kept of it.
    pub(crate) fn save(&self) -> QueueState {
        let ring = self.ring.state();
        QueueState {
            size: ring.size,
            ready: ring.ready,
            next_available: ring.next_avail,
            next_used: ring.next_used,
            descriptors: ring.desc_table,
            available: ring.avail_ring,
            used: ring.used_ring,
        }
    }

    /// Takes over what was kept of a queue, which has to lie in memory if it is ready.
    ///
    /// # Errors
    /// [`StateError::Impossible`] names what no driver could have set.
    pub(crate) fn restore(
        &mut self,
        memory: &GuestMemory,
        state: QueueState,
        event_idx_enabled: bool,
    ) -> Result<(), StateError> {
        let ring = virtio_queue::QueueState {
            max_size: self.ring.max_size(),
            next_avail: state.next_available,
            next_used: state.next_used,
            event_idx_enabled,
            size: state.size,
            ready: state.ready,
            desc_table: state.descriptors,
            avail_ring: state.available,
            used_ring: state.used,
        };
        self.ring = Queue::try_from(ring).map_err(|_| impossible("the layout of a queue of this index", self.index))?;
        if state.ready && !self.is_usable(memory) {
            return Err(impossible("outside of memory a queue of this index", self.index));
        }
        Ok(())
    }

    /// Takes the next available chain.
    ///
    /// # Errors
    /// [`Broken`] when the available index jumped by more than the queue's size, or the ring is not in memory.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemory) -> Result<Option<Chain<'m>>, Broken> {
        if !self.ring.ready() {
            return Ok(None);
        }
        let queue = self.index;
        let mut available = self.ring.iter(memory).map_err(|source| Broken::Queue { queue, source })?;
        Ok(available.next())
    }

    /// Gives the chain that was taken last back, as if it had not been taken.
    pub fn unpop(&mut self) {
        self.ring.go_to_previous_position();
    }

    /// Returns a chain of which the device wrote `length` bytes.
    ///
    /// # Errors
    /// [`Broken`] when the chain's head or the used ring is out of bounds.
    pub fn push(&mut self, memory: &GuestMemory, head: u16, length: u32) -> Result<(), Broken> {
        self.returned += 1;
        self.ring.add_used(memory, head, length).map_err(|source| self.broken(source))
    }

    /// Returns chains, each with how many bytes the device wrote, in order: the driver sees either none or all of them.
    ///
    /// # Errors
    /// As [`VirtQueue::push`].
    pub fn push_together(&mut self, memory: &GuestMemory, chains: &[(u16, u32)]) -> Result<(), Broken> {
        let Some((&(head, length), before)) = chains.split_last() else { return Ok(()) };
        let first = self.ring.next_used();
        let mut position = Wrapping(first);
        for &(head, length) in before {
            self.write_used(memory, position.0, head, length).map_err(|source| self.broken(source))?;
            position += 1;
        }
        self.returned += position - Wrapping(first);
        // The last one publishes the index after it, and with it all of them.
        self.ring.set_next_used(position.0);
        self.push(memory, head, length)
    }

    /// Writes an element of the used ring (VIRTIO 1.2 §2.7.8, "The Virtqueue Used Ring"), which is not yet to be seen.
    fn write_used(&self, memory: &GuestMemory, position: u16, head: u16, length: u32) -> Result<(), Error> {
        let size = self.ring.size();
        if head >= size {
            return Err(Error::InvalidDescriptorIndex);
        }
        let element = u64::from(head) | u64::from(length) << 32;
        let offset = 4 + u64::from(position % size) * size_of_val(&element) as u64;
        let address = self.ring.used_ring().checked_add(offset).ok_or(Error::AddressOverflow)?;
        memory.write_obj(element.to_le(), GuestAddress(address)).map_err(Error::GuestMemory)
    }

    /// Interrupts the driver if it wants to know of the buffers used since the last call.
    ///
    /// # Errors
    /// [`Broken`] when the ring is not in memory.
    pub fn signal(&mut self, memory: &GuestMemory) -> Result<(), Broken> {
        if !self.ring.ready() {
            return Ok(());
        }
        let returned = std::mem::take(&mut self.returned);
        // What was returned is there before it is asked whether it is waited for.
        fence(Ordering::SeqCst);
        // Without VIRTIO_F_EVENT_IDX the driver has only a hint to give, which it need not be told by.
        let wanted = !self.ring.event_idx_enabled() || {
            let event = self.used_event(memory).map_err(|source| self.broken(source))?;
            Wrapping(self.ring.next_used()) - event - Wrapping(1) < returned
        };
        if wanted {
            self.interrupt.raise(Interrupt::USED);
        }
        Ok(())
    }

    /// The used index that the driver wants to be interrupted beyond (VIRTIO 1.2 §2.7.7, "Used Buffer Notification
    /// Suppression"): the field after the available ring.
    fn used_event(&self, memory: &GuestMemory) -> Result<Wrapping<u16>, Error> {
        let offset = 4 + u64::from(self.ring.size()) * 2;
        let address = self.ring.avail_ring().checked_add(offset).ok_or(Error::AddressOverflow)?;
        let event: u16 = memory.load(GuestAddress(address), Ordering::Relaxed).map_err(Error::GuestMemory)?;
        Ok(Wrapping(u16::from_le(event)))
    }

    /// Tells the driver not to notify of buffers for now, as far as it can be told.
    ///
    /// # Errors
    /// [`Broken`] when the ring is not in memory.
    pub fn disarm(&mut self, memory: &GuestMemory) -> Result<(), Broken> {
        if !self.ring.ready() {
            return Ok(());
        }
        self.ring.disable_notification(memory).map_err(|source| self.broken(source))
    }

    /// Asks the driver to notify of the next buffer; says whether there is one already.
    ///
    /// # Errors
    /// [`Broken`] when the ring is not in memory.
    pub fn rearm(&mut self, memory: &GuestMemory) -> Result<bool, Broken> {
        if !self.ring.ready() {
            return Ok(false);
        }
        self.ring.enable_notification(memory).map_err(|source| self.broken(source))
    }

    /// Calls `handle` with each available chain; what it returns is how many bytes it wrote into it. Then interrupts the
    /// driver if it asked for it. Stops after a bounded number of chains and asks the event loop for another turn.
    ///
    /// # Errors
    /// [`Broken`] when the ring is not usable, or as `handle` says.
    pub fn for_each<'m>(
        &mut self,
        memory: &'m GuestMemory,
        mut handle: impl FnMut(Chain<'m>) -> Result<u32, Broken>,
    ) -> Result<(), Broken> {
        self.serve(memory, |chain| handle(chain).map(Served::Used))
    }

    /// As [`VirtQueue::for_each`], for a device that keeps chains, or does not take all that there are.
    ///
    /// # Errors
    /// As [`VirtQueue::for_each`].
    pub fn serve<'m>(
        &mut self,
        memory: &'m GuestMemory,
        handle: impl FnMut(Chain<'m>) -> Result<Served, Broken>,
    ) -> Result<(), Broken> {
        self.serve_and_signal(memory, false, handle)
    }

    /// As [`VirtQueue::serve`], for a device that may wait: the driver is interrupted after each chain, since the next one may
    /// take long and whoever waits for this one could go on.
    ///
    /// # Errors
    /// As [`VirtQueue::for_each`].
    pub fn serve_each<'m>(
        &mut self,
        memory: &'m GuestMemory,
        handle: impl FnMut(Chain<'m>) -> Result<Served, Broken>,
    ) -> Result<(), Broken> {
        self.serve_and_signal(memory, true, handle)
    }

    fn serve_and_signal<'m>(
        &mut self,
        memory: &'m GuestMemory,
        at_once: bool,
        mut handle: impl FnMut(Chain<'m>) -> Result<Served, Broken>,
    ) -> Result<(), Broken> {
        if !self.ring.ready() {
            return Ok(());
        }
        let (mut budget, mut used) = (BUDGET, false);
        let mut more = true;
        while more {
            self.disarm(memory)?;
            while more && let Some(chain) = self.pop(memory)? {
                let head = chain.head_index();
                match handle(chain)? {
                    Served::Used(written) => {
                        self.push(memory, head, written)?;
                        used = !at_once;
                        if at_once {
                            self.signal(memory)?;
                        }
                    }
                    Served::Kept => {}
                    Served::Refused => {
                        self.unpop();
                        more = false;
                    }
                }
                budget -= 1;
                if budget == 0 && more {
                    let _ = self.kick.write(1);
                    more = false;
                }
            }
            more = more && self.rearm(memory)?;
        }
        if used { self.signal(memory) } else { Ok(()) }
    }

    /// The error for a chain that has no status byte to put an error into.
    pub fn malformed(&self, reason: &'static str) -> Broken {
        Broken::Chain { queue: self.index, reason }
    }

    fn broken(&self, source: Error) -> Broken {
        Broken::Queue { queue: self.index, source }
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::mock::MockSplitQueue;

    use super::*;

    /// Where the two regions of memory meet.
    const SEAM: u64 = 0x1_0000;

    /// In how many pieces the buffers of a chain are.
    fn pieces(buffers: &[(u64, u32)], table: bool) -> Result<usize, &'static str> {
        let regions = [(GuestAddress(0), SEAM as usize), (GuestAddress(SEAM), SEAM as usize)];
        let memory = GuestMemory::from_ranges(&regions).unwrap();
        let ring = MockSplitQueue::new(&memory, QUEUE_SIZE_MAX);
        let last = buffers.len() - 1;
        let describe = |(index, (address, length)): (usize, &(u64, u32))| {
            let (more, next) = if index < last { (1, index as u16 + 1) } else { (0, 0) };
            RawDescriptor::from(Descriptor::new(*address, *length, more, next))
        };
        let chain: Vec<_> = buffers.iter().enumerate().map(describe).collect();
        if table {
            let at = GuestAddress(SEAM + 0x8000);
            chain
                .iter()
                .zip(0..)
                .for_each(|(one, index)| memory.write_obj(*one, at.unchecked_add(index * 16)).unwrap());
            let indirect = Descriptor::new(at.0, chain.len() as u32 * 16, 4, 0);
            ring.add_desc_chains(&[RawDescriptor::from(indirect)], 0).unwrap();
        } else {
            ring.add_desc_chains(&chain, 0).unwrap();
        }
        let mut queue: Queue = ring.create_queue().unwrap();
        let mut found = 0;
        walk(&memory, queue.iter(&memory).unwrap().next().unwrap(), |_, _| found += 1).map(|()| found)
    }

    #[test]
    fn a_chain_as_long_as_a_queue_may_have_buffers_across_regions() {
        let (whole, cut) = ((0x8000, 16), (SEAM - 8, 16));
        for table in [false, true] {
            assert_eq!(pieces(&[whole; 256], table), Ok(256));
            assert_eq!(pieces(&[&[cut][..], &[whole; 255]].concat(), table), Ok(257));
            assert_eq!(pieces(&[&[whole; 255][..], &[cut]].concat(), table), Ok(257));
            assert_eq!(pieces(&[cut; 256], table), Ok(512));
        }
        assert!(pieces(&[whole; 257], true).is_err() && pieces(&[(0x8000, 0); 257], true).is_err());
    }
}
