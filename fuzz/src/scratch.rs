//! Places for files, in memory where the system has such a place.

use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use rustix::fs::MemfdFlags;
use tempfile::TempDir;

/// Where temporary files are in memory.
const MEMORY: &str = "/dev/shm";

/// A folder that is ours alone, and goes when it is dropped.
pub fn folder() -> TempDir {
    let place = Path::new(MEMORY);
    let place = if place.is_dir() { place.to_owned() } else { std::env::temp_dir() };
    let mut builder = tempfile::Builder::new();
    builder.prefix("cofferdam-fuzz-").permissions(Permissions::from_mode(0o700));
    builder.tempdir_in(place).expect("a temporary folder can be made")
}

/// A file without a name that holds `bytes`.
pub fn file(length: u64) -> File {
    let file = File::from(rustix::fs::memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a file in memory can be made"));
    file.set_len(length).expect("a file in memory can grow");
    file
}
