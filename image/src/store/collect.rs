//! Listing, removing and pruning. Whatever is leased stays.

use std::collections::HashSet;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::locks::{self, PathLock};
use super::record::{Name, Record, id_prefix};
use super::{STORE_LOCK, Store, file_names};
use crate::digest::Digest;
use crate::error::{Error, IoContext};
use crate::reference::Reference;

/// One line of the list of images: a name and the image it stands for, or an image without name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Registry and repository as people write them, or `oci:` or `docker-archive:` and the path.
    pub repository: Option<String>,
    /// The tag, or the digest that was pulled, or what else chose the image.
    pub tag: Option<String>,
    /// Digest of the image configuration.
    pub id: String,
    /// When the image says it was made (RFC 3339).
    pub created: Option<String>,
    /// Bytes of the unpacked layers.
    pub size_bytes: u64,
}

/// What a removal did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Names that are gone.
    pub untagged: Vec<String>,
    /// The image's id, if the image is gone too.
    pub deleted: Option<String>,
}

/// What pruning did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Ids of images that are gone.
    pub images: Vec<String>,
    /// Bytes given back to the filesystem.
    pub freed_bytes: u64,
}

impl Store {
    /// All images, each once per name, sorted by name.
    ///
    /// # Errors
    /// The store can't be read.
    pub fn list(&self) -> Result<Vec<Summary>, Error> {
        let names = self.names()?;
        let mut list = Vec::new();
        for id in self.ids_with_prefix("")? {
            let Some(record) = Record::read(&self.paths.record(id))? else { continue };
            let summary = |repository, tag| Summary {
                repository,
                tag,
                id: id.to_string(),
                created: record.created.clone(),
                size_bytes: record.bytes,
            };
            let own = names.iter().filter(|name| name.id == id);
            let before = list.len();
            list.extend(own.map(|name| summary(Some(name.repository.clone()), name.tag.clone())));
            if list.len() == before {
                list.push(summary(None, None));
            }
        }
        list.sort_by(|a, b| (&a.repository, &a.tag, &a.id).cmp(&(&b.repository, &b.tag, &b.id)));
        Ok(list)
    }

    /// Removes a name, and with its last name the image. An id (12 digits or more) stands for the image and its
    /// name; with more than one name it needs `force`. An image that a container uses is refused; with `force` it
    /// only loses its name, and [`Store::prune`] removes it later.
    ///
    /// # Errors
    /// There is no such image, it is in use, or the store can't be written.
    pub fn remove(&self, reference_or_id: &str, force: bool) -> Result<Removed, Error> {
        let reference: Reference = reference_or_id.parse()?;
        let key = Name::key(&reference)?;
        let _lock = self.lock()?;
        let names = self.names()?;
        let (id, doomed): (Digest, Vec<&Name>) = match names.iter().find(|name| name.name == key) {
            Some(name) => (name.id, vec![name]),
            None => {
                let id = self.id_of(&reference, reference_or_id)?;
                (id, names.iter().filter(|name| name.id == id).collect())
            }
        };
        if doomed.len() > 1 && !force {
            let what = format!("an image with {} names", doomed.len());
            return Err(Error::Ambiguous { name: reference_or_id.to_owned(), what });
        }
        let last = names.iter().filter(|name| name.id == id).count() == doomed.len();
        let unused = if last { self.lock_unused(id)? } else { None };
        if last && unused.is_none() && !force {
            return Err(Error::InUse { name: reference_or_id.to_owned() });
        }
        let mut removed = Removed::default();
        for name in doomed {
            remove_file(&self.paths.name(&name.name))?;
            removed.untagged.push(name.name.clone());
        }
        if last && unused.is_some() {
            self.delete(id)?;
            removed.deleted = Some(id.to_string());
        }
        Ok(removed)
    }

    /// Removes images without name, and what interrupted pulls left, except what is in use at this moment.
    ///
    /// # Errors
    /// The store can't be read or written.
    pub fn prune(&self) -> Result<Pruned, Error> {
        let _lock = self.lock()?;
        let mut pruned = Pruned::default();
        let named: HashSet<Digest> = self.names()?.iter().map(|name| name.id).collect();
        for id in self.ids_with_prefix("")?.into_iter().filter(|id| !named.contains(id)) {
            if let Some(_unused) = self.lock_unused(id)? {
                pruned.freed_bytes += self.delete(id)?;
                pruned.images.push(id.to_string());
            }
        }
        // Image files whose record never came, or went without them.
        let keys = self.keys()?;
        for name in file_names(&self.paths.images())? {
            let path = self.paths.images().join(&name);
            let key = name.strip_suffix(".erofs").and_then(Digest::from_hex);
            if key.is_some_and(|key| !keys.contains(&key)) && locks::unused(&path)?.is_some() {
                pruned.freed_bytes += remove_file(&path)?;
            }
        }
        pruned.freed_bytes += self.prune_unfinished()?;
        Ok(pruned)
    }

    /// Removes temporary files, locks and layers that no running pull is working on.
    fn prune_unfinished(&self) -> Result<u64, Error> {
        let mut freed = 0;
        for name in file_names(&self.paths.locks())?.iter().filter(|name| *name != STORE_LOCK) {
            // A lock that can be had is nobody's, and goes with its file.
            drop(PathLock::try_acquire(&self.paths.locks().join(name))?);
        }
        for name in file_names(&self.paths.tmp())? {
            let path = self.paths.tmp().join(&name);
            // An unfinished image belongs to who has its lock; records are only written under the store's lock.
            let lock = match name.strip_suffix(".erofs") {
                Some(key) => PathLock::try_acquire(&self.paths.locks().join(key))?.map(Some),
                None => Some(None),
            };
            if lock.is_some() {
                freed += remove_file(&path)?;
            }
        }
        for name in file_names(&self.paths.blobs())? {
            let path = self.paths.blobs().join(&name);
            if name.ends_with(".partial") {
                if let Some(lock) = PathLock::try_acquire(&path)? {
                    freed += lock.file.metadata().during("examine", &path)?.blocks() * 512;
                }
            } else {
                // A pull that needs it has it open.
                freed += remove_file(&path)?;
            }
        }
        Ok(freed)
    }

    fn names(&self) -> Result<Vec<Name>, Error> {
        let mut names = Vec::new();
        for file in file_names(&self.paths.refs())? {
            let path = self.paths.refs().join(&file);
            names.extend(super::record::read_name(&path)?);
        }
        names.sort_by(|a: &Name, b| a.name.cmp(&b.name));
        Ok(names)
    }

    /// Keys of the image files that records need.
    fn keys(&self) -> Result<HashSet<Digest>, Error> {
        let mut keys = HashSet::new();
        for id in self.ids_with_prefix("")? {
            keys.extend(Record::read(&self.paths.record(id))?.map(|record| record.key));
        }
        Ok(keys)
    }

    fn id_of(&self, reference: &Reference, text: &str) -> Result<Digest, Error> {
        let prefix = match reference {
            Reference::Registry(reference) => id_prefix(reference),
            _ => None,
        };
        let ids = prefix.map_or(Ok(Vec::new()), |prefix| self.ids_with_prefix(prefix))?;
        match ids.as_slice() {
            [id] => Ok(*id),
            [] => Err(Error::NoSuchImage { reference: text.to_owned(), detail: "it is not in the store".to_owned() }),
            _ => Err(Error::Ambiguous { name: text.to_owned(), what: format!("{} images", ids.len()) }),
        }
    }

    /// Locks an image's file if nobody uses it; the lock goes with the file handed back. An image whose file is
    /// missing is unused, and a handle on its record stands in.
    fn lock_unused(&self, id: Digest) -> Result<Option<std::fs::File>, Error> {
        let path = self.paths.record(id);
        let Some(record) = Record::read(&path)? else { return Ok(None) };
        let rootfs = self.paths.rootfs(record.key);
        locks::unused(if rootfs.exists() { &rootfs } else { &path })
    }

    /// Removes an image's record, and its file if no other image has the same. The caller holds both locks.
    fn delete(&self, id: Digest) -> Result<u64, Error> {
        let path = self.paths.record(id);
        let record = Record::read(&path)?;
        let mut freed = remove_file(&path)?;
        if let Some(record) = record
            && !self.keys()?.contains(&record.key)
        {
            freed += remove_file(&self.paths.rootfs(record.key))?;
        }
        Ok(freed)
    }
}

/// Removes a file if it is there, and tells how many bytes it took.
fn remove_file(path: &Path) -> Result<u64, Error> {
    let bytes = std::fs::symlink_metadata(path).map_or(0, |metadata| metadata.blocks() * 512);
    match std::fs::remove_file(path) {
        Ok(()) => Ok(bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error).during("remove", path),
    }
}
