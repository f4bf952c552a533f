//! The interrupt of a device (VIRTIO 1.2 §2.3, "Notifications"; §4.2.2, InterruptStatus): its line, and why it was raised.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::mmio::INTERRUPT_STATUS;
use crate::window::Window;

/// A pin of an interrupt controller that takes edges.
pub trait Line: fmt::Debug + Send + Sync {
    /// Raises it and lets it go. The guest may take the interrupt before this returns. Never called by two threads at a time,
    /// which an edge could get lost by.
    fn pulse(&self);
}

/// The interrupt line of a device and the reasons it was raised for.
#[derive(Debug, Clone)]
pub struct Interrupt {
    line: Arc<dyn Line>,
    /// Where the driver reads the reasons.
    window: Window,
}

impl Interrupt {
    /// The device used a buffer.
    pub const USED: u32 = 1;
    /// The device's configuration or status changed.
    pub const CONFIGURATION: u32 = 2;

    /// An interrupt that is not pending.
    pub(crate) fn new(line: Arc<dyn Line>, window: Window) -> Self {
        Self { line, window }
    }

    /// Raises the line for the given reasons. For who has the device to himself.
    pub(crate) fn raise(&self, reasons: u32) {
        self.window.register(INTERRUPT_STATUS).fetch_or(reasons.to_le(), Ordering::SeqCst);
        self.line.pulse();
    }

    /// The reasons not yet acknowledged.
    pub fn status(&self) -> u32 {
        u32::from_le(self.window.register(INTERRUPT_STATUS).load(Ordering::SeqCst))
    }

    /// The driver has seen these reasons.
    pub fn acknowledge(&self, reasons: u32) {
        self.window.register(INTERRUPT_STATUS).fetch_and(!reasons.to_le(), Ordering::SeqCst);
    }
}
