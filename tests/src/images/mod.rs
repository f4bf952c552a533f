//! The images that the tests run, made from Debian packages and stored as docker-registry stores them.
//!
//! | repository | layers | for |
//! |---|---|---|
//! | `busybox` | busybox | nearly everything: it boots fast |
//! | `layers` | busybox, files, changes | how layers become one file tree |
//! | `defaults` | busybox | an entrypoint, a command, a user and a working directory in the image |
//! | `debian` | Debian 12, python3, files, changes | real programs |
//! | `redis` | Debian 12, redis-server | a server |
//!
//! "Files" and "changes" are two small layers: the second removes, replaces and links what is in the first.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::layer::{Access, Layer};
use crate::layout::{Compression, LayerBlob, Layout};
use crate::registry::Registry;

/// The repositories, each with one image, tagged [`TAG`].
pub const REPOSITORIES: [&str; 5] = ["busybox", "layers", "defaults", "debian", "redis"];

/// The tag of every image.
pub const TAG: &str = "latest";

/// The hook that makes the layers of Debian.
const DEBIAN_HOOK: &str = include_str!("debian.sh");

/// A path of more than 255 bytes, which tar can only write in an extended form.
pub const LONG_PATH: &str = "opt/long/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa/\
     bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb/\
     cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc";

/// The size of the sparse file in `layers` and `debian`, in bytes.
pub const SPARSE_SIZE: u64 = 64 << 20;

/// What tells one edition of the images from another: their recipes.
#[must_use]
pub fn key() -> String {
    let recipes = [include_str!("mod.rs"), DEBIAN_HOOK, include_str!("../layer.rs"), include_str!("../layout.rs")];
    let mut hash = Sha256::new();
    for recipe in recipes {
        hash.update(recipe.len().to_le_bytes());
        hash.update(recipe);
    }
    hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// Makes all images and gives them to a registry that keeps them in `storage`, which must not exist. The last step is
/// a rename, so that a storage that exists is complete.
///
/// # Errors
/// A Debian package is missing, or its archive cannot be reached.
pub fn build(storage: &Path) -> Result<()> {
    let parent = storage.parent().context("the storage needs a folder")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let staged = tempfile::Builder::new()
        .prefix(".images-")
        // mmdebstrap may work as another user.
        .permissions(fs::Permissions::from_mode(0o755))
        .tempdir_in(parent)
        .with_context(|| format!("cannot create a folder in {}", parent.display()))?;
    let layout = staged.path().join("layout");
    write(&layout, &staged.path().join("debian"))?;
    let stored = staged.path().join("storage");
    fs::create_dir(&stored)?;
    let registry = Registry::start(&stored)?;
    for repository in REPOSITORIES {
        registry.push(&layout, repository, repository, TAG)?;
    }
    drop(registry);
    fs::rename(&stored, storage).with_context(|| format!("cannot create {}", storage.display()))
}

/// Writes all images, tagged with their repositories' names, into one layout.
fn write(folder: &Path, debian: &Path) -> Result<()> {
    let mut layout = Layout::create(folder)?;
    let plain = json!({ "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["sh"] });
    let busybox = layout.layer(&busybox()?, Compression::Gzip)?;
    let files = layout.layer(&files()?, Compression::None)?;
    let changes = changes()?;
    let compressed = layout.layer(&changes, Compression::Zstd)?;
    layout.image("busybox", "amd64", &plain, std::slice::from_ref(&busybox))?;
    layout.image("layers", "amd64", &plain, &[busybox.clone(), files.clone(), compressed])?;
    layout.image("defaults", "amd64", &defaults(), &[busybox])?;

    debian_layers(debian)?;
    let layer = |name: &str, compression| -> Result<LayerBlob> {
        let path = debian.join(name).with_extension("tar");
        let content = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        layout.layer(&content, compression)
    };
    let base = layer("base", Compression::Gzip)?;
    let (python, redis) = (layer("python", Compression::Zstd)?, layer("redis", Compression::Gzip)?);
    let compressed = layout.layer(&changes, Compression::Gzip)?;
    let mut config = plain;
    config["Env"] = json!(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"]);
    layout.image("debian", "amd64", &config, &[base.clone(), python, files, compressed])?;
    config["Cmd"] = json!(["redis-server", "--save", "", "--dir", "/tmp"]);
    layout.image("redis", "amd64", &config, &[base, redis])
}

/// What a container of the image `defaults` starts with.
fn defaults() -> Value {
    json!({
        "Env": ["PATH=/bin", "FROM_IMAGE=yes", "CHANGED=image"],
        "Entrypoint": ["/bin/busybox", "echo", "entrypoint:"],
        "Cmd": ["command", "of the image"],
        "User": "alice",
        "WorkingDir": "/srv/work",
    })
}

/// The one layer of busybox: the program under all its names, and accounts.
fn busybox() -> Result<Vec<u8>> {
    let path = "/bin/busybox";
    let program = fs::read(path).with_context(|| format!("cannot read {path}: install Debian's busybox-static"))?;
    let names = Command::new(path).arg("--list").stdin(Stdio::null()).output().context("cannot start busybox")?;
    let names = String::from_utf8(names.stdout).context("busybox has names that are not UTF-8")?;
    let mut layer = Layer::new();
    for folder in ["bin", "etc", "home", "root", "usr", "usr/bin", "var"] {
        layer.directory(folder, Access::root(0o755))?;
    }
    layer.directory("tmp", Access::root(0o1777))?;
    layer.directory("home/alice", Access { user: 1000, group: 1000, mode: 0o755 })?;
    layer.file("bin/busybox", Access::root(0o755), &program)?;
    for name in names.lines().filter(|name| *name != "busybox") {
        layer.symlink(&format!("bin/{name}"), "busybox")?;
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n";
    let group = "root:x:0:\nalice:x:1000:\nwheel:x:10:alice\naudio:x:29:bob,alice\nstaff:x:50:bob\n";
    layer.file("etc/passwd", Access::root(0o644), passwd.as_bytes())?;
    layer.file("etc/group", Access::root(0o644), group.as_bytes())?;
    layer.file("etc/data", Access::root(0o644), b"not a program\n")?;
    layer.finish()
}

/// A layer with files for [`changes`] to change.
fn files() -> Result<Vec<u8>> {
    let mut layer = Layer::new();
    for folder in ["opt", "opt/opaque", "opt/opaque/folder", "opt/removed", "opt/kept"] {
        layer.directory(folder, Access::root(0o755))?;
    }
    layer.file("opt/opaque/old", Access::root(0o644), b"old")?;
    layer.file("opt/opaque/folder/old", Access::root(0o644), b"old")?;
    layer.file("opt/removed/file", Access::root(0o644), b"removed with its folder")?;
    layer.file("opt/gone", Access::root(0o644), b"removed")?;
    layer.file("opt/kept/file", Access::root(0o600), b"kept")?;
    layer.file("opt/replaced", Access::root(0o644), b"lower")?;
    layer.file("opt/was-a-file", Access::root(0o644), b"lower")?;
    layer.file("opt/first", Access::root(0o640), b"linked")?;
    layer.finish()
}

/// A layer that removes, replaces and links what is in [`files`], and holds what else tar can hold.
fn changes() -> Result<Vec<u8>> {
    let mut layer = Layer::new();
    layer.whiteout("opt/gone")?;
    layer.whiteout("opt/removed")?;
    layer.opaque("opt/opaque")?;
    layer.file("opt/opaque/new", Access::root(0o644), b"new")?;
    layer.file("opt/replaced", Access { user: 1000, group: 50, mode: 0o4711 }, b"upper")?;
    layer.directory("opt/was-a-file", Access::root(0o755))?;
    layer.file("opt/was-a-file/inside", Access::root(0o644), b"inside")?;
    layer.hard_link("opt/second", "opt/first")?;
    layer.hard_link("opt/kept/third", "opt/second")?;
    layer.symlink("opt/symlink", "/opt/kept/file")?;
    // VFS_CAP_REVISION_2 with the effective bit, and CAP_NET_RAW (13) permitted: what `ping` once had.
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    layer.file_with_attribute(
        "opt/capable",
        Access::root(0o755),
        b"#!/bin/sh\n",
        ("security.capability", &capability),
    )?;
    layer.file_with_attribute("opt/attribute", Access::root(0o644), b"attribute", ("user.note", b"hello"))?;
    layer.file(LONG_PATH, Access::root(0o644), b"long")?;
    layer.sparse("opt/sparse", SPARSE_SIZE, (SPARSE_SIZE / 2, b"in the middle"))?;
    layer.file("opt/\u{fc}ml\u{e4}ut \u{2713}", Access::root(0o644), b"utf-8")?;
    layer.finish()
}

/// Makes `base.tar`, `python.tar` and `redis.tar` in `folder`.
fn debian_layers(folder: &Path) -> Result<()> {
    fs::create_dir(folder)?;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o777))?;
    let hook = folder.join("hook.sh");
    fs::write(&hook, DEBIAN_HOOK)?;
    let sources = folder.join("sources.list");
    fs::write(&sources, apt_sources()?)?;
    let quoted = |path: &Path| format!("'{}'", path.display().to_string().replace('\'', "'\\''"));
    let status = Command::new("mmdebstrap")
        .args(["--variant=minbase", "--format=null", "--quiet", "--aptopt=Acquire::Retries \"3\""])
        .args(
            ["doc", "man", "locale", "info", "lintian"]
                .map(|name| format!("--dpkgopt=path-exclude=/usr/share/{name}/*")),
        )
        .arg(format!("--customize-hook=sh {} \"$1\" {} >&2", quoted(&hook), quoted(folder)))
        .args(["bookworm", "-"])
        .arg(&sources)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("cannot start mmdebstrap: install Debian's package of this name")?;
    ensure!(status.success(), "mmdebstrap: {status}: it needs root or `newuidmap`, and Debian's archive");
    Ok(())
}

/// Where this machine gets Debian 12 from, so that a mirror that it uses is used here too; else Debian's own servers.
fn apt_sources() -> Result<String> {
    let targets = Command::new("apt-get")
        .args(["indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"])
        .stdin(Stdio::null())
        .output()
        .context("cannot start apt-get")?;
    let mut sources: Vec<String> = String::from_utf8_lossy(&targets.stdout)
        .lines()
        .filter(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            words.get(1).is_some_and(|release| release.starts_with("bookworm")) && words.get(2) == Some(&"main")
        })
        .map(|line| format!("deb {line}\n"))
        .collect();
    sources.dedup();
    if !sources.iter().any(|line| line.contains(" bookworm ")) {
        sources = ["debian bookworm", "debian bookworm-updates", "debian-security bookworm-security"]
            .map(|place| format!("deb http://deb.debian.org/{place} main\n"))
            .into();
    }
    Ok(sources.concat())
}

/// Where a cache keeps the storage of this edition of the images.
#[must_use]
pub fn place(cache: &Path) -> PathBuf {
    cache.join("images").join(key())
}
