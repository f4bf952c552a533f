//! Downloads of layers: several at a time, into files that survive an interruption, verified when complete.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use reqwest::StatusCode;
use sha2::{Digest as _, Sha256};

use super::Connection;
use crate::digest::Digest;
use crate::error::{Error, IoContext};
use crate::flatten::check_size_and_digest;
use crate::manifest::Blob;
use crate::progress::{Phase, Progress};
use crate::store::{PathLock, Paths};

/// Layers that are fetched at the same time, as docker does.
pub(super) const PARALLEL: usize = 3;
/// Times a broken connection is taken up again before the pull fails.
const RETRIES: u32 = 3;
/// Pause before the first retry; it doubles with each.
const RETRY_PAUSE: Duration = Duration::from_millis(300);
/// Bytes read at once of what an earlier pull left.
const BUFFER_BYTES: usize = 256 << 10;

/// All layers of an image on their way.
pub(super) struct Downloads<'a> {
    pub(super) connection: &'a Connection,
    pub(super) layers: &'a [Blob],
    pub(super) paths: &'a Paths,
    pub(super) progress: &'a dyn Progress,
}

/// A layer's number and its bytes, verified.
type Arrival = (usize, Result<File, Error>);

impl Downloads<'_> {
    /// Fetches the layers, the lowest first and `parallel` at a time, and sends each when it is complete. Ends at
    /// the first failure.
    pub(super) async fn run(&self, parallel: usize, sender: &Sender<Arrival>) {
        let mut running = stream::iter(self.layers.iter().enumerate())
            .map(|(index, blob)| async move { (index, self.layer(index, *blob).await) })
            .buffer_unordered(parallel);
        while let Some((index, result)) = running.next().await {
            let failed = result.is_err();
            // If nobody listens any more, the other side failed and says why.
            if sender.send((index, result)).is_err() || failed {
                return;
            }
        }
    }

    async fn layer(&self, index: usize, blob: Blob) -> Result<File, Error> {
        let path = self.paths.blobs().join(blob.digest.hex());
        let name = blob.digest.to_string();
        if let Some(file) = complete(&path, blob)? {
            return Ok(file);
        }
        self.progress.begin(index, Phase::Download, &name, blob.bytes);
        let lock = lock_partial(&partial_path(&path)).await?;
        // Another pull may have brought it while this one waited.
        if let Some(file) = complete(&path, blob)? {
            self.progress.done(index, Phase::Download);
            return Ok(file);
        }
        let mut partial = Partial { lock, path, blob, hash: Sha256::new(), bytes: 0 };
        let resumed = partial.resume()?;
        self.progress.advance(index, Phase::Download, resumed);
        let mut result = self.fill(index, &mut partial).await;
        if resumed > 0 && matches!(result, Err(Error::WrongDigest { .. } | Error::WrongSize { .. })) {
            // What the earlier pull left may be the culprit.
            partial.restart()?;
            result = self.fill(index, &mut partial).await;
        }
        let file = match result {
            Ok(()) => partial.publish()?,
            Err(error) => {
                if error.is_transient() && partial.bytes > 0 {
                    // Worth going on with next time.
                    partial.lock.keep_file();
                }
                return Err(error);
            }
        };
        self.progress.done(index, Phase::Download);
        Ok(file)
    }

    /// Fetches what is missing, over several connections if they break.
    async fn fill(&self, index: usize, partial: &mut Partial) -> Result<(), Error> {
        let what = format!("layer {}", partial.blob.digest);
        let mut retries = 0;
        while partial.bytes < partial.blob.bytes {
            let before = partial.bytes;
            let Err(error) = self.attempt(index, partial, &what).await else { continue };
            if !error.is_transient() || matches!(error, Error::Io { .. }) {
                return Err(error);
            }
            retries = if partial.bytes > before { 1 } else { retries + 1 };
            if retries > RETRIES {
                return Err(error);
            }
            self.progress.message(&format!("{error}; trying again at byte {}", partial.bytes));
            tokio::time::sleep(RETRY_PAUSE * 2u32.pow(retries - 1)).await;
        }
        partial.verify(&what)
    }

    /// One request. Ends with the answer; short of the whole layer only if the connection broke.
    async fn attempt(&self, index: usize, partial: &mut Partial, what: &str) -> Result<(), Error> {
        let wrong_size = |actual| Error::WrongSize { what: what.to_owned(), expected: partial.blob.bytes, actual };
        let connection = self.connection;
        let path = format!("blobs/{}", partial.blob.digest);
        let mut response = connection.get(&path, partial.bytes, what).await?;
        if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            return Err(wrong_size(partial.bytes));
        }
        connection.check_status(response.status(), what)?;
        let from = if response.status() == StatusCode::PARTIAL_CONTENT { partial.bytes } else { 0 };
        // An answer that announces another size can't be the layer, however often it is asked for.
        let announced = response.content_length().map(|length| from.saturating_add(length));
        if let Some(actual) = announced.filter(|announced| *announced != partial.blob.bytes) {
            return Err(wrong_size(actual));
        }
        if from == 0 {
            partial.restart()?;
        }
        let broken = |error: reqwest::Error| connection.transfer(what, error.without_url().into());
        while let Some(chunk) = response.chunk().await.map_err(broken)? {
            partial.append(&chunk)?;
            self.progress.advance(index, Phase::Download, chunk.len() as u64);
        }
        if partial.bytes < partial.blob.bytes {
            let early = io::Error::from(io::ErrorKind::UnexpectedEof);
            return Err(self.connection.transfer(what, early.into()));
        }
        Ok(())
    }
}

/// A layer that is coming in. Its file is locked, and goes away with this unless it is kept.
struct Partial {
    lock: PathLock,
    /// Where it goes when it is complete.
    path: PathBuf,
    blob: Blob,
    /// Of the `bytes` in the file.
    hash: Sha256,
    bytes: u64,
}

impl Partial {
    /// Takes up what an earlier pull left, and tells how many bytes that is.
    fn resume(&mut self) -> Result<u64, Error> {
        let mut file = &self.lock.file;
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let count = file.read(&mut buffer).during("read", &self.path)?;
            if count == 0 {
                return Ok(self.bytes);
            }
            self.hash.update(&buffer[..count]);
            self.bytes += count as u64;
            if self.bytes > self.blob.bytes {
                self.restart()?;
                return Ok(0);
            }
        }
    }

    fn restart(&mut self) -> Result<(), Error> {
        let mut file = &self.lock.file;
        file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0))).during("write", &self.path)?;
        self.hash = Sha256::new();
        self.bytes = 0;
        Ok(())
    }

    fn append(&mut self, chunk: &[u8]) -> Result<(), Error> {
        let total = self.bytes + chunk.len() as u64;
        if total > self.blob.bytes {
            let what = format!("layer {}", self.blob.digest);
            return Err(Error::WrongSize { what, expected: self.blob.bytes, actual: total });
        }
        (&self.lock.file).write_all(chunk).during("write", &self.path)?;
        self.hash.update(chunk);
        self.bytes = total;
        Ok(())
    }

    fn verify(&self, what: &str) -> Result<(), Error> {
        let actual = Blob { digest: Digest::from_hash(self.hash.clone()), bytes: self.bytes };
        check_size_and_digest(what, self.blob, actual)
    }

    /// Gives the complete layer its name; it is on stable storage then, so a later pull need not verify it again.
    fn publish(mut self) -> Result<File, Error> {
        let partial = partial_path(&self.path);
        self.lock.file.sync_data().during("sync", &partial)?;
        std::fs::rename(&partial, &self.path).during("publish", &self.path)?;
        self.lock.keep_file();
        File::open(&self.path).during("open", &self.path)
    }
}

fn partial_path(path: &Path) -> PathBuf {
    path.with_extension("partial")
}

/// A layer that an interrupted pull had already fetched whole.
fn complete(path: &Path, blob: Blob) -> Result<Option<File>, Error> {
    match File::open(path) {
        Ok(file) => {
            let bytes = file.metadata().during("examine", path)?.len();
            Ok((bytes == blob.bytes).then_some(file))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).during("open", path),
    }
}

/// Locks a layer's partial file; while another pull has it, this one waits on a thread of its own.
async fn lock_partial(path: &Path) -> Result<PathLock, Error> {
    if let Some(lock) = PathLock::try_acquire(path)? {
        return Ok(lock);
    }
    let owned = path.to_owned();
    match tokio::task::spawn_blocking(move || PathLock::acquire(&owned)).await {
        Ok(lock) => lock,
        Err(error) => Err(Error::Runtime(error.into())),
    }
}

/// Removes a layer that is no longer needed. One that is still coming in belongs to its own pull.
pub(super) fn discard(paths: &Paths, digest: Digest) {
    // Failing to is no failure of the pull; prune will try again.
    let _ = std::fs::remove_file(paths.blobs().join(digest.hex()));
}
