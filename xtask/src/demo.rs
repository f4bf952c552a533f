//! `cargo xtask demo`: a container image from Debian's busybox, run in a micro-VM, here or in the lab.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::command::{output, run};
use crate::lab::{self, LabArgs};
use crate::{build, debian, paths};

/// An emulating KVM runs about one million guest instructions a second, real hardware and the lab hundreds of times
/// as many.
const MIPS_ENOUGH: f64 = 20.0;

/// Makes an image and runs a container from it.
pub fn demo() -> Result<ExitCode> {
    debian::setup()?;
    build::build()?;
    let layout = paths::target().join("demo/busybox");
    if !layout.join("index.json").exists() {
        paths::make_folder(&paths::target().join("demo"))?;
        let root = tempfile::Builder::new().prefix(".root-").tempdir_in(paths::target().join("demo"))?;
        busybox_tree(root.path())?;
        self::layout(root.path(), &layout)?;
    }
    let program = paths::release().join("cofferdam");
    let mut reference = OsString::from("oci:");
    reference.push(&layout);
    reference.push(":latest");
    let script = "echo Hello from a micro-VM: Linux $(uname -r), $(nproc) CPU, process $$";
    let arguments: Vec<OsString> = [program.into(), "run".into(), "--rm".into(), reference]
        .into_iter()
        .chain(["sh", "-c", script].map(OsString::from))
        .collect();
    eprintln!("demo: cofferdam run --rm oci:target/demo/busybox:latest sh -c '{script}'");
    if kvm_runs_guests() {
        let status = Command::new(&arguments[0]).args(&arguments[1..]).status().context("cannot start cofferdam")?;
        return Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)));
    }
    eprintln!(
        "demo: /dev/kvm on this host cannot run guests (`cofferdam doctor` says why): using the lab, an emulated machine"
    );
    lab::run(&LabArgs::for_command(arguments))
}

/// Whether guests can run here at a useful speed, by the monitor's own probe.
pub fn kvm_runs_guests() -> bool {
    let Ok(output) = Command::new(paths::release().join("cofferdam-vmm")).arg("--probe").output() else {
        return false;
    };
    let probe: Option<Value> = serde_json::from_slice(&output.stdout).ok();
    let mips = probe.as_ref().and_then(|probe| probe.get("mips")).and_then(Value::as_f64);
    output.status.success() && mips.is_some_and(|mips| mips >= MIPS_ENOUGH)
}

/// Writes an OCI image layout whose image `latest` has one layer: the file tree `root`.
pub fn layout(root: &Path, layout: &Path) -> Result<()> {
    let parent = layout.parent().context("the layout has a folder")?;
    let staged = tempfile::Builder::new().prefix(".image-").tempdir_in(parent).context("cannot create a folder")?;
    let image = staged.path().join("image");
    paths::make_folder(&image.join("blobs/sha256"))?;

    let tar = staged.path().join("layer.tar");
    run(Command::new("tar")
        .args(["--create", "--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mtime=@0", "--format=pax"])
        .args(["--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime"])
        .arg("--file")
        .arg(&tar)
        .arg("--directory")
        .arg(root)
        .arg("."))?;
    let layer = fs::read(&tar).with_context(|| format!("cannot read {}", tar.display()))?;
    let layer = blob(&image, "application/vnd.oci.image.layer.v1.tar", &layer)?;
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Cmd": ["sh"],
        },
        "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
    });
    let config = blob(&image, "application/vnd.oci.image.config.v1+json", &serde_json::to_vec(&config)?)?;
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": manifest_type, "config": config, "layers": [layer] });
    let mut manifest = blob(&image, manifest_type, &serde_json::to_vec(&manifest)?)?;
    manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": "latest" });
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    fs::write(image.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    fs::write(image.join("index.json"), serde_json::to_vec_pretty(&index)?)?;
    fs::rename(&image, layout).with_context(|| format!("cannot create {}", layout.display()))
}

/// A file tree with busybox under every name that it answers to.
pub fn busybox_tree(root: &Path) -> Result<()> {
    for folder in ["bin", "etc", "root", "tmp", "usr/bin", "var"] {
        paths::make_folder(&root.join(folder))?;
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    let busybox = paths::find_program("busybox").context("no busybox: run `cargo xtask setup`")?;
    fs::copy(&busybox, root.join("bin/busybox")).context("cannot copy busybox")?;
    for name in output(Command::new(&busybox).arg("--list"))?.lines().filter(|name| *name != "busybox") {
        symlink("busybox", root.join("bin").join(name))?;
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")?;
    Ok(())
}

/// Stores a blob in an image layout and gives its descriptor.
fn blob(image: &Path, media_type: &str, content: &[u8]) -> Result<Value> {
    let digest: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
    let path: PathBuf = image.join("blobs/sha256").join(&digest);
    fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": content.len() }))
}
