//! `cargo xtask test`: everything that must hold before a change is accepted, cheapest first.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::build::cargo;
use crate::command::run;
use crate::lab::{self, LabArgs};
use crate::{build, debian, demo, images, paths, schemathesis, tidy};

/// The package whose tests boot guests.
const E2E_PACKAGE: &str = "tests";
/// How long those may take in the lab, in seconds.
const E2E_LIMIT: u32 = 2100;
/// How often they are begun there, when the lab's machine dies.
const LAB_ATTEMPTS: u32 = 3;
/// Those that boot the most guests. They have a machine of their own in the lab, so that less has to be begun again when it
/// dies.
const LONG_TESTS: [&str; 5] = ["faults::", "hostile::", "jail::", "memory::", "network::"];
/// What runs all of them there.
const LAB_SCRIPT: &str = include_str!("e2e.sh");
/// The lab's memory for them, in MiB: guests, their images, and every file written.
const E2E_MEMORY: u32 = 6144;

/// The whole suite.
pub fn test(filters: &[OsString]) -> Result<ExitCode> {
    step("setup", debian::setup)?;
    step("build", build::build)?;
    check()?;
    step("unit tests", unit)?;
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
    if paths::find_program("cargo-deny").is_some() || cargo_tool("deny") {
        step("dependencies", deny)?;
    } else {
        eprintln!(
            "test: cargo-deny is not installed: `make deny` (after `cargo install cargo-deny`) checks dependencies"
        );
    }
    Ok(())
}

/// Licences, sources and duplicates of what we depend on, by `deny.toml`.
pub fn deny() -> Result<()> {
    run(cargo().args(["deny", "--workspace", "check", "bans", "licenses", "sources"]))
        .context("the dependencies break a rule of deny.toml, or cargo-deny is missing (`cargo install cargo-deny`)")
}

/// Tests that run anywhere.
fn unit() -> Result<()> {
    let mut command = cargo();
    if cargo_tool("nextest") {
        command.args(["nextest", "run", "--workspace", "--exclude", E2E_PACKAGE]);
    } else {
        command.args(["test", "--quiet", "--workspace", "--exclude", E2E_PACKAGE]);
    }
    run(&mut command)
}

/// Tests that boot guests: here when KVM can, else in the lab. The exit code is the last failing program's.
pub fn e2e(filters: &[OsString]) -> Result<ExitCode> {
    let programs = step("end-to-end tests: compile", e2e_programs)?;
    let mut environment = step("end-to-end tests: images", images::environment)?;
    environment.push((tests::HOSTILE_VARIABLE.into(), step("end-to-end tests: hostile agent", hostile_agent)?.into()));
    environment.push((
        tests::SCHEMATHESIS_VARIABLE.into(),
        step("end-to-end tests: schemathesis", schemathesis::program)?.into(),
    ));
    for name in [tests::SOAK_VARIABLE, tests::FAULTS_VARIABLE] {
        environment.extend(std::env::var_os(name).map(|value| (name.into(), value)));
    }
    let here = demo::kvm_runs_guests();
    if !here {
        eprintln!("test: /dev/kvm on this host cannot run guests: running the end-to-end tests in the lab");
    }
    // Where cargo starts tests, too.
    let folder = paths::root().join(E2E_PACKAGE);
    let mut code = ExitCode::SUCCESS;
    let turns = if filters.is_empty() { turns().to_vec() } else { vec![filters.to_vec()] };
    let runs = programs.iter().flat_map(|program| turns.iter().map(move |turn| (program, turn)));
    for (program, turn) in runs {
        // The lab takes no other environment than this process's own.
        let mut command = vec![OsString::from("/usr/bin/env")];
        command.extend(environment.iter().map(|(name, value)| [name, OsStr::new("="), value].join(OsStr::new(""))));
        command.push(program.into());
        command.extend_from_slice(turn);
        if here {
            let status = Command::new(&command[0]).args(&command[1..]).current_dir(&folder).status()?;
            if !status.success() {
                code = ExitCode::FAILURE;
            }
            continue;
        }
        if filters.is_empty() {
            let script = ["/bin/bash", "-c", LAB_SCRIPT, "e2e"].map(OsString::from);
            command.splice(..0, script);
        }
        let in_lab = || {
            let args = LabArgs::for_command(command.clone());
            lab::run(&LabArgs { timeout: E2E_LIMIT, mem: E2E_MEMORY, folder: Some(folder.clone()), ..args })
        };
        // A test that fails is an exit code. A machine that dies is the emulator's doing (docs/STATUS.md): once more.
        let mut ended = in_lab();
        for _ in 1..LAB_ATTEMPTS {
            let Err(error) = &ended else { break };
            eprintln!("test: the lab failed, not a test: {error:#}; running the end-to-end tests once more");
            ended = in_lab();
        }
        let ended = ended?;
        if ended != ExitCode::SUCCESS {
            code = ended;
        }
    }
    Ok(code)
}

/// The arguments of the runs that all tests take together.
fn turns() -> [Vec<OsString>; 2] {
    let others = LONG_TESTS.iter().flat_map(|tests| ["--skip", tests]);
    [LONG_TESTS.iter().map(Into::into).collect(), others.map(Into::into).collect()]
}

/// Compiles the agent that means harm, and gives its path.
fn hostile_agent() -> Result<PathBuf> {
    run(cargo().args(["build", "--package", "agent", "--example", "hostile"]))?;
    Ok(paths::target().join(paths::TARGET).join("debug/examples/hostile"))
}

/// Compiles the end-to-end tests and gives the programs that hold them.
fn e2e_programs() -> Result<Vec<PathBuf>> {
    let output = cargo()
        .args(["test", "--package", E2E_PACKAGE, "--no-run", "--message-format=json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("the end-to-end tests do not compile");
    }
    let text = String::from_utf8(output.stdout).context("cargo did not write UTF-8")?;
    let programs: Vec<PathBuf> = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["kind"] == serde_json::json!(["test"]))
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .collect();
    ensure!(!programs.is_empty(), "the package `{E2E_PACKAGE}` has no end-to-end tests");
    Ok(programs)
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
fn step<T>(name: &str, perform: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("== {name}");
    let start = Instant::now();
    let result = perform()?;
    eprintln!("== {name}: {:.1} s", start.elapsed().as_secs_f64());
    Ok(result)
}
