//! Compiles `resources/seccomp/container-default.json` to one classic BPF program, so that nothing is left to do when a
//! container starts but to hand it to the kernel.

use std::path::Path;

use filter::{FilterError, LAST, Unknown};

/// The filters of the profile. The later one wins where it does not allow.
const FILTERS: [&str; 2] = ["allowed", "absent"];

/// What a kernel that is older than a system call says of it (ENOSYS): programs then do without, as they do not after
/// EPERM.
const UNKNOWN: Unknown = Unknown { first: LAST + 1, action: 0x0005_0000 | 38 };

fn main() -> anyhow::Result<()> {
    // From this package's folder, in which build scripts run: wherever the tree is.
    let profile = Path::new("../resources/seccomp/container-default.json");
    println!("cargo::rerun-if-changed={}", profile.display());
    println!("cargo::rerun-if-changed=build.rs");
    let mut compiled = filter::compile(profile)?;
    let filters = FILTERS.into_iter().map(|name| compiled.take(name)).collect::<Result<Vec<_>, FilterError>>()?;
    let program = filter::search(&filters, Some(UNKNOWN))?;
    Ok(filter::write("container_default.rs", &filter::source(&program))?)
}
