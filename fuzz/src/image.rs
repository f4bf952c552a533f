//! Images: layers, the documents that describe them, and the two kinds of local images, an OCI layout and an archive of
//! `docker save` (OCI Image Specification).

use std::fs;
use std::path::Path;

use ::image::{Digest, Reference, fuzzing};
use tempfile::TempDir;

use crate::input::Input;
use crate::scratch;

/// Layers, one after the other, plain or compressed: unpacked, and the image written.
pub fn layer(bytes: &[u8]) {
    let mut layers = vec![bytes];
    // A second layer sees what the first has made.
    if let Some(split) = bytes.windows(MARK.len()).position(|window| window == MARK) {
        layers = vec![&bytes[..split], &bytes[split + MARK.len()..]];
    }
    fuzzing::layers(&layers, scratch::file(0));
}

/// What is between two layers in an input.
pub const MARK: &[u8] = b"--next--";

/// A manifest, an index, or an image configuration.
pub fn document(bytes: &[u8]) {
    fuzzing::document(bytes);
}

thread_local! {
    static FOLDER: TempDir = scratch::folder();
}

/// An archive of `docker save`, compressed or not.
pub fn archive(bytes: &[u8]) {
    FOLDER.with(|folder| {
        let file = folder.path().join("archive.tar");
        let tmp = folder.path().join("tmp");
        let made = fs::create_dir_all(&tmp).and_then(|()| fs::write(&file, bytes));
        made.expect("a file in memory can be written");
        for name in [None, Some("web:1".to_owned())] {
            let reference = Reference::DockerArchive { file: file.clone(), name };
            fuzzing::local(&reference, folder.path(), scratch::file(0));
        }
    });
}

/// A layout in a directory, whose documents name each other: an index, and blobs. `@N` in a document stands for the digest
/// of the blob before it of that number, so that what it leads to is found.
pub fn layout(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    FOLDER.with(|folder| {
        let blobs = folder.path().join("blobs/sha256");
        _ = fs::remove_dir_all(&blobs);
        fs::create_dir_all(&blobs).expect("a folder in memory can be made");
        let mut digests: Vec<String> = Vec::new();
        for _ in 0..usize::from(input.u8() % 6) {
            let blob = named(input.chunk(), &digests);
            let digest = Digest::of(&blob);
            fs::write(blobs.join(digest.hex()), &blob).expect("a file in memory can be written");
            digests.push(digest.to_string());
        }
        write(folder.path(), &named(input.rest(), &digests));
        for tag in [None, Some("1".to_owned())] {
            let reference = Reference::OciLayout { dir: folder.path().to_owned(), tag };
            fuzzing::local(&reference, folder.path(), scratch::file(0));
        }
    });
}

fn write(folder: &Path, index: &[u8]) {
    fs::write(folder.join("index.json"), index).expect("a file in memory can be written");
}

/// A document with the digests that it asks for.
fn named(document: &[u8], digests: &[String]) -> Vec<u8> {
    let mut named = Vec::with_capacity(document.len());
    let mut bytes = document.iter().copied();
    while let Some(byte) = bytes.next() {
        if byte != b'@' {
            named.push(byte);
            continue;
        }
        let number = bytes.next().unwrap_or_default();
        if let Some(digest) = digests.get(usize::from(number.wrapping_sub(b'0'))) {
            named.extend_from_slice(digest.as_bytes());
        }
    }
    named
}
