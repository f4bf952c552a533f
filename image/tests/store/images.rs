//! Builds images for the tests: layers byte by byte, so that they can be as wrong as a hostile author likes.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use image::Digest;
use serde_json::json;
use tar::{EntryType, Header};

/// How a layer is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    None,
    Gzip,
    Zstd,
}

/// A tar archive under construction.
#[derive(Clone, Default)]
pub struct Layer {
    bytes: Vec<u8>,
}

impl Layer {
    pub fn new() -> Layer {
        Layer::default()
    }

    /// Any entry; names go into the header as they are.
    pub fn entry(mut self, kind: EntryType, path: &[u8], link: &[u8], data: &[u8], edit: fn(&mut Header)) -> Self {
        for (long, kind) in [(path, EntryType::GNULongName), (link, EntryType::GNULongLink)] {
            if long.len() > 100 {
                let mut terminated = long.to_vec();
                terminated.push(0);
                self = self.entry(kind, b"././@LongLink", b"", &terminated, |_| {});
            }
        }
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(if kind == EntryType::Directory { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        header.set_size(data.len() as u64);
        let old = header.as_old_mut();
        let (path, link) = (&path[..path.len().min(100)], &link[..link.len().min(100)]);
        old.name[..path.len()].copy_from_slice(path);
        old.linkname[..link.len()].copy_from_slice(link);
        edit(&mut header);
        header.set_cksum();
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    pub fn file(self, path: &str, data: &[u8]) -> Self {
        self.entry(EntryType::Regular, path.as_bytes(), b"", data, |_| {})
    }

    pub fn directory(self, path: &str) -> Self {
        self.entry(EntryType::Directory, path.as_bytes(), b"", b"", |_| {})
    }

    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, path.as_bytes(), target.as_bytes(), b"", |_| {})
    }

    pub fn hard_link(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Link, path.as_bytes(), target.as_bytes(), b"", |_| {})
    }

    pub fn device(mut self, path: &str, kind: EntryType, major: u32, minor: u32) -> Self {
        let start = self.bytes.len();
        self = self.entry(kind, path.as_bytes(), b"", b"", |_| {});
        let mut header = Header::new_gnu();
        header.as_mut_bytes().copy_from_slice(&self.bytes[start..]);
        header.set_device_major(major).unwrap();
        header.set_device_minor(minor).unwrap();
        header.set_cksum();
        self.bytes.truncate(start);
        self.raw(header.as_bytes())
    }

    /// An extended header for the entry that follows.
    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            write!(data, "{length} {key}=").unwrap();
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        self.entry(EntryType::XHeader, b"PaxHeaders.0/x", b"", &data, |_| {})
    }

    /// Bytes that are no entry at all.
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// The archive with its end marker.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.extend_from_slice(&[0; 1024]);
        self.bytes
    }
}

/// An image: what its blobs are named by, and the blobs.
#[derive(Clone)]
pub struct TestImage {
    pub blobs: BTreeMap<Digest, Vec<u8>>,
    pub manifest: Digest,
    pub config: Digest,
    pub layers: Vec<Digest>,
    pub archives: Vec<Vec<u8>>,
}

pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

impl TestImage {
    /// An image of tar archives, each compressed in its way, for linux and an architecture.
    pub fn new(layers: &[(Vec<u8>, Compression)], architecture: &str) -> TestImage {
        let mut blobs = BTreeMap::new();
        let mut add = |bytes: Vec<u8>| {
            let digest = Digest::of(&bytes);
            blobs.insert(digest, bytes);
            digest
        };
        let mut descriptors = Vec::new();
        let mut digests = Vec::new();
        for (archive, compression) in layers {
            let bytes = compress(archive, *compression);
            let size = bytes.len();
            let digest = add(bytes);
            let suffix = match compression {
                Compression::None => "",
                Compression::Gzip => "+gzip",
                Compression::Zstd => "+zstd",
            };
            let media_type = format!("application/vnd.oci.image.layer.v1.tar{suffix}");
            descriptors.push(json!({"mediaType": media_type, "digest": digest, "size": size}));
            digests.push(digest);
        }
        let diff_ids: Vec<_> = layers.iter().map(|(archive, _)| Digest::of(archive)).collect();
        let config = json!({
            "architecture": architecture, "os": "linux", "created": "2024-01-02T03:04:05Z",
            "config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"], "User": "1:2", "WorkingDir": "/srv",
                       "Labels": {"a": "b"}, "StopSignal": "SIGINT"},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = serde_json::to_vec(&config).unwrap();
        let config_size = config.len();
        let config = add(config);
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST_TYPE,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": config_size},
            "layers": descriptors,
        });
        let manifest = add(serde_json::to_vec(&manifest).unwrap());
        let archives = layers.iter().map(|(archive, _)| archive.clone()).collect();
        TestImage { blobs, manifest, config, layers: digests, archives }
    }

    /// One layer, gzip.
    pub fn single(layer: Layer) -> TestImage {
        TestImage::new(&[(layer.finish(), Compression::Gzip)], "amd64")
    }

    /// Writes an OCI layout with one tag. Existing blobs are replaced, entries of the index kept.
    pub fn write_layout(&self, directory: &Path, tag: &str) {
        let blobs = directory.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        for (digest, bytes) in &self.blobs {
            std::fs::write(blobs.join(digest.hex()), bytes).unwrap();
        }
        let path = directory.join("index.json");
        let mut index = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap(),
            Err(_) => json!({"schemaVersion": 2, "manifests": []}),
        };
        index["manifests"].as_array_mut().unwrap().push(json!({
            "mediaType": MANIFEST_TYPE, "digest": self.manifest, "size": self.blobs[&self.manifest].len(),
            "annotations": {"org.opencontainers.image.ref.name": tag},
        }));
        std::fs::write(path, serde_json::to_vec(&index).unwrap()).unwrap();
    }

    /// What `docker save` wrote before version 25: one directory for each layer.
    pub fn legacy_archive(&self, tags: &[&str]) -> Vec<u8> {
        let mut archive = Layer::new();
        let mut names = Vec::new();
        for bytes in &self.archives {
            let id = Digest::of(bytes).hex();
            let name = format!("{id}/layer.tar");
            archive = archive.directory(&id).file(&format!("{id}/VERSION"), b"1.0").file(&name, bytes);
            names.push(name);
        }
        let config = format!("{}.json", self.config.hex());
        let manifest = json!([{"Config": config, "RepoTags": tags, "Layers": names}]);
        archive
            .file(&config, &self.blobs[&self.config])
            .file("manifest.json", &serde_json::to_vec(&manifest).unwrap())
            .finish()
    }

    /// An OCI layout in a tar archive, with docker's `manifest.json` beside it if `with_manifest`.
    pub fn oci_archive(&self, tag: &str, with_manifest: bool) -> Vec<u8> {
        let directory = tempfile::tempdir().unwrap();
        self.write_layout(directory.path(), tag);
        let mut archive = Layer::new().directory("blobs").directory("blobs/sha256");
        for name in ["oci-layout", "index.json"] {
            archive = archive.file(name, &std::fs::read(directory.path().join(name)).unwrap());
        }
        for (digest, bytes) in &self.blobs {
            archive = archive.file(&format!("blobs/sha256/{}", digest.hex()), bytes);
        }
        if with_manifest {
            let blob = |digest: &Digest| format!("blobs/sha256/{}", digest.hex());
            let layers: Vec<_> = self.layers.iter().map(blob).collect();
            let manifest = json!([{"Config": blob(&self.config), "RepoTags": [format!("x:{tag}")], "Layers": layers}]);
            archive = archive.file("manifest.json", &serde_json::to_vec(&manifest).unwrap());
        }
        archive.finish()
    }
}

pub fn compress(bytes: &[u8], compression: Compression) -> Vec<u8> {
    match compression {
        Compression::None => bytes.to_vec(),
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        Compression::Zstd => zstd::encode_all(bytes, 1).unwrap(),
    }
}
