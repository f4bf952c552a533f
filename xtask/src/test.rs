//! `cargo xtask test`: everything that must hold before a change is accepted, cheapest first.

use std::ffi::OsString;
use std::process::{ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::build::cargo;
use crate::command::run;
use crate::e2e::{self, e2e};
use crate::{build, cargo_deny, debian, tidy};

/// The database of advisories, as cargo-deny names it.
const ADVISORIES: &str = "https://github.com/RustSec/advisory-db";

/// The whole suite.
pub fn test(filters: &[OsString]) -> Result<ExitCode> {
    step("setup", debian::setup)?;
    step("build", build::build)?;
    check()?;
    step("unit tests", unit)?;
    if step("jail", e2e::jail)? != ExitCode::SUCCESS {
        return Ok(ExitCode::FAILURE);
    }
    e2e(filters)
}

/// What needs no guest and no test run: format, lints, structure, dependencies.
pub fn check() -> Result<()> {
    step("format", || run(cargo().args(["fmt", "--all", "--check"])))?;
    step("lints", || {
        // The programs of fuzz targets, too, but without the fuzzer, which needs another compiler.
        let what = ["clippy", "--quiet", "--workspace", "--all-targets", "--features", "fuzz/engine"];
        run(cargo().args(what).args(["--", "--deny", "warnings"]))
    })?;
    step("structure", tidy::tidy)?;
    step("dependencies", deny)
}

/// Licences, sources and duplicates of what we depend on, by `deny.toml`.
pub fn deny() -> Result<()> {
    run(cargo_deny::command()?.args(["bans", "licenses", "sources"]))
        .context("the dependencies break a rule of deny.toml")
}

/// Whether an advisory of the RustSec database applies to what we depend on. Not a part of [`check`]: the answer is another one
/// when the database is, and it is fetched. `$COFFERDAM_ADVISORIES` is a clone of it to be fetched from instead.
pub fn advisories() -> Result<()> {
    let mut deny = cargo_deny::command()?;
    deny.arg("advisories");
    if let Some(clone) = std::env::var_os("COFFERDAM_ADVISORIES") {
        let clone = std::fs::canonicalize(&clone).with_context(|| format!("cannot find {}", clone.display()))?;
        // git takes the one address for the other (`url.<base>.insteadOf` of git-config(1)).
        deny.env("GIT_CONFIG_COUNT", "1")
            .env("GIT_CONFIG_KEY_0", format!("url.file://{}.insteadOf", clone.display()))
            .env("GIT_CONFIG_VALUE_0", ADVISORIES);
    }
    run(&mut deny).context(
        "an advisory applies to a dependency, or its database cannot be fetched (a clone can be named with \
         COFFERDAM_ADVISORIES)",
    )
}

/// Tests that run anywhere.
fn unit() -> Result<()> {
    let mut command = cargo();
    if cargo_tool("nextest") {
        command.args(["nextest", "run", "--workspace", "--exclude", e2e::PACKAGE]);
    } else {
        command.args(["test", "--quiet", "--workspace", "--exclude", e2e::PACKAGE]);
    }
    run(&mut command)
}

/// Whether `cargo NAME` exists.
fn cargo_tool(name: &str) -> bool {
    cargo()
        .args([name, "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Runs one step between two lines that say what it is and how long it took.
pub fn step<T>(name: &str, perform: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("== {name}");
    let start = Instant::now();
    let result = perform()?;
    eprintln!("== {name}: {:.1} s", start.elapsed().as_secs_f64());
    Ok(result)
}
