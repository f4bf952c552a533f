//! OCI image layouts (OCI Image Specification, "Image Layout"), in a directory or an archive.

use std::path::{Path, PathBuf};

use oci_spec::image::{Descriptor, ImageIndex};

use super::files::Files;
use super::{Apply, LayerRef, Resolved, Source};
use crate::config::ParsedConfig;
use crate::digest::Digest;
use crate::error::Error;
use crate::flatten::check_size_and_digest;
use crate::manifest::{Blob, Document, INDEX_DEPTH_MAX, Manifest, choose};
use crate::progress::Progress;
use crate::reference::Reference;

/// The file that lists what is in a layout.
pub(crate) const INDEX: &str = "index.json";
/// Annotation with the tag of an entry.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Annotation with the whole name of an entry, by docker and containerd.
const CONTAINERD_NAME: &str = "io.containerd.image.name";

struct Layout {
    files: Files,
    layers: Vec<Blob>,
}

/// Finds an image in a layout.
///
/// # Errors
/// There is none of that tag or for this platform, or the layout is malformed.
pub(crate) fn resolve(
    files: Files,
    tag: Option<&str>,
    reference: &Reference,
) -> Result<(Box<dyn Source>, Resolved), Error> {
    let name = reference.to_string();
    let no_image = |detail: String| Error::NoSuchImage { reference: name.clone(), detail };
    let bytes = files.read(Path::new(INDEX))?.ok_or_else(|| no_image(format!("there is no {INDEX} in it")))?;
    let index = match Document::parse(&bytes, INDEX)? {
        Document::Index(index) => index,
        Document::Manifest(_) => {
            return Err(Error::Malformed {
                what: INDEX.to_owned(),
                reason: "it is a manifest, not an index".to_owned(),
            });
        }
    };
    let mut descriptor = select(&index, tag, &name)?.clone();
    for _ in 0..INDEX_DEPTH_MAX {
        let blob = Blob::from_descriptor(&descriptor, INDEX)?;
        let what = format!("manifest {}", blob.digest);
        let bytes = read_blob(&files, blob, &what)?;
        match Document::parse(&bytes, &what)? {
            Document::Index(index) => descriptor = choose(index.manifests(), &name)?.clone(),
            Document::Manifest(manifest) => return finish(files, &manifest, blob.digest),
        }
    }
    Err(Error::Malformed { what: INDEX.to_owned(), reason: "indexes are nested too deeply".to_owned() })
}

fn finish(files: Files, manifest: &Manifest, manifest_digest: Digest) -> Result<(Box<dyn Source>, Resolved), Error> {
    let what = format!("image configuration {}", manifest.config.digest);
    let bytes = read_blob(&files, manifest.config, &what)?;
    let config = ParsedConfig::parse(&bytes, manifest.layers.len(), &what)?;
    let layers = manifest.layers.iter().map(|blob| LayerRef { digest: Some(blob.digest), bytes: blob.bytes });
    let resolved = Resolved { id: manifest.config.digest, manifest_digest, config, layers: layers.collect() };
    Ok((Box::new(Layout { files, layers: manifest.layers.clone() }), resolved))
}

fn annotation<'a>(entry: &'a Descriptor, key: &str) -> Option<&'a String> {
    entry.annotations().as_ref()?.get(key)
}

/// The entry of the top index that a tag means.
fn select<'a>(index: &'a ImageIndex, tag: Option<&str>, name: &str) -> Result<&'a Descriptor, Error> {
    let entries = index.manifests();
    let tagged = |tag: &str| -> Vec<&'a Descriptor> {
        let named = |entry: &Descriptor, key| annotation(entry, key).is_some_and(|name| name == tag);
        entries.iter().filter(|entry| named(entry, REF_NAME) || named(entry, CONTAINERD_NAME)).collect()
    };
    let candidates = match tag {
        Some(tag) => tagged(tag),
        // Without a tag: what is called latest, else everything if it is one image for several platforms.
        None => match tagged("latest") {
            latest if !latest.is_empty() => latest,
            _ => entries.iter().collect(),
        },
    };
    let names: Vec<_> = entries.iter().filter_map(|entry| annotation(entry, REF_NAME)).map(String::as_str).collect();
    let several_names = names.iter().any(|name| *name != names[0]);
    if candidates.is_empty() || (tag.is_none() && candidates.len() > 1 && several_names) {
        let mut listed =
            names.iter().take(10).map(|name| name.escape_debug().to_string()).collect::<Vec<_>>().join(", ");
        if listed.is_empty() {
            listed = "none with a name".to_owned();
        }
        return Err(Error::NoSuchImage { reference: name.to_owned(), detail: format!("the layout has: {listed}") });
    }
    choose(candidates, name)
}

/// A document by its digest, verified.
fn read_blob(files: &Files, blob: Blob, what: &str) -> Result<Vec<u8>, Error> {
    blob.check_document(what)?;
    let bytes = files.read(&blob_path(blob.digest))?.ok_or_else(|| missing(files, blob.digest))?;
    let actual = Blob { digest: Digest::of(&bytes), bytes: bytes.len() as u64 };
    check_size_and_digest(what, blob, actual)?;
    Ok(bytes)
}

fn blob_path(digest: Digest) -> PathBuf {
    Path::new("blobs/sha256").join(digest.hex())
}

fn missing(files: &Files, digest: Digest) -> Error {
    Error::Malformed { what: files.path().display().to_string(), reason: format!("it lacks the blob {digest}") }
}

impl Source for Layout {
    fn each_layer(&mut self, _: &dyn Progress, apply: &mut Apply<'_>) -> Result<(), Error> {
        for (index, blob) in self.layers.iter().enumerate() {
            let opened = self.files.open(&blob_path(blob.digest))?;
            let (mut input, _) = opened.ok_or_else(|| missing(&self.files, blob.digest))?;
            apply(index, &mut input)?;
        }
        Ok(())
    }
}
