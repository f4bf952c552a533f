//! Compiles `resources/seccomp/monitor.json` to one classic BPF program per kind of thread, so that a start costs no
//! compilation and a policy that does not compile is a build that fails. What is not listed kills, unknown calls too.

use std::fmt::Write as _;
use std::path::Path;
use std::slice;

fn main() -> anyhow::Result<()> {
    // From this package's folder, in which build scripts run: wherever the tree is.
    let policy = Path::new("../resources/seccomp/monitor.json");
    println!("cargo::rerun-if-changed={}", policy.display());
    println!("cargo::rerun-if-changed=build.rs");
    let mut source = String::new();
    for (name, linear) in filter::compile(policy)? {
        let program = filter::source(&filter::search(slice::from_ref(&linear), None)?);
        writeln!(source, "static {}: &[sock_filter] = &{};", name.to_uppercase(), program.trim_end())?;
    }
    Ok(filter::write("monitor.rs", &source)?)
}
