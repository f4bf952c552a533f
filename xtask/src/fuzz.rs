//! `cargo xtask fuzz`: the targets of `fuzz/` with libFuzzer, on the compiler that everything else is built with.
//!
//! The passes that libFuzzer needs are LLVM's own and can be asked for without a sanitizer, which is what would need another
//! compiler. Everything that is linked is built with them, in a folder of its own. Inputs that reached something new and
//! those that went wrong are kept in the cache, so that a run goes on where the last one was.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use rustix::param::clock_ticks_per_second;
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

use crate::build::cargo;
use crate::command::run;
use crate::{debian, paths};

/// What libFuzzer sees of an execution: which edges were taken, and what was compared with what.
const FLAGS: &str = "-C passes=sancov-module -C llvm-args=-sanitizer-coverage-level=4 \
    -C llvm-args=-sanitizer-coverage-inline-8bit-counters -C llvm-args=-sanitizer-coverage-pc-table \
    -C llvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing";
/// The profile in Cargo.toml.
const PROFILE: &str = "fuzz";
/// How long an input may take, in seconds: what takes longer is a finding.
const INPUT_MAX: u32 = 10;
/// What a process may have in memory, the fuzzer's own part included, in MiB. What a target itself may hold is in
/// `fuzz/src/lib.rs`.
const RESIDENT_MAX: u32 = 1536;
/// After so many findings a target is left alone.
const FINDINGS_MAX: u32 = 5;

/// What to fuzz
#[derive(Debug, Args)]
pub struct FuzzArgs {
    /// How long to fuzz, in minutes; shared by the targets
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// How many targets at a time [default: one for each CPU]
    #[arg(long)]
    jobs: Option<usize>,
    /// Run an input of a target once, without a fuzzer
    #[arg(long, num_args = 2, value_names = ["TARGET", "FILE"], conflicts_with = "targets")]
    reproduce: Option<Vec<String>>,
    /// Targets [default: all]
    targets: Vec<String>,
}

/// What became of a target.
#[derive(Debug, Default)]
struct Tally {
    /// How long it was fuzzed.
    seconds: f64,
    /// How much time of a CPU that took.
    cpu_seconds: f64,
    executions: u64,
    edges: u64,
    findings: u32,
}

/// Fuzzes, or runs an input again.
pub fn fuzz(args: &FuzzArgs) -> Result<()> {
    if let Some([target, file]) = args.reproduce.as_deref() {
        let file = std::path::absolute(file).context("the input is not a path")?;
        let command = ["run", "--quiet", "--package", "fuzz", "--example", "run", "--", target];
        return run(cargo().args(command).arg(file));
    }
    let all = targets()?;
    if let Some(unknown) = args.targets.iter().find(|target| !all.contains(target)) {
        bail!("there is no target {unknown}: there are {}", all.join(", "));
    }
    let wanted = if args.targets.is_empty() { &all } else { &args.targets };
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = args.jobs.unwrap_or(cpus).clamp(1, wanted.len());
    let seconds = args.minutes * 60.0 * jobs as f64 / wanted.len() as f64;
    ensure!(seconds >= 1.0, "less than a second for each of {} targets: ask for more minutes", wanted.len());
    debian::setup_fuzzing()?;
    let programs = build(wanted)?;
    let cache = paths::cache()?.join("fuzz");
    eprintln!("fuzz: {} targets, {seconds:.0} s each, {jobs} at a time; inputs in {}", wanted.len(), cache.display());
    let left = Mutex::new(wanted.iter());
    let done = Mutex::new(Vec::new());
    let work = || -> Result<()> {
        loop {
            let next = left.lock().ok().and_then(|mut left| left.next());
            let Some(target) = next else { return Ok(()) };
            let tally = one(target, &programs.join(target), &cache, seconds)?;
            eprintln!("fuzz: {target}: {} executions, {} findings", tally.executions, tally.findings);
            if let Ok(mut done) = done.lock() {
                done.push((target, tally));
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(ended) => ended,
            Err(_) => bail!("a worker panicked"),
        })
    })?;
    report(done.into_inner().unwrap_or_default(), &cache)
}

/// The names of all targets: there is a program for each.
fn targets() -> Result<Vec<String>> {
    let folder = paths::root().join("fuzz/fuzz_targets");
    let entries = folder.read_dir().with_context(|| format!("cannot list {}", folder.display()))?;
    let names = entries.flatten().filter_map(|entry| Some(entry.path().file_stem()?.to_str()?.to_owned()));
    let mut names: Vec<String> = names.collect();
    names.sort();
    Ok(names)
}

/// Builds the programs of some targets and gives the folder that they are in.
fn build(targets: &[String]) -> Result<PathBuf> {
    let folder = paths::target().join("fuzz");
    let mut command = cargo();
    command.env("RUSTFLAGS", FLAGS).env("CARGO_TARGET_DIR", &folder);
    command.args(["build", "--profile", PROFILE, "--package", "fuzz", "--features", "libfuzzer"]);
    command.args(targets.iter().flat_map(|target| ["--bin", target]));
    run(&mut command)?;
    Ok(folder.join(paths::TARGET).join(PROFILE))
}

/// Fuzzes a target until its time is over. The fuzzer ends with each finding, and is started again.
fn one(target: &str, program: &Path, cache: &Path, seconds: f64) -> Result<Tally> {
    let (corpus, findings) = (cache.join("corpus").join(target), cache.join("findings").join(target));
    let log = cache.join("logs").join(format!("{target}.log"));
    for folder in [&corpus, &findings, &cache.join("logs")] {
        paths::make_folder(folder)?;
    }
    let seeds = paths::root().join("fuzz/seeds").join(target);
    let mut tally = Tally::default();
    while seconds - tally.seconds >= 1.0 && tally.findings < FINDINGS_MAX {
        let output = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        let begun = Instant::now();
        // As for every program in Rust, whose start libFuzzer takes the place of: writing to who is gone is an error.
        let mut child = Command::new("env")
            .arg("--ignore-signal=PIPE")
            .arg(program)
            .arg(format!("-max_total_time={}", (seconds - tally.seconds) as u64))
            .arg(format!("-timeout={INPUT_MAX}"))
            .arg(format!("-rss_limit_mb={RESIDENT_MAX}"))
            .arg(format!("-artifact_prefix={}/", findings.display()))
            .args(["-print_final_stats=1", "-use_value_profile=1", "-print_funcs=0", "-max_len=8192"])
            .args([&corpus, &seeds])
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        tally.cpu_seconds += cpu_seconds(&child)?;
        let status = child.wait()?;
        tally.seconds += begun.elapsed().as_secs_f64();
        let text = fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
        let text = String::from_utf8_lossy(&text);
        tally.executions += figure(&text, "stat::number_of_executed_units:").unwrap_or(0);
        tally.edges = figure(&text, " cov:").unwrap_or(tally.edges);
        if !status.success() {
            tally.findings += 1;
            fs::rename(&log, log.with_extension(format!("{}.log", tally.findings)))?;
            eprintln!("fuzz: {target}: {status}: a finding in {}", findings.display());
        }
    }
    Ok(tally)
}

/// Waits for the end of a process, and says how much time of a CPU it took.
fn cpu_seconds(child: &Child) -> Result<f64> {
    let pid = Pid::from_child(child);
    // It stays until it is waited for in earnest, and its times with it.
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    rustix::io::retry_on_intr(|| waitid(WaitId::Pid(pid), options)).context("cannot wait for a fuzzer")?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("cannot read a fuzzer's times")?;
    ticks(&stat).map(|ticks| ticks as f64 / clock_ticks_per_second() as f64).context("a fuzzer's times are missing")
}

/// The time in user and in kernel mode of a process's `stat`: see proc_pid_stat(5).
fn ticks(stat: &str) -> Option<u64> {
    // What stands before, a name in parentheses, may have spaces in it.
    let mut times = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    Some(times.next()?.parse::<u64>().ok()? + times.next()?.parse::<u64>().ok()?)
}

/// The number behind the last occurrence of a word.
fn figure(text: &str, word: &str) -> Option<u64> {
    text.rsplit_once(word)?.1.split_ascii_whitespace().next()?.parse().ok()
}

/// Prints a table, as in docs/security/fuzzing.md. Findings are an error.
fn report(mut tallies: Vec<(&String, Tally)>, cache: &Path) -> Result<()> {
    tallies.sort_by_key(|(target, _)| *target);
    println!("| target | CPU seconds | executions | a CPU second | edges | findings |\n|---|---|---|---|---|---|");
    for (target, Tally { cpu_seconds, executions, edges, findings, .. }) in &tallies {
        let speed = *executions as f64 / cpu_seconds.max(1.0);
        println!("| `{target}` | {cpu_seconds:.0} | {executions} | {speed:.0} | {edges} | {findings} |");
    }
    let cpu_hours: f64 = tallies.iter().map(|(_, tally)| tally.cpu_seconds / 3600.0).sum();
    println!("\n{cpu_hours:.2} CPU-hours.");
    let findings: u32 = tallies.iter().map(|(_, tally)| tally.findings).sum();
    ensure!(findings == 0, "{findings} findings: see {}", cache.join("findings").display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_the_last_ones_told() {
        let text = "#2\tINITED cov: 5 ft: 6\n#9\tNEW cov: 12 ft: 30\nstat::number_of_executed_units: 77\n";
        assert_eq!(figure(text, " cov:"), Some(12));
        assert_eq!(figure(text, "stat::number_of_executed_units:"), Some(77));
        assert_eq!(figure(text, "none"), None);
    }

    #[test]
    fn times_stand_behind_a_name_of_any_kind() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194304 100 0 0 0 30 12 5 5 20 0 1 0 100";
        assert_eq!(ticks(stat), Some(42));
        assert_eq!(ticks("7 (a"), None);
    }

    #[test]
    fn there_are_targets() {
        assert!(targets().unwrap().contains(&"blk".to_owned()));
    }
}
