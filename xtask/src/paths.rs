//! Where things are: the work tree, its build output, and the cache outside it that survives `make clean`.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The target triple that `.cargo/config.toml` sets; artifacts land in a folder of this name.
pub const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The root of the work tree.
pub fn root() -> PathBuf {
    let mut path = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    path.pop();
    path
}

/// Cargo's output folder (`target/` unless `CARGO_TARGET_DIR` says otherwise).
pub fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(path) => root().join(path),
        None => root().join("target"),
    }
}

/// The folder in which a finished build is: binaries, guest kernel, initramfs.
pub fn release() -> PathBuf {
    target().join("release")
}

/// The cache: `$COFFERDAM_CACHE`, else `$XDG_CACHE_HOME/cofferdam`, else `~/.cache/cofferdam`.
pub fn cache() -> Result<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(path) = set("COFFERDAM_CACHE") {
        return std::path::absolute(path).context("COFFERDAM_CACHE is not a path");
    }
    if let Some(path) = set("XDG_CACHE_HOME").filter(|path| path.is_absolute()) {
        return Ok(path.join("cofferdam"));
    }
    let home = set("HOME").context("HOME is not set: set COFFERDAM_CACHE to a folder for cached builds")?;
    Ok(home.join(".cache/cofferdam"))
}

/// Creates a folder and its parents.
pub fn make_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))
}

/// Puts what `from` holds at `to` in one step, as a hard link where both are on one file system.
pub fn publish(from: &Path, to: &Path) -> Result<()> {
    let folder = to.parent().context("a file to publish needs a folder")?;
    make_folder(folder)?;
    let staged = tempfile::Builder::new()
        .prefix(".publish-")
        .tempdir_in(folder)
        .with_context(|| format!("cannot create a file in {}", folder.display()))?;
    let name = staged.path().join("file");
    if fs::hard_link(from, &name).is_err() {
        fs::copy(from, &name).with_context(|| format!("cannot copy {} to {}", from.display(), folder.display()))?;
    }
    fs::rename(&name, to).with_context(|| format!("cannot replace {}", to.display()))?;
    // Renaming one hard link over another of the same file leaves both: the folder's removal takes the rest.
    Ok(())
}

/// Takes the lock file `path`, waiting for another holder; released when the returned file is dropped.
pub fn lock(path: &Path, waiting_for: &str) -> Result<File> {
    make_folder(path.parent().context("a lock file needs a folder")?)?;
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    if file.try_lock().is_err() {
        eprintln!("waiting for another process that holds {} ({waiting_for})", path.display());
        file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    }
    Ok(file)
}

/// Looks a program up in `PATH` and in the folders of system tools that a user's `PATH` may lack.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}
