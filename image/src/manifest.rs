//! Manifests and indexes (OCI Image Specification, "Image Manifest" and "Image Index"; docker's schema 2).

use oci_spec::image::{Arch, Descriptor, ImageIndex, ImageManifest, Os};
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::config::PLATFORM;
use crate::digest::Digest;
use crate::error::Error;
use crate::limits::{DOCUMENT_BYTES_MAX, LAYERS_MAX};

/// Media types a client accepts for a manifest.
pub(crate) const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";

/// Indexes inside indexes: two levels are in use (attestations, multi-arch layouts).
pub(crate) const INDEX_DEPTH_MAX: usize = 4;

/// What media types of layers begin with; compression is told by their first bytes.
const LAYER_TYPES: [&str; 4] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
];

/// A manifest, or the way to one.
pub(crate) enum Document {
    Index(Box<ImageIndex>),
    Manifest(Manifest),
}

/// What a manifest points to.
#[derive(Clone, Debug)]
pub(crate) struct Manifest {
    pub(crate) config: Blob,
    pub(crate) layers: Vec<Blob>,
}

/// Content by digest and size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Blob {
    pub(crate) digest: Digest,
    pub(crate) bytes: u64,
}

impl Blob {
    /// Reads a descriptor; `what` names where it stands.
    ///
    /// # Errors
    /// Its digest is not SHA-256.
    pub(crate) fn from_descriptor(descriptor: &Descriptor, what: &str) -> Result<Blob, Error> {
        let digest = descriptor.digest().to_string();
        let digest = digest.parse().map_err(|error: crate::DigestParseError| Error::Malformed {
            what: what.to_owned(),
            reason: error.to_string(),
        })?;
        Ok(Blob { digest, bytes: descriptor.size() })
    }
}

/// Fields that tell one kind of document from the other.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Probe {
    schema_version: Option<u64>,
    manifests: Option<IgnoredAny>,
    layers: Option<IgnoredAny>,
}

impl Document {
    /// Reads a manifest or index; `what` names it in errors.
    ///
    /// # Errors
    /// It is neither, or both, or of a kind that is not supported.
    pub(crate) fn parse(bytes: &[u8], what: &str) -> Result<Document, Error> {
        let json = |source| Error::Json { what: what.to_owned(), source };
        let malformed = |reason: &str| Error::Malformed { what: what.to_owned(), reason: reason.to_owned() };
        let probe: Probe = serde_json::from_slice(bytes).map_err(json)?;
        match (probe.schema_version, probe.manifests, probe.layers) {
            (Some(2), Some(_), None) => serde_json::from_slice(bytes).map(Document::Index).map_err(json),
            (Some(2), None, Some(_)) => {
                let manifest: ImageManifest = serde_json::from_slice(bytes).map_err(json)?;
                Manifest::new(&manifest, what).map(Document::Manifest)
            }
            (Some(2), Some(_), Some(_)) => Err(malformed("it is a manifest and an index at once")),
            (Some(1), ..) => {
                Err(malformed("it has docker's schema 1, which was replaced in 2016; push the image again"))
            }
            _ => Err(malformed("it is neither a manifest nor an index")),
        }
    }
}

impl Manifest {
    fn new(manifest: &ImageManifest, what: &str) -> Result<Manifest, Error> {
        let malformed = |reason: String| Error::Malformed { what: what.to_owned(), reason };
        if manifest.layers().len() > LAYERS_MAX {
            return Err(malformed(format!(
                "it has {} layers, at most {LAYERS_MAX} are possible",
                manifest.layers().len()
            )));
        }
        for layer in manifest.layers() {
            let media_type = layer.media_type().to_string();
            let known = LAYER_TYPES.iter().any(|known| {
                media_type
                    .strip_prefix(known)
                    .is_some_and(|rest| matches!(rest, "" | "+gzip" | "+zstd" | ".gzip" | ".zstd"))
            });
            if !known {
                return Err(malformed(format!("layers of type `{}` are no image", media_type.escape_debug())));
            }
        }
        let config = Blob::from_descriptor(manifest.config(), what)?;
        config.check_document("the image configuration")?;
        let layers = manifest.layers().iter().map(|layer| Blob::from_descriptor(layer, what));
        Ok(Manifest { config, layers: layers.collect::<Result<_, _>>()? })
    }
}

impl Blob {
    /// Checks the size of what will be read into memory.
    ///
    /// # Errors
    /// It is too large for a document.
    pub(crate) fn check_document(&self, what: &str) -> Result<(), Error> {
        if self.bytes > DOCUMENT_BYTES_MAX {
            return Err(Error::TooLarge { what: what.to_owned(), bytes: self.bytes, limit: DOCUMENT_BYTES_MAX });
        }
        Ok(())
    }
}

/// The entry of an index for this host's platform. Entries without platform may be for any.
///
/// # Errors
/// There is none.
pub(crate) fn choose<'a>(
    entries: impl IntoIterator<Item = &'a Descriptor> + Clone,
    reference: &str,
) -> Result<&'a Descriptor, Error> {
    let fits = |entry: &&Descriptor| {
        entry.platform().as_ref().is_some_and(|p| *p.os() == Os::Linux && *p.architecture() == Arch::Amd64)
    };
    // v2 and up ask for instructions that not every amd64 machine has; a plain entry runs everywhere.
    let plain = |entry: &&Descriptor| {
        entry.platform().as_ref().is_some_and(|p| matches!(p.variant().as_deref(), None | Some("" | "v1")))
    };
    let candidates = || entries.clone().into_iter().filter(fits);
    let chosen = candidates().find(plain).or_else(|| candidates().next());
    let chosen = chosen.or_else(|| entries.clone().into_iter().find(|entry| entry.platform().is_none()));
    chosen.ok_or_else(|| {
        let platforms = entries.clone().into_iter().filter_map(|entry| entry.platform().as_ref());
        let mut found: Vec<_> = platforms.map(|p| format!("{}/{}", p.os(), p.architecture())).collect();
        found.retain(|platform| platform != "unknown/unknown");
        found.dedup();
        found.truncate(8);
        let found = if found.is_empty() { "no platform".to_owned() } else { found.join(", ") };
        Error::WrongPlatform { reference: reference.to_owned(), found: found.escape_debug().to_string() }
    })
}

/// Checks a configuration's platform.
///
/// # Errors
/// It is for another one.
pub(crate) fn check_platform(platform: &str, reference: &str) -> Result<(), Error> {
    if platform == PLATFORM {
        return Ok(());
    }
    let found = platform.chars().take(100).collect::<String>().escape_debug().to_string();
    Err(Error::WrongPlatform { reference: reference.to_owned(), found })
}
