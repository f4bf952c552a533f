//! Decompression on a thread of its own, some chunks ahead of the tree: the two take about the same time.

use std::io::{self, Read};
use std::sync::mpsc::{Receiver, SyncSender};

/// Bytes handed over at once.
const CHUNK_BYTES: usize = 64 << 10;
/// Chunks that may wait to be read: enough to even out small files, little enough to stay in the cache.
pub(super) const CHUNKS_AHEAD: usize = 16;

/// What the decompressing thread sends.
pub(super) type Chunk = io::Result<Vec<u8>>;

/// Reads to the end, to an error, or until nobody listens any more; sends what it read, an empty chunk at the end.
pub(super) fn pump(input: &mut impl Read, sender: &SyncSender<Chunk>) {
    loop {
        let mut chunk = vec![0; CHUNK_BYTES];
        let result = input.read(&mut chunk).map(|count| {
            chunk.truncate(count);
            chunk
        });
        let ended = !matches!(&result, Ok(chunk) if !chunk.is_empty());
        if sender.send(result).is_err() || ended {
            return;
        }
    }
}

/// The other end: a reader of the chunks.
#[derive(Debug)]
pub(super) struct Ahead {
    receiver: Receiver<Chunk>,
    chunk: Vec<u8>,
    used: usize,
}

impl Ahead {
    pub(super) fn new(receiver: Receiver<Chunk>) -> Ahead {
        Ahead { receiver, chunk: Vec::new(), used: 0 }
    }
}

impl Read for Ahead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.used == self.chunk.len() {
            // The sender goes once it sent the end, and no sooner.
            self.chunk = self.receiver.recv().unwrap_or_else(|_| Ok(Vec::new()))?;
            self.used = 0;
        }
        let count = buffer.len().min(self.chunk.len() - self.used);
        buffer[..count].copy_from_slice(&self.chunk[self.used..self.used + count]);
        self.used += count;
        Ok(count)
    }
}
