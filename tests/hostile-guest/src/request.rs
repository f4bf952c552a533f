//! Chains of descriptors in the making: what a driver of the device would send, and what is done to it afterwards
//! (VIRTIO 1.2 §2.7.4 "Message Framing", §2.7.5 "The Virtqueue Descriptor Table").

use crate::aim;
use crate::memory;
use crate::random::Random;
use crate::ring::{Descriptor, INDIRECT, NEXT, WRITE};

/// The most descriptors of a chain that is written out.
const PARTS_MAX: usize = 48;
/// The most descriptors of an indirect table that 16 bits can tell, in bytes: far more than any queue has.
const LONGEST_TABLE: u32 = 16 * 0xffff;

/// A chain in the making.
pub struct Request<'r> {
    /// Where its numbers come from.
    pub random: &'r mut Random,
    /// The longest buffer in memory that is given to the device by chance.
    longest: u32,
    parts: [Descriptor; PARTS_MAX],
    count: usize,
}

impl<'r> Request<'r> {
    /// An empty one.
    pub fn new(random: &'r mut Random, longest: u32) -> Self {
        Self { random, longest, parts: [Descriptor::default(); PARTS_MAX], count: 0 }
    }

    /// The descriptors so far.
    #[must_use]
    pub fn parts(&self) -> &[Descriptor] {
        &self.parts[..self.count]
    }

    /// Adds a descriptor, if there is room.
    pub fn push(&mut self, part: Descriptor) {
        if let Some(place) = self.parts.get_mut(self.count) {
            *place = part;
            self.count += 1;
        }
    }

    /// Adds a buffer with these bytes, for the device to read.
    pub fn say(&mut self, bytes: &[u8]) {
        let address = self.say_room(bytes.len() as u32);
        memory::write_bytes(address, bytes);
    }

    /// Adds a buffer for the device to read, and says where it is; at most a MiB.
    pub fn say_room(&mut self, length: u32) -> u64 {
        let address = aim::buffer(self.random);
        self.push(Descriptor::buffer(address, length, false));
        address
    }

    /// Adds room for the device to write to; at most a MiB.
    pub fn hear(&mut self, length: u32) {
        let address = aim::buffer(self.random);
        self.push(Descriptor::buffer(address, length, true));
    }

    /// Adds descriptors that have nothing to do with any device.
    pub fn nonsense(&mut self) {
        for _ in 0..1 + self.random.below(6) {
            let write = self.random.one_in(2);
            let part = Descriptor::buffer(aim::anywhere(self.random), aim::length(self.random, self.longest), write);
            self.push(part);
        }
        if self.random.one_in(4) {
            // More than any device expects, of one buffer, or of nothing.
            let part =
                Descriptor::buffer(aim::buffer(self.random), self.random.pick(&[0, 1, 64]), self.random.one_in(2));
            (0..PARTS_MAX).for_each(|_| self.push(part));
        }
    }

    /// Breaks a rule of chains.
    pub fn spoil(&mut self) {
        if self.count == 0 {
            return self.nonsense();
        }
        let index = self.random.below(self.count as u64) as usize;
        let other = self.random.below(self.count as u64) as usize;
        let (address, length) = (aim::anywhere(self.random), aim::length(self.random, self.longest));
        let flags = self.random.half();
        match self.random.below(9) {
            0 => self.parts[index].address = address,
            1 => self.parts[index].length = length,
            2 => self.parts[index].flags ^= WRITE,
            3 => self.parts[index].flags = flags,
            // Without an end: what follows the last one is whatever is said here.
            4 => {
                let last = self.count - 1;
                self.parts[last].flags |= NEXT;
                self.parts[last].next = self.random.pick(&[0, 1, 7, 255, 256, 0x7fff, 0xffff]);
            }
            5 => self.parts.swap(index, other),
            6 => self.count -= 1,
            7 => self.parts[index].length = 0,
            _ => self.nonsense(),
        }
    }

    /// Puts the chain into an indirect table (§2.7.5.3), by the rules or against them, and leaves a descriptor of that.
    pub fn indirect(&mut self, table: u64) {
        let count = self.count as u64;
        for (index, part) in (0..).zip(self.parts()) {
            let more = index + 1 < count;
            let (flags, next) = if more { (part.flags | NEXT, index as u16 + 1) } else { (part.flags, part.next) };
            Descriptor { flags, next, ..*part }.put(table, index);
        }
        let mut part = Descriptor { address: table, length: 16 * count as u32, flags: INDIRECT, next: 0 };
        match self.random.below(16) {
            // Not a whole number of descriptors, none at all, more than there can be.
            0 => part.length += self.random.pick(&[1, 8, 15]),
            1 => part.length = 0,
            2 => part.length = self.random.pick(&[LONGEST_TABLE, LONGEST_TABLE + 16, 0xffff_fff0, u32::MAX]),
            3 => part.address = aim::anywhere(self.random),
            // A table in a table, which may be itself.
            4 => part.put(table, self.random.below(count.max(1))),
            5 => part.flags |= WRITE,
            // The longest chain that can be told: the table is the beginning of one, and its end leads there again.
            6 | 7 => {
                part.length = LONGEST_TABLE;
                let last = self.parts[self.count.max(1) - 1];
                let length = self.random.pick(&[last.length, 0, 1]);
                Descriptor { length, flags: last.flags | NEXT, next: 0, ..last }.put(table, count.max(1) - 1);
            }
            _ => {}
        }
        self.count = 0;
        if self.random.one_in(8) {
            self.say(&[0; 16]);
        }
        self.push(part);
        if self.random.one_in(8) {
            self.hear(16);
        }
    }
}
