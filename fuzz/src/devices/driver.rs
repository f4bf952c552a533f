//! A driver that does what bytes say: through registers, memory and notifications, as a guest does (VIRTIO 1.2 §4.2,
//! "Virtio Over MMIO"), against a device in the monitor's event loop.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::GuestMemory;
use devices::device::VirtioDevice;
use devices::interrupt::Line;
use devices::mmio::MmioDevice;
use devices::reclaim::discard_range;
use devices::window::Windows;
use event_manager::{EventManager, SubscriberOps as _};
use vm_memory::{Bytes as _, GuestAddress};

use crate::input::Input;

/// Guest memory, in bytes: rings and buffers, and the region of the devices that have one.
const MEMORY: u64 = 8 << 20;
/// Where the region of a device that has one begins.
pub const REGION: u64 = 4 << 20;
/// Where the rings of queue N are, 64 KiB apart: descriptors, available ring, used ring.
const RINGS: u64 = 0x10_0000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x3000;
/// Where tables of indirect descriptors are.
const TABLES: u64 = 0x8_0000;
/// Where buffers are, 4 KiB apart.
const BUFFERS: u64 = 0x20_0000;
/// Places in a ring.
const SIZE: u16 = 16;
/// The most steps of one input.
const STEPS_MAX: usize = 300;
/// The most turns of the event loop for one step: a device may always have something to do.
const TURNS_MAX: usize = 40;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

/// What is behind a device.
pub trait Backend {
    /// What the driver sends, in the device's own format as far as it pleases.
    fn request(&mut self, input: &mut Input<'_>) -> Vec<u8>;

    /// Something that happens on the host.
    fn host(&mut self, _input: &mut Input<'_>) {}

    /// How long it may take until something that was begun on the host has happened, in milliseconds.
    fn patience(&self) -> i32 {
        0
    }

    /// Whoever is on the host goes away: nobody waits for a reader any more.
    fn close(&mut self) {}

    /// What has to hold when the VM is over.
    fn check(&self) {}
}

/// The driver's side of a queue.
#[derive(Debug, Default, Clone, Copy)]
struct Ring {
    available: u16,
    next: u16,
}

/// A line that leads nowhere.
#[derive(Debug)]
struct Unheard;

impl Line for Unheard {
    fn pulse(&self) {}
}

struct Guest {
    device: Arc<Mutex<MmioDevice>>,
    events: EventManager<Arc<Mutex<MmioDevice>>>,
    memory: GuestMemory,
    rings: Vec<Ring>,
}

thread_local! {
    static GUEST_MEMORY: GuestMemory =
        GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).expect("memory can be mapped");
}

/// Drives a device as `input` says, to the end of its VM.
pub fn drive(device: Box<dyn VirtioDevice>, backend: &mut dyn Backend, input: &mut Input<'_>) {
    let mut guest = Guest::new(device);
    guest.forget();
    guest.live(backend, input);
    guest.end(backend);
}

/// What is left of a device's life when its VM is saved.
#[derive(Debug)]
pub struct Saved {
    /// What the device gave, unless it refused.
    pub state: Vec<u8>,
    rings: Vec<Ring>,
}

impl Saved {
    /// What nobody has saved.
    pub fn made_up(state: &[u8]) -> Self {
        Self { state: state.to_vec(), rings: Vec::new() }
    }
}

/// Drives a device as `input` says, until it is saved.
pub fn save(device: Box<dyn VirtioDevice>, backend: &mut dyn Backend, input: &mut Input<'_>) -> Saved {
    let mut guest = Guest::new(device);
    guest.forget();
    guest.live(backend, input);
    let state = guest.lock().save().unwrap_or_default();
    let rings = std::mem::take(&mut guest.rings);
    Saved { state, rings }
}

/// Goes on with another device where one was saved, if that one takes it, to the end of its VM.
pub fn go_on(device: Box<dyn VirtioDevice>, backend: &mut dyn Backend, saved: Saved, input: &mut Input<'_>) {
    let mut guest = Guest::new(device);
    if guest.lock().restore(&saved.state).is_err() {
        assert_eq!(guest.read(0x70), 0, "a device that took nothing over has a status");
    } else if saved.rings.len() == guest.rings.len() {
        guest.rings = saved.rings;
    }
    guest.live(backend, input);
    // What it goes on with can be saved once more, or it is busy.
    let _ = guest.lock().save();
    guest.end(backend);
}

impl Guest {
    fn new(device: Box<dyn VirtioDevice>) -> Self {
        let memory = GUEST_MEMORY.with(Clone::clone);
        let window = Windows::new(1).expect("there is memory").window(0).expect("there is one");
        let device = MmioDevice::new(device, memory.clone(), window, Arc::new(Unheard)).expect("there are descriptors");
        let rings = vec![Ring::default(); device.queues().len()];
        let device = Arc::new(Mutex::new(device));
        let mut events = EventManager::new().expect("there are descriptors");
        events.add_subscriber(Arc::clone(&device));
        Self { device, events, memory, rings }
    }

    /// Has its memory as it was when it was new.
    fn forget(&self) {
        discard_range(&self.memory, &(0..MEMORY));
    }

    fn live(&mut self, backend: &mut dyn Backend, input: &mut Input<'_>) {
        if input.u8() & 1 == 0 {
            self.start(input);
        }
        for _ in 0..STEPS_MAX {
            if input.is_empty() {
                break;
            }
            self.step(backend, input);
        }
        self.wait(backend.patience());
    }

    fn end(self, backend: &mut dyn Backend) {
        backend.close();
        self.lock().flush();
        self.write(0x70, 0);
        assert_eq!(self.read(0x70), 0, "a device that was reset has a status");
        let _ = self.lock().metrics();
        backend.check();
    }

    fn lock(&self) -> MutexGuard<'_, MmioDevice> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, offset: u64) -> u32 {
        let mut value = [0; 4];
        self.lock().read(offset, &mut value);
        u32::from_le_bytes(value)
    }

    fn write(&self, offset: u64, value: u32) {
        self.lock().write(offset, &value.to_le_bytes());
    }

    fn poke(&self, address: u64, bytes: &[u8]) {
        // What is no memory is not written, by a guest either.
        let _ = self.memory.write_slice(bytes, GuestAddress(address));
    }

    fn step(&mut self, backend: &mut dyn Backend, input: &mut Input<'_>) {
        match input.u8() % 16 {
            0..=3 => self.offer(backend, input, false),
            4 => self.offer(backend, input, true),
            5..=7 => self.notify(input.u8()),
            8 | 9 => backend.host(input),
            10 => self.wait(backend.patience()),
            11 => self.write(u64::from(input.u8()) * 4, input.u32()),
            12 => {
                let offset = u64::from(input.u16()) & 0xfff;
                let length = usize::from(input.u8() % 9);
                let bytes = input.take(length);
                self.lock().write(offset, bytes);
                self.lock().read(offset, &mut vec![0; length]);
            }
            13 => {
                let address = self.address(input);
                let length = input.u8();
                let bytes = input.take(length.into());
                self.poke(address, bytes);
            }
            14 => {
                let queue = self.queue(input.u8());
                let index = input.u16();
                self.publish(queue, index);
            }
            _ => {
                self.write(0x70, 0);
                self.start(input);
            }
        }
    }

    /// Sets the device up as Linux does, with some of the features that it offers.
    fn start(&mut self, input: &mut Input<'_>) {
        let wanted = input.u32();
        self.write(0x70, 1);
        self.write(0x70, 3);
        for (half, wanted) in [(0, wanted), (1, 1)] {
            self.write(0x14, half);
            let offered = self.read(0x10);
            self.write(0x24, half);
            self.write(0x20, offered & wanted);
        }
        self.write(0x70, 0xb);
        for queue in 0..self.rings.len() {
            self.rings[queue] = Ring::default();
            let rings = rings(queue);
            self.poke(rings, &[0; 0x4000]);
            self.write(0x30, queue as u32);
            self.write(0x38, SIZE.into());
            for (register, offset) in [(0x80, 0), (0x90, AVAILABLE), (0xa0, USED)] {
                self.write(register, (rings + offset) as u32);
                self.write(register + 4, 0);
            }
            self.write(0x44, 1);
        }
        self.write(0x70, 0xf);
        self.turn();
    }

    fn queue(&self, number: u8) -> usize {
        usize::from(number) % self.rings.len()
    }

    fn notify(&mut self, number: u8) {
        let queue = self.queue(number);
        // An eventfd's counter is not full.
        let _ = self.lock().queues()[queue].kick().write(1);
        self.turn();
    }

    /// Lets the event loop wait for something, and do it.
    fn wait(&mut self, patience_ms: i32) {
        if matches!(self.events.run_with_timeout(patience_ms), Ok(1..)) {
            self.turn();
        }
    }

    /// Lets the event loop do what it has to do now.
    fn turn(&mut self) {
        for _ in 0..TURNS_MAX {
            if !matches!(self.events.run_with_timeout(0), Ok(1..)) {
                return;
            }
        }
    }

    fn address(&self, input: &mut Input<'_>) -> u64 {
        match input.u8() % 8 {
            0..=3 => BUFFERS + u64::from(input.u8()) * 0x100,
            4 => RINGS + u64::from(input.u32() % 0x8_0000),
            5 => MEMORY - u64::from(input.u8()),
            6 => REGION + (u64::from(input.u16()) << 8),
            _ => input.u64(),
        }
    }

    fn length(&self, input: &mut Input<'_>) -> u32 {
        match input.u8() % 6 {
            0 | 1 => input.u8().into(),
            2 => u32::from(input.u8()) * 512,
            3 => input.u16().into(),
            4 => 4096,
            _ => input.u32(),
        }
    }

    /// Makes a chain available. Its first buffers hold what the backend's driver sends, unless the input says otherwise.
    fn offer(&mut self, backend: &mut dyn Backend, input: &mut Input<'_>, indirect: bool) {
        let queue = self.queue(input.u8());
        let shape = input.u8();
        let mut chain = Vec::new();
        if shape & 1 == 0 {
            let page = BUFFERS + u64::from(self.rings[queue].next) * 0x1_0000;
            let request = backend.request(input);
            self.poke(page, &request);
            let cut = if shape & 2 == 0 { request.len() } else { usize::from(input.u8()).min(request.len()) };
            for (from, to) in [(0, cut), (cut, request.len())] {
                if from < to {
                    chain.push((page + from as u64, (to - from) as u32, 0));
                }
            }
        }
        for _ in 0..(shape >> 2) % 6 {
            let flags = if input.u8().is_multiple_of(4) { 0 } else { F_WRITE };
            chain.push((self.address(input), self.length(input), flags));
        }
        let head = self.rings[queue].next;
        if indirect {
            let table = TABLES + (queue as u64 * u64::from(SIZE) + u64::from(head)) * 0x100;
            for (index, buffer) in (0u16..).zip(&chain) {
                let next = (usize::from(index) + 1 < chain.len()).then_some(index + 1);
                self.describe(table + u64::from(index) * 16, *buffer, next);
            }
            let length = chain.len() as u32 * 16;
            self.describe(rings(queue) + u64::from(head) * 16, (table, length, F_INDIRECT), None);
            self.rings[queue].next = (head + 1) % SIZE;
        } else {
            for (position, buffer) in chain.iter().enumerate() {
                let index = self.rings[queue].next;
                let next = (index + 1) % SIZE;
                self.rings[queue].next = next;
                let next = (position + 1 < chain.len()).then_some(next);
                self.describe(rings(queue) + u64::from(index) * 16, *buffer, next);
            }
        }
        let available = self.rings[queue].available;
        self.poke(rings(queue) + AVAILABLE + 4 + u64::from(available % SIZE) * 2, &head.to_le_bytes());
        self.publish(queue, available.wrapping_add(1));
        if shape & 0x80 == 0 {
            self.notify(queue as u8);
        }
    }

    fn describe(&self, at: u64, (address, length, flags): (u64, u32, u16), next: Option<u16>) {
        let flags = flags | if next.is_some() { F_NEXT } else { 0 };
        self.poke(at, &address.to_le_bytes());
        self.poke(at + 8, &length.to_le_bytes());
        self.poke(at + 12, &flags.to_le_bytes());
        self.poke(at + 14, &next.unwrap_or(0).to_le_bytes());
    }

    fn publish(&mut self, queue: usize, index: u16) {
        self.rings[queue].available = index;
        self.poke(rings(queue) + AVAILABLE + 2, &index.to_le_bytes());
    }
}

fn rings(queue: usize) -> u64 {
    RINGS + queue as u64 * 0x1_0000
}
