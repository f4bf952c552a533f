//! The load of `cargo xtask bench io`.
//!
//! As process 1 of a guest it takes tasks from a socket of the host's (vsock, [`CONTROL_PORT`]); started in any other way
//! it takes them from standard input, so that the host can be measured doing the same. One line is one task; each step of
//! the conversation is one line:
//!
//! | who | line | meaning |
//! |---|---|---|
//! | measurer | `block FILE …`, `files …`, `mount …`, `stream …` | the task |
//! | load | `ready`, or `failed: …` | everything is open, and caches are as the task wants them |
//! | measurer | `go` | from here on it is measured |
//! | load | `done`, or `failed: …` | it is all done |
//!
//! The clock is the measurer's.

#![forbid(unsafe_code)]

mod block;
mod files;
mod link;
mod stream;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};

use stream::Streams;

/// The host's port at which a guest gets its tasks; the next one is for the data of streams.
const CONTROL_PORT: u32 = 1024;

/// The measured part of a task.
type Work = Box<dyn FnOnce() -> Result<()>>;

fn main() -> ExitCode {
    let guest = std::process::id() == 1;
    let outcome = if guest { run_guest() } else { serve(std::io::stdin(), std::io::stdout(), Streams::default()) };
    if let Err(error) = &outcome {
        eprintln!("io-load: {error:#}");
    }
    if guest {
        // The kernel's command line makes a restart a triple fault, which monitors take as the end.
        let _ = reboot(RebootCommand::Restart);
    }
    if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Serves as process 1 of a guest that has nothing but this program.
fn run_guest() -> Result<()> {
    for (path, kind) in [("/dev", "devtmpfs"), ("/proc", "proc"), ("/sys", "sysfs")] {
        mount(kind, path, kind, MountFlags::empty(), None).with_context(|| format!("cannot mount {path}"))?;
    }
    let control = stream::vsock(CONTROL_PORT).context("cannot reach the host")?;
    let data = stream::vsock(CONTROL_PORT + 1).context("cannot reach the host's port for data")?;
    let answers = control.try_clone().context("cannot use the control connection twice")?;
    serve(control, answers, Streams::with_vsock(data))
}

/// Does tasks until there are no more.
fn serve(tasks: impl Read, mut answers: impl Write, mut streams: Streams) -> Result<()> {
    let mut lines = BufReader::new(tasks).lines();
    while let Some(line) = lines.next().transpose().context("cannot read a task")? {
        let work = match prepare(&line, &mut streams) {
            Ok(work) => work,
            Err(error) => {
                tell(&mut answers, &format!("failed: {error:#}"))?;
                continue;
            }
        };
        tell(&mut answers, "ready")?;
        let go = lines.next().transpose().context("cannot wait for a task's start")?;
        if go.as_deref() != Some("go") {
            bail!("{go:?} came instead of \"go\"");
        }
        match work() {
            Ok(()) => tell(&mut answers, "done")?,
            Err(error) => tell(&mut answers, &format!("failed: {error:#}"))?,
        }
    }
    Ok(())
}

fn tell(answers: &mut impl Write, line: &str) -> Result<()> {
    answers.write_all(format!("{line}\n").as_bytes()).and_then(|()| answers.flush()).context("cannot answer")
}

/// Does what of a task is not measured.
fn prepare(line: &str, streams: &mut Streams) -> Result<Work> {
    let words: Vec<&str> = line.split(' ').collect();
    match words[..] {
        ["block", file, direction, cache, size, count, threads] => {
            let shape = block::Shape { size: number(size)?, count: number(count)?, threads: number(threads)? };
            block::prepare(file, direction, cache, shape)
        }
        ["files", what, folder, count] => files::prepare(what, folder, number(count)?),
        ["mount", tag, folder] => {
            fs::create_dir_all(folder).with_context(|| format!("cannot make {folder}"))?;
            mount(tag, folder, "virtiofs", MountFlags::empty(), None)
                .with_context(|| format!("cannot mount {tag} at {folder}"))?;
            Ok(Box::new(|| Ok(())))
        }
        ["stream", kind, direction, count] => streams.prepare(kind, direction, number(count)?),
        _ => bail!("unknown task {line:?}"),
    }
}

fn number(word: &str) -> Result<usize> {
    word.parse().with_context(|| format!("{word:?} is no number"))
}

/// Empties the caches of a guest's kernel. The host's stay as they are: they are what the guest is given from.
fn drop_caches() -> Result<()> {
    if std::process::id() == 1 {
        rustix::fs::sync();
        fs::write("/proc/sys/vm/drop_caches", "3").context("cannot empty the caches")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the load answers to lines.
    fn answers(lines: &[&str]) -> Vec<String> {
        let mut answers = Vec::new();
        serve(lines.join("\n").as_bytes(), &mut answers, Streams::default()).unwrap();
        String::from_utf8(answers).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn files_are_made_renamed_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().display();
        let lines = ["create", "stat", "cold-open", "rename"].map(|what| format!("files {what} {path} 3"));
        let lines: Vec<&str> = lines.iter().flat_map(|line| [line.as_str(), "go"]).collect();
        assert_eq!(answers(&lines), ["ready", "done"].repeat(4));
        assert!(folder.path().join("renamed-2").exists());
        assert_eq!(answers(&[&format!("files unlink {path} 3"), "go"]), ["ready", "done"]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn every_byte_is_written_by_as_many_threads_as_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        let block = |how: &str| format!("block {} {how} buffered 1000 7 3", file.display());
        assert_eq!(answers(&[&block("write"), "go", &block("read"), "go"]), ["ready", "done"].repeat(2));
        assert_eq!(fs::read(&file).unwrap(), [0x5a; 7000]);
        // What is to be read is there, whatever was there before.
        fs::write(&file, [0; 6999]).unwrap();
        assert_eq!(answers(&[&block("read"), "go"]), ["ready", "done"]);
        assert_eq!(fs::read(&file).unwrap(), [0x5a; 7000]);
    }

    #[test]
    fn what_cannot_be_done_is_answered_and_the_next_task_is_taken() {
        let answers =
            answers(&["dance", "block / read direct 0 1 1", "stream vsock send 1", "files stat /proc 0", "go"]);
        assert_eq!(answers.iter().filter(|answer| answer.starts_with("failed: ")).count(), 3);
        assert_eq!(answers[3..], ["ready", "done"]);
    }
}
