//! The host's half: everything that is measured, in a folder that can be a root directory.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{bundle, probe};
use crate::{demo, paths};

/// The folder below the root with everything of ours.
pub const FOLDER: &str = "bench";
/// In it, what was measured, as JSON.
pub const ABOUT: &str = "about.json";
/// The probe's path in its container.
pub const PROBE: &str = "/bin/probe";
/// Folders of a Debian system that are links into /usr.
const MERGED: [&str; 4] = ["bin", "lib", "lib64", "sbin"];

/// Prepares the root and gives its path.
pub fn prepare(firecracker: Option<&Path>, kernel: Option<&Path>) -> Result<PathBuf> {
    let root = empty_root()?;
    let bench = root.join(FOLDER);
    let release = paths::release();
    let kernel = kernel.map_or_else(|| release.join("vmlinux"), Path::to_owned);
    let built = |name: &str| release.join(name);
    for (from, name) in [
        (built("cofferdam"), "cofferdam"),
        (built("cofferdam-vmm"), "cofferdam-vmm"),
        (built("initramfs.cpio"), "initramfs.cpio"),
        (kernel.clone(), "vmlinux"),
    ] {
        copy(&from, &bench.join(name)).context("is everything built? `cargo xtask build` does it")?;
    }
    copy(&std::env::current_exe().context("cannot find this program's own file")?, &bench.join("xtask"))?;
    let mut versions = vec![version(&bench.join("cofferdam"), "--version")?];
    let mut programs = vec![find("crun")?, find("runc")?];
    programs.extend(firecracker.map(Path::to_owned));
    for (program, name) in programs.iter().zip(["crun", "runc", "firecracker"]) {
        libraries(program, &root)?;
        copy(program, &bench.join(name))?;
        versions.push(version(program, "--version")?);
    }
    copy(&find("busybox")?, &bench.join("busybox"))?;
    if Path::new("/etc/ld.so.cache").exists() {
        copy(Path::new("/etc/ld.so.cache"), &root.join("etc/ld.so.cache"))?;
    }

    let tree = bench.join("rootfs");
    demo::busybox_tree(&tree)?;
    let probe = tree.join(PROBE.trim_start_matches('/'));
    fs::write(&probe, probe::program()).with_context(|| format!("cannot write {}", probe.display()))?;
    fs::set_permissions(&probe, fs::Permissions::from_mode(0o755))?;
    demo::layout(&tree, &bench.join("layout"))?;
    // Both read the same file tree; where it is depends on where this folder will be, so the root is filled in there.
    for (name, own_network) in [("bundle", true), ("bundle-host-network", false)] {
        write_json(&bench.join(name).join("config.json"), &bundle::config("", PROBE, own_network)?)?;
    }
    write_json(&bench.join(ABOUT), &json!({ "versions": versions, "kernel_sha256": digest(&kernel)? }))?;
    Ok(root)
}

/// A root with nothing in it but the folders of a Debian system, in place of any earlier one.
pub fn empty_root() -> Result<PathBuf> {
    let root = paths::target().join(FOLDER);
    if root.exists() {
        fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))?;
    }
    paths::make_folder(&root.join(FOLDER))?;
    for name in MERGED {
        paths::make_folder(&root.join("usr").join(name))?;
        symlink(format!("usr/{name}"), root.join(name))?;
    }
    Ok(root)
}

/// The beginning of a file's SHA-256.
pub fn digest(file: &Path) -> Result<String> {
    let content = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok(Sha256::digest(content).iter().take(8).map(|byte| format!("{byte:02x}")).collect())
}

fn find(name: &str) -> Result<PathBuf> {
    paths::find_program(name).with_context(|| format!("no {name}: run `cargo xtask setup`"))
}

/// Copies a file with its permissions.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    paths::make_folder(to.parent().context("a file has a folder")?)?;
    fs::copy(from, to).map(drop).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

/// Writes JSON into a file.
pub fn write_json(to: &Path, value: &Value) -> Result<()> {
    paths::make_folder(to.parent().context("a file has a folder")?)?;
    fs::write(to, serde_json::to_vec_pretty(value)?).with_context(|| format!("cannot write {}", to.display()))
}

/// Copies the shared libraries of a program to where it will look for them in the new root.
pub fn libraries(program: &Path, root: &Path) -> Result<()> {
    let output = Command::new("ldd").arg(program).stderr(Stdio::null()).output().context("cannot start ldd")?;
    // A static program has none, and ldd says so by failing.
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let files: BTreeSet<&str> = text
        .lines()
        .filter(|line| !line.contains("not found"))
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .collect();
    ensure!(!text.contains("not found"), "{} lacks libraries: {text}", program.display());
    for file in files {
        // The first folder is a link into /usr on Debian; its counterpart in the new root is one, too.
        let to = root.join(file.trim_start_matches('/'));
        if !to.exists() {
            copy(Path::new(file), &to)?;
        }
    }
    Ok(())
}

/// What a program says of itself, first line only.
pub fn version(program: &Path, flag: &str) -> Result<String> {
    let output = Command::new(program)
        .arg(flag)
        .stderr(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    ensure!(output.status.success(), "{} {flag}: {}", program.display(), output.status);
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
}
