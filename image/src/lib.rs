//! The image store: pulls OCI images, verifies every digest, and flattens each into one read-only EROFS file that
//! all micro-VMs share.
//!
//! - [`Reference`] names an image in a registry, an OCI layout directory or a `docker save` archive.
//! - [`Store`] is one directory. [`Store::find`] is on the start path of every container and reads two small files;
//!   [`Store::pull`] does everything else.
//! - Whoever holds an [`Image`]'s lease keeps it from being pruned, across processes.
//!
//! Nothing an image or a registry says is trusted: [`Limits`] bounds it, [`Problem`] names what was refused.
#![forbid(unsafe_code)]

mod config;
mod digest;
mod erofs;
mod error;
mod flatten;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod layer;
mod limits;
mod manifest;
mod problem;
mod progress;
mod reference;
mod source;
mod store;
mod tree;

pub use config::ImageConfig;
pub use digest::{Digest, DigestParseError};
pub use error::Error;
pub use limits::Limits;
pub use problem::Problem;
pub use progress::{Phase, Progress, Silent, Step};
pub use reference::{Reference, ReferenceParseError, RegistryReference};
pub use source::RegistryOptions;
pub use store::{Image, Pruned, PullOptions, Removed, Store, Summary};
