//! The driver's side of a device, for tests: sets a device up through its registers as Linux does, and puts chains on its
//! queues.

use vm_memory::{Bytes, GuestAddress};

use crate::GuestMemory;
use crate::device::VirtioDevice;
use crate::mmio::MmioDevice;

/// Ring memory of queue N begins here, 64 KiB apart; buffers are for the test to place from [`BUFFERS`] on.
const RINGS: u64 = 0x10_0000;
/// Free memory for buffers.
pub const BUFFERS: u64 = 0x20_0000;
/// The size of every queue.
pub const SIZE: u16 = 16;

const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const STATUS_DRIVER_OK: u32 = 0xf;
const FEATURES_ACCEPTED: u32 = 0xb;

/// A buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    /// Its guest-physical address.
    pub address: u64,
    /// Its length.
    pub length: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

/// A device and its driver.
pub struct Driver {
    /// The device behind its registers.
    pub device: MmioDevice,
    /// Guest memory: 4 MiB from 0.
    pub memory: GuestMemory,
    available: Vec<u16>,
    used: Vec<u16>,
    next_descriptor: Vec<u16>,
}

impl Driver {
    /// A device that was found and not yet set up.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        let device = MmioDevice::new(device, memory.clone()).unwrap();
        let count = device.queues().len();
        Self { device, memory, available: vec![0; count], used: vec![0; count], next_descriptor: vec![0; count] }
    }

    /// Reads a register.
    pub fn read(&mut self, offset: u64) -> u32 {
        let mut value = [0; 4];
        self.device.read(offset, &mut value);
        u32::from_le_bytes(value)
    }

    /// Writes a register.
    pub fn write(&mut self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    /// Negotiates virtio 1 and nothing else, sets all queues up and starts the device.
    pub fn start(self) -> Self {
        self.start_with(0)
    }

    /// Negotiates virtio 1 and these features of the device's own, sets all queues up and starts the device.
    pub fn start_with(mut self, features: u32) -> Self {
        self.write(0x70, 1);
        self.write(0x70, 3);
        self.write(0x24, 0);
        self.write(0x20, features);
        self.write(0x24, 1);
        self.write(0x20, 1); // VIRTIO_F_VERSION_1
        self.write(0x70, FEATURES_ACCEPTED);
        assert_eq!(self.read(0x70), FEATURES_ACCEPTED);
        for queue in 0..self.available.len() as u32 {
            let rings = (RINGS + u64::from(queue) * 0x1_0000) as u32;
            self.write(0x30, queue);
            self.write(0x38, SIZE.into());
            for (register, offset) in [(0x80, 0), (0x90, AVAILABLE), (0xa0, USED)] {
                self.write(register, rings + offset as u32);
                self.write(register + 4, 0);
            }
            self.write(0x44, 1);
        }
        self.write(0x70, STATUS_DRIVER_OK);
        assert_eq!(self.read(0x70), STATUS_DRIVER_OK);
        self
    }

    /// Makes a chain available on a queue, without telling the device, and gives its head.
    pub fn offer(&mut self, queue: usize, chain: &[Buffer]) -> u16 {
        let rings = RINGS + queue as u64 * 0x1_0000;
        let head = self.next_descriptor[queue];
        for (position, buffer) in chain.iter().enumerate() {
            let index = self.next_descriptor[queue];
            let next = (index + 1) % SIZE;
            self.next_descriptor[queue] = next;
            let more = position + 1 < chain.len();
            let flags = u16::from(more) | if buffer.writable { 2 } else { 0 };
            let at = GuestAddress(rings + u64::from(index) * 16);
            self.memory.write_obj(buffer.address, at).unwrap();
            self.memory.write_obj(buffer.length, GuestAddress(at.0 + 8)).unwrap();
            self.memory.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
            self.memory.write_obj(next, GuestAddress(at.0 + 14)).unwrap();
        }
        let slot = rings + AVAILABLE + 4 + u64::from(self.available[queue] % SIZE) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_available(queue, self.available[queue].wrapping_add(1));
        head
    }

    /// Sets a queue's available index to anything.
    pub fn set_available(&mut self, queue: usize, index: u16) {
        self.available[queue] = index;
        let at = RINGS + queue as u64 * 0x1_0000 + AVAILABLE + 2;
        self.memory.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// Takes the chain that was offered last back; the device must not have used it.
    pub fn retract(&mut self, queue: usize) {
        self.set_available(queue, self.available[queue].wrapping_sub(1));
        self.next_descriptor[queue] = (self.next_descriptor[queue] + SIZE - 1) % SIZE;
    }

    /// The next used chain of a queue: its head and how many bytes the device wrote.
    pub fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let rings = RINGS + queue as u64 * 0x1_0000;
        let index: u16 = self.memory.read_obj(GuestAddress(rings + USED + 2)).unwrap();
        if index == self.used[queue] {
            return None;
        }
        let slot = rings + USED + 4 + u64::from(self.used[queue] % SIZE) * 8;
        self.used[queue] = self.used[queue].wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        Some((head as u16, self.memory.read_obj(GuestAddress(slot + 4)).unwrap()))
    }
}
