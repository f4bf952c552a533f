//! One case: a driver that brings a device up, by the rules or not, and then does a few things that no driver should.
//!
//! What is attacked, by sections of VIRTIO 1.2:
//! - §2.1, §3.1: status bits out of order, missing, too many; a device that runs without being ready;
//! - §2.2, §3.1.1: features that were not offered, changed after FEATURES_OK, or never agreed upon;
//! - §2.4, §4.2.2: the configuration space and every register, read and written at any time, offset and width; queues and
//!   shared memory regions that do not exist;
//! - §2.7, §4.2.3.2: queues of any size, anywhere: beyond RAM, in registers, in each other, odd, wrapping; placed again
//!   while they are in use;
//! - §2.7.5: chains that loop, have no end, lead out of the table, lie about their direction, their place and their length;
//!   indirect tables of no, broken or the greatest length, in each other and in themselves;
//! - §2.7.6, §2.7.8: indices that jump, stand still or go back, heads that do not exist or are there twice, rings that
//!   change while the device reads them;
//! - §2.7.7, §2.7.10, §4.2.3.3: storms of notifications, also of queues that do not exist, and of interrupts;
//! - §2.1.2, §4.2.3.1: resets in the middle of all that.

use crate::aim::{self, RING_ROOM, RINGS, TABLE};
use crate::cpu;
use crate::devices::{Kind, Opening};
use crate::memory;
use crate::mmio::{
    ACKNOWLEDGE, CONFIGURATION, DRIVER, DRIVER_OK, Device, FEATURES_OK, INTERRUPT_ACKNOWLEDGE, NEEDS_RESET,
    QUEUE_READY, QUEUE_SELECT, QUEUE_SIZE, STATUS, VERSION_1, WINDOW,
};
use crate::random::Random;
use crate::request::Request;
use crate::ring::Ring;

/// The most queues of a device that are used.
pub const QUEUES_MAX: usize = 9;
/// How many cycles a device has to serve requests that it may not serve at all: milliseconds.
const SETTLED: u64 = 10_000_000;
/// Registers that mean something, and some that do not, or not any more.
const REGISTERS: [u64; 22] = [
    0x00, 0x04, 0x08, 0x0c, 0x10, 0x14, 0x20, 0x24, 0x28, 0x30, 0x34, 0x38, 0x3c, 0x40, 0x44, 0x50, 0x60, 0x64, 0x70,
    0xac, 0xc0, 0xfc,
];

/// What came of a case.
pub struct Outcome {
    /// Whether the device ended up broken.
    pub broken: bool,
    /// How many requests it answered, about.
    pub used: u64,
}

/// What a device is attacked with.
pub struct Case<'r> {
    /// The device.
    pub device: Device,
    /// What is known of its kind.
    pub kind: &'static Kind,
    /// How long each of its queues may be; zero for one that it does not have.
    pub sizes: [u32; QUEUES_MAX],
    /// Where all choices come from.
    pub random: &'r mut Random,
}

impl Case<'_> {
    /// Plays it, and says what came of it.
    pub fn play(&mut self) -> Outcome {
        if self.random.one_in(4) {
            self.poke();
            if self.random.one_in(2) {
                self.device.reset();
            }
        }
        let mut rings = self.bring_up();
        for _ in 0..1 + self.random.below(6) {
            let index = self.random.below(self.queues()) as usize;
            match self.random.below(20) {
                0..10 => self.request(index as u32, &mut rings[index]),
                10 => self.jump(index as u32, &rings[index]),
                11 => self.storm(),
                12 => self.configuration(),
                13 => self.poke(),
                14 => {
                    self.device.reset();
                    if self.random.one_in(2) {
                        rings = self.bring_up();
                    }
                }
                15 => self.scribble(&rings[index]),
                16 => rings[index] = self.place(index as u32),
                17 => self.interrupts(&rings[index]),
                18 => self.pause(),
                _ => {
                    let status = self.random.pick(&[0x80, 0x40, 0xff, 4, 8, 0xf, 0xffff_ff0f]);
                    self.device.write(STATUS, status);
                }
            }
        }
        if self.random.one_in(2) {
            self.pause();
        }
        let broken = self.device.read(STATUS) & NEEDS_RESET != 0;
        // What was notified of may still be on its way when the device is reset.
        if self.random.one_in(2) {
            (0..self.queues()).for_each(|queue| self.device.notify(queue as u32));
        }
        // A ring that was placed elsewhere, or written over, tells nothing of this.
        let used =
            rings.iter().take(self.queues() as usize).map(|ring| u64::from(ring.used().min(ring.available))).sum();
        Outcome { broken, used }
    }

    fn queues(&self) -> u64 {
        self.sizes.iter().filter(|size| **size > 0).count().max(1) as u64
    }

    fn bring_up(&mut self) -> [Ring; QUEUES_MAX] {
        let offered = self.device.offered();
        let random = &mut *self.random;
        match random.below(20) {
            // Features that were not offered, or without the one that matters.
            0 => drop(self.device.negotiate(random.long() | VERSION_1)),
            1 => drop(self.device.negotiate(offered & !VERSION_1)),
            2 => drop(self.device.negotiate(u64::MAX)),
            // The end first.
            3 => {
                self.device.write(STATUS, DRIVER_OK);
                self.device.write(STATUS, FEATURES_OK | DRIVER_OK);
                self.device.accept(random.long());
                self.device.write(STATUS, 0xf);
            }
            // Another opinion after both have agreed.
            4 => {
                self.device.negotiate(VERSION_1);
                self.device.accept(offered | random.long());
                self.device.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
            }
            _ => {
                let some = random.long() | random.long();
                self.device.negotiate(offered & some | VERSION_1);
            }
        }
        let mut rings = [Ring::at(RINGS, 1); QUEUES_MAX];
        for (index, ring) in (0..self.queues() as u32).zip(&mut rings) {
            *ring = self.place(index);
        }
        if !self.random.one_in(16) {
            self.device.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        }
        if let Some(opening) = &self.kind.opening
            && !self.random.one_in(4)
        {
            self.open(opening, &mut rings[opening.queue]);
        }
        rings
    }

    /// Begins as a driver does that keeps to the rules, so that what comes next is looked at.
    fn open(&mut self, opening: &Opening, ring: &mut Ring) {
        let mut reply = aim::BUFFERS;
        for number in 0..opening.count {
            let mut request = Request::new(self.random, self.kind.longest);
            (opening.compose)(&mut request, number, reply);
            reply = request.parts().last().map_or(reply, |part| part.address);
            let head = ring.write_chain(request.parts());
            ring.publish(head);
            self.device.notify(opening.queue as u32);
            self.settle(ring);
        }
    }

    /// Places a queue somewhere.
    fn place(&mut self, index: u32) -> Ring {
        let most = self.sizes[index as usize].max(1);
        let random = &mut *self.random;
        let size = random.pick(&[most, most, most, most, most, most.min(64), 2, 1]);
        let place = RINGS + RING_ROOM * u64::from(index);
        let ring = Ring::at(place, size as u16);
        let mut parts = ring.parts;
        let mut told = size;
        match random.below(16) {
            0 => told = random.pick(&[0, 3, most + 1, 2 * most, 0x8000, 0xffff, 0x1_0000 | size, u32::MAX]),
            1 => parts = [place; 3],
            2 => parts = parts.map(|part| part + 1 + random.below(15)),
            3 => parts[random.below(3) as usize] = aim::anywhere(random),
            4 => parts = [(); 3].map(|()| aim::anywhere(random)),
            _ => {}
        }
        self.device.place_queue(index, told, parts);
        if random.one_in(16) {
            self.device.write(QUEUE_READY, random.pick(&[0, 2, u32::MAX]));
        }
        // A queue that does not exist.
        if random.one_in(16) {
            self.device.write(QUEUE_SELECT, random.pick(&[16, 0xffff, 0x1_0000, u32::MAX]));
            self.device.write(QUEUE_SIZE, size);
            self.device.write(QUEUE_READY, 1);
        }
        ring
    }

    /// Sends requests, most of them spoilt. A device that has a session shows what it makes of requests only as long as their
    /// chains are in order, so that most of its are.
    fn request(&mut self, index: u32, ring: &mut Ring) {
        let orderly = self.kind.opening.is_some() && !self.random.one_in(4);
        let count = self.random.pick(&[1, 1, 2, 4, 16]);
        for _ in 0..count {
            let mut request = Request::new(self.random, self.kind.longest);
            if !orderly && request.random.one_in(8) {
                request.nonsense();
            } else {
                (self.kind.compose)(&mut request, index);
            }
            let spoilt = if orderly { 0 } else { request.random.pick(&[0, 0, 0, 0, 0, 1, 1, 2]) };
            (0..spoilt).for_each(|_| request.spoil());
            if !orderly && request.random.one_in(4) {
                request.indirect(RINGS + RING_ROOM * u64::from(index) + TABLE);
            }
            let head = ring.write_chain(request.parts());
            ring.stage(match self.random.below(24) {
                _ if orderly => head,
                0 => ring.size,
                1 => self.random.half(),
                _ => head,
            });
            if !orderly && self.random.one_in(12) {
                // Once more, as many times as there is room.
                (0..self.random.below(u64::from(ring.size))).for_each(|_| ring.stage(head));
            }
        }
        ring.show(ring.available);
        self.device.notify(index);
        // What comes next meets the device at work, or after it.
        if self.random.one_in(2) {
            self.settle(ring);
        }
    }

    /// Waits until the device has served what it will serve.
    fn settle(&self, ring: &Ring) {
        let began = cpu::cycles();
        while ring.used() != ring.available && cpu::cycles().wrapping_sub(began) < SETTLED {
            core::hint::spin_loop();
        }
    }

    /// Has the index of the available ring jump, or go back.
    fn jump(&mut self, index: u32, ring: &Ring) {
        let far = self.random.pick(&[1, ring.size, ring.size.wrapping_add(1), 0x7fff, 0x8000, 0xffff]);
        ring.show(ring.available.wrapping_add(far));
        self.device.notify(index);
    }

    /// Notifies again and again, also of what does not exist.
    fn storm(&mut self) {
        for _ in 0..1 + self.random.below(64) {
            let queue = self.random.pick(&[0, 0, 1, 1, 2, 3, 64, 0xffff, 0x1_0000, u32::MAX]);
            self.device.notify(queue);
        }
    }

    /// Reads and writes the configuration space.
    fn configuration(&mut self) {
        for _ in 0..1 + self.random.below(16) {
            let most = self.random.pick(&[16, 64, WINDOW - CONFIGURATION - 8]);
            let offset = self.random.below(most + 1);
            self.access(CONFIGURATION + offset);
        }
    }

    /// Reads and writes registers.
    fn poke(&mut self) {
        for _ in 0..1 + self.random.below(16) {
            let offset = match self.random.below(4) {
                0 => self.random.below(CONFIGURATION),
                1 => 0x80 + 4 * self.random.below(16),
                _ => self.random.pick(&REGISTERS),
            };
            self.access(offset);
        }
    }

    fn access(&mut self, offset: u64) {
        let width = self.random.pick(&[1, 2, 4, 4, 4, 8]);
        if self.random.one_in(2) {
            let value = match self.random.below(4) {
                0 => self.random.long(),
                1 => u64::MAX,
                _ => self.random.below(16),
            };
            self.device.write_wide(offset, width, value);
        } else {
            self.device.read_wide(offset, width);
        }
    }

    /// Writes over a ring while the device may be reading it.
    fn scribble(&mut self, ring: &Ring) {
        let start = self.random.pick(&ring.parts);
        for _ in 0..self.random.below(64) {
            // Addresses far beyond all memory: what the device is told to write to must not be this program.
            let word = self.random.long() | 1 << 40;
            memory::write(start + 8 * self.random.below(0x100), word);
        }
    }

    /// Has as many interrupts come as there can be, or none, and acknowledges what was not sent.
    fn interrupts(&mut self, ring: &Ring) {
        ring.set_flags(self.random.pick(&[0, 1, 0xffff]));
        let offset = self.random.pick(&[0, 1, ring.size, 0x8000, 0xffff]);
        ring.set_used_event(ring.used().wrapping_add(offset));
        let reasons = self.random.pick(&[0, 1, 2, 3, u32::MAX]);
        self.device.write(INTERRUPT_ACKNOWLEDGE, reasons);
    }

    /// Lets the device work for a moment.
    fn pause(&mut self) {
        let (began, cycles) = (cpu::cycles(), self.random.below(300_000));
        while cpu::cycles().wrapping_sub(began) < cycles {
            core::hint::spin_loop();
        }
    }
}
