//! The registers of a device, as its driver sees them (VIRTIO 1.2 §4.2.2, "MMIO Device Register Layout").

use crate::command_line::Place;
use crate::memory;

/// MagicValue.
pub const MAGIC: u64 = 0x00;
/// Version.
pub const VERSION: u64 = 0x04;
/// DeviceID.
pub const DEVICE_ID: u64 = 0x08;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SELECT: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECT: u64 = 0x24;
/// QueueSel.
pub const QUEUE_SELECT: u64 = 0x30;
/// QueueNumMax.
pub const QUEUE_SIZE_MAX: u64 = 0x34;
/// QueueNum.
pub const QUEUE_SIZE: u64 = 0x38;
/// QueueReady.
pub const QUEUE_READY: u64 = 0x44;
/// QueueNotify.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// InterruptStatus.
pub const INTERRUPT_STATUS: u64 = 0x60;
/// InterruptACK.
pub const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
/// Status.
pub const STATUS: u64 = 0x70;
/// QueueDescLow, followed by QueueDescHigh; QueueDriver and QueueDevice come 16 and 32 bytes later.
pub const QUEUE_DESCRIPTORS: u64 = 0x80;
/// The device's configuration space.
pub const CONFIGURATION: u64 = 0x100;
/// The end of the registers and of the configuration space.
pub const WINDOW: u64 = 0x1000;

/// The status bits (§2.1): ACKNOWLEDGE,
pub const ACKNOWLEDGE: u32 = 1;
/// DRIVER,
pub const DRIVER: u32 = 2;
/// DRIVER_OK,
pub const DRIVER_OK: u32 = 4;
/// FEATURES_OK,
pub const FEATURES_OK: u32 = 8;
/// and DEVICE_NEEDS_RESET.
pub const NEEDS_RESET: u32 = 0x40;

/// VIRTIO_F_VERSION_1, without which no device of ours goes on (§6).
pub const VERSION_1: u64 = 1 << 32;

/// A device's registers.
#[derive(Debug, Clone, Copy)]
pub struct Device {
    /// Where they are, and its interrupt.
    pub place: Place,
}

impl Device {
    /// Reads a register.
    #[must_use]
    pub fn read(&self, offset: u64) -> u32 {
        memory::read(self.place.base + offset)
    }

    /// Writes a register.
    pub fn write(&self, offset: u64, value: u32) {
        memory::write(self.place.base + offset, value);
    }

    /// Reads as many bytes as `width` says, which may be anything but 2, 4 and 8 for one.
    pub fn read_wide(&self, offset: u64, width: u64) -> u64 {
        let address = self.place.base + offset;
        match width {
            2 => memory::read::<u16>(address).into(),
            4 => memory::read::<u32>(address).into(),
            8 => memory::read(address),
            _ => memory::read::<u8>(address).into(),
        }
    }

    /// Writes as many bytes, likewise.
    pub fn write_wide(&self, offset: u64, width: u64, value: u64) {
        let address = self.place.base + offset;
        match width {
            2 => memory::write(address, value as u16),
            4 => memory::write(address, value as u32),
            8 => memory::write(address, value),
            _ => memory::write(address, value as u8),
        }
    }

    /// What the device offers.
    #[must_use]
    pub fn offered(&self) -> u64 {
        let half = |select| {
            self.write(DEVICE_FEATURES_SELECT, select);
            u64::from(self.read(DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    /// Says what the driver accepts.
    pub fn accept(&self, features: u64) {
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(DRIVER_FEATURES_SELECT, select);
            self.write(DRIVER_FEATURES, half);
        }
    }

    /// Resets the device; whether it says that it has done so.
    pub fn reset(&self) -> bool {
        self.write(STATUS, 0);
        self.read(STATUS) == 0
    }

    /// Begins as a driver should, with these features; whether the device agrees.
    pub fn negotiate(&self, features: u64) -> bool {
        self.write(STATUS, ACKNOWLEDGE);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        self.accept(features);
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.read(STATUS) & FEATURES_OK != 0
    }

    /// Tells the device of a queue.
    pub fn place_queue(&self, index: u32, size: u32, [descriptors, available, used]: [u64; 3]) {
        self.write(QUEUE_SELECT, index);
        self.write(QUEUE_SIZE, size);
        for (register, address) in (QUEUE_DESCRIPTORS..).step_by(16).zip([descriptors, available, used]) {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
    }

    /// How long a queue may be; zero if there is none.
    #[must_use]
    pub fn queue_size_max(&self, index: u32) -> u32 {
        self.write(QUEUE_SELECT, index);
        self.read(QUEUE_SIZE_MAX)
    }

    /// Notifies the device of a queue.
    pub fn notify(&self, queue: u32) {
        self.write(QUEUE_NOTIFY, queue);
    }
}
