//! What every device does alike, tested once for all of them: `conformance!` makes the tests of one of them.
//!
//! A [`Subject`] knows how its device is made and asked for something; everything else is here.

mod kept;
mod subjects;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::device::{Event, VirtioDevice};
use crate::interrupt::Interrupt;
use crate::mmio::MmioDevice;
use crate::testing::{Driver, alone};

const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 0x40;
const EVENT_IDX: u32 = 1 << VIRTIO_RING_F_EVENT_IDX;
const INDIRECT: u32 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// No index is past it before a test is over.
const NEVER: u16 = 0x8000;

/// A device, as these tests know it.
pub trait Subject: Sized {
    /// The queue whose chains [`Subject::serve`] has used, one each time.
    const QUEUE: usize;
    /// The device's own features that its driver is to accept, of the lower 32.
    const FEATURES: u32;
    /// What is counted when something was served.
    const SERVED: &'static str;
    /// What is counted when something was refused, if there is anything that is not served.
    const REFUSED: Option<&'static str>;

    /// The host's side, which stays when the device is replaced.
    fn new() -> Self;

    /// A new device with that host's side.
    fn device(&self) -> Box<dyn VirtioDevice>;

    /// Asks for something that makes sense, and does not wait for it.
    fn ask(&mut self, driver: &mut Driver);

    /// Whether what was asked for was done.
    fn check(&mut self, driver: &mut Driver);

    /// Asks for something that is refused, and waits until it is.
    fn refuse(&mut self, _driver: &mut Driver) {}

    /// Asks for something and sees to it that it is done.
    fn serve(&mut self, driver: &mut Driver) {
        self.ask(driver);
        driver.device.dispatch(Event::Queue(Self::QUEUE as u16));
        self.check(driver);
    }
}

/// A driver of a subject's device that has started it.
fn started<S: Subject>(subject: &S, rings: u32) -> Driver {
    Driver::new(subject.device()).start_with(S::FEATURES | rings)
}

/// All that a driver can read, except for how often the configuration has changed.
fn registers(device: &mut MmioDevice) -> Vec<u32> {
    let read = |at| {
        let mut value = [0; 4];
        device.read(at, &mut value);
        u32::from_le_bytes(value)
    };
    (0..0x180).step_by(4).filter(|at| *at != 0xfc).map(read).collect()
}

pub fn a_reset_returns_to_the_beginning_at_any_time<S: Subject>() {
    let mut subject = S::new();
    let mut driver = Driver::new(subject.device());
    let new = registers(&mut driver.device);
    // Each step of a driver that comes up, and no further.
    let features = [(0x24, 0), (0x20, S::FEATURES), (0x24, 1), (0x20, 1), (0x14, 1)];
    let queue = [(0x30, 0), (0x38, 16), (0x80, 0x10_0000), (0x90, 0x10_1000), (0xa0, 0x10_2000), (0x44, 1)];
    let agreed = [(0x70, 1), (0x70, 3)].into_iter().chain(features).chain([(0x70, 0xb)]);
    let steps: Vec<_> = agreed.chain(queue).chain([(0x70, 0xf), (0x70, 0x8f)]).collect();
    for count in 0..=steps.len() {
        for (register, value) in &steps[..count] {
            driver.write(*register, *value);
        }
        driver.write(0x70, 0);
        assert_eq!(registers(&mut driver.device), new, "after {count} steps");
    }
    driver = driver.start_with(S::FEATURES);
    subject.serve(&mut driver);
    subject.ask(&mut driver);
    driver.write(0x70, 0);
    assert_eq!(registers(&mut driver.device), new);
    driver = driver.start_with(S::FEATURES);
    subject.serve(&mut driver);
}

pub fn only_what_is_offered_can_be_agreed_on<S: Subject>() {
    let mut driver = Driver::new(S::new().device());
    let mut half = |high: u32| {
        driver.write(0x14, high);
        u64::from(driver.read(0x10))
    };
    let offered = half(0) | half(1) << 32;
    assert_eq!(offered as u32 & S::FEATURES, S::FEATURES);
    let mut agree = |features: u64| {
        driver.write(0x70, 0);
        driver.write(0x70, 3);
        for high in [0, 1] {
            driver.write(0x24, high);
            driver.write(0x20, (features >> (32 * high)) as u32);
        }
        driver.write(0x70, 3 | FEATURES_OK);
        driver.read(0x70) & FEATURES_OK != 0
    };
    let modern = 1 << VIRTIO_F_VERSION_1;
    for bit in 0..64 {
        let feature = 1u64 << bit;
        assert_eq!(agree(feature | modern), offered & feature != 0, "feature {bit}");
    }
    assert!(agree(offered) && !agree(offered & !modern) && !agree(0));
}

pub fn chains_may_be_in_tables_and_interrupts_for_some_of_them_only<S: Subject>() {
    for rings in [EVENT_IDX, EVENT_IDX | INDIRECT] {
        let mut subject = S::new();
        let mut driver = started(&subject, rings);
        driver.indirect = rings & INDIRECT != 0;
        for queue in 0..driver.device.queues().len() {
            driver.set_used_event(queue, NEVER);
        }
        driver.set_used_event(S::QUEUE, 1);
        for (count, interrupted) in [(1, false), (2, true), (3, false)] {
            subject.serve(&mut driver);
            assert_eq!(driver.interrupted(), interrupted, "{count}");
            assert_eq!(driver.available_event(S::QUEUE), count, "which notification the device asks for");
        }
    }
}

pub fn a_broken_queue_needs_a_reset<S: Subject>() {
    let mut subject = S::new();
    let mut driver = started(&subject, 0);
    subject.serve(&mut driver);
    driver.set_available(S::QUEUE, 5000);
    driver.device.dispatch(Event::Queue(S::QUEUE as u16));
    assert_ne!(driver.read(0x70) & NEEDS_RESET, 0);
    assert_ne!(driver.read(0x60) & Interrupt::CONFIGURATION, 0);
    let metrics = driver.device.metrics();
    for queue in 0..driver.device.queues().len() {
        driver.device.dispatch(Event::Queue(queue as u16));
    }
    driver.device.dispatch(Event::Backend(0));
    assert_eq!(driver.device.metrics(), metrics, "a broken device does nothing");
    driver.write(0x70, 0);
    driver = driver.start_with(S::FEATURES);
    subject.serve(&mut driver);
    assert_eq!((driver.metric("broken"), driver.metric("resets")), (1, 1));
}

pub fn a_stopped_device_leaves_nothing<S: Subject>() {
    // Threads of the kernel's, such as a ring's, end when they come to it.
    let ours = |comm: std::io::Result<String>| comm.is_ok_and(|comm| !comm.starts_with("iou-"));
    let count = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let threads = tasks.filter(|task| ours(std::fs::read_to_string(task.path().join("comm")))).count();
        (std::fs::read_dir("/proc/self/fd").unwrap().count(), threads)
    };
    let mut subject = S::new();
    let before = count();
    let mut driver = started(&subject, 0);
    subject.serve(&mut driver);
    driver.device.flush();
    drop(driver);
    assert_eq!(count(), before, "descriptors and threads");
}

pub fn what_is_served_and_what_is_refused_counts<S: Subject>() {
    let mut subject = S::new();
    let mut driver = started(&subject, 0);
    let (events, served) = (driver.metric("events"), driver.metric(S::SERVED));
    subject.serve(&mut driver);
    subject.serve(&mut driver);
    assert!(driver.metric("events") > events && driver.metric(S::SERVED) > served + 1);
    if let Some(name) = S::REFUSED {
        let before = driver.metric(name);
        subject.refuse(&mut driver);
        assert!(driver.metric(name) > before, "{name}");
    }
}

pub fn a_restored_device_goes_on<S: Subject>() {
    for rings in [0, EVENT_IDX | INDIRECT] {
        let mut subject = S::new();
        let mut driver = started(&subject, rings);
        driver.indirect = rings != 0;
        subject.serve(&mut driver);
        let registers_before = registers(&mut driver.device);
        driver.move_to(subject.device());
        assert_eq!(registers(&mut driver.device), registers_before);
        driver.heed();
        subject.serve(&mut driver);
        // What is under way is brought to an end.
        subject.ask(&mut driver);
        driver.device.dispatch(Event::Queue(S::QUEUE as u16));
        driver.move_to(subject.device());
        subject.check(&mut driver);
        // What the driver made available, and nobody looked at, is found.
        subject.ask(&mut driver);
        driver.move_to(subject.device());
        driver.heed();
        subject.check(&mut driver);
        subject.serve(&mut driver);
        driver.write(0x70, 0);
        driver = driver.start_with(S::FEATURES);
        driver.indirect = false;
        subject.serve(&mut driver);
    }
}

pub fn a_device_is_restored_at_every_step_of_its_driver<S: Subject>() {
    let subject = S::new();
    let steps = [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 0xb), (0x30, 0), (0x80, 0x10_0000), (0x44, 1)];
    let mut driver = Driver::new(subject.device());
    for (register, value) in steps {
        driver.write(register, value);
        let before = registers(&mut driver.device);
        driver.move_to(subject.device());
        assert_eq!(registers(&mut driver.device), before, "{register:#x}");
    }
    let state = driver.device.save().unwrap();
    assert!(driver.device.restore(&state).is_err(), "it has a driver");
}

pub fn a_state_that_was_tampered_with_does_no_harm<S: Subject>() {
    let mut subject = S::new();
    let mut driver = started(&subject, EVENT_IDX | INDIRECT);
    subject.serve(&mut driver);
    let state = driver.device.save().unwrap();
    let memory = driver.memory.clone();
    let new = registers(&mut alone(S::new().device(), &memory));
    let mut refused = 0;
    let mut restore = |state: &[u8]| {
        // With a host's side of its own: what is restored of that stays.
        let mut device = alone(S::new().device(), &memory);
        if device.restore(state).is_err() {
            refused += 1;
            assert_eq!(registers(&mut device), new);
        }
        for queue in 0..device.queues().len() {
            device.dispatch(Event::Queue(queue as u16));
        }
        device.dispatch(Event::Backend(0));
        device.save().unwrap();
    };
    for length in 0..state.len() {
        restore(&state[..length]);
    }
    for at in 0..state.len() {
        for flip in [1, 2, 4, 8, 16, 32, 64, 128, 255] {
            let mut tampered = state.clone();
            tampered[at] ^= flip;
            restore(&tampered);
        }
    }
    restore(&[&state[..], &[0]].concat());
    restore(&vec![0; 1 << 20]);
    // Every truncation, every bit of the version, and more.
    assert!(refused > state.len() + 16, "{refused}");
}

/// The tests of one device.
macro_rules! conformance {
    ($module:ident, $subject:ty) => {
        mod $module {
            use super::*;
            conformance!(@ $subject:
                a_reset_returns_to_the_beginning_at_any_time
                only_what_is_offered_can_be_agreed_on
                chains_may_be_in_tables_and_interrupts_for_some_of_them_only
                a_broken_queue_needs_a_reset
                a_stopped_device_leaves_nothing
                what_is_served_and_what_is_refused_counts
                a_restored_device_goes_on
                a_device_is_restored_at_every_step_of_its_driver
                a_state_that_was_tampered_with_does_no_harm
            );
        }
    };
    (@ $subject:ty: $($test:ident)*) => {
        $(
            #[test]
            fn $test() {
                crate::conformance::$test::<$subject>();
            }
        )*
    };
}
use conformance;
