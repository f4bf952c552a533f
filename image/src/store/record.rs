//! The store's small files: records of images, and names that lead to them.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Paths;
use crate::config::{ImageConfig, PLATFORM};
use crate::digest::Digest;
use crate::erofs::WRITER_VERSION;
use crate::error::{Error, IoContext};
use crate::reference::{Reference, RegistryReference};

/// Bytes of a record: a configuration is at most 4 MiB, and escapes make its strings at most six times longer.
const RECORD_BYTES_MAX: u64 = 32 << 20;

/// Hexadecimal digits that an image id must be given with, as docker shows it.
const ID_DIGITS_MIN: usize = 12;

/// What is known of an image. The same image always has the same record but for its size on paper.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    /// Names the image file.
    pub(super) key: Digest,
    /// RFC 3339, as the image says.
    pub(super) created: Option<String>,
    /// Bytes of the unpacked layers.
    pub(super) bytes: u64,
    pub(super) config: ImageConfig,
}

impl Record {
    /// # Errors
    /// It can't be read.
    pub(super) fn read(path: &Path) -> Result<Option<Record>, Error> {
        read_json(path)
    }
}

/// A name and the image it stands for.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Name {
    /// The full name; the file's own name is its digest.
    pub(super) name: String,
    /// For people: registry and repository, or the path of a layout or archive.
    pub(super) repository: String,
    /// For people: the tag, or what else chooses the image.
    pub(super) tag: Option<String>,
    pub(super) id: Digest,
    pub(super) manifest_digest: Digest,
    /// Changes when a local source does.
    pub(super) stamp: Option<String>,
}

impl Name {
    pub(super) fn new(
        reference: &Reference,
        id: Digest,
        manifest_digest: Digest,
        stamp: Option<String>,
    ) -> Result<Name, Error> {
        let name = Name::key(reference)?;
        let (repository, tag) = match reference {
            Reference::Registry(registry) => {
                let digest = registry.digest().map(|digest| digest.to_string());
                (registry.familiar_name(), registry.tag().map(str::to_owned).or(digest))
            }
            Reference::OciLayout { tag, .. } => (Name::key(&without_choice(reference))?, tag.clone()),
            Reference::DockerArchive { name, .. } => (Name::key(&without_choice(reference))?, name.clone()),
        };
        Ok(Name { name, repository, tag, id, manifest_digest, stamp })
    }

    /// The full name of a reference: paths are made absolute.
    ///
    /// # Errors
    /// The working directory is gone.
    pub(super) fn key(reference: &Reference) -> Result<String, Error> {
        let absolute = |path: &Path| std::path::absolute(path).during("find", path);
        Ok(match reference {
            Reference::Registry(_) => reference.to_string(),
            Reference::OciLayout { dir, tag } => {
                Reference::OciLayout { dir: absolute(dir)?, tag: tag.clone() }.to_string()
            }
            Reference::DockerArchive { file, name } => {
                Reference::DockerArchive { file: absolute(file)?, name: name.clone() }.to_string()
            }
        })
    }

    /// # Errors
    /// It can't be read.
    pub(super) fn read(path: &Path, key: &str) -> Result<Option<Name>, Error> {
        Ok(read_json::<Name>(path)?.filter(|name| name.name == key))
    }
}

/// A name by its file.
///
/// # Errors
/// It can't be read.
pub(super) fn read_name(path: &Path) -> Result<Option<Name>, Error> {
    read_json(path)
}

fn without_choice(reference: &Reference) -> Reference {
    match reference {
        Reference::OciLayout { dir, .. } => Reference::OciLayout { dir: dir.clone(), tag: None },
        Reference::DockerArchive { file, .. } => Reference::DockerArchive { file: file.clone(), name: None },
        registry @ Reference::Registry(_) => registry.clone(),
    }
}

/// The digits of a reference that can be the beginning of an image id: `0123456789ab` or `sha256:0123456789ab`.
pub(super) fn id_prefix(reference: &RegistryReference) -> Option<&str> {
    let repository = reference.repository().strip_prefix("library/")?;
    let digits = match (repository, reference.tag()) {
        ("sha256", Some(digits)) => digits,
        (digits, Some("latest")) => digits,
        _ => return None,
    };
    let hexadecimal = digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    (hexadecimal && (ID_DIGITS_MIN..=64).contains(&digits.len())).then_some(digits)
}

/// What an image file is named by: everything that decides its bytes.
pub(super) fn image_key(diff_ids: &[Digest]) -> Digest {
    let mut text = format!("cofferdam erofs {WRITER_VERSION}\n{PLATFORM}\n");
    for diff_id in diff_ids {
        text.push_str(&diff_id.to_string());
        text.push('\n');
    }
    Digest::of(text.as_bytes())
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).during("open", path),
    };
    let mut bytes = Vec::new();
    file.take(RECORD_BYTES_MAX).read_to_end(&mut bytes).during("read", path)?;
    let what = || format!("the store's file {}", path.display());
    serde_json::from_slice(&bytes).map(Some).map_err(|source| Error::Json { what: what(), source })
}

/// Puts a small file into the store: synced, then renamed. The caller holds the store's lock.
///
/// # Errors
/// Writing failed.
pub(super) fn publish_json(paths: &Paths, value: &impl Serialize, path: &Path) -> Result<(), Error> {
    // One name is enough: the store's lock is held. One that a killed process left is overwritten.
    let temporary = paths.tmp().join("record.json");
    let what = || format!("the store's file {}", path.display());
    let bytes = serde_json::to_vec(value).map_err(|source| Error::Json { what: what(), source })?;
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary);
    let mut file = file.during("create", &temporary)?;
    file.write_all(&bytes).and_then(|()| file.sync_all()).during("write", &temporary)?;
    std::fs::rename(&temporary, path).during("publish", path)?;
    sync_parent(path)
}

/// Makes a rename last.
///
/// # Errors
/// Syncing failed.
pub(super) fn sync_parent(path: &Path) -> Result<(), Error> {
    match path.parent() {
        Some(parent) => File::open(parent).and_then(|directory| directory.sync_all()).during("sync", parent),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_ids_are_recognised() {
        let prefix = |text: &str| match text.parse() {
            Ok(Reference::Registry(reference)) => id_prefix(&reference).map(str::to_owned),
            other => panic!("{other:?}"),
        };
        assert_eq!(prefix("0123456789ab").as_deref(), Some("0123456789ab"));
        assert_eq!(prefix("sha256:0123456789ab").as_deref(), Some("0123456789ab"));
        for text in ["0123456789a", "busybox", "0123456789ab:1", "ghcr.io/a/0123456789ab", "0123456789ag"] {
            assert_eq!(prefix(text), None, "{text}");
        }
    }
}
