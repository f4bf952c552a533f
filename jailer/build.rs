//! Compiles `resources/seccomp/monitor.json` to classic BPF, so that a start costs no compilation and a policy that does
//! not compile is a build that fails.

use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

use seccompiler::{BpfMap, TargetArch, compile_from_json};

fn main() {
    let policy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/seccomp/monitor.json");
    println!("cargo::rerun-if-changed={}", policy.display());
    let json = fs::read(&policy).unwrap_or_else(|error| panic!("cannot read {}: {error}", policy.display()));
    let filters: BpfMap = compile_from_json(json.as_slice(), TargetArch::x86_64)
        .unwrap_or_else(|error| panic!("{} does not compile: {error}", policy.display()));
    let mut source = String::new();
    for (name, program) in &filters {
        writeln!(source, "static {}: &[sock_filter] = &[", name.to_uppercase()).expect("a string takes any text");
        for i in program {
            let (code, jt, jf, k) = (i.code, i.jt, i.jf, i.k);
            writeln!(source, "    sock_filter {{ code: {code}, jt: {jt}, jf: {jf}, k: {k} }},")
                .expect("a string takes any text");
        }
        source.push_str("];\n");
    }
    let path = Path::new(&env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("monitor.rs");
    fs::write(&path, source).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
}
