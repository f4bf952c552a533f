//! Debian's packages: what the project needs of them, whether they are installed, and fetching one without
//! installing it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::{output, run};

/// What building the guest kernel needs, beside the compiler that Rust needs anyway.
pub const KERNEL_PACKAGES: &[&str] =
    &[KERNEL_SOURCE_PACKAGE, "bc", "bison", "flex", "gcc", "libc6-dev", "libelf-dev", "libssl-dev", "make", "xz-utils"];

/// Debian's package of the guest kernel's source, and the archive that it installs.
pub const KERNEL_SOURCE_PACKAGE: &str = "linux-source-6.12";

/// What the lab needs.
const LAB_PACKAGES: &[&str] = &["busybox-static", "kmod", "qemu-system-x86", "util-linux", "xz-utils"];

/// What the end-to-end tests and the demo take their images, registry and reference runtimes from.
const TEST_PACKAGES: &[&str] = &[
    "crun",
    "curl",
    "docker-registry",
    "e2fsprogs",
    "erofs-utils",
    "iproute2",
    "jq",
    "mmdebstrap",
    "python3",
    "python3-venv",
    "runc",
    "strace",
];

/// What fuzzing needs: libFuzzer is built from source.
const FUZZING_PACKAGES: &[&str] = &["g++"];

/// Installs every Debian package that building, testing and the demo need; does nothing when all are there.
pub fn setup() -> Result<()> {
    let mut wanted: Vec<&str> = [KERNEL_PACKAGES, LAB_PACKAGES, TEST_PACKAGES].concat();
    wanted.sort_unstable();
    wanted.dedup();
    install(wanted)
}

/// Installs what fuzzing needs beside that.
pub fn setup_fuzzing() -> Result<()> {
    install(FUZZING_PACKAGES.to_vec())
}

/// Installs packages; does nothing when all are there.
fn install(wanted: Vec<&str>) -> Result<()> {
    let missing: Vec<&str> = wanted.into_iter().filter(|package| version(package).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("setup: installing Debian packages: {}", missing.join(" "));
    // The package lists may be missing (a fresh image) or older than the archive, so they are always fetched.
    run(privileged("apt-get").args(["update", "-q=2"]))?;
    run(privileged("apt-get")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["install", "--yes", "-q=2", "-o=Dpkg::Use-Pty=0", "--no-install-recommends"])
        .args(&missing))
    .with_context(|| format!("cannot install {}", missing.join(" ")))
}

/// A command that runs as root: directly when we are root, else through sudo.
fn privileged(program: &str) -> Command {
    let root = output(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0");
    if root {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    command
}

/// The version of an installed package.
pub fn version(package: &str) -> Option<String> {
    let output = Command::new("dpkg-query").args(["-W", "-f=${db:Status-Status} ${Version}", package]).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let version = text.strip_prefix("installed ")?;
    output.status.success().then(|| version.to_owned())
}

/// The package that a meta-package stands for: its first dependency that starts with `prefix`.
pub fn dependency(package: &str, prefix: &str) -> Result<String> {
    let text = output(Command::new("apt-cache").args(["depends", "--no-recommends", "--no-suggests", package]))?;
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with(prefix))
        .map(str::to_owned)
        .with_context(|| format!("apt knows no {package}: run `apt-get update` as root"))
}

/// Downloads a package into `folder` and unpacks its files there, without installing it. Gives the folder with the
/// files.
pub fn unpack(package: &str, folder: &Path) -> Result<PathBuf> {
    run(Command::new("apt-get")
        // As root, apt would drop privileges to a user that cannot write to the folder, and warn that it did not.
        .args(["download", "-q=2", "-o=APT::Sandbox::User=root", package])
        .current_dir(folder))?;
    let mut archives = Vec::new();
    for entry in folder.read_dir().with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            archives.push(path);
        }
    }
    let [archive] = &archives[..] else {
        bail!("apt-get download {package} left {} archives in {}", archives.len(), folder.display());
    };
    let files = folder.join("files");
    run(Command::new("dpkg").arg("-x").arg(archive).arg(&files))?;
    std::fs::remove_file(archive).with_context(|| format!("cannot remove {}", archive.display()))?;
    Ok(files)
}
