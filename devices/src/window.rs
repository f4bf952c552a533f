//! The registers of devices as their drivers read them (VIRTIO 1.2 §4.2.2, "MMIO Device Register Layout"): memory that the
//! guest may read and not write.
//!
//! A driver reads registers without leaving the guest: what there is to read stands there before it looks. What it writes
//! leaves the guest as ever ([`crate::mmio`]). No buffer of a driver's can lie here, since this is no part of guest memory.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::{Bytes as _, MmapRegion, VolatileMemory as _};

/// The size of a device's register window in bytes.
pub const WINDOW: u64 = 0x1000;
/// The offset of the device's configuration space in its window.
pub const CONFIGURATION_SPACE: u64 = 0x100;
/// How much of a configuration space is shown, in bytes: more than any of our devices has. What is behind it reads as zero.
pub const CONFIGURATION_LENGTH: u64 = 64;

/// The windows of some devices, one behind the other.
#[derive(Debug)]
pub struct Windows(Arc<MmapRegion>);

impl Windows {
    /// Windows for so many devices, all of it zero.
    ///
    /// # Errors
    /// When the system has no memory left.
    pub fn new(count: usize) -> io::Result<Self> {
        MmapRegion::new(count * WINDOW as usize).map(Arc::new).map(Self).map_err(io::Error::other)
    }

    /// What the guest is to see in its place.
    pub fn region(&self) -> &MmapRegion {
        &self.0
    }

    /// The window of the device at this position; `None` behind the last one.
    pub fn window(&self, index: usize) -> Option<Window> {
        let start = index.checked_mul(WINDOW as usize)?;
        (start < self.0.size()).then(|| Window { region: Arc::clone(&self.0), start })
    }
}

/// The window of one device.
#[derive(Debug, Clone)]
pub struct Window {
    region: Arc<MmapRegion>,
    start: usize,
}

impl Window {
    /// A register, which is one of [`WINDOW`] and aligned.
    pub(crate) fn register(&self, offset: u64) -> &AtomicU32 {
        let register = self.region.get_atomic_ref(self.start + offset as usize);
        register.expect("a window is a page, and registers are constants in it")
    }

    /// Has a register read as `value`.
    pub(crate) fn put(&self, offset: u64, value: u32) {
        self.register(offset).store(value.to_le(), Ordering::SeqCst);
    }

    /// Has fields of the configuration space read as `value`, each word of it at once: drivers read the shorter fields without
    /// looking at the generation. They must lie within [`CONFIGURATION_LENGTH`], and begin and end with a word.
    pub(crate) fn put_configuration(&self, offset: u64, value: &[u8]) {
        self.put_words(CONFIGURATION_SPACE + offset, value);
    }

    /// Has the words from `offset` on read as `value`, each of them at once.
    pub(crate) fn put_words(&self, offset: u64, value: &[u8]) {
        let (words, rest) = value.as_chunks::<4>();
        debug_assert!(rest.is_empty(), "what is put is words");
        for (word, at) in words.iter().zip((offset..).step_by(4)) {
            self.put(at, u32::from_le_bytes(*word));
        }
    }

    /// Reads what a driver reads at `offset`; zeros behind the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some(rest) = WINDOW.checked_sub(offset).filter(|rest| *rest > 0) else { return };
        let length = data.len().min(rest as usize);
        let read = self.region.as_volatile_slice().read_slice(&mut data[..length], self.start + offset as usize);
        read.expect("a window is a page");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_lie_one_behind_the_other() {
        let windows = Windows::new(2).unwrap();
        let [first, second] = [0, 1].map(|index| windows.window(index).unwrap());
        assert!(windows.window(2).is_none() && windows.window(usize::MAX).is_none());
        first.put(0xffc, 7);
        second.put(0, 9);
        let mut both = [0; 8];
        windows.region().as_volatile_slice().read_slice(&mut both, 0xffc).unwrap();
        assert_eq!(both, [7, 0, 0, 0, 9, 0, 0, 0]);
    }

    /// A driver need not look at the generation for a field that it reads at once.
    #[test]
    fn a_word_of_the_configuration_space_changes_at_once() {
        let window = Windows::new(1).unwrap().window(0).unwrap();
        let other = window.clone();
        let writer = std::thread::spawn(move || {
            // Aligned for nothing.
            let bytes = [[0u8; 9], [0xff; 9]];
            (0..1_000_000).for_each(|turn| other.put_configuration(0, &bytes[turn % 2][1..]));
        });
        while !writer.is_finished() {
            let word = window.register(CONFIGURATION_SPACE).load(Ordering::SeqCst);
            assert!([0, u32::MAX].contains(&word), "{word:#x}");
        }
    }

    #[test]
    fn a_read_ends_with_the_window() {
        let windows = Windows::new(2).unwrap();
        let [first, second] = [0, 1].map(|index| windows.window(index).unwrap());
        first.put(0xffc, u32::MAX);
        second.put(0, u32::MAX);
        for (offset, expected) in [(0xffe, [0xff, 0xff, 0, 0]), (0x1000, [0; 4]), (0x1001, [0; 4]), (u64::MAX, [0; 4])]
        {
            let mut data = [1; 4];
            first.read(offset, &mut data);
            assert_eq!(data, expected, "{offset:#x}");
            // There is nothing behind the last one.
            second.read(offset.max(WINDOW), &mut data);
            assert_eq!(data, [0; 4]);
        }
    }
}
