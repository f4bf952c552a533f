//! What the lab boots: Debian's stock kernel, kept in the cache, and an initramfs made for each run.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::command::run;
use crate::cpio::Archive;
use crate::paths::{cache, find_program, lock, make_folder};
use crate::{debian, paths};

/// The modules needed before the host's files are there; the rest is loaded on demand from the package's own tree.
const BOOT_MODULES: [&str; 5] = ["virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay"];

/// A stock kernel with its modules.
pub struct Machine {
    /// The uncompressed kernel image.
    pub kernel: PathBuf,
    /// `…/lib/modules/VERSION`.
    pub modules: PathBuf,
}

impl Machine {
    /// The machine in the cache; fetched from Debian first when there is none.
    pub fn prepare() -> Result<Self> {
        let folder = cache()?.join("lab");
        let current = folder.join("current");
        if let Ok(machine) = Self::at(&current) {
            return Ok(machine);
        }
        let _lock = lock(&folder.join("lock"), "another process prepares the lab")?;
        if let Ok(machine) = Self::at(&current) {
            return Ok(machine);
        }
        let package = debian::dependency("linux-image-amd64", "linux-image-")?;
        eprintln!("lab: fetching Debian's {package} (not installed, only unpacked)");
        let staged = tempfile::Builder::new()
            .prefix(".unpack-")
            .tempdir_in(&folder)
            .with_context(|| format!("cannot create a folder in {}", folder.display()))?;
        let files = debian::unpack(&package, staged.path())?;
        let version = package.trim_start_matches("linux-image-");
        let compressed = files.join(format!("boot/vmlinuz-{version}"));
        decompress(&compressed, &files.join("vmlinux"))?;
        let depmod = find_program("depmod").context("no depmod: run `cargo xtask setup`")?;
        run(Command::new(depmod).arg("-b").arg(&files).arg(version))?;
        let place = folder.join(&package);
        if place.exists() {
            fs::remove_dir_all(&place).with_context(|| format!("cannot remove {}", place.display()))?;
        }
        fs::rename(&files, &place).with_context(|| format!("cannot create {}", place.display()))?;
        let link = staged.path().join("current");
        std::os::unix::fs::symlink(&package, &link)?;
        fs::rename(&link, &current).with_context(|| format!("cannot create {}", current.display()))?;
        Self::at(&current)
    }

    /// The machine unpacked in `folder`.
    fn at(folder: &Path) -> Result<Self> {
        let folder = folder.canonicalize()?;
        let mut versions = folder.join("lib/modules").read_dir()?;
        let modules = versions.next().context("no kernel modules")??.path();
        ensure!(modules.join("modules.dep").exists(), "no modules.dep");
        let kernel = folder.join("vmlinux");
        ensure!(kernel.exists(), "no kernel");
        Ok(Self { kernel, modules })
    }

    /// Writes the initramfs that runs `session` once.
    pub fn write_initramfs(&self, to: &Path, session: &Session<'_>) -> Result<()> {
        let busybox = find_program("busybox").context("no busybox: run `cargo xtask setup`")?;
        let busybox = fs::read(&busybox).with_context(|| format!("cannot read {}", busybox.display()))?;
        let mut archive = Archive::new(Vec::new());
        for folder in ["bin", "dev", "modules"] {
            archive.directory(folder)?;
        }
        archive.character_device("dev/console", 0o600, 5, 1)?;
        archive.file("bin/busybox", 0o755, &busybox)?;
        archive.file("init", 0o755, include_bytes!("init.sh"))?;
        archive.file("session.sh", 0o644, include_bytes!("session.sh"))?;
        archive.file("settings", 0o644, &session.settings(&self.modules)?)?;
        archive.file("command.sh", 0o644, &session.script())?;
        let mut order = String::new();
        for module in self.boot_modules()? {
            let path = self.modules.join(&module);
            let name = path.file_name().and_then(OsStr::to_str).context("a module without a name")?;
            let content = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            archive.file(&format!("modules/{name}"), 0o644, &content)?;
            order.push_str(name);
            order.push('\n');
        }
        archive.file("modules/order", 0o644, order.as_bytes())?;
        fs::write(to, archive.finish()?).with_context(|| format!("cannot write {}", to.display()))
    }

    /// The boot modules and what they depend on, in loading order, relative to the module tree.
    fn boot_modules(&self) -> Result<Vec<String>> {
        let path = self.modules.join("modules.dep");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut order: Vec<String> = Vec::new();
        for module in BOOT_MODULES {
            let file = format!("/{module}.ko:");
            let line = text
                .lines()
                .find(|line| line.contains(&file))
                .with_context(|| format!("{} does not name {module}", path.display()))?;
            let (name, dependencies) = line.split_once(':').unwrap_or((line, ""));
            // modules.dep lists the nearest dependency first, so the last one must be loaded first.
            for needed in dependencies.split_whitespace().rev().chain([name]) {
                if !order.iter().any(|known| known == needed) {
                    order.push(needed.to_owned());
                }
            }
        }
        Ok(order)
    }
}

/// What one run of the lab does.
pub struct Session<'a> {
    /// The program and its arguments.
    pub command: &'a [OsString],
    /// The folder it starts in.
    pub folder: &'a Path,
    /// The folder whose content comes back to the host.
    pub out: &'a Path,
}

impl Session<'_> {
    /// Shell assignments for the lab's process 1.
    fn settings(&self, modules: &Path) -> Result<Vec<u8>> {
        let relay = std::env::current_exe().context("cannot find this program's own file")?;
        let mut text = Vec::new();
        for (name, path) in [("LAB_MODULES", modules), ("LAB_OUT", self.out), ("LAB_RELAY", &relay)] {
            text.extend_from_slice(name.as_bytes());
            text.push(b'=');
            quote(path.as_os_str(), &mut text);
            text.push(b'\n');
        }
        Ok(text)
    }

    /// The shell script that becomes the command, in the caller's folder with the caller's environment.
    fn script(&self) -> Vec<u8> {
        let mut text = b"cd ".to_vec();
        quote(self.folder.as_os_str(), &mut text);
        text.extend_from_slice(b" || exit 125\nexec /usr/bin/env -i");
        let own = [
            (OsString::from("COFFERDAM_LAB"), OsString::from("1")),
            (OsString::from("COFFERDAM_LAB_OUT"), self.out.as_os_str().to_owned()),
        ];
        for (name, value) in
            std::env::vars_os().filter(|(name, _)| own.iter().all(|(ours, _)| ours != name)).chain(own.clone())
        {
            text.push(b' ');
            let mut pair = name.into_vec();
            pair.push(b'=');
            pair.extend_from_slice(value.as_bytes());
            quote(OsStr::from_bytes(&pair), &mut text);
        }
        for argument in self.command {
            text.push(b' ');
            quote(argument, &mut text);
        }
        text.push(b'\n');
        text
    }
}

/// Appends `word` so that a shell reads exactly it.
fn quote(word: &OsStr, to: &mut Vec<u8>) {
    to.push(b'\'');
    for &byte in word.as_bytes() {
        if byte == b'\'' {
            to.extend_from_slice(b"'\\''");
        } else {
            to.push(byte);
        }
    }
    to.push(b'\'');
}

/// Takes the ELF kernel out of a bzImage (Documentation/arch/x86/boot.rst: `setup_sects`, `payload_offset`,
/// `payload_length`), so that the emulated machine need not decompress it on every start.
fn decompress(bzimage: &Path, to: &Path) -> Result<()> {
    let image = fs::read(bzimage).with_context(|| format!("cannot read {}", bzimage.display()))?;
    let word = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 4).context("the kernel image is too short")?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize)
    };
    ensure!(image.get(0x202..0x206) == Some(b"HdrS"), "{} is not a bzImage", bzimage.display());
    let setup_sectors = match image[0x1f1] {
        0 => 4, // the header's documented default
        sectors => usize::from(sectors),
    };
    let start = (setup_sectors + 1) * 512 + word(0x248)?;
    // The payload ends with the four bytes of its uncompressed size.
    let end = (start + word(0x24c)?).saturating_sub(4);
    let payload = image.get(start..end).with_context(|| format!("{} has no payload", bzimage.display()))?;
    ensure!(payload.starts_with(b"\xfd7zXZ\0"), "{} is not compressed with xz", bzimage.display());
    let staged = to.with_extension("xz");
    fs::write(&staged, payload).with_context(|| format!("cannot write {}", staged.display()))?;
    let status = Command::new("xz")
        .args(["--decompress", "--stdout"])
        .arg(&staged)
        .stdout(Stdio::from(File::create(to).with_context(|| format!("cannot write {}", to.display()))?))
        .status()
        .context("cannot start xz")?;
    if !status.success() {
        bail!("xz cannot decompress {}: {status}", bzimage.display());
    }
    fs::remove_file(&staged).with_context(|| format!("cannot remove {}", staged.display()))
}

/// The folder that is the lab's writable share: `given`, or one in the build output.
pub fn out_folder(given: Option<PathBuf>) -> Result<PathBuf> {
    let folder = given.unwrap_or_else(|| paths::target().join("lab"));
    make_folder(&folder)?;
    folder.canonicalize().with_context(|| format!("cannot resolve {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_for_the_shell() {
        let mut text = Vec::new();
        quote(OsStr::new("it's $HOME"), &mut text);
        assert_eq!(text, br"'it'\''s $HOME'");
    }
}
