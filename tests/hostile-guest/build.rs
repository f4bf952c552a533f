//! Links the program as a kernel where it is one: at a fixed address, without a C library, without relocations.
//!
//! It is one where panics abort, as in the release profile: a program without the standard library cannot unwind. Elsewhere
//! the same code is a library for its unit tests, and a program that only says so.

fn main() {
    println!("cargo:rerun-if-changed=guest.ld");
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("PROFILE").as_deref() == Ok("release") {
        let folder = std::env::var("CARGO_MANIFEST_DIR").expect("cargo says where the package is");
        for word in
            ["-static", "-no-pie", "-nostdlib", "-nostartfiles", "-Wl,--build-id=none", "-Wl,--no-dynamic-linker"]
        {
            println!("cargo:rustc-link-arg-bins={word}");
        }
        println!("cargo:rustc-link-arg-bins=-Wl,-T{folder}/guest.ld");
        // The core library was compiled to unwind. What it refers to is dropped with what is not called, but not without LTO.
        println!("cargo:rustc-link-arg-bins=-Wl,--defsym=rust_eh_personality=0");
    }
}
