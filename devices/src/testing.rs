//! The driver's side of a device, for tests: sets a device up through its registers as Linux does, and puts chains on its
//! queues.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

use crate::GuestMemory;
use crate::device::{Event, VirtioDevice};
use crate::interrupt::Line;
use crate::mmio::MmioDevice;
use crate::window::{Window, Windows};

/// Ring memory of queue N begins here, 64 KiB apart; buffers are for the test to place from [`BUFFERS`] on.
const RINGS: u64 = 0x10_0000;
/// Free memory for buffers.
pub const BUFFERS: u64 = 0x20_0000;
/// The size of every queue, unless the test says otherwise.
pub const SIZE: u16 = 16;

/// Indirect tables, from here to the end of memory.
const TABLES: u64 = 0x3f_0000;
const INDIRECT: u16 = 4;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const STATUS_DRIVER_OK: u32 = 0xf;
const FEATURES_ACCEPTED: u32 = 0xb;

/// Where the rings of a queue are.
fn rings(queue: usize) -> u64 {
    RINGS + queue as u64 * 0x1_0000
}

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

/// A line that remembers whether it was raised.
#[derive(Debug, Default)]
pub struct Remembered(AtomicBool);

impl Line for Remembered {
    fn pulse(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A device behind its registers, whose interrupts nobody takes.
pub fn alone(device: Box<dyn VirtioDevice>, memory: &GuestMemory) -> MmioDevice {
    MmioDevice::new(device, memory.clone(), window(), Arc::new(Remembered::default())).unwrap()
}

fn window() -> Window {
    Windows::new(1).unwrap().window(0).unwrap()
}

/// Watches what a device hears of.
fn watch(device: &dyn VirtioDevice) -> Epoll {
    let epoll = Epoll::new().unwrap();
    for (index, watch) in (0u64..).zip(device.watched()) {
        epoll.ctl(ControlOperation::Add, watch.descriptor, EpollEvent::new(watch.trigger.events(), index)).unwrap();
    }
    epoll
}

/// A device and its driver.
pub struct Driver {
    /// The device behind its registers.
    pub device: MmioDevice,
    /// Guest memory: 4 MiB from 0.
    pub memory: GuestMemory,
    /// Whether chains are in tables of their own.
    pub indirect: bool,
    line: Arc<Remembered>,
    size: u16,
    epoll: Epoll,
    available: Vec<u16>,
    used: Vec<u16>,
    next_descriptor: Vec<u16>,
}

impl Driver {
    /// A device that was found and not yet set up.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::with_size(device, SIZE)
    }

    /// The same with queues of another size, a power of two up to 256; indirect tables are for the usual one.
    pub fn with_size(mut device: Box<dyn VirtioDevice>, size: u16) -> Self {
        device.prepare();
        Self::as_it_is(device, size)
    }

    /// As [`Driver::new`], with a device that got nothing for later.
    pub fn unprepared(device: Box<dyn VirtioDevice>) -> Self {
        Self::as_it_is(device, SIZE)
    }

    fn as_it_is(device: Box<dyn VirtioDevice>, size: u16) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        let epoll = watch(&*device);
        let line = Arc::new(Remembered::default());
        let device = MmioDevice::new(device, memory.clone(), window(), Arc::clone(&line) as Arc<dyn Line>).unwrap();
        let count = device.queues().len();
        let none = vec![0; count];
        let (available, used, next_descriptor) = (none.clone(), none.clone(), none);
        Self { device, memory, indirect: false, line, size, epoll, available, used, next_descriptor }
    }

    /// Saves the device, and goes on with another one, made like it, that takes over what was saved.
    pub fn move_to(&mut self, mut device: Box<dyn VirtioDevice>) {
        let state = self.device.save().unwrap();
        device.prepare();
        self.epoll = watch(&*device);
        let line = Arc::clone(&self.line) as Arc<dyn Line>;
        self.device = MmioDevice::new(device, self.memory.clone(), window(), line).unwrap();
        self.device.restore(&state).unwrap();
    }

    /// Lets the device hear of the notifications that wait for it, as the event loop does.
    pub fn heed(&mut self) {
        for queue in 0..self.device.queues().len() {
            if self.device.queues()[queue].kick().read().is_ok() {
                self.device.dispatch(Event::Queue(queue as u16));
            }
        }
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

    /// As [`Driver::start`], with these of the lower 32 feature bits.
    pub fn start_with(mut self, features: u32) -> Self {
        for queue in 0..self.available.len() {
            (self.available[queue], self.used[queue], self.next_descriptor[queue]) = (0, 0, 0);
            self.memory.write_slice(&[0; 0x4000], GuestAddress(rings(queue))).unwrap();
        }
        self.write(0x70, 1);
        self.write(0x70, 3);
        self.write(0x24, 0);
        self.write(0x20, features);
        self.write(0x24, 1);
        self.write(0x20, 1); // VIRTIO_F_VERSION_1
        self.write(0x70, FEATURES_ACCEPTED);
        assert_eq!(self.read(0x70), FEATURES_ACCEPTED);
        for queue in 0..self.available.len() as u32 {
            let rings = rings(queue as usize) as u32;
            self.write(0x30, queue);
            self.write(0x38, self.size.into());
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
        if self.indirect {
            return self.offer_indirect(queue, chain);
        }
        let head = self.next_descriptor[queue];
        for (position, buffer) in chain.iter().enumerate() {
            let index = self.next_descriptor[queue];
            let next = (index + 1) % self.size;
            self.next_descriptor[queue] = next;
            let next = (position + 1 < chain.len()).then_some(next);
            self.describe(rings(queue) + u64::from(index) * 16, *buffer, next);
        }
        self.publish(queue, head);
        head
    }

    /// As [`Driver::offer`], in a table of its own (VIRTIO 1.2 §2.7.5.3).
    pub fn offer_indirect(&mut self, queue: usize, chain: &[Buffer]) -> u16 {
        let head = self.next_descriptor[queue];
        self.next_descriptor[queue] = (head + 1) % self.size;
        let table = TABLES + (queue as u64 * u64::from(SIZE) + u64::from(head)) * u64::from(SIZE) * 16;
        for (index, buffer) in (0u16..).zip(chain) {
            let next = (usize::from(index) + 1 < chain.len()).then_some(index + 1);
            self.describe(table + u64::from(index) * 16, *buffer, next);
        }
        let at = rings(queue) + u64::from(head) * 16;
        self.describe(at, Buffer { address: table, length: chain.len() as u32 * 16, writable: false }, None);
        self.memory.write_obj(INDIRECT, GuestAddress(at + 12)).unwrap();
        self.publish(queue, head);
        head
    }

    /// As [`Driver::offer_indirect`], with a table that claims to be as long as any can be, and whose first buffer leads to
    /// itself.
    pub fn offer_endless(&mut self, queue: usize, buffer: Buffer) -> u16 {
        let head = self.offer_indirect(queue, &[buffer]);
        let at = rings(queue) + u64::from(head) * 16;
        let table = self.memory.read_obj(GuestAddress(at)).unwrap();
        self.describe(table, buffer, Some(0));
        self.memory.write_obj(0xffff_u32 * 16, GuestAddress(at + 8)).unwrap();
        head
    }

    fn describe(&self, at: u64, buffer: Buffer, next: Option<u16>) {
        let flags = u16::from(next.is_some()) | if buffer.writable { 2 } else { 0 };
        self.memory.write_obj(buffer.address, GuestAddress(at)).unwrap();
        self.memory.write_obj(buffer.length, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next.unwrap_or(0), GuestAddress(at + 14)).unwrap();
    }

    fn publish(&mut self, queue: usize, head: u16) {
        let slot = rings(queue) + AVAILABLE + 4 + u64::from(self.available[queue] % self.size) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_available(queue, self.available[queue].wrapping_add(1));
    }

    /// Sets a queue's available index to anything.
    pub fn set_available(&mut self, queue: usize, index: u16) {
        self.available[queue] = index;
        let at = rings(queue) + AVAILABLE + 2;
        self.memory.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// With EVENT_IDX: asks for an interrupt when the used index goes past `index` (VIRTIO 1.2 §2.7.7).
    pub fn set_used_event(&mut self, queue: usize, index: u16) {
        let at = rings(queue) + AVAILABLE + 4 + u64::from(self.size) * 2;
        self.memory.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// With EVENT_IDX: past which available index the device wants to be notified.
    pub fn available_event(&self, queue: usize) -> u16 {
        self.memory.read_obj(GuestAddress(rings(queue) + USED + 4 + u64::from(self.size) * 8)).unwrap()
    }

    /// Whether the device interrupted since it was last asked.
    pub fn interrupted(&self) -> bool {
        self.line.0.swap(false, Ordering::SeqCst)
    }

    /// Takes the chain that was offered last back; the device must not have used it.
    pub fn retract(&mut self, queue: usize) {
        self.set_available(queue, self.available[queue].wrapping_sub(1));
        self.next_descriptor[queue] = (self.next_descriptor[queue] + self.size - 1) % self.size;
    }

    /// The next used chain of a queue: its head and how many bytes the device wrote.
    pub fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let rings = rings(queue);
        let index: u16 = self.memory.read_obj(GuestAddress(rings + USED + 2)).unwrap();
        if index == self.used[queue] {
            return None;
        }
        let slot = rings + USED + 4 + u64::from(self.used[queue] % self.size) * 8;
        self.used[queue] = self.used[queue].wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        Some((head as u16, self.memory.read_obj(GuestAddress(slot + 4)).unwrap()))
    }

    /// Waits until a descriptor of the device is ready, as the event loop does, and lets the device hear of it.
    pub fn turn(&mut self) {
        let mut events = [EpollEvent::default(); 4];
        let count = loop {
            match self.epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                count => break count.unwrap(),
            }
        };
        for event in &events[..count] {
            self.device.dispatch(Event::Backend(event.data() as usize));
        }
    }

    /// Whether the event loop would be woken for the device now.
    pub fn is_woken(&self) -> bool {
        self.epoll.wait(0, &mut [EpollEvent::default()]).unwrap() > 0
    }

    /// Waits until a chain of a queue is used.
    pub fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        loop {
            if let Some(used) = self.used(queue) {
                return used;
            }
            self.turn();
        }
    }

    /// What the device or its transport has counted under this name.
    pub fn metric(&self, name: &str) -> u64 {
        let metrics = self.device.metrics();
        metrics.iter().find(|(other, _)| *other == name).unwrap_or_else(|| panic!("no {name} in {metrics:?}")).1
    }
}
