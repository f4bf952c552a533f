//! Compiles `resources/seccomp/container-default.json` to classic BPF, so that nothing is left to do when a container
//! starts but to hand the programs to the kernel.

use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

use seccompiler::{BpfMap, TargetArch, compile_from_json};

/// The filters of the profile, in the order in which they are installed. The kernel takes the strictest answer.
const FILTERS: [&str; 2] = ["allowed", "absent"];

fn main() {
    let profile = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/seccomp/container-default.json");
    println!("cargo::rerun-if-changed={}", profile.display());
    let json = fs::read(&profile).unwrap_or_else(|error| panic!("cannot read {}: {error}", profile.display()));
    let filters: BpfMap = compile_from_json(json.as_slice(), TargetArch::x86_64)
        .unwrap_or_else(|error| panic!("{} does not compile: {error}", profile.display()));
    let mut source = String::from("[\n");
    for name in FILTERS {
        let program = filters.get(name).unwrap_or_else(|| panic!("{} has no filter {name:?}", profile.display()));
        source.push_str("    &[\n");
        for i in program {
            let (code, jt, jf, k) = (i.code, i.jt, i.jf, i.k);
            writeln!(source, "        sock_filter {{ code: {code}, jt: {jt}, jf: {jf}, k: {k} }},")
                .expect("a string takes any text");
        }
        source.push_str("    ],\n");
    }
    source.push_str("]\n");
    let path = Path::new(&env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("container_default.rs");
    fs::write(&path, source).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
}
