//! From layers to one image file: every layer is applied in order and verified, then the metadata is written.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::digest::Digest;
use crate::erofs::{DataWriter, write_metadata};
use crate::error::{Error, IoContext};
use crate::layer::{Flattener, LayerFault};
use crate::limits::Limits;
use crate::manifest::Blob;
use crate::progress::{Phase, Progress, Step};
use crate::source::{LayerRef, Resolved, Source};

/// Unpacks all layers of `source` into the empty file at `path`. It is complete and on stable storage then.
/// Tells how many bytes the layers unpacked to.
///
/// # Errors
/// A layer can't be had, is not what its digests say, or is refused; or the file can't be written.
pub(crate) fn flatten(
    source: &mut dyn Source,
    resolved: &Resolved,
    limits: &Limits,
    (file, path): (File, &Path),
    uuid: [u8; 16],
    progress: &dyn Progress,
) -> Result<u64, Error> {
    let mut flattener = Flattener::new(DataWriter::new(file), limits);
    let mut unpacked = 0;
    let mut apply = |index: usize, input: &mut (dyn Read + Send)| {
        let layer = &resolved.layers[index];
        let diff_id = resolved.config.diff_ids[index];
        progress.begin(index, Phase::Unpack, &layer.name(diff_id).to_string(), layer.bytes);
        // One byte more than announced, so that a longer layer is noticed.
        let input = Reported { input: input.take(layer.bytes.saturating_add(1)), index, progress };
        let measured = flattener.apply(input, layer.bytes).map_err(|fault| layer_error(layer, diff_id, fault, path))?;
        check_blob(layer, measured.blob)?;
        if measured.diff_id != diff_id {
            let what = format!("the unpacked layer {}", layer.name(diff_id));
            return Err(Error::WrongDigest { what, expected: diff_id, actual: measured.diff_id });
        }
        unpacked += measured.unpacked;
        progress.done(index, Phase::Unpack);
        Ok(())
    };
    source.each_layer(progress, &mut apply)?;
    progress.step(Step::Sealing);
    let (tree, file, data_end) = flattener.finish().during("write", path)?;
    write_metadata(&file, data_end, &tree, uuid).during("write", path)?;
    file.sync_all().during("sync", path)?;
    Ok(unpacked)
}

/// Checks the compressed form of a layer that has a digest of its own.
fn check_blob(layer: &LayerRef, (actual, bytes): (Digest, u64)) -> Result<(), Error> {
    let Some(digest) = layer.digest else { return Ok(()) };
    check_size_and_digest(
        &format!("layer {digest}"),
        Blob { digest, bytes: layer.bytes },
        Blob { digest: actual, bytes },
    )
}

/// Compares content with its descriptor.
///
/// # Errors
/// They differ.
pub(crate) fn check_size_and_digest(what: &str, expected: Blob, actual: Blob) -> Result<(), Error> {
    if actual.bytes != expected.bytes {
        return Err(Error::WrongSize { what: what.to_owned(), expected: expected.bytes, actual: actual.bytes });
    }
    if actual.digest != expected.digest {
        let (expected, actual) = (expected.digest, actual.digest);
        return Err(Error::WrongDigest { what: what.to_owned(), expected, actual });
    }
    Ok(())
}

/// Wrong bytes are the better explanation of anything else that seems wrong with a layer.
fn layer_error(layer: &LayerRef, diff_id: Digest, fault: LayerFault, path: &Path) -> Error {
    if let crate::Problem::Write(source) = fault.problem {
        return Error::Io { action: "write", path: path.to_owned(), source };
    }
    if let Some(Err(error)) = fault.blob.map(|blob| check_blob(layer, blob)) {
        return error;
    }
    /// Characters of a path worth showing: an error is one line.
    const SHOWN: usize = 200;
    let mut shown: String = fault.path.escape_ascii().to_string();
    if shown.len() > SHOWN {
        shown.truncate(SHOWN);
        shown.push_str("...");
    }
    Error::Layer { layer: layer.name(diff_id), path: shown, source: fault.problem }
}

/// Tells the progress what was read.
struct Reported<'a, R> {
    input: R,
    index: usize,
    progress: &'a dyn Progress,
}

impl<R: Read> Read for Reported<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        if count > 0 {
            self.progress.advance(self.index, Phase::Unpack, count as u64);
        }
        Ok(count)
    }
}
