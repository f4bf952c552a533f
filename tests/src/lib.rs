//! What the end-to-end tests stand on: images made from Debian packages, a registry to pull them from, and the
//! `cofferdam` command run in a place of its own that must be empty afterwards.

#![forbid(unsafe_code)]

pub mod images;
pub mod layer;
pub mod layout;
pub mod process;
pub mod proxy;
pub mod pty;
pub mod registry;
pub mod sandbox;

use std::time::{Duration, Instant};

/// Names the folder that `cargo xtask e2e` has prepared for the tests.
pub const FOLDER_VARIABLE: &str = "COFFERDAM_E2E";
/// Names the folder with the programs to test, the guest kernel and the initramfs.
pub const PROGRAMS_VARIABLE: &str = "COFFERDAM_BIN";
/// Names the program of an agent that means harm.
pub const HOSTILE_VARIABLE: &str = "COFFERDAM_HOSTILE_AGENT";
/// Names the kernel of a guest that means harm.
pub const HOSTILE_GUEST_VARIABLE: &str = "COFFERDAM_HOSTILE_GUEST";
/// Says how many cases of each seed that guest plays.
pub const HOSTILE_CASES_VARIABLE: &str = "COFFERDAM_HOSTILE_CASES";
/// Says how many rounds a soak has.
pub const SOAK_VARIABLE: &str = "COFFERDAM_SOAK";
/// The environment variable that has the tests of faults try every step, when it is `all`, and not each fifth one.
pub const FAULTS_VARIABLE: &str = "COFFERDAM_FAULTS";
/// Names the program of schemathesis.
pub const SCHEMATHESIS_VARIABLE: &str = "COFFERDAM_SCHEMATHESIS";
/// In the prepared folder: a store that holds all images already.
pub const STORE: &str = "store";
/// In the prepared folder: the storage of a registry that holds all images.
pub const STORAGE: &str = "registry";
/// In the prepared folder: a JSON object from repositories to the references under which the store has them.
pub const REFERENCES: &str = "references.json";

/// How long a guest may take to do as it is asked, in the slowest lab.
const PATIENCE: Duration = Duration::from_secs(120);

/// Waits until `look` finds what it looks for.
///
/// # Panics
/// It does not come about in two minutes.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "{what} did not come about in {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}
