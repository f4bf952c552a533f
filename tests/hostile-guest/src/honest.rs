//! A driver that keeps to the rules, with one request at a time: what a device must still serve after each attack.

use crate::cpu;
use crate::memory::{self, HONEST};
use crate::mmio::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, Device, FEATURES_OK, INTERRUPT_ACKNOWLEDGE, INTERRUPT_STATUS, STATUS, VERSION_1,
};
use crate::ring::{Descriptor, Ring};

/// How many descriptors an honest queue has.
const SIZE: u16 = 8;
/// The most queues that a request needs.
const QUEUES: usize = 3;
/// Where buffers are.
const BUFFERS: u64 = HONEST + 0x4_0000;
/// The room for each of them.
const BUFFER_ROOM: u64 = 0x1_0000;
/// How many there are.
const BUFFER_COUNT: u64 = 8;
/// How many cycles of the processor's clock a device may take: ten seconds and more on any machine.
const PATIENCE: u64 = 60_000_000_000;

/// What a device did wrong.
pub type Fault = &'static str;

/// A driver of a device that was reset.
pub struct Driver {
    device: Device,
    rings: [Ring; QUEUES],
    /// How many chains of each queue were used.
    used: [u16; QUEUES],
    buffers: u64,
}

impl Driver {
    /// Brings a device up with its first `queues` queues.
    ///
    /// # Errors
    /// What it refuses.
    pub fn start(device: Device, queues: usize) -> Result<Self, Fault> {
        if !device.reset() {
            return Err("it does not reset");
        }
        if !device.negotiate(VERSION_1) {
            return Err("it does not take its own features");
        }
        let mut rings = [Ring::default(); QUEUES];
        for (index, ring) in (0..).zip(&mut rings[..queues.min(QUEUES)]) {
            *ring = Ring::at(HONEST + Ring::ROOM * u64::from(index), SIZE);
            device.place_queue(index, SIZE.into(), ring.parts);
        }
        device.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        if device.read(STATUS) != ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK {
            return Err("it does not start");
        }
        Ok(Self { device, rings, used: [0; QUEUES], buffers: 0 })
    }

    /// A buffer of at most 64 KiB that begins with these bytes, for the device to read.
    pub fn says(&mut self, bytes: &[u8]) -> Descriptor {
        let address = self.room();
        memory::write_bytes(address, bytes);
        Descriptor::buffer(address, bytes.len() as u32, false)
    }

    /// Room of zeroes, for the device to write to.
    pub fn hears(&mut self, length: u32) -> Descriptor {
        let address = self.room();
        memory::clear(address, u64::from(length).next_multiple_of(8));
        Descriptor::buffer(address, length, true)
    }

    fn room(&mut self) -> u64 {
        self.buffers = (self.buffers + 1) % BUFFER_COUNT;
        BUFFERS + BUFFER_ROOM * self.buffers
    }

    /// Makes a chain available.
    pub fn offer(&mut self, queue: usize, chain: &[Descriptor]) {
        let ring = &mut self.rings[queue];
        let head = ring.write_chain(chain);
        ring.publish(head);
        self.device.notify(queue as u32);
    }

    /// Waits until the next chain of a queue is used, and gives the length that the device tells.
    ///
    /// # Errors
    /// It is not used, or not as the only one.
    pub fn wait(&mut self, queue: usize) -> Result<u32, Fault> {
        let (ring, before) = (&self.rings[queue], self.used[queue]);
        let began = cpu::cycles();
        while ring.used() == before {
            if cpu::cycles().wrapping_sub(began) > PATIENCE {
                return Err("it does not answer");
            }
            core::hint::spin_loop();
        }
        if ring.used() != before.wrapping_add(1) {
            return Err("it answers more than was asked");
        }
        let reasons = self.device.read(INTERRUPT_STATUS);
        self.device.write(INTERRUPT_ACKNOWLEDGE, reasons);
        self.used[queue] = before.wrapping_add(1);
        Ok(ring.used_length(before))
    }

    /// Sends a request on a queue and waits for its answer.
    ///
    /// # Errors
    /// As [`Driver::wait`].
    pub fn ask(&mut self, queue: usize, chain: &[Descriptor]) -> Result<u32, Fault> {
        self.offer(queue, chain);
        self.wait(queue)
    }
}

/// The byte at a place in a buffer.
#[must_use]
pub fn byte(buffer: Descriptor, at: u64) -> u8 {
    memory::read(buffer.address + at)
}
