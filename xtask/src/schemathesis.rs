//! Schemathesis, which makes requests of all shapes from the description of the REST API: installed from the Python package
//! index into the cache, in an environment of its own.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::run;
use crate::paths;

/// The version that the tests were written with.
const VERSION: &str = "4.32.5";
/// Written last: without it an installation is not whole.
const COMPLETE: &str = "complete";

/// Installs it when it is not there, and gives the program.
pub fn program() -> Result<PathBuf> {
    let cache = paths::cache()?;
    let folder = cache.join(format!("schemathesis-{VERSION}"));
    let _lock = paths::lock(&cache.join("schemathesis.lock"), "the installation of schemathesis")?;
    let program = folder.join("bin/schemathesis");
    if folder.join(COMPLETE).exists() {
        return Ok(program);
    }
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    // Debian's Python, whichever is first in the path.
    run(Command::new("/usr/bin/python3").args(["-m", "venv"]).arg(&folder))?;
    run(Command::new(folder.join("bin/pip"))
        .args(["install", "--quiet", "--disable-pip-version-check"])
        .arg(format!("schemathesis=={VERSION}")))
    .context("cannot install schemathesis from the Python package index")?;
    fs::write(folder.join(COMPLETE), "").context("cannot write into the cache")?;
    Ok(program)
}
