//! Compiles `resources/seccomp/monitor.json` to one classic BPF program per kind of thread, so that a start costs no
//! compilation and a policy that does not compile is a build that fails. What is not listed kills, unknown calls too; what is in
//! `fs_absent` is answered to threads that serve files as by a kernel that does not know it.

use std::fmt::Write as _;
use std::path::Path;

fn main() -> anyhow::Result<()> {
    // From this package's folder, in which build scripts run: wherever the tree is.
    let policy = Path::new("../resources/seccomp/monitor.json");
    println!("cargo::rerun-if-changed={}", policy.display());
    println!("cargo::rerun-if-changed=build.rs");
    let mut source = String::new();
    let mut policy = filter::compile(policy)?;
    let absent = policy.take("fs_absent")?;
    for (name, linear) in policy {
        let filters = if name == "fs" { vec![linear, absent.clone()] } else { vec![linear] };
        let program = filter::source(&filter::search(&filters, None)?);
        writeln!(source, "static {}: &[sock_filter] = &{};", name.to_uppercase(), program.trim_end())?;
    }
    Ok(filter::write("monitor.rs", &source)?)
}
