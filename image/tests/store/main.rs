//! The store end to end: images built here, pulled from layouts, archives and a real registry (Debian's
//! `docker-registry` on loopback), compared with what tar(1) makes of the same layers.

mod contents;
mod hostile;
mod hostile_registry;
mod images;
mod interrupted;
mod model;
mod registry;
mod snapshot;
mod upkeep;

use std::path::{Path, PathBuf};

use image::{Image, PullOptions, Reference, Silent, Store};

/// A store in a directory of its own.
pub(crate) struct Fixture {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) store: Store,
}

impl Fixture {
    pub(crate) fn new() -> Fixture {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("store")).unwrap();
        Fixture { directory, store }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn pull(&self, reference: &str) -> Result<Image, image::Error> {
        self.store.pull(&reference.parse::<Reference>()?, &PullOptions::default(), &Silent)
    }

    /// Pulls an image through an OCI layout.
    pub(crate) fn pull_image(&self, image: &images::TestImage) -> Result<Image, image::Error> {
        let directory = self.path(&image.manifest.hex());
        image.write_layout(&directory, "latest");
        self.pull(&format!("oci:{}", directory.display()))
    }

    /// Files in the store that are no images, records or names: an idle store has none.
    pub(crate) fn leftovers(&self) -> Vec<PathBuf> {
        let root = self.path("store");
        let mut left: Vec<_> =
            ["tmp", "blobs/sha256", "locks"].iter().flat_map(|name| entries(&root.join(name))).collect();
        left.retain(|path| !path.ends_with("locks/store"));
        left
    }
}

pub(crate) fn entries(directory: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// An error with all its causes, as the command line shows it.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    assert!(!text.contains('\n'), "more than a line: {text}");
    text
}
