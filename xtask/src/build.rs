//! `cargo xtask build`: everything a user needs, in `target/release/`.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::command::run;
use crate::cpio::Archive;
use crate::{kernel, paths};

/// The packages that hold the programs, and the programs.
const PROGRAMS: [(&str, &str); 3] = [("cli", "cofferdam"), ("vmm", "cofferdam-vmm"), ("agent", "cofferdam-agent")];
/// The program that is process 1 of a guest.
const AGENT: &str = "cofferdam-agent";

/// Builds the guest kernel (unless `COFFERDAM_KERNEL` names one), the programs and the initramfs. Installs nothing.
pub fn build() -> Result<()> {
    match std::env::var_os("COFFERDAM_KERNEL").filter(|path| !path.is_empty()) {
        Some(given) => {
            let given = PathBuf::from(given);
            ensure!(given.is_file(), "the kernel {} named by COFFERDAM_KERNEL is not a file", given.display());
            paths::publish(&given, &paths::release().join("vmlinux"))?;
        }
        None => {
            kernel::kernel()?;
        }
    }
    programs()
}

/// Writes the description of the REST API where it is committed; a test of the crate compares it with the code.
pub fn openapi() -> Result<()> {
    let mut command = cargo();
    command.args(["run", "--quiet", "--package", "api", "--example", "openapi"]);
    let output = command.stderr(Stdio::inherit()).output().context("cannot start cargo")?;
    ensure!(output.status.success(), "the description was not made");
    let path = paths::root().join("api/openapi.json");
    fs::write(&path, output.stdout).with_context(|| format!("cannot write {}", path.display()))
}

/// Builds the programs and the initramfs, and puts them where the kernel is.
fn programs() -> Result<()> {
    let mut cargo = cargo();
    cargo.args(["build", "--release"]);
    for (package, program) in PROGRAMS {
        cargo.args(["--package", package, "--bin", program]);
    }
    run(&mut cargo)?;
    let built = paths::target().join(paths::TARGET).join("release");
    for (_, program) in PROGRAMS {
        paths::publish(&built.join(program), &paths::release().join(program))?;
    }
    initramfs(&built.join(AGENT), &paths::release().join("initramfs.cpio"))
}

/// Writes the guest's initial RAM file system: the agent, a console to complain on, and mount points.
fn initramfs(agent: &Path, to: &Path) -> Result<()> {
    let content = fs::read(agent).with_context(|| format!("cannot read {}", agent.display()))?;
    let mut archive = Archive::new(Vec::new());
    for folder in ["dev", "proc", "run", "sys"] {
        archive.directory(folder)?;
    }
    archive.character_device("dev/console", 0o600, 5, 1)?;
    archive.file("init", 0o755, &content)?;
    let staged = tempfile::NamedTempFile::new_in(paths::release()).context("cannot create a file in target/release")?;
    fs::write(staged.path(), archive.finish()?).context("cannot write the initramfs")?;
    fs::set_permissions(staged.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    staged.persist(to).with_context(|| format!("cannot replace {}", to.display()))?;
    Ok(())
}

/// The cargo that runs us, in the work tree, without what cargo tells the programs that it runs.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    command.current_dir(paths::root());
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}
