//! Where images come from. Each source resolves a reference to a configuration and layers, then hands out the
//! layers in order.

mod archive;
mod credentials;
mod files;
mod layout;
mod registry;

use std::io::Read;
use std::path::Path;

pub use registry::RegistryOptions;

use crate::config::ParsedConfig;
use crate::digest::Digest;
use crate::error::Error;
use crate::progress::Progress;
use crate::reference::Reference;
use crate::store::{Paths, PullOptions};

/// An image, found but not yet unpacked.
#[derive(Debug)]
pub(crate) struct Resolved {
    /// Digest of the image configuration: the image's id.
    pub(crate) id: Digest,
    /// Digest of the manifest. An archive of docker's own format has none; the id stands for it.
    pub(crate) manifest_digest: Digest,
    pub(crate) config: ParsedConfig,
    pub(crate) layers: Vec<LayerRef>,
}

/// A layer as its source describes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerRef {
    /// Digest of the bytes as they come; archives of docker's own format have none, there the diff_id must do.
    pub(crate) digest: Option<Digest>,
    pub(crate) bytes: u64,
}

impl LayerRef {
    /// What to call it.
    pub(crate) fn name(&self, diff_id: Digest) -> Digest {
        self.digest.unwrap_or(diff_id)
    }
}

/// What is done with each layer: its number from the lowest, and its bytes.
pub(crate) type Apply<'a> = dyn FnMut(usize, &mut (dyn Read + Send)) -> Result<(), Error> + 'a;

/// A resolved image whose layers can be read.
pub(crate) trait Source {
    /// Hands every layer to `apply`, the lowest first. Sizes and digests are checked by `apply`.
    ///
    /// # Errors
    /// Those of `apply`, or a layer can't be had.
    fn each_layer(&mut self, progress: &dyn Progress, apply: &mut Apply<'_>) -> Result<(), Error>;

    /// Drops what was only kept to go on after an interruption.
    fn discard(&mut self) {}
}

/// Finds the image a reference names.
///
/// # Errors
/// There is none, it is for another platform, or what describes it is malformed.
pub(crate) fn resolve(
    reference: &Reference,
    options: &PullOptions,
    paths: &Paths,
) -> Result<(Box<dyn Source>, Resolved), Error> {
    let (source, resolved): (Box<dyn Source>, Resolved) = match reference {
        Reference::Registry(reference) => registry::resolve(reference, options, paths)?,
        Reference::OciLayout { dir, tag } => layout::resolve(files::Files::directory(dir), tag.as_deref(), reference)?,
        Reference::DockerArchive { file, name } => archive::resolve(file, name.as_deref(), reference, paths, options)?,
    };
    crate::manifest::check_platform(&resolved.config.platform, &reference.to_string())?;
    let limit = options.limits.unpacked_bytes;
    for (layer, diff_id) in resolved.layers.iter().zip(&resolved.config.diff_ids) {
        if layer.bytes > limit {
            return Err(Error::TooLarge { what: format!("layer {}", layer.name(*diff_id)), bytes: layer.bytes, limit });
        }
    }
    Ok((source, resolved))
}

/// A short text that changes when a local source does; `None` for registries, which are only asked on demand.
///
/// # Errors
/// The source can't be read.
pub(crate) fn stamp(reference: &Reference) -> Result<Option<String>, Error> {
    match reference {
        Reference::Registry(_) => Ok(None),
        Reference::OciLayout { dir, .. } => files::Files::directory(dir).stamp(Path::new(layout::INDEX)).map(Some),
        Reference::DockerArchive { file, .. } => files::file_stamp(file).map(Some),
    }
}
