//! The store: one directory that any number of processes use at the same time.
//!
//! ```text
//! images/KEY.erofs   a flattened image; KEY is the digest of writer version, platform and diff_ids, so images
//!                    with the same layers share it
//! images/ID.json     the record of an image: its configuration and its KEY
//! refs/HASH.json     a name and the image it stands for; HASH is the digest of the name
//! blobs/sha256/HEX   layers of unfinished pulls, complete; HEX.partial is still coming in
//! tmp/               what will be renamed into the folders above
//! locks/             see below
//! ```
//!
//! Files appear by rename after they were synced, so what has its final name is complete, and nothing else is
//! ever used. Locks are flock(2) locks, which the kernel drops with their holder:
//! - `locks/KEY` while an image file is made: a second pull of it waits, then finds the file.
//! - `locks/store` while names, records or image files appear or go.
//! - a shared lock on the image file itself is the lease of those who use it; removal needs an exclusive one.

mod collect;
mod locks;
mod pull;
mod record;

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

pub use collect::{Pruned, Removed, Summary};

use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::error::{Error, IoContext};
use crate::limits::Limits;
use crate::reference::Reference;
use crate::source::RegistryOptions;
pub(crate) use locks::PathLock;
use record::{Name, Record};

/// The lock that stays: names, records and image files appear and go under it.
const STORE_LOCK: &str = "store";

/// A directory of images.
#[derive(Clone, Debug)]
pub struct Store {
    paths: Paths,
}

/// An image that is ready to run.
#[derive(Debug)]
pub struct Image {
    /// Digest of the image configuration, `sha256:` and 64 hexadecimal digits.
    pub id: String,
    /// Digest of the manifest it was pulled by. Archives of docker's own format have none: there it is the id.
    pub manifest_digest: String,
    /// The root filesystem: a read-only EROFS file, shared by all who run the image.
    pub rootfs: PathBuf,
    /// How the image wants to be run.
    pub config: ImageConfig,
    /// [`Image::rootfs`], open for reading and locked (shared). The image is not removed while any process has this
    /// file description open, so hand it to the process that uses the image. It is closed on exec unless that is
    /// changed; opening the path again makes no lease.
    pub lease: File,
}

/// How to pull.
#[derive(Clone, Debug, Default)]
pub struct PullOptions {
    /// How much the image may ask for.
    pub limits: Limits,
    /// How to talk to registries.
    pub registry: RegistryOptions,
}

/// Where things are in a store.
#[derive(Clone, Debug)]
pub(crate) struct Paths {
    root: PathBuf,
}

impl Paths {
    /// The places below a folder.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn below(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    fn refs(&self) -> PathBuf {
        self.root.join("refs")
    }

    pub(crate) fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }

    fn locks(&self) -> PathBuf {
        self.root.join("locks")
    }

    fn rootfs(&self, key: Digest) -> PathBuf {
        self.images().join(format!("{}.erofs", key.hex()))
    }

    fn record(&self, id: Digest) -> PathBuf {
        self.images().join(format!("{}.json", id.hex()))
    }

    fn name(&self, name: &str) -> PathBuf {
        self.refs().join(format!("{}.json", Digest::of(name.as_bytes()).hex()))
    }
}

impl Store {
    /// Opens the store in `root`, and makes it (only its owner may enter) if it is not there.
    ///
    /// # Errors
    /// The directory can't be made or entered.
    pub fn open(root: &Path) -> Result<Store, Error> {
        let root = std::path::absolute(root).during("find", root)?;
        let store = Store { paths: Paths { root } };
        // The last one made: if it is there, all are.
        if !store.paths.locks().is_dir() {
            store.create()?;
        }
        Ok(store)
    }

    fn create(&self) -> Result<(), Error> {
        let root = &self.paths.root;
        if let Some(parent) = root.parent() {
            std::fs::create_dir_all(parent).during("create", parent)?;
        }
        let blobs = root.join("blobs");
        for path in [root, &blobs, &self.paths.blobs(), &self.paths.images(), &self.paths.refs(), &self.paths.tmp()] {
            create_private(path)?;
        }
        create_private(&self.paths.locks())
    }

    /// Where the store is unless the user says otherwise: `COFFERDAM_DATA`, else `/var/lib/cofferdam` for root and
    /// `$XDG_DATA_HOME/cofferdam` or `~/.local/share/cofferdam` for others.
    #[must_use]
    pub fn default_root() -> PathBuf {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(path) = variable("COFFERDAM_DATA") {
            return path;
        }
        if rustix::process::geteuid().is_root() {
            return "/var/lib/cofferdam".into();
        }
        // XDG Base Directory Specification: relative paths are ignored.
        match variable("XDG_DATA_HOME").filter(|path| path.is_absolute()) {
            Some(path) => path.join("cofferdam"),
            None => variable("HOME").unwrap_or_else(|| "/".into()).join(".local/share/cofferdam"),
        }
    }

    /// The image of that name if it is in the store. Only looks at this machine and only reads two small files:
    /// this is on the start path of every container. A name can also be an image id or the beginning of one, 12
    /// digits at least. A layout or archive that changed since it was pulled is not found.
    ///
    /// # Errors
    /// The store or the local source can't be read.
    pub fn find(&self, reference: &Reference) -> Result<Option<Image>, Error> {
        let key = Name::key(reference)?;
        if let Some(name) = Name::read(&self.paths.name(&key), &key)? {
            if name.stamp.is_some() && name.stamp != crate::source::stamp(reference)? {
                return Ok(None);
            }
            return self.image(name.id, name.manifest_digest);
        }
        match reference {
            Reference::Registry(reference) => match record::id_prefix(reference) {
                Some(prefix) => match self.ids_with_prefix(prefix)?.as_slice() {
                    [id] => self.image(*id, *id),
                    _ => Ok(None),
                },
                None => Ok(None),
            },
            _ => Ok(None),
        }
    }

    /// The image of an id with a lease on it.
    fn image(&self, id: Digest, manifest_digest: Digest) -> Result<Option<Image>, Error> {
        let Some(record) = Record::read(&self.paths.record(id))? else { return Ok(None) };
        let rootfs = self.paths.rootfs(record.key);
        let Some(lease) = locks::lease(&rootfs)? else { return Ok(None) };
        let (id, manifest_digest) = (id.to_string(), manifest_digest.to_string());
        Ok(Some(Image { id, manifest_digest, rootfs, config: record.config, lease }))
    }

    /// Ids of the images in the store that begin with some hexadecimal digits.
    fn ids_with_prefix(&self, prefix: &str) -> Result<Vec<Digest>, Error> {
        let mut ids = Vec::new();
        for name in file_names(&self.paths.images())? {
            let id = name.strip_suffix(".json").and_then(Digest::from_hex);
            ids.extend(id.filter(|_| name.starts_with(prefix)));
        }
        Ok(ids)
    }
}

/// Makes a directory that only its owner may enter; one that is there already stays as it is.
fn create_private(path: &Path) -> Result<(), Error> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        result => result.during("create", path),
    }
}

/// Names of the files in a directory, sorted. Names that are not UTF-8 are none of ours.
fn file_names(directory: &Path) -> Result<Vec<String>, Error> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).during("read", directory)? {
        let entry = entry.during("read", directory)?;
        names.extend(entry.file_name().into_string().ok());
    }
    names.sort();
    Ok(names)
}
