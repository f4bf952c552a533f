//! `cargo xtask images`: the images that the end-to-end tests run, and what those tests need to know of this build.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tests::images::{REPOSITORIES, TAG};
use tests::registry::Registry;
use tests::{FOLDER_VARIABLE, REFERENCES, STORAGE, STORE};

use crate::paths;

/// Makes the images unless the cache has them, and gives the storage of the registry that holds them.
pub fn images() -> Result<PathBuf> {
    let cache = paths::cache()?;
    let place = tests::images::place(&cache);
    if place.exists() {
        return Ok(place);
    }
    let _lock = paths::lock(&cache.join("images/lock"), "another process makes the images")?;
    if !place.exists() {
        eprintln!("images: making images of busybox, Debian, python3 and redis from Debian packages");
        tests::images::build(&place)?;
    }
    Ok(place)
}

/// Pulls the images into a store of their own, on this machine, where that takes seconds, and gives the environment in
/// which the tests find it. A store belongs to one build of `cofferdam`: another build pulls anew.
pub fn environment() -> Result<Vec<(OsString, OsString)>> {
    let storage = images()?;
    let program = paths::release().join("cofferdam");
    let content = fs::read(&program)
        .with_context(|| format!("cannot read {}: run `cargo xtask build` first", program.display()))?;
    let digest: String = Sha256::digest(&content).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let parent = paths::target().join("e2e");
    let folder = parent.join(format!("{}-{digest}", tests::images::key()));
    if !folder.exists() {
        if parent.exists() {
            fs::remove_dir_all(&parent).with_context(|| format!("cannot remove {}", parent.display()))?;
        }
        paths::make_folder(&parent)?;
        let staged = tempfile::Builder::new().prefix(".pull-").tempdir_in(&parent).context("cannot create a folder")?;
        pull(&program, &storage, staged.path())?;
        fs::rename(staged.path(), &folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    Ok(vec![(FOLDER_VARIABLE.into(), folder.into()), (tests::PROGRAMS_VARIABLE.into(), paths::release().into())])
}

/// Pulls every image over HTTP and notes what each is called.
fn pull(program: &Path, storage: &Path, folder: &Path) -> Result<()> {
    let registry = Registry::start(storage)?;
    let mut references = Map::new();
    for repository in REPOSITORIES {
        let reference = format!("{}/{repository}:{TAG}", registry.address());
        let status = Command::new(program)
            .args(["pull", "--quiet", &reference])
            .env("COFFERDAM_DATA", folder.join(STORE))
            .stdout(std::io::stderr())
            .status()
            .context("cannot start cofferdam")?;
        ensure!(status.success(), "cofferdam pull {reference}: {status}");
        references.insert(repository.to_owned(), reference.into());
    }
    fs::write(folder.join(REFERENCES), serde_json::to_vec_pretty(&Value::Object(references))?)?;
    std::os::unix::fs::symlink(storage, folder.join(STORAGE))?;
    Ok(())
}
