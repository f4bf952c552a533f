//! `cargo xtask kernel`: the guest kernel, from Debian's source package and `resources/kernel/guest.config`.
//!
//! Images are kept in the cache under a key made of everything that decides what comes out. A lock makes two
//! builds of one key do the work once, and a rename publishes the result.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::command::{output, run};
use crate::debian::{self, KERNEL_PACKAGES, KERNEL_SOURCE_PACKAGE};
use crate::paths;

/// Raised whenever this recipe changes what comes out.
const RECIPE: &str = "1";
/// Roughly how many files a build compiles or links; only progress is told by it.
const OBJECTS: u32 = 1820;
/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// The guest kernel's image, built unless the cache has it. It is put at `target/release/vmlinux` too.
pub fn kernel() -> Result<PathBuf> {
    let fragment = paths::root().join("resources/kernel/guest.config");
    let options = fs::read_to_string(&fragment).with_context(|| format!("cannot read {}", fragment.display()))?;
    let version = debian::version(KERNEL_SOURCE_PACKAGE)
        .with_context(|| format!("{KERNEL_SOURCE_PACKAGE} is not installed: run `cargo xtask setup`"))?;
    let folder = paths::cache()?.join("kernel").join(key(&version, &options));
    let image = folder.join("vmlinux");
    if !image.exists() {
        let name = folder.file_name().context("a key is a name")?.to_string_lossy().into_owned();
        let _lock = paths::lock(&folder.with_file_name(format!("{name}.lock")), "it builds the same guest kernel")?;
        if !image.exists() {
            build(&version, &fragment, &options, &folder)?;
        }
    }
    paths::publish(&image, &paths::release().join("vmlinux"))?;
    Ok(image)
}

/// The name of the image that this source, configuration and recipe give.
fn key(version: &str, options: &str) -> String {
    let mut hash = Sha256::new();
    for part in [RECIPE, version, options] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// Builds into a scratch folder beside `to` and publishes the finished image there.
fn build(version: &str, fragment: &Path, options: &str, to: &Path) -> Result<()> {
    for package in KERNEL_PACKAGES {
        ensure!(debian::version(package).is_some(), "{package} is not installed: run `cargo xtask setup`");
    }
    let start = Instant::now();
    let parent = to.parent().context("the cache has a folder")?;
    let scratch = tempfile::Builder::new()
        .prefix(".build-")
        .tempdir_in(parent)
        .with_context(|| format!("cannot create a folder in {}", parent.display()))?;
    let tree = scratch.path().join("linux");
    paths::make_folder(&tree)?;
    eprintln!("kernel: unpacking {KERNEL_SOURCE_PACKAGE} {version}");
    run(Command::new("tar")
        .arg("--extract")
        .arg(format!("--file=/usr/src/{KERNEL_SOURCE_PACKAGE}.tar.xz"))
        .args(["--strip-components=1", "--exclude=linux-source-*/Documentation/*/*"])
        .current_dir(&tree))?;
    configure(&tree, fragment, options)?;
    compile(&tree)?;
    let image = scratch.path().join("vmlinux");
    // The monitor and the guest need no symbol table: panics are resolved by kallsyms.
    run(Command::new("strip").arg("--strip-all").arg("-o").arg(&image).arg(tree.join("vmlinux")))?;
    check_segments(&image)?;
    let done = scratch.path().join("done");
    paths::make_folder(&done)?;
    fs::rename(&image, done.join("vmlinux"))?;
    fs::copy(tree.join(".config"), done.join("config"))?;
    fs::rename(&done, to).with_context(|| format!("cannot create {}", to.display()))?;
    eprintln!("kernel: built in {} s", start.elapsed().as_secs());
    Ok(())
}

/// The final configuration: the smallest one, the fragment over it, and defaults for what follows from that.
fn configure(tree: &Path, fragment: &Path, options: &str) -> Result<()> {
    eprintln!("kernel: configuring");
    run(make(tree).args(["-s", "tinyconfig"]).stdout(Stdio::null()))?;
    run(Command::new("scripts/kconfig/merge_config.sh")
        .args(["-m", "-O", ".", ".config"])
        .arg(fragment)
        .current_dir(tree)
        .stdout(Stdio::null()))?;
    run(make(tree).args(["-s", "olddefconfig"]).stdout(Stdio::null()))?;
    let path = tree.join(".config");
    let config = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let lost = lost_options(options, &config);
    ensure!(
        lost.is_empty(),
        "the kernel's configuration does not keep these lines of {}: {} (an option that they need is missing, or \
         another one selects them)",
        fragment.display(),
        lost.join(", "),
    );
    Ok(())
}

/// The lines of `fragment` that the final configuration contradicts.
fn lost_options<'a>(fragment: &'a str, config: &str) -> Vec<&'a str> {
    let kept = |line: &str| match line.strip_prefix("# ").and_then(|rest| rest.strip_suffix(" is not set")) {
        Some(option) => !config.lines().any(|set| set.strip_prefix(option).is_some_and(|rest| rest.starts_with('='))),
        None => config.lines().any(|set| set == line),
    };
    fragment
        .lines()
        .filter(|line| line.starts_with("CONFIG_") || line.starts_with("# CONFIG_"))
        .filter(|line| !kept(line))
        .collect()
}

/// Compiles `vmlinux`, telling from time to time how far it is.
fn compile(tree: &Path) -> Result<()> {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let log_path = tree.join("build.log");
    let log = File::create(&log_path).with_context(|| format!("cannot create {}", log_path.display()))?;
    // Ahead of nobody: a kernel build beside other work should not slow that down.
    let mut command = Command::new("nice");
    command.args(["-n", "5", "make", &format!("-j{jobs}"), "vmlinux"]);
    let mut child = reproducible(&mut command, tree)
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .context("cannot start make: run `cargo xtask setup`")?;
    let steps = BufReader::new(child.stdout.take().context("make has no standard output")?);
    let (mut done, mut told) = (0u32, Instant::now());
    for line in steps.lines() {
        let line = line.context("cannot read what make says")?;
        done += u32::from(["  CC  ", "  AS  ", "  AR  ", "  LD  "].iter().any(|step| line.starts_with(step)));
        if told.elapsed() >= PROGRESS_EVERY {
            told = Instant::now();
            eprintln!("kernel: {done} of about {OBJECTS} objects ({})", line.trim());
        }
    }
    let status = child.wait().context("cannot wait for make")?;
    if !status.success() {
        let text = fs::read(&log_path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let mut end: Vec<&str> = text.lines().rev().take(20).collect();
        end.reverse();
        bail!("the guest kernel does not build ({status}):\n{}", end.join("\n"));
    }
    Ok(())
}

/// `make` in the kernel's tree.
fn make(tree: &Path) -> Command {
    let mut command = Command::new("make");
    reproducible(&mut command, tree);
    command
}

/// Fixes what a kernel build would otherwise take from its surroundings.
fn reproducible<'a>(command: &'a mut Command, tree: &Path) -> &'a mut Command {
    command
        .current_dir(tree)
        .stdin(Stdio::null())
        .env("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970")
        .env("KBUILD_BUILD_USER", "cofferdam")
        .env("KBUILD_BUILD_HOST", "cofferdam")
        .env("LC_ALL", "C")
        .env("TZ", "UTC")
        // The caller's jobserver and flags are for other builds.
        .env_remove("MAKEFLAGS")
        .env_remove("MFLAGS")
        .env_remove("MAKELEVEL")
        .env_remove("ARCH")
        .env_remove("CROSS_COMPILE")
}

/// Checks that every loadable segment can be mapped page by page where the kernel wants it.
fn check_segments(image: &Path) -> Result<()> {
    let text = output(Command::new("readelf").args(["-lW"]).arg(image))?;
    let mut segments = 0;
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["LOAD", offset, _, address, ..] = words[..] else { continue };
        let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16);
        ensure!(
            number(offset)? % 4096 == number(address)? % 4096,
            "{}: the segment at offset {offset} cannot be mapped at {address}",
            image.display()
        );
        segments += 1;
    }
    ensure!(segments > 0, "{} has no loadable segment", image.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_options_are_named() {
        let fragment = "# a comment\nCONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\n# CONFIG_D is not set\n";
        let config = "CONFIG_A=y\nCONFIG_BB=y\nCONFIG_C=y\nCONFIG_DD=y\n";
        assert_eq!(lost_options(fragment, config), ["CONFIG_B=y", "# CONFIG_C is not set"]);
    }

    #[test]
    fn every_part_changes_the_key() {
        assert_eq!(key("1", "a").len(), 32);
        assert_ne!(key("1", "a"), key("1", "b"));
        assert_ne!(key("1", "a"), key("2", "a"));
        assert_ne!(key("1", "1a"), key("11", "a"));
    }
}
