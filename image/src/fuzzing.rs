//! What reads images, for `fuzz`: without a store around it, and without the digests, which no generated input would have.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::config::ParsedConfig;
use crate::erofs::{DataWriter, write_metadata};
use crate::flatten::check_size_and_digest;
use crate::layer::Flattener;
use crate::manifest::{Blob, Document, check_platform, choose};
use crate::source::{Resolved, Source, resolve};
use crate::store::Paths;
use crate::{Digest, Error, Limits, PullOptions, Reference, Silent};

/// What layers may ask for: less than anything else in the process may.
fn limits() -> Limits {
    let limits = Limits { unpacked_bytes: 64 << 20, ratio_floor_bytes: 4 << 20, ..Limits::default() };
    Limits { entries: 10_000, metadata_bytes: 8 << 20, ..limits }
}

/// Unpacks layers, the lowest first, and writes the image of what came of them into `file`.
pub fn layers(layers: &[&[u8]], file: File) {
    let mut flattener = Flattener::new(DataWriter::new(file), &limits());
    for layer in layers {
        if flattener.apply(*layer, layer.len() as u64).is_err() {
            return;
        }
    }
    if let Ok((tree, file, end)) = flattener.finish() {
        let _ = write_metadata(&file, end, &tree, [0; 16]);
    }
}

/// Reads a document as a manifest, an index, and an image configuration.
pub fn document(bytes: &[u8]) {
    match Document::parse(bytes, "it") {
        Ok(Document::Index(index)) => {
            if let Ok(entry) = choose(index.manifests(), "it") {
                let _ = Blob::from_descriptor(entry, "it");
            }
        }
        Ok(Document::Manifest(manifest)) => {
            for layer in &manifest.layers {
                let actual = Blob { digest: Digest::of(bytes), bytes: bytes.len() as u64 };
                let _ = check_size_and_digest("it", *layer, actual);
            }
        }
        Err(_) => {}
    }
    for layers in 0..3 {
        if let Ok(config) = ParsedConfig::parse(bytes, layers, "it") {
            let _ = check_platform(&config.platform, "it");
        }
    }
}

/// Finds the image of a local reference (a layout or an archive), and unpacks it into `file`. Compressed archives are
/// unpacked below `store`.
pub fn local(reference: &Reference, store: &Path, file: File) {
    let options = PullOptions { limits: limits(), ..PullOptions::default() };
    let Ok((mut source, resolved)) = resolve(reference, &options, &Paths::below(store)) else { return };
    let _ = unpack(source.as_mut(), &resolved, &options.limits, file);
}

fn unpack(source: &mut dyn Source, resolved: &Resolved, limits: &Limits, file: File) -> Result<(), Error> {
    let mut flattener = Flattener::new(DataWriter::new(file), limits);
    source.each_layer(&Silent, &mut |index, input| {
        // A fault ends the layer, and the next one is tried all the same: nothing of this is kept.
        let bytes = resolved.layers[index].bytes;
        let _ = flattener.apply(input.take(bytes.saturating_add(1)), bytes);
        Ok(())
    })
}
