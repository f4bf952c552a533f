//! The host's half: everything that is measured, in a folder that can be a root directory.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;

use crate::bench::stage::{ABOUT, FOLDER, copy, digest, empty_root, libraries, version, write_json};
use crate::build::cargo;
use crate::command::run;
use crate::cpio::Archive;
use crate::paths;

/// The load, below the folder.
pub const LOAD: &str = "io-load";

/// Prepares the root and gives its path.
pub fn prepare(firecracker: Option<&Path>, kernel: Option<&Path>) -> Result<PathBuf> {
    run(cargo().args(["build", "--release", "--package", LOAD]))?;
    let load = paths::target().join(paths::TARGET).join("release").join(LOAD);
    let root = empty_root()?;
    let bench = root.join(FOLDER);
    let release = paths::release();
    let kernel = kernel.map_or_else(|| release.join("vmlinux"), Path::to_owned);
    for (from, name) in [(release.join("cofferdam-vmm"), "cofferdam-vmm"), (kernel.clone(), "vmlinux")] {
        copy(&from, &bench.join(name)).context("is everything built? `cargo xtask build` does it")?;
    }
    copy(&load, &bench.join(LOAD))?;
    copy(&std::env::current_exe().context("cannot find this program's own file")?, &bench.join("xtask"))?;
    let busybox = paths::find_program("busybox").context("no busybox: run `cargo xtask setup`")?;
    copy(&busybox, &bench.join("busybox"))?;
    let mut versions = vec![version(&bench.join("cofferdam-vmm"), "--version")?];
    if let Some(firecracker) = firecracker {
        libraries(firecracker, &root)?;
        copy(firecracker, &bench.join("firecracker"))?;
        versions.push(version(firecracker, "--version")?);
    }
    initramfs(&load, &bench.join("initramfs.cpio"))?;
    write_json(&bench.join(ABOUT), &json!({ "versions": versions, "kernel_sha256": digest(&kernel)? }))?;
    Ok(root)
}

/// The load as a guest's process 1.
fn initramfs(load: &Path, to: &Path) -> Result<()> {
    let content = fs::read(load).with_context(|| format!("cannot read {}", load.display()))?;
    let mut archive = Archive::new(Vec::new());
    for folder in ["dev", "mnt", "proc", "sys"] {
        archive.directory(folder)?;
    }
    archive.character_device("dev/console", 0o600, 5, 1)?;
    // Where there is no console, the standard library wants this for the standard streams before it runs anything.
    archive.character_device("dev/null", 0o666, 1, 3)?;
    archive.file("init", 0o755, &content)?;
    fs::write(to, archive.finish()?).with_context(|| format!("cannot write {}", to.display()))
}
