//! The end-to-end tests: compiled on the host, run where KVM runs guests.
//!
//! In the lab they are run in turns, and a turn can be continued. The emulator has faults of its own (docs/STATUS.md): its
//! machine dies or stands still now and then, and it loses a guest now and then, which stands still or ends without a word. What
//! has no result because of its machine, and a test that failed with one of the messages that a lost guest has, is run again; any
//! other failure is one. What each test said is read from a copy of the output that outlives the machine.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::build::cargo;
use crate::command::{output, run};
use crate::lab::{self, LabArgs};
use crate::test::step;
use crate::{demo, images, paths, schemathesis};

/// The package whose tests boot guests.
pub const PACKAGE: &str = "tests";
/// How long a turn may take in the lab, in seconds.
const LIMIT: u32 = 2100;
/// How long one may take that does more than usual, because somebody asked for it.
const LIMIT_LONGER: u32 = 4 * 3600;
/// The variables that ask for more.
const MORE: [&str; 3] = [::tests::SOAK_VARIABLE, ::tests::FAULTS_VARIABLE, ::tests::HOSTILE_CASES_VARIABLE];
/// The lab's memory for them, in MiB: guests, their images, and every file written.
const MEMORY: u32 = 6144;
/// How many machines a turn may take.
const MACHINES: u32 = 5;
/// How many tests of a turn may lose a guest. More of them would be a fault of the monitor.
const LOST: usize = 4;
/// What a test says that lost a guest: nobody answers, or the guest has ended. A wrong answer is none of these.
const LOST_MESSAGES: [&str; 4] =
    ["agent did not report in time", "agent did not answer within", "does not end: ", ": the guest shut down"];
/// The tests that boot the most guests: a turn of their own, so that a machine is not used for too long.
const LONG_TESTS: [&str; 6] = ["faults::", "hostile::", "hostile_guest::", "jail::", "memory::", "network::"];

/// Runs the tests whose names contain one of the filters, with the harness's options among them; all, with none.
pub fn e2e(filters: &[OsString]) -> Result<ExitCode> {
    let programs = step("end-to-end tests: compile", || programs(&["--package", PACKAGE]))?;
    let mut environment = step("end-to-end tests: images", images::environment)?;
    environment
        .push((::tests::HOSTILE_VARIABLE.into(), step("end-to-end tests: hostile agent", hostile_agent)?.into()));
    environment.push((
        ::tests::SCHEMATHESIS_VARIABLE.into(),
        step("end-to-end tests: schemathesis", schemathesis::program)?.into(),
    ));
    environment
        .push((::tests::HOSTILE_GUEST_VARIABLE.into(), step("end-to-end tests: hostile guest", hostile_guest)?.into()));
    for name in MORE {
        environment.extend(std::env::var_os(name).map(|value| (name.into(), value)));
    }
    let here = demo::kvm_runs_guests();
    if !here {
        eprintln!("test: /dev/kvm on this host cannot run guests: running the end-to-end tests in the lab");
    }
    let mut passed = true;
    for program in programs {
        let harness = Harness { program, environment: &environment };
        if here || !filters.is_empty() {
            passed &= harness.run(filters, here)? == ExitCode::SUCCESS;
            continue;
        }
        let (long, others) =
            harness.list()?.into_iter().partition(|name| LONG_TESTS.iter().any(|long| name.starts_with(long)));
        for turn in [long, others] {
            passed &= harness.turn(turn)?;
        }
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs the tests of the jail once more in the lab, which has the unified hierarchy of control groups, where this machine has an
/// older one.
pub fn jail() -> Result<ExitCode> {
    let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    if unified || demo::kvm_runs_guests() {
        eprintln!("test: the tests of the jail ran under the control groups of this machine alone");
        return Ok(ExitCode::SUCCESS);
    }
    // The examples are who tries to break out. Asked for as a part of the whole, they are what the unit tests compiled.
    let mut passed = true;
    for program in programs(&["--workspace", "--exclude", PACKAGE, "--test", "breakout", "--examples"])? {
        let harness = Harness { program, environment: &[] };
        passed &= harness.turn(harness.list()?)?;
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A program that holds tests, and the variables that it takes.
struct Harness<'a> {
    program: PathBuf,
    environment: &'a [(OsString, OsString)],
}

impl Harness<'_> {
    /// The names of its tests.
    fn list(&self) -> Result<Vec<String>> {
        let text = output(Command::new(&self.program).args(["--list", "--format=terse"]))?;
        Ok(text.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
    }

    /// The command that runs it with these arguments. The lab takes no other environment than this process's own.
    fn command(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Vec<OsString> {
        let variables =
            self.environment.iter().map(|(name, value)| [name, OsStr::new("="), value].join(OsStr::new("")));
        let arguments = arguments.into_iter().map(|argument| argument.as_ref().to_owned());
        [OsString::from("/usr/bin/env")]
            .into_iter()
            .chain(variables)
            .chain([self.program.clone().into()])
            .chain(arguments)
            .collect()
    }

    /// Runs it once, here or in the lab, from where cargo starts tests, too.
    fn run(&self, arguments: &[OsString], here: bool) -> Result<ExitCode> {
        let command = self.command(arguments);
        if !here {
            return in_lab(command, None);
        }
        let status = Command::new(&command[0]).args(&command[1..]).current_dir(folder()).status()?;
        Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// Runs these tests in the lab until each has a result that the emulator has no part in. Says whether all passed.
    fn turn(&self, tests: Vec<String>) -> Result<bool> {
        let mut left = tests;
        let (mut failed, mut lost) = (Vec::new(), 0);
        for machine in 1..=MACHINES {
            let out = tempfile::tempdir().context("cannot create a temporary folder")?;
            let arguments = ["--exact".to_owned()].into_iter().chain(left.iter().cloned());
            // The copy is written by the line to the host's own file system.
            let tee = "set -o pipefail; \"$@\" | tee \"$COFFERDAM_LAB_OUT/output\"";
            let mut command: Vec<OsString> = ["/bin/bash", "-c", tee, "e2e"].map(OsString::from).into();
            command.extend(self.command(arguments));
            let ended = in_lab(command, Some(out.path()));
            let output = fs::read(out.path().join("output")).unwrap_or_default();
            let results = Results::read(&String::from_utf8_lossy(&output));
            match &ended {
                Ok(code) if *code == ExitCode::SUCCESS => return Ok(failed.is_empty()),
                Ok(_) => {}
                Err(error) => {
                    eprintln!("test: the lab failed, not a test: {error:#} (machine {machine} of {MACHINES})");
                }
            }
            // What a test said that failed is told at the end, which is not reached when the machine dies.
            let (gone, bad): (Vec<_>, Vec<_>) =
                results.failed.into_iter().partition(|(_, said)| said.as_ref().is_none_or(|said| lost_a_guest(said)));
            failed.extend(bad.into_iter().map(|(name, _)| name));
            lost += gone.iter().filter(|(_, said)| said.is_some()).count();
            left.retain(|name| !results.passed.contains(name) && !failed.contains(name));
            if ended.is_ok() {
                // A run that came to its end, or to its time limit, and has nothing to say of a test.
                let (again, silent) = left.into_iter().partition(|name| gone.iter().any(|(lost, _)| lost == name));
                left = again;
                failed.extend::<Vec<_>>(silent);
            }
            if left.is_empty() || lost > LOST {
                failed.append(&mut left);
                break;
            }
            eprintln!("test: once more, in a new machine: {} tests: {}", left.len(), abbreviated(&left));
        }
        failed.append(&mut left);
        if !failed.is_empty() {
            eprintln!("test: failed: {}", failed.join(" "));
        }
        Ok(failed.is_empty())
    }
}

/// What a run of tests told.
#[derive(Default)]
struct Results {
    passed: Vec<String>,
    /// With what each said, when the run came to its end.
    failed: Vec<(String, Option<String>)>,
}

impl Results {
    /// Reads what libtest wrote.
    fn read(output: &str) -> Self {
        let mut results = Self::default();
        for line in output.lines() {
            let Some(line) = line.strip_prefix("test ") else { continue };
            if let Some(name) = line.strip_suffix(" ... ok") {
                results.passed.push(name.to_owned());
            } else if let Some(name) = line.strip_suffix(" ... FAILED") {
                let said = output
                    .split_once(&format!("\n---- {name} stdout ----\n"))
                    .map(|(_, rest)| rest.split("\n---- ").next().unwrap_or_default().to_owned());
                results.failed.push((name.to_owned(), said));
            }
        }
        results
    }
}

/// Whether a test failed for want of a guest.
fn lost_a_guest(said: &str) -> bool {
    LOST_MESSAGES.iter().any(|message| said.contains(message))
}

/// The first of some names.
fn abbreviated(names: &[String]) -> String {
    let shown: Vec<&str> = names.iter().take(4).map(String::as_str).collect();
    shown.join(" ") + if names.len() > shown.len() { " …" } else { "" }
}

/// Runs a command in the lab's machine for tests.
fn in_lab(command: Vec<OsString>, out: Option<&Path>) -> Result<ExitCode> {
    let args = LabArgs::for_command(command);
    let more = MORE.iter().any(|name| std::env::var_os(name).is_some());
    let timeout = if more { LIMIT_LONGER } else { LIMIT };
    lab::run(&LabArgs { timeout, mem: MEMORY, folder: Some(folder()), out: out.map(Path::to_owned), ..args })
}

/// Where cargo starts the tests.
fn folder() -> PathBuf {
    paths::root().join(PACKAGE)
}

/// Compiles the agent that means harm, and gives its path.
fn hostile_agent() -> Result<PathBuf> {
    run(cargo().args(["build", "--package", "agent", "--example", "hostile"]))?;
    Ok(paths::target().join(paths::TARGET).join("debug/examples/hostile"))
}

/// Compiles the guest that means harm, a kernel in the release profile only, and gives its path.
fn hostile_guest() -> Result<PathBuf> {
    run(cargo().args(["build", "--release", "--package", "hostile-guest"]))?;
    Ok(paths::target().join(paths::TARGET).join("release/hostile-guest"))
}

/// Compiles tests and gives the programs that hold them.
fn programs(which: &[&str]) -> Result<Vec<PathBuf>> {
    let output = cargo()
        .args(["test", "--no-run", "--message-format=json-render-diagnostics"])
        .args(which)
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("the tests of {} do not compile", which.join(" "));
    }
    let text = String::from_utf8(output.stdout).context("cargo did not write UTF-8")?;
    let programs: Vec<PathBuf> = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["kind"] == serde_json::json!(["test"]))
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .collect();
    ensure!(!programs.is_empty(), "there are no tests of {}", which.join(" "));
    Ok(programs)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\nrunning 3 tests\ntest a::one ... ok\ntest a::two has been running for over 60 seconds\n\
        test a::two ... FAILED\ntest b::three ... FAILED\n\nfailures:\n\n---- a::two stdout ----\n\nerror: the guest ended \
        before its agent reported: the guest shut down\n\n---- b::three stdout ----\n\nleft: 1\n\n\nfailures:\n    a::two\n    \
        b::three\n\ntest result: FAILED. 1 passed; 2 failed\n";

    #[test]
    fn each_failure_has_what_its_test_said() {
        let results = Results::read(OUTPUT);
        assert_eq!(results.passed, ["a::one"]);
        let lost: Vec<_> =
            results.failed.iter().map(|(name, said)| (name.as_str(), said.as_deref().map(lost_a_guest))).collect();
        assert_eq!(lost, [("a::two", Some(true)), ("b::three", Some(false))]);
    }

    #[test]
    fn a_failure_before_the_end_of_the_machine_has_no_words() {
        let cut = OUTPUT.split_once("\nfailures:").unwrap().0;
        let results = Results::read(cut);
        assert!(results.failed.len() == 2 && results.failed.iter().all(|(_, said)| said.is_none()));
    }
}
