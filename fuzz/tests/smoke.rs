//! Every target over its seeds and over inputs that are made of them, on any machine: a crash that is easily found is found
//! by whoever made it. `cargo xtask fuzz` looks for the others.

use std::fs;
use std::panic;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use fuzz::mutate::Mutator;
use fuzz::{TARGETS, Target, target};

/// The first panic, of whatever thread: of a task or a thread of the code under test nobody else may hear.
static PANIC: Mutex<Option<String>> = Mutex::new(None);

fn seeds(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(name);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|file| fs::read(file).unwrap()).collect()
}

/// Runs an input; a panic of any thread leaves it in a file, and fails.
fn check(target: &Target, bytes: &[u8]) {
    let ended = panic::catch_unwind(|| (target.run)(bytes));
    let found = PANIC.lock().unwrap_or_else(|error| error.into_inner()).take();
    if ended.is_err() || found.is_some() {
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}.input", target.name));
        fs::write(&file, bytes).unwrap();
        let found = found.unwrap_or_default();
        panic!("{found}: `cargo xtask fuzz --reproduce {} {}`", target.name, file.display());
    }
}

fn smoke(name: &str) {
    panic::set_hook(Box::new(|info| {
        eprintln!("{info}");
        PANIC.lock().unwrap_or_else(|error| error.into_inner()).get_or_insert(info.to_string());
    }));
    let target = target(name).unwrap();
    let seeds = seeds(name);
    assert!(!seeds.is_empty(), "{name} has no seeds: `cargo run --package fuzz --example seeds`");
    check(target, &[]);
    for seed in &seeds {
        check(target, seed);
    }
    let mut mutator = Mutator::new(1);
    for _ in 0..target.smoke {
        check(target, &mutator.make(&seeds));
    }
}

macro_rules! smoke {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                smoke(stringify!($name));
            }
        )*

        #[test]
        fn every_target_is_in_the_table_and_has_a_program() {
            let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(names, [$(stringify!($name)),*]);
            for name in names {
                let program = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fuzz_targets/{name}.rs"));
                let text = fs::read_to_string(&program).unwrap_or_default();
                assert!(text.contains(&format!("\"{name}\"")), "{} does not run {name}", program.display());
            }
        }
    };
}

smoke! {
    balloon blk console device_state fs limits mem net pmem rng serial vsock
    agent_archive agent_message agent_user cli_archive client_answer client_output container_record env_file fuse_message host_message
    image_archive image_document image_layer image_layout launch_config log proc_text server words
}
