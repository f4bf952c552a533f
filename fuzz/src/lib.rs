//! Fuzz targets: for everything that reads what a guest, an image, a registry, an agent, a monitor or a file says.
//!
//! - [`TARGETS`] is the table of them; a target is a function of bytes, and the first thing wrong is a panic.
//! - [`devices`]: each virtio device behind its transport, in the monitor's event loop, with a driver that does what the
//!   bytes say.
//! - [`server`], [`client`]: a monitor's API with its agent, and what a front end makes of a monitor's answers.
//! - [`files`]: what a guest asks of a file system.
//! - [`image`], [`archives`], [`documents`]: images, archives that go in and out of containers, and everything smaller.
//! - [`mutate`]: generated inputs for where there is no fuzzer.
//!
//! `fuzz_targets/` holds a program for each, linked with libFuzzer (`cargo xtask fuzz`); `tests/smoke.rs` runs all of them
//! over `seeds/` and some thousand inputs made of those. `docs/security/fuzzing.md` says what each covers.

#![forbid(unsafe_code)]

pub mod archives;
pub mod client;
pub mod devices;
pub mod documents;
pub mod files;
pub mod image;
mod input;
pub mod mutate;
pub mod samples;
mod scratch;
pub mod server;

use std::alloc::System;

use cap::Cap;

/// What a process with a target in it may hold at once, in bytes: the fuzzer's own memory is not counted. What asks for more
/// is a finding, and the process ends.
pub const MEMORY_MAX: usize = 256 << 20;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, MEMORY_MAX);

/// A target.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name: of its program, and of the folder of its seeds.
    pub name: &'static str,
    /// What is done with an input.
    pub run: fn(&[u8]),
    /// How many generated inputs the smoke test makes: a second's worth of an unoptimized build.
    pub smoke: u32,
}

macro_rules! targets {
    ($($name:ident, $run:path, $smoke:literal;)*) => {
        /// All targets.
        pub const TARGETS: &[Target] =
            &[$(Target { name: stringify!($name), run: $run, smoke: $smoke }),*];
    };
}

targets! {
    balloon, devices::balloon, 3000;
    blk, devices::blk, 2000;
    console, devices::console, 3000;
    device_state, devices::device_state, 1500;
    fs, devices::fs, 1500;
    limits, devices::limits, 5000;
    mem, devices::mem, 3000;
    net, devices::net, 2000;
    pmem, devices::pmem, 3000;
    rng, devices::rng, 3000;
    serial, devices::serial, 5000;
    vsock, devices::vsock, 2000;
    agent_archive, archives::agent, 5000;
    agent_message, documents::agent_message, 5000;
    agent_user, documents::agent_user, 5000;
    cli_archive, archives::cli, 1500;
    client_answer, client::answer, 1500;
    client_output, client::output, 5000;
    container_record, documents::container_record, 1500;
    env_file, documents::env_file, 3000;
    fuse_message, files::messages, 1500;
    host_message, documents::host_message, 5000;
    image_archive, image::archive, 1500;
    image_document, image::document, 5000;
    image_layer, image::layer, 1500;
    image_layout, image::layout, 1500;
    launch_config, documents::launch_config, 5000;
    log, documents::log, 3000;
    proc_text, documents::proc_text, 5000;
    server, server::session, 800;
    words, documents::words, 5000;
}

/// The target of this name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// Runs an input of the target of this name.
///
/// # Panics
/// Something is wrong, or there is no such target.
pub fn run(name: &str, bytes: &[u8]) {
    (target(name).expect("the target is in the table").run)(bytes);
}
