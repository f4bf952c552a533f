//! A place to run the command in: an image store with one small image, a run root, and a file in the place of each part of
//! the installation, none of which is ever used.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use sha2::{Digest as _, Sha256};

/// The command under test.
pub const COFFERDAM: &str = env!("CARGO_BIN_EXE_cofferdam");

/// Where a test runs. Everything is in a temporary directory.
pub struct Bench {
    directory: tempfile::TempDir,
}

impl Bench {
    /// A bench with an image in its store.
    pub fn new() -> Self {
        let bench = Self { directory: tempfile::tempdir().unwrap() };
        for name in ["kernel", "initramfs", "monitor"] {
            fs::write(bench.path(name), name).unwrap();
        }
        bench.pull();
        bench
    }

    /// A path in the bench's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The command with the bench's surroundings.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(COFFERDAM);
        command.args(arguments).env("COFFERDAM_DATA", self.path("store")).env("COFFERDAM_RUN", self.path("run"));
        command.env("COFFERDAM_VMM", self.path("monitor")).env("COFFERDAM_KERNEL", self.path("kernel"));
        command.env("COFFERDAM_INITRAMFS", self.path("initramfs")).stdin(Stdio::null());
        command
    }

    /// Runs the command to its end.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// The image's name.
    pub fn image(&self) -> String {
        format!("oci:{}", self.path("layout").display())
    }

    /// What is left in the run root.
    pub fn left(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path("run")) else { return Vec::new() };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|name| name != "names").collect();
        if let Ok(links) = fs::read_dir(self.path("run/names")) {
            names.extend(links.map(|link| link.unwrap().file_name().into_string().unwrap()));
        }
        names
    }

    fn pull(&self) {
        layout(&self.path("layout"));
        let output = self.run(&["pull", &self.image()]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Standard error as text.
pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Writes an OCI image layout with one layer that holds one file.
fn layout(directory: &Path) {
    let mut layer = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(5);
    header.set_mode(0o644);
    layer.append_data(&mut header, "hello", &b"hello"[..]).unwrap();
    let layer = layer.into_inner().unwrap();
    let blobs = directory.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let store = |bytes: &[u8]| {
        let digest: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        fs::File::create(blobs.join(&digest)).unwrap().write_all(bytes).unwrap();
        (format!("sha256:{digest}"), bytes.len())
    };
    let (layer, layer_size) = store(&layer);
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"Cmd":["/hello"],"Env":["A=image"]}},"rootfs":{{"type":"layers","diff_ids":["{layer}"]}}}}"#
    );
    let (config, config_size) = store(config.as_bytes());
    let media = "application/vnd.oci.image";
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{media}.manifest.v1+json","config":{{"mediaType":"{media}.config.v1+json","digest":"{config}","size":{config_size}}},"layers":[{{"mediaType":"{media}.layer.v1.tar","digest":"{layer}","size":{layer_size}}}]}}"#
    );
    let (manifest, manifest_size) = store(manifest.as_bytes());
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{media}.manifest.v1+json","digest":"{manifest}","size":{manifest_size}}}]}}"#
    );
    fs::write(directory.join("index.json"), index).unwrap();
    fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}
