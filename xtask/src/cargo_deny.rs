//! cargo-deny, which checks licences, sources and advisories of what we depend on: built from its published source into the
//! cache, unless it is installed already.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::build::cargo;
use crate::command::run;
use crate::paths;

/// The version whose rules `deny.toml` was written for.
const VERSION: &str = "0.20.2";

/// A command of it, to be given its words.
pub fn command() -> Result<Command> {
    let mut command = Command::new(program()?);
    // It asks the cargo that is in the path, and only for what is in the tree.
    command.current_dir(paths::root()).args(["--workspace", "check"]);
    Ok(command)
}

fn program() -> Result<PathBuf> {
    if let Some(installed) = paths::find_program("cargo-deny") {
        return Ok(installed);
    }
    let cache = paths::cache()?;
    let folder = cache.join(format!("cargo-deny-{VERSION}"));
    let program = folder.join("bin/cargo-deny");
    let _lock = paths::lock(&cache.join("cargo-deny.lock"), "the installation of cargo-deny")?;
    if !program.exists() {
        // cargo puts the program there last. Unoptimized: it is built more often than it is run.
        let words = ["install", "--quiet", "--locked", "--debug", "cargo-deny", "--version", VERSION, "--root"];
        run(cargo().args(words).arg(&folder)).context("cannot build cargo-deny: is the package registry reachable?")?;
    }
    Ok(program)
}
