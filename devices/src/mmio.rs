//! The virtio-mmio transport (VIRTIO 1.2 §4.2, "Virtio Over MMIO"), version 2 only.
//!
//! A transport owns one device, its queues and its registers under one lock, held by whichever thread has something to
//! do with the device: a vCPU that touches a register, or the event loop when a queue was kicked or the backend is
//! ready. The driver's notifications do not come this way: they are eventfds from the start.
//!
//! ```text
//!   reset --ACKNOWLEDGE, DRIVER--> features --FEATURES_OK--> queues --DRIVER_OK--> running --rule broken--> needs reset
//!     ^                                                                               |                        |
//!     +------------------------------------- status = 0 ------------------------------+------------------------+
//! ```

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ids;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;

use crate::GuestMemory;
use crate::device::{Broken, Configuration, Event, Loop, Resources, Trigger, VirtioDevice};
use crate::interrupt::{Interrupt, Line};
use crate::queue::VirtQueue;
use crate::state::{self, DeviceState, StateError, impossible};
use crate::window::{CONFIGURATION_LENGTH, CONFIGURATION_SPACE, Window};

/// The offset of the QueueNotify register, for `KVM_IOEVENTFD`.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// The offset of the InterruptACK register: [`Interrupt::acknowledge`], which needs no lock.
pub const INTERRUPT_ACK: u64 = 0x64;
/// The offset of the InterruptStatus register: see [`Interrupt`].
pub(crate) const INTERRUPT_STATUS: u64 = 0x60;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"CFDM");
/// The event's data for the first of the device's own descriptors; queues have their index.
const BACKEND: u32 = 1 << 16;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;
/// What a driver can say of itself. DEVICE_NEEDS_RESET is ours to say, and the other bits are nobody's.
const DRIVER_BITS: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;

/// One device behind a register window.
pub struct MmioDevice {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    queues: Vec<VirtQueue>,
    window: Window,
    interrupt: Interrupt,
    status: u32,
    driver_features: u64,
    /// Which 32 of the features each register is of; none for a number above one.
    selected_device_features: u32,
    selected_driver_features: u32,
    selected_queue: u32,
    /// How often the configuration space has changed.
    generation: u32,
    counters: Counters,
}

/// What the transport counts.
#[derive(Debug, Default)]
struct Counters {
    events: u64,
    resets: u64,
    broken: u64,
}

impl MmioDevice {
    /// A device in its reset state, which is read in `window` and interrupts by `line`.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        window: Window,
        line: Arc<dyn Line>,
    ) -> io::Result<Self> {
        let interrupt = Interrupt::new(line, window.clone());
        let queues = (0u16..)
            .zip(device.queue_sizes())
            .map(|(index, size)| VirtQueue::new(index, *size, interrupt.clone()))
            .collect::<io::Result<_>>()?;
        let mut new = Self {
            device,
            memory,
            queues,
            window,
            interrupt,
            status: 0,
            driver_features: 0,
            selected_device_features: 0,
            selected_driver_features: 0,
            selected_queue: 0,
            generation: 0,
            counters: Counters::default(),
        };
        new.introduce();
        new.publish();
        Ok(new)
    }

    /// The device's kind in a word.
    pub fn kind(&self) -> &'static str {
        match self.device.device_type() {
            virtio_ids::VIRTIO_ID_BALLOON => "balloon",
            virtio_ids::VIRTIO_ID_MEM => "memory",
            virtio_ids::VIRTIO_ID_PMEM => "pmem",
            virtio_ids::VIRTIO_ID_VSOCK => "vsock",
            virtio_ids::VIRTIO_ID_BLOCK => "block",
            virtio_ids::VIRTIO_ID_NET => "network",
            virtio_ids::VIRTIO_ID_RNG => "entropy",
            virtio_ids::VIRTIO_ID_CONSOLE => "console",
            virtio_ids::VIRTIO_ID_FS => "file system",
            _ => "unknown",
        }
    }

    /// How far its driver is, in a word.
    pub fn driver_status(&self) -> &'static str {
        match self.status {
            status if status & (NEEDS_RESET | FAILED) != 0 => "broken",
            status if status & DRIVER_OK != 0 => "ready",
            _ => "reset",
        }
    }

    /// The event loop that it is to be in (see [`VirtioDevice::event_loop`]).
    pub fn event_loop(&self) -> Loop {
        self.device.event_loop()
    }

    /// What the device and its transport have counted, by name.
    pub fn metrics(&self) -> Vec<(&'static str, u64)> {
        let Counters { events, resets, broken } = self.counters;
        let mut metrics = vec![("events", events), ("resets", resets), ("broken", broken)];
        metrics.extend(self.device.metrics());
        metrics
    }

    /// The device's interrupt.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// The device's queues.
    pub fn queues(&self) -> &[VirtQueue] {
        &self.queues
    }

    /// Delivers what the guest already handed over (see [`VirtioDevice::flush`]).
    pub fn flush(&mut self) {
        self.device.hurry();
        for queue in 0..self.queues.len() {
            self.dispatch(Event::Queue(u16::try_from(queue).unwrap_or(u16::MAX)));
        }
        self.device.flush();
    }

    /// Waits for what a disk is doing. What it has not begun is lost, as when the power fails: it may be more than anybody
    /// would wait for.
    pub fn drain(&mut self) {
        self.device.flush();
    }

    /// Brings what is under way to an end and gives what is kept of the device, which goes on as before. Its vCPUs must stand
    /// still, and the event loop must not call it meanwhile.
    ///
    /// # Errors
    /// [`StateError`] says why it cannot be saved now.
    pub fn save(&mut self) -> Result<Vec<u8>, StateError> {
        if self.is_in_service() {
            self.call(|device, resources| device.quiesce(resources));
        }
        // It may have been broken just now.
        if !self.is_in_service() {
            self.device.settle();
        }
        let state = state::seal(&DeviceState {
            device_type: self.device.device_type(),
            status: self.status,
            driver_features: self.driver_features,
            selected_features: (self.selected_device_features, self.selected_driver_features),
            selected_queue: self.selected_queue,
            generation: self.generation,
            interrupt: self.interrupt.status(),
            queues: self.queues.iter().map(VirtQueue::save).collect(),
            own: self.device.save()?,
        });
        // What could not be restored is not saved.
        if state.len() > state::STATE_MAX { Err(StateError::TooLong { length: state.len() }) } else { Ok(state) }
    }

    /// Takes over what [`MmioDevice::save`] gave, in a device that was made like that one, with the same memory, and whose
    /// driver is not there yet. What is in it is checked as if a guest had written it.
    ///
    /// # Errors
    /// [`StateError`] says what is wrong; the device is as it was then.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        if self.status != 0 {
            return Err(StateError::InUse);
        }
        let restored = state::open(bytes).and_then(|state| self.take_over(state));
        if restored.is_err() {
            self.generation = 0;
            self.clear();
        }
        self.publish();
        restored
    }

    fn take_over(&mut self, state: DeviceState) -> Result<(), StateError> {
        let (own, own_queues) = (self.device.device_type(), self.queues.len());
        if state.device_type != own || state.queues.len() != own_queues {
            let (found, found_queues) = (state.device_type, state.queues.len());
            return Err(StateError::OtherDevice { found, found_queues, own, own_queues });
        }
        if !is_reachable(state.status) {
            return Err(impossible("the status", state.status));
        }
        let agreed = state.status & FEATURES_OK != 0;
        (self.driver_features, self.status) = (state.driver_features, state.status);
        if agreed && !self.features_acceptable() {
            return Err(impossible("what was agreed on", state.driver_features));
        }
        if state.interrupt & !(Interrupt::USED | Interrupt::CONFIGURATION) != 0 {
            return Err(impossible("the interrupt", state.interrupt));
        }
        (self.selected_device_features, self.selected_driver_features) = state.selected_features;
        (self.selected_queue, self.generation) = (state.selected_queue, state.generation);
        let started = state.status & DRIVER_OK != 0;
        let event_idx = started && state.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        for (queue, saved) in self.queues.iter_mut().zip(state.queues) {
            if saved.ready && !agreed {
                return Err(impossible("the status with a queue that is ready", state.status));
            }
            // Until the driver is ready it may be anywhere: that is looked at then.
            let ready = saved.ready;
            queue.restore(&self.memory, state::QueueState { ready: ready && started, ..saved }, event_idx)?;
            queue.ring().set_ready(ready);
        }
        if started {
            self.device.start(self.driver_features);
        }
        self.device.restore(&state.own)?;
        if state.interrupt != 0 {
            // It may have been on its way. One too many does no harm.
            self.interrupt.raise(state.interrupt);
        }
        // So may the driver's notifications, and what the device put off.
        if started {
            self.kick();
        }
        Ok(())
    }

    fn kick(&self) {
        for queue in &self.queues {
            // A full counter is a notification, too.
            let _ = queue.kick().write(1);
        }
    }

    /// What the guest reads in the window at `offset`.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.window.read(offset, data);
    }

    /// Shows what never changes.
    fn introduce(&self) {
        // SHMLenLow and SHMLenHigh: the device has no shared memory (§4.2.2.1).
        let no_memory = [(0xb0, u32::MAX), (0xb4, u32::MAX)];
        let identity = [(0x00, MAGIC), (0x04, VERSION), (0x08, self.device.device_type()), (0x0c, VENDOR)];
        identity.into_iter().chain(no_memory).for_each(|(offset, value)| self.window.put(offset, value));
    }

    /// Shows the registers and the configuration space as they are now. After everything that changes them, and before anybody
    /// is told.
    fn publish(&mut self) {
        let queue = self.selected().map(|queue| (queue.ring().max_size(), queue.ring().ready()));
        let (size, ready) = queue.unwrap_or_default();
        self.window.put(0x10, part(self.offered(), self.selected_device_features));
        self.window.put(0x34, size.into());
        self.window.put(0x44, ready.into());
        self.window.put(0x70, self.status);
        for offset in (0..CONFIGURATION_LENGTH).step_by(8) {
            let mut fields = [0; 8];
            self.device.read_config(offset as usize, &mut fields);
            self.window.put_configuration(offset, &fields);
        }
        // Behind what it is the number of: who finds it has all of that in front of him.
        self.window.put(0xfc, self.generation);
    }

    /// Handles a write of the window at `offset`. Accesses of a register that are not 4 bytes wide are ignored, and so are
    /// writes of the configuration space before the driver says that it is there (§3.1.1).
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIGURATION_SPACE) {
            if self.status & (DRIVER | NEEDS_RESET | FAILED) == DRIVER {
                self.device.write_config(usize::try_from(offset).unwrap_or(usize::MAX), data);
            }
        } else if let Ok(data) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
        self.publish();
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            0x14 => self.selected_device_features = value,
            0x20 if self.status & FEATURES_OK == 0 => match self.selected_driver_features {
                0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
                1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
                _ => {}
            },
            0x24 => self.selected_driver_features = value,
            0x30 => self.selected_queue = value,
            INTERRUPT_ACK => self.interrupt.acknowledge(value),
            0x70 => self.set_status(value),
            0x38 | 0x44 | 0x80..=0xa4 => self.configure_queue(offset, value),
            // QueueNotify is an eventfd; what comes here is for a queue that does not exist.
            _ => {}
        }
    }

    /// Queue registers are writable only between FEATURES_OK and DRIVER_OK, so a running queue never moves (§4.2.3.2).
    fn configure_queue(&mut self, offset: u64, value: u32) {
        if self.status & (FEATURES_OK | DRIVER_OK | NEEDS_RESET | FAILED) != FEATURES_OK {
            return;
        }
        let Some(queue) = self.selected() else { return };
        let ring = queue.ring();
        match offset {
            0x38 => ring.set_size(u16::try_from(value).unwrap_or(0)),
            0x44 => ring.set_ready(value == 1),
            0x80 => ring.set_desc_table_address(Some(value), None),
            0x84 => ring.set_desc_table_address(None, Some(value)),
            0x90 => ring.set_avail_ring_address(Some(value), None),
            0x94 => ring.set_avail_ring_address(None, Some(value)),
            0xa0 => ring.set_used_ring_address(Some(value), None),
            0xa4 => ring.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        // A driver may only add bits (§2.1.1), one step after the other.
        let added = value & !self.status & DRIVER_BITS;
        let needed = if added & DRIVER_OK != 0 {
            ACKNOWLEDGE | DRIVER | FEATURES_OK
        } else if added & FEATURES_OK != 0 {
            ACKNOWLEDGE | DRIVER
        } else {
            0
        };
        if self.status & needed != needed || (self.status & NEEDS_RESET != 0 && added & DRIVER_OK != 0) {
            return;
        }
        let mut accepted = added;
        if added & FEATURES_OK != 0 && !self.features_acceptable() {
            accepted &= !FEATURES_OK;
        }
        self.status |= accepted;
        if accepted & DRIVER_OK != 0 {
            self.start();
        }
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered() == 0 && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn start(&mut self) {
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        for queue in &mut self.queues {
            queue.ring().set_event_idx(event_idx);
            // A queue the driver did not set up stays unused; one that lies outside of memory is never touched.
            if !queue.is_usable(&self.memory) {
                queue.ring().set_ready(false);
            }
        }
        self.device.start(self.driver_features);
        // Buffers can have been made available before DRIVER_OK without a notification that counted.
        self.kick();
    }

    fn reset(&mut self) {
        self.counters.resets += 1;
        self.clear();
    }

    fn clear(&mut self) {
        self.status = 0;
        self.driver_features = 0;
        self.selected_device_features = 0;
        self.selected_driver_features = 0;
        self.selected_queue = 0;
        self.interrupt.acknowledge(u32::MAX);
        for queue in &mut self.queues {
            queue.ring().reset();
        }
        self.device.reset();
    }

    fn offered(&self) -> u64 {
        self.device.features()
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn selected(&mut self) -> Option<&mut VirtQueue> {
        self.queues.get_mut(self.selected_queue as usize)
    }

    /// Whether the device has a driver that is ready and has not broken it.
    fn is_in_service(&self) -> bool {
        self.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK
    }

    /// Calls the device, if it runs, and takes it out of service when the driver broke it.
    pub(crate) fn dispatch(&mut self, event: Event) {
        self.device.let_go();
        if !self.is_in_service() {
            return;
        }
        self.counters.events += 1;
        self.call(|device, resources| device.process(resources, event));
    }

    fn call(&mut self, work: impl FnOnce(&mut dyn VirtioDevice, Resources<'_>) -> Result<(), Broken>) {
        let Self { memory, queues, window, .. } = self;
        let mut changed = false;
        let configuration = Configuration { window, changed: &mut changed };
        let outcome = work(&mut *self.device, Resources { memory, queues, configuration });
        if changed {
            // A driver that reads the space from before the change to the middle of it, or from there to the end, sees two
            // numbers (§2.5.2): there is one of the time in between. Who reads both in that time is interrupted afterwards, and
            // reads the space again.
            self.generation = self.generation.wrapping_add(1);
            self.window.put(0xfc, self.generation);
            self.generation = self.generation.wrapping_add(1);
        }
        if let Err(Broken::Queue { .. } | Broken::Chain { .. }) = outcome {
            self.counters.broken += 1;
            self.status |= NEEDS_RESET;
            changed = true;
        }
        if changed {
            self.publish();
            self.interrupt.raise(Interrupt::CONFIGURATION);
        }
    }
}

impl MutEventSubscriber for MmioDevice {
    fn init(&mut self, ops: &mut EventOps) {
        for (index, queue) in (0u32..).zip(&self.queues) {
            // An edge: each notification is one, whether the eventfd was read meanwhile or not, and so it never is.
            let kick = Events::with_data(queue.kick(), index, Trigger::Readable.events());
            ops.add(kick).expect("an eventfd can be watched");
        }
        self.device.prepare();
        for (index, watch) in (BACKEND..).zip(self.device.watched()) {
            ops.add(Events::with_data_raw(watch.descriptor, index, watch.trigger.events()))
                .expect("a device's descriptor can be watched");
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        match (events.data().checked_sub(BACKEND), u16::try_from(events.data())) {
            (Some(index), _) => self.dispatch(Event::Backend(index as usize)),
            (None, Ok(index)) => self.dispatch(Event::Queue(index)),
            // No queue has such a number.
            (None, Err(_)) => {}
        }
    }
}

/// Whether the status is one that a driver can have brought a device to ([`MmioDevice::set_status`]).
fn is_reachable(status: u32) -> bool {
    let steps = [ACKNOWLEDGE | DRIVER, FEATURES_OK, DRIVER_OK];
    let known = DRIVER_BITS | NEEDS_RESET;
    // Each step needs the one before.
    let in_order = steps.windows(2).all(|pair| status & pair[1] == 0 || status & pair[0] == pair[0]);
    status & !known == 0 && in_order && (status & NEEDS_RESET == 0 || status & DRIVER_OK != 0)
}

/// The 32 features with this number; zero behind the last ones.
fn part(features: u64, number: u32) -> u32 {
    // Shifted as they are, they fit.
    features.checked_shr(number.saturating_mul(32)).unwrap_or(0) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;
    use crate::balloon::Balloon;
    use crate::balloon::host::HostBalloon;
    use crate::blk::{Blk, Options};
    use crate::console::{Console, ConsoleOutput};
    use crate::mem::Mem;
    use crate::mem::host::HostMem;
    use crate::pmem::Pmem;
    use crate::rng::Rng;
    use crate::testing::{Buffer, Driver};
    use crate::vsock::Vsock;
    use crate::vsock::ports::HostPorts;

    fn devices() -> Vec<Box<dyn VirtioDevice>> {
        let disk = tempfile::tempfile().unwrap();
        disk.set_len(1 << 20).unwrap();
        vec![
            Box::new(Rng::default()),
            Box::new(Blk::new(disk, Options { queues: 2, ..Options::default() }).unwrap()),
            Box::new(Console::new(ConsoleOutput::default(), None)),
            Box::new(Vsock::new(HostPorts::default(), None, None).unwrap()),
            Box::new(crate::net::peer::device()),
            crate::fs::testing::device(),
            Box::new(Balloon::new(HostBalloon::new().unwrap())),
            Box::new(Mem::new(HostMem::new(2 << 20).unwrap(), 2 << 20)),
            Box::new(Pmem::new(None, 2 << 20..4 << 20, None)),
        ]
    }

    #[test]
    fn a_driver_finds_the_device_and_sets_it_up() {
        for device in devices() {
            let mut driver = Driver::new(device);
            assert_eq!((driver.read(0), driver.read(4)), (MAGIC, VERSION));
            driver.start();
        }
    }

    #[test]
    fn a_step_left_out_is_not_taken() {
        let mut driver = Driver::new(Box::new(Rng::default()));
        driver.write(0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!(driver.read(0x70) & DRIVER_OK, 0);
    }

    #[test]
    fn bits_of_the_status_that_no_driver_has_are_not_taken() {
        let mut driver = Driver::new(Box::new(Rng::default())).start();
        driver.write(0x70, u32::MAX);
        assert_eq!(driver.read(0x70), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED);
    }

    #[test]
    fn there_are_two_halves_of_the_features_and_nothing_else() {
        let mut driver = Driver::new(Box::new(Rng::default()));
        let halves = [0, 1, 2, u32::MAX].map(|select| {
            driver.write(0x14, select);
            driver.read(0x10)
        });
        assert_eq!(halves, [3 << VIRTIO_RING_F_INDIRECT_DESC, 1, 0, 0]);
        driver.write(0x70, ACKNOWLEDGE | DRIVER);
        for (select, features) in [(1, 1), (2, u32::MAX), (u32::MAX, u32::MAX)] {
            driver.write(0x24, select);
            driver.write(0x20, features);
        }
        driver.write(0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_ne!(driver.read(0x70) & FEATURES_OK, 0);
    }

    #[test]
    fn a_running_queue_cannot_be_moved() {
        let mut driver = Driver::new(Box::new(Rng::default())).start();
        driver.write(0x30, 0);
        driver.write(0x80, 0x30_0000);
        driver.write(0x44, 0);
        assert_eq!(driver.read(0x44), 1);
        assert_ne!(driver.device.queues[0].ring().desc_table(), 0x30_0000);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Register(u64, u32),
        Narrow(u64, Vec<u8>),
        Chain(usize, Vec<(u64, u32, bool)>),
        Indirect(usize, Vec<(u64, u32, bool)>),
        Index(usize, u16),
        Kick(u16),
        Read(u64, usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let address = prop_oneof![0u64..4 << 20, Just(u64::MAX), Just((4 << 20) - 1), any::<u64>()];
        let length = prop_oneof![0u32..5000, Just(u32::MAX)];
        let step = prop_oneof![
            (0u64..0x110, prop_oneof![0u32..16, any::<u32>()]).prop_map(|(at, value)| Step::Register(at & !3, value)),
            (0u64..0x1000, proptest::collection::vec(any::<u8>(), 0..9)).prop_map(|(at, data)| Step::Narrow(at, data)),
            (0usize..3, any::<bool>(), proptest::collection::vec((address, length, any::<bool>()), 1..5))
                .prop_map(|(q, indirect, c)| if indirect { Step::Indirect(q, c) } else { Step::Chain(q, c) }),
            (0usize..3, any::<u16>()).prop_map(|(queue, index)| Step::Index(queue, index)),
            (0u16..4).prop_map(Step::Kick),
            (0u64..0x1000, 0usize..9).prop_map(|(at, length)| Step::Read(at, length)),
        ];
        proptest::collection::vec(step, 1..40)
    }

    fn buffers(chain: Vec<(u64, u32, bool)>) -> Vec<Buffer> {
        chain.into_iter().map(|(address, length, writable)| Buffer { address, length, writable }).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

        /// Whatever a driver does, in whatever order: the device neither panics nor hangs, and can be saved and restored.
        #[test]
        fn a_hostile_driver_does_no_harm(
            which in 0..devices().len(),
            rings in 0u32..4,
            filling in any::<[u8; 64]>(),
            steps in steps(),
        ) {
            let features = rings << VIRTIO_RING_F_INDIRECT_DESC;
            let mut driver = Driver::new(devices().swap_remove(which)).start_with(features);
            for page in 0..64 {
                driver.memory.write_slice(&filling, vm_memory::GuestAddress(page * 4096)).unwrap();
            }
            let queues = driver.device.queues.len();
            for step in steps {
                match step {
                    Step::Register(at, value) => driver.write(at, value),
                    Step::Narrow(at, data) => driver.device.write(at, &data),
                    Step::Chain(queue, chain) if queue < queues => {
                        driver.offer(queue, &buffers(chain));
                    }
                    Step::Indirect(queue, chain) if queue < queues => {
                        driver.offer_indirect(queue, &buffers(chain));
                    }
                    Step::Index(queue, index) if queue < queues => driver.set_available(queue, index),
                    Step::Kick(queue) => driver.device.dispatch(Event::Queue(queue)),
                    Step::Read(at, length) => driver.device.read(at, &mut vec![0; length]),
                    _ => {}
                }
                driver.device.dispatch(Event::Backend(0));
            }
            // What is saved of it could go on elsewhere.
            let state = driver.device.save().unwrap();
            crate::testing::alone(devices().swap_remove(which), &driver.memory).restore(&state).unwrap();
        }
    }
}
