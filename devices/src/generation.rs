//! The VM generation ID (Microsoft, "Virtual Machine Generation ID"; in a devicetree, the binding `microsoft,vmgenid` of Linux):
//! 16 random bytes that are others when the VM is no longer the one that it was, because it was copied or put back.
//!
//! No virtio device: the bytes stand in a window of their own, where the guest reads them, and an interrupt tells that they have
//! changed. Linux mixes them into its random numbers when it boots and at every change, so that no two copies draw the same.
//! Nothing of it is saved with a VM: one that is restored has new ones.

use std::io;
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::window::Window;

/// How many bytes it has.
pub const LENGTH: usize = 16;

/// The generation ID of a VM.
#[derive(Debug)]
pub struct GenerationId {
    /// What it is now, and how often it has changed. Whoever changes it has this.
    now: Mutex<([u8; LENGTH], u64)>,
    window: Window,
    changed: EventFd,
}

impl GenerationId {
    /// One that the guest reads in `window`, and for whose changes `changed` interrupts it.
    ///
    /// # Errors
    /// The host gives no random numbers.
    pub fn new(window: Window, changed: EventFd) -> io::Result<Self> {
        let id = random()?;
        window.put_words(0, &id);
        Ok(Self { now: Mutex::new((id, 0)), window, changed })
    }

    /// What it is now, in the order of its bytes, and how often it has changed since the VM was made.
    pub fn now(&self) -> ([u8; LENGTH], u64) {
        *self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the VM be another one from now on, and tells the guest.
    ///
    /// # Errors
    /// The host gives no random numbers, or cannot interrupt the guest, which then goes on as the one that it was.
    pub fn renew(&self) -> io::Result<()> {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let id = random()?;
        // Not all at once: who reads in between is interrupted, and reads again.
        self.window.put_words(0, &id);
        *now = (id, now.1 + 1);
        self.changed.write(1)
    }
}

fn random() -> io::Result<[u8; LENGTH]> {
    let mut id = [0; LENGTH];
    // So few bytes come all at once (getrandom(2)).
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;
    use crate::window::Windows;

    #[test]
    fn the_guest_reads_what_the_host_says_and_hears_of_each_change() {
        let windows = Windows::new(2).unwrap();
        let [window, neighbour] = [0, 1].map(|index| windows.window(index).unwrap());
        let changed = EventFd::new(EFD_NONBLOCK).unwrap();
        let generation = GenerationId::new(window.clone(), changed.try_clone().unwrap()).unwrap();
        let read = || {
            let mut id = [0; LENGTH];
            window.read(0, &mut id);
            id
        };
        let (first, changes) = generation.now();
        assert_eq!((read(), changes), (first, 0));
        assert!(first != [0; LENGTH] && changed.read().is_err());

        generation.renew().unwrap();
        let (second, changes) = generation.now();
        assert_eq!((read(), changes, changed.read().unwrap()), (second, 1, 1));
        assert_ne!(first, second);
        let mut rest = [1; 64];
        neighbour.read(0, &mut rest);
        assert_eq!(rest, [0; 64]);
    }
}
