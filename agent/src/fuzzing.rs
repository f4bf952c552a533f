//! Readers of what images and users write, for `fuzz`.

pub use crate::container::{read_archive, resolve_user};
