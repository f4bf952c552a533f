//! Pulling: resolve, unpack under the image's lock, publish under the store's lock.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::locks::{self, PathLock};
use super::record::{Name, Record, image_key, publish_json, sync_parent};
use super::{Image, PullOptions, STORE_LOCK, Store};
use crate::digest::Digest;
use crate::error::{Error, IoContext};
use crate::flatten::flatten;
use crate::progress::{Progress, Step};
use crate::reference::Reference;
use crate::source::{self, Resolved, Source};

impl Store {
    /// Fetches the image a reference names and makes it ready to run. What the store already has of it is used; a
    /// pull that was interrupted goes on where it was.
    ///
    /// # Errors
    /// The image can't be had, is not what its digests say, has something that is refused, or the store can't be
    /// written. Nothing of it can be found then.
    pub fn pull(&self, source: &Reference, options: &PullOptions, progress: &dyn Progress) -> Result<Image, Error> {
        progress.step(Step::Resolving);
        // Taken first: if the source changes meanwhile, the name is out of date rather than wrong.
        let stamp = source::stamp(source)?;
        let (mut origin, resolved) = source::resolve(source, options, &self.paths)?;
        let name = Name::new(source, resolved.id, resolved.manifest_digest, stamp)?;
        let key = image_key(&resolved.config.diff_ids);
        loop {
            let lock = self.lock_image(key, progress)?;
            let rootfs = self.paths.rootfs(key);
            let (lease, made) = match locks::lease(&rootfs)? {
                Some(lease) => (lease, None),
                None => {
                    let (lease, bytes) = self.build(key, origin.as_mut(), &resolved, options, progress)?;
                    (lease, Some(bytes))
                }
            };
            if self.publish(key, &resolved, &name, made, progress)? {
                origin.discard();
                drop(lock);
                let (id, manifest_digest) = (resolved.id.to_string(), resolved.manifest_digest.to_string());
                return Ok(Image { id, manifest_digest, rootfs, config: resolved.config.config, lease });
            }
        }
    }

    fn lock_image(&self, key: Digest, progress: &dyn Progress) -> Result<PathLock, Error> {
        let path = self.paths.locks().join(key.hex());
        match PathLock::try_acquire(&path)? {
            Some(lock) => Ok(lock),
            None => {
                progress.step(Step::Waiting);
                PathLock::acquire(&path)
            }
        }
    }

    /// Makes the image file under its temporary name. The caller holds the image's lock.
    fn build(
        &self,
        key: Digest,
        origin: &mut dyn Source,
        resolved: &Resolved,
        options: &PullOptions,
        progress: &dyn Progress,
    ) -> Result<(File, u64), Error> {
        progress.step(Step::Unpacking);
        let path = self.paths.tmp().join(format!("{}.erofs", key.hex()));
        let temporary = Temporary::create(&path)?;
        let file = temporary.file.try_clone().during("open", &path)?;
        let result = flatten(origin, resolved, &options.limits, (file, &path), key.uuid(), progress);
        if let Err(error) = &result
            && !error.is_transient()
        {
            // The image itself is at fault: nothing of it is worth keeping for another try.
            origin.discard();
        }
        let bytes = result?;
        let lease = locks::lease(&path)?.ok_or_else(|| Error::Io {
            action: "open",
            path: path.clone(),
            source: io::ErrorKind::NotFound.into(),
        })?;
        temporary.keep();
        Ok((lease, bytes))
    }

    /// Gives the image file its name, and makes record and reference. With `made` the file is still under its
    /// temporary name. False if the file was removed meanwhile and must be made again.
    fn publish(
        &self,
        key: Digest,
        resolved: &Resolved,
        name: &Name,
        made: Option<u64>,
        progress: &dyn Progress,
    ) -> Result<bool, Error> {
        let _lock = self.lock()?;
        let rootfs = self.paths.rootfs(key);
        progress.step(Step::Publishing);
        if made.is_some() {
            let temporary = self.paths.tmp().join(format!("{}.erofs", key.hex()));
            std::fs::rename(&temporary, &rootfs).during("publish", &rootfs)?;
            sync_parent(&rootfs)?;
        } else if !rootfs.exists() {
            return Ok(false);
        }
        progress.step(Step::Recording);
        let path = self.paths.record(resolved.id);
        if Record::read(&path)?.is_none_or(|record| record.key != key) {
            let record = Record {
                key,
                created: resolved.config.created.clone(),
                bytes: made.map_or_else(|| file_bytes(&rootfs), Ok)?,
                config: resolved.config.config.clone(),
            };
            publish_json(&self.paths, &record, &path)?;
        }
        progress.step(Step::Tagging);
        publish_json(&self.paths, name, &self.paths.name(&name.name))?;
        Ok(true)
    }

    /// The store's lock, for a moment.
    pub(super) fn lock(&self) -> Result<PathLock, Error> {
        let mut lock = PathLock::acquire(&self.paths.locks().join(STORE_LOCK))?;
        lock.keep_file();
        Ok(lock)
    }
}

fn file_bytes(path: &Path) -> Result<u64, Error> {
    Ok(std::fs::metadata(path).during("examine", path)?.len())
}

/// A file that goes away unless it is kept.
struct Temporary<'a> {
    file: File,
    path: &'a Path,
    kept: bool,
}

impl<'a> Temporary<'a> {
    /// What a killed process left under the name goes first: the caller's lock says that it is dead.
    fn create(path: &'a Path) -> Result<Temporary<'a>, Error> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).during("remove", path),
            _ => {}
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
        Ok(Temporary { file: file.during("create", path)?, path, kept: false })
    }

    fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if !self.kept {
            // The error that got us here matters more; the next pull or prune tries again.
            let _ = std::fs::remove_file(self.path);
        }
    }
}
