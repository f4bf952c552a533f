//! A container's log while its VM lives: written as output comes, read by any number of clients, who may follow it.

use std::io;
use std::sync::{Mutex, PoisonError};

use bytes::{BufMut, Bytes, BytesMut};
use tokio::sync::watch;

use super::streams::header;
use crate::folder::Folder;
use crate::log::{Entry, LogReader, LogWriter, Selection};
use crate::model::StreamKind;

/// Bytes of entries that are sent at once.
const PIECE: usize = 32 << 10;

/// A log.
#[derive(Debug)]
pub struct Log {
    folder: Folder,
    writer: Mutex<LogWriter>,
    grown: watch::Sender<()>,
}

impl Log {
    /// Opens the log in a folder, at its end.
    ///
    /// # Errors
    /// What the system says.
    pub fn open(folder: &Folder) -> io::Result<Self> {
        let writer = Mutex::new(LogWriter::open(folder)?);
        Ok(Self { folder: folder.clone(), writer, grown: watch::Sender::new(()) })
    }

    /// Adds what a stream brought. A full disk costs the log its entry, not the container its life or its readers their
    /// output.
    pub fn write(&self, stream: StreamKind, bytes: &[u8]) {
        let _ = self.writer.lock().unwrap_or_else(PoisonError::into_inner).write(stream, bytes);
        self.grown.send_replace(());
    }

    /// Reads it from the first wanted entry on.
    ///
    /// # Errors
    /// What the system says.
    pub fn read(&self, selection: Selection, timestamps: bool) -> io::Result<Follower> {
        let grown = self.grown.subscribe();
        Ok(Follower { reader: LogReader::open(&self.folder, selection)?, timestamps, grown })
    }
}

/// A reader that can wait for more.
#[derive(Debug)]
pub struct Follower {
    reader: LogReader,
    timestamps: bool,
    grown: watch::Receiver<()>,
}

impl Follower {
    /// The next entries as frames of a multiplexed stream, or `None` when there are no further ones yet.
    ///
    /// # Errors
    /// What the system says.
    pub fn next(&mut self) -> io::Result<Option<Bytes>> {
        self.grown.mark_unchanged();
        let mut frames = BytesMut::new();
        while frames.len() < PIECE
            && let Some(entry) = self.reader.next()?
        {
            frame(&entry, self.timestamps, &mut frames);
        }
        Ok((!frames.is_empty()).then(|| frames.freeze()))
    }

    /// Waits until the log has grown since the last [`Follower::next`].
    pub async fn grown(&mut self) {
        // A log that is gone grows no more.
        if self.grown.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Adds an entry as a frame.
fn frame(entry: &Entry, timestamps: bool, to: &mut BytesMut) {
    let text = entry.shown(timestamps);
    to.put_slice(&header(entry.stream as u8, text.len()));
    to.put_slice(&text);
}
