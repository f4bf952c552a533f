//! OCI image layouts (image-layout.md of the OCI image specification): images in a directory.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The type of an image's manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// How a layer is compressed.
#[derive(Clone, Copy, Debug)]
pub enum Compression {
    /// Not at all.
    None,
    /// As gzip does it.
    Gzip,
    /// As zstd does it.
    Zstd,
}

/// An image layout that is being written.
pub struct Layout {
    folder: PathBuf,
    manifests: Vec<Value>,
}

/// A layer in a layout.
#[derive(Clone)]
pub struct LayerBlob {
    descriptor: Value,
    diff_id: String,
}

impl LayerBlob {
    /// The digest of the bytes as stored.
    #[must_use]
    pub fn digest(&self) -> &str {
        self.descriptor["digest"].as_str().unwrap_or_default()
    }
}

impl Layout {
    /// Makes a layout without images.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn create(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder.join("blobs/sha256"))
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let layout = Self { folder: folder.to_owned(), manifests: Vec::new() };
        layout.write("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(layout)
    }

    /// Stores a layer.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn layer(&self, tar: &[u8], compression: Compression) -> Result<LayerBlob> {
        let diff_id = digest(tar);
        let (suffix, bytes) = match compression {
            Compression::None => ("", tar.to_owned()),
            Compression::Gzip => {
                // Speed counts more than size: images are made on every fresh machine.
                let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::new(2));
                encoder.write_all(tar)?;
                ("+gzip", encoder.finish()?)
            }
            Compression::Zstd => ("+zstd", zstd::encode_all(tar, 3)?),
        };
        let descriptor = self.blob(&format!("application/vnd.oci.image.layer.v1.tar{suffix}"), &bytes)?;
        Ok(LayerBlob { descriptor, diff_id })
    }

    /// Stores an image under a tag. `config` is what a container of it starts with by default (`Env`, `Cmd`, …).
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn image(&mut self, tag: &str, architecture: &str, config: &Value, layers: &[LayerBlob]) -> Result<()> {
        let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        let config = json!({
            "architecture": architecture,
            "os": "linux",
            "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = self.blob("application/vnd.oci.image.config.v1+json", &serde_json::to_vec(&config)?)?;
        let layers: Vec<&Value> = layers.iter().map(|layer| &layer.descriptor).collect();
        let manifest = json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers });
        let mut descriptor = self.blob(MANIFEST, &serde_json::to_vec(&manifest)?)?;
        descriptor["platform"] = json!({ "architecture": architecture, "os": "linux" });
        descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
        self.manifests.push(descriptor);
        let index = json!({ "schemaVersion": 2, "manifests": self.manifests });
        self.write("index.json", &serde_json::to_vec_pretty(&index)?)
    }

    /// Stores a blob and gives its descriptor.
    fn blob(&self, media_type: &str, bytes: &[u8]) -> Result<Value> {
        let digest = digest(bytes);
        self.write(&format!("blobs/sha256/{}", digest.trim_start_matches("sha256:")), bytes)?;
        Ok(json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() }))
    }

    /// Where the blob with a digest is.
    #[must_use]
    pub fn path(&self, digest: &str) -> PathBuf {
        self.folder.join("blobs/sha256").join(digest.trim_start_matches("sha256:"))
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.folder.join(name);
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// The digest of some bytes, in the form `sha256:…`.
#[must_use]
pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}
