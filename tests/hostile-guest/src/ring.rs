//! A split virtqueue as its driver writes it (VIRTIO 1.2 §2.7, "Split Virtqueues"), rules broken or not.

use crate::memory;

/// The next descriptor belongs to the chain (§2.7.5).
pub const NEXT: u16 = 1;
/// The device writes to the buffer.
pub const WRITE: u16 = 2;
/// The buffer is a table of descriptors (§2.7.5.3).
pub const INDIRECT: u16 = 4;
/// The length of a descriptor.
pub const DESCRIPTOR: u64 = 16;

/// A descriptor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Where its buffer is.
    pub address: u64,
    /// How long.
    pub length: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// The index of the next one.
    pub next: u16,
}

impl Descriptor {
    /// A buffer, for the device to write to or to read.
    #[must_use]
    pub fn buffer(address: u64, length: u32, write: bool) -> Self {
        Self { address, length, flags: if write { WRITE } else { 0 }, next: 0 }
    }

    /// Writes it into a table.
    pub fn put(self, table: u64, index: u64) {
        let at = table + DESCRIPTOR * index;
        memory::write(at, self.address);
        memory::write(at + 8, self.length);
        memory::write(at + 12, self.flags);
        memory::write(at + 14, self.next);
    }
}

/// Where the parts of a queue are, and how long it is: what its driver thinks, whatever it told the device.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ring {
    /// The descriptor table, the available ring, the used ring.
    pub parts: [u64; 3],
    /// How many descriptors; not zero.
    pub size: u16,
    /// How many heads were made available.
    pub available: u16,
    /// The descriptor that is written next.
    pub free: u16,
}

impl Ring {
    /// The room that a queue's parts take when they follow each other, with the longest queue.
    pub const ROOM: u64 = 0x4000;

    /// A queue in a page-aligned place, all of it zero.
    #[must_use]
    pub fn at(place: u64, size: u16) -> Self {
        memory::clear(place, Self::ROOM);
        Self { parts: [place, place + 0x2000, place + 0x3000], size: size.max(1), available: 0, free: 0 }
    }

    /// Writes a chain into the table and gives its head. Flags and links are those of a chain.
    pub fn write_chain(&mut self, chain: &[Descriptor]) -> u16 {
        let head = self.free;
        for (index, descriptor) in chain.iter().enumerate() {
            let (at, next) = (self.free, (self.free + 1) % self.size);
            let more = index + 1 < chain.len();
            let flags = descriptor.flags | if more { NEXT } else { 0 };
            Descriptor { flags, next: if more { next } else { descriptor.next }, ..*descriptor }
                .put(self.parts[0], at.into());
            self.free = next;
        }
        head
    }

    /// Makes a chain available, which the device sees at once.
    pub fn publish(&mut self, head: u16) {
        self.stage(head);
        self.show(self.available);
    }

    /// Writes a head into the available ring without showing it.
    pub fn stage(&mut self, head: u16) {
        memory::write(self.parts[1] + 4 + 2 * u64::from(self.available % self.size), head);
        self.available = self.available.wrapping_add(1);
    }

    /// Writes the index of the available ring.
    pub fn show(&self, index: u16) {
        memory::barrier();
        memory::write(self.parts[1] + 2, index);
        memory::barrier();
    }

    /// Writes the flags of the available ring.
    pub fn set_flags(&self, flags: u16) {
        memory::write(self.parts[1], flags);
    }

    /// Asks to be interrupted once the used ring goes beyond an index (§2.7.7).
    pub fn set_used_event(&self, index: u16) {
        memory::write(self.parts[1] + 4 + 2 * u64::from(self.size), index);
    }

    /// The index of the used ring.
    #[must_use]
    pub fn used(&self) -> u16 {
        memory::read(self.parts[2] + 2)
    }

    /// The length in an element of the used ring.
    #[must_use]
    pub fn used_length(&self, index: u16) -> u32 {
        memory::read(self.parts[2] + 8 + 8 * u64::from(index % self.size))
    }
}
