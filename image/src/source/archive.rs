//! Archives of `docker save`: docker's own format (`manifest.json`) or an OCI layout in a tar file.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use serde::Deserialize;

use super::files::{Archive, Files, open_regular};
use super::{Apply, LayerRef, Resolved, Source, layout};
use crate::config::ParsedConfig;
use crate::digest::Digest;
use crate::error::{Error, IoContext};
use crate::progress::Progress;
use crate::reference::Reference;
use crate::store::{Paths, PullOptions};

/// The file that lists the images of an archive.
const MANIFEST: &str = "manifest.json";

/// One image of `manifest.json` (Docker Image Specification v1.2, "Combined Image JSON + Filesystem Changeset").
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    config: PathBuf,
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Vec<PathBuf>,
}

struct DockerArchive {
    files: Files,
    layers: Vec<PathBuf>,
}

/// Finds an image in an archive.
///
/// # Errors
/// There is none of that name, or the archive is malformed.
pub(crate) fn resolve(
    path: &Path,
    name: Option<&str>,
    reference: &Reference,
    paths: &Paths,
    options: &PullOptions,
) -> Result<(Box<dyn Source>, Resolved), Error> {
    let (file, _) = open_regular(path).during("open", path)?;
    let file = uncompressed(file, path, paths, options)?;
    let files = Files::Archive(Archive::index(file, path)?);
    let Some(bytes) = files.read(Path::new(MANIFEST))? else {
        return layout::resolve(files, name, reference);
    };
    let what = || format!("{MANIFEST} of {}", path.display());
    let entries: Vec<Entry> = serde_json::from_slice(&bytes).map_err(|source| Error::Json { what: what(), source })?;
    let entry = select(entries, name, reference)?;
    let missing = |name: &Path| Error::Malformed { what: what(), reason: format!("`{}` is not there", name.display()) };
    let config_bytes = files.read(&entry.config)?.ok_or_else(|| missing(&entry.config))?;
    let id = Digest::of(&config_bytes);
    check_name(&entry.config, id)?;
    let config = ParsedConfig::parse(&config_bytes, entry.layers.len(), &format!("image configuration {id}"))?;
    let mut layers = Vec::new();
    for layer in &entry.layers {
        let (_, bytes) = files.open(layer)?.ok_or_else(|| missing(layer))?;
        layers.push(LayerRef { digest: named_digest(layer), bytes });
    }
    let resolved = Resolved { id, manifest_digest: id, config, layers };
    Ok((Box::new(DockerArchive { files, layers: entry.layers }), resolved))
}

/// The digest a file is named by: `blobs/sha256/HEX` (docker 25 and later) or `HEX.json`.
fn named_digest(path: &Path) -> Option<Digest> {
    let name = path.to_str()?;
    Digest::from_hex(name.strip_prefix("blobs/sha256/").or_else(|| name.strip_suffix(".json"))?)
}

fn check_name(path: &Path, actual: Digest) -> Result<(), Error> {
    match named_digest(path) {
        Some(expected) if expected != actual => {
            Err(Error::WrongDigest { what: "the image configuration".to_owned(), expected, actual })
        }
        _ => Ok(()),
    }
}

fn select(entries: Vec<Entry>, name: Option<&str>, reference: &Reference) -> Result<Entry, Error> {
    let tags: Vec<String> = entries.iter().flat_map(|entry| entry.repo_tags.iter().flatten()).cloned().collect();
    let count = entries.len();
    let mut fitting = entries.into_iter().filter(|entry| match name {
        Some(name) => entry.repo_tags.iter().flatten().any(|tag| same_image(tag, name)),
        None => count == 1,
    });
    fitting.next().ok_or_else(|| {
        let tags: Vec<_> = tags.iter().take(10).map(|tag| tag.escape_debug().to_string()).collect();
        let detail = format!("the archive has {count} images, with the names: {}", tags.join(", "));
        Error::NoSuchImage { reference: reference.to_string(), detail }
    })
}

/// Whether two names mean the same image once docker's defaults are filled in.
fn same_image(a: &str, b: &str) -> bool {
    a == b || matches!((a.parse::<Reference>(), b.parse::<Reference>()), (Ok(a), Ok(b)) if a == b)
}

/// The archive itself, or if it is compressed with gzip, an unpacked copy that goes with its last user.
fn uncompressed(mut file: File, path: &Path, paths: &Paths, options: &PullOptions) -> Result<File, Error> {
    let mut magic = [0; 2];
    let known = file.read(&mut magic).during("read", path)?;
    file.rewind().during("read", path)?;
    if known < 2 || magic != [0x1f, 0x8b] {
        return Ok(file);
    }
    let directory = paths.tmp();
    let flags = rustix::fs::OFlags::TMPFILE.bits() as i32;
    let copy = OpenOptions::new().read(true).write(true).custom_flags(flags).mode(0o600).open(&directory);
    let mut copy = copy.during("create a file in", &directory)?;
    let limit = options.limits.unpacked_bytes;
    let bytes = io::copy(&mut MultiGzDecoder::new(&file).take(limit.saturating_add(1)), &mut copy);
    let bytes = bytes.during("unpack", path)?;
    if bytes > limit {
        return Err(Error::TooLarge { what: format!("the unpacked archive {}", path.display()), bytes, limit });
    }
    copy.rewind().during("read", path)?;
    Ok(copy)
}

impl Source for DockerArchive {
    fn each_layer(&mut self, _: &dyn Progress, apply: &mut Apply<'_>) -> Result<(), Error> {
        for (index, name) in self.layers.iter().enumerate() {
            let opened = self.files.open(name)?;
            let (mut input, _) = opened.ok_or_else(|| Error::Malformed {
                what: self.files.path().display().to_string(),
                reason: format!("`{}` is not there", name.display()),
            })?;
            apply(index, &mut input)?;
        }
        Ok(())
    }
}
