//! What a pull tells while it runs. The store never prints: whoever called draws it.

/// What is done with a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Its compressed bytes come from the registry.
    Download,
    /// Its compressed bytes are unpacked into the image file.
    Unpack,
}

/// Where a pull as a whole is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Reads manifest and configuration.
    Resolving,
    /// Another pull of the same image is at work; its result will be used.
    Waiting,
    /// Layers come in and are unpacked.
    Unpacking,
    /// All layers are in; directories and inodes are written and everything goes to stable storage.
    Sealing,
    /// The image file is complete and gets its name in the store.
    Publishing,
    /// The image file is in the store, its record not yet.
    Recording,
    /// The record is in the store, the image's name does not lead to it yet.
    Tagging,
}

/// Receives progress, from more than one thread. Layers are numbered from 0, the lowest.
pub trait Progress: Sync {
    /// A pull reached a step.
    fn step(&self, step: Step) {
        let _ = step;
    }

    /// A phase of a layer begins; `name` is its digest and `total_bytes` its compressed size.
    fn begin(&self, layer: usize, phase: Phase, name: &str, total_bytes: u64) {
        let _ = (layer, phase, name, total_bytes);
    }

    /// So many compressed bytes more are done. When a download must start over, the sum passes the total.
    fn advance(&self, layer: usize, phase: Phase, bytes: u64) {
        let _ = (layer, phase, bytes);
    }

    /// A phase of a layer ended well.
    fn done(&self, layer: usize, phase: Phase) {
        let _ = (layer, phase);
    }

    /// Something worth a line, such as a connection that is tried again.
    fn message(&self, text: &str) {
        let _ = text;
    }
}

/// Tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {}
