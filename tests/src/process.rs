//! Running programs with a time limit, and looking at them while they run.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use crate::pty::Terminal;

/// How long anything may take. An emulated machine that shares its host with others is slow; what hangs is found all the
/// same.
pub const LIMIT: Duration = Duration::from_secs(180);

/// How much of a stream is kept; the rest is only counted.
const KEPT_MAX: usize = 16 << 20;

/// What a program reads.
enum Input {
    Nothing,
    Bytes(Vec<u8>),
    Open,
}

/// A program that is about to be run.
pub struct Invocation {
    command: Command,
    input: Input,
}

impl Invocation {
    pub(crate) fn new(command: Command) -> Self {
        Self { command, input: Input::Nothing }
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Gives the program something to read, and then the end of its input.
    #[must_use]
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Input::Bytes(bytes.into());
        self
    }

    /// Gives the program an input that stays open: see [`Running::write`].
    #[must_use]
    pub fn open_input(mut self) -> Self {
        self.input = Input::Open;
        self
    }

    /// Starts the program.
    ///
    /// # Panics
    /// It cannot be started.
    #[must_use]
    pub fn start(mut self) -> Running {
        let stdin = if matches!(self.input, Input::Nothing) { Stdio::null() } else { Stdio::piped() };
        let command = self.command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let stdout = Stream::follow(child.stdout.take().expect("standard output is a pipe"));
        let stderr = Stream::follow(child.stderr.take().expect("standard error is a pipe"));
        let mut stdin = child.stdin.take();
        if let Input::Bytes(bytes) = self.input {
            let mut stdin = stdin.take().expect("standard input is a pipe");
            // A program that ends without reading all of it is none of this thread's business.
            thread::spawn(move || stdin.write_all(&bytes));
        }
        Running { child, stdin, stdout, stderr, terminal: None }
    }

    /// Starts the program on a new terminal of this size, which takes all three streams: everything that is shown
    /// counts as its standard output.
    ///
    /// # Panics
    /// It cannot be started.
    #[must_use]
    pub fn start_on_terminal(self, rows: u16, columns: u16) -> Running {
        let (terminal, line) = Terminal::open(rows, columns).expect("cannot open a terminal");
        // A program becomes the terminal's foreground by `setsid`, which replaces itself with it.
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(self.command.get_program()).args(self.command.get_args()).env_clear();
        command.envs(self.command.get_envs().filter_map(|(name, value)| Some((name, value?)))).env("TERM", "xterm");
        if let Some(folder) = self.command.get_current_dir() {
            command.current_dir(folder);
        }
        let end = || Stdio::from(line.try_clone().expect("cannot duplicate a descriptor"));
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn();
        let child = child.unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let stdout = Stream::follow(terminal.reader());
        Running { child, stdin: None, stdout, stderr: Stream::follow(std::io::empty()), terminal: Some(terminal) }
    }

    /// Runs the program to its end.
    ///
    /// # Panics
    /// It cannot be started, or does not end within [`LIMIT`].
    #[must_use]
    pub fn end(self) -> Ended {
        self.start().end()
    }
}

/// A program that was started. Dropping it kills it, and with it the monitor that it may have started.
pub struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Arc<Stream>,
    stderr: Arc<Stream>,
    terminal: Option<Terminal>,
}

impl Running {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process id of the monitor that it has started.
    ///
    /// # Panics
    /// There is none.
    #[must_use]
    pub fn monitor(&self) -> u32 {
        self.find_monitor().unwrap_or_else(|| panic!("there is no monitor: {}", self.said()))
    }

    fn find_monitor(&self) -> Option<u32> {
        let pid = self.pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
        children
            .split_whitespace()
            .find(|child| {
                fs::read_to_string(format!("/proc/{child}/comm")).is_ok_and(|name| name.trim() == "cofferdam-vmm")
            })
            .and_then(|child| child.parse().ok())
    }

    /// Waits until the program has written `text` to its standard output.
    ///
    /// # Panics
    /// That does not happen before the output ends, or within [`LIMIT`].
    pub fn wait_for(&self, text: &str) {
        let found = |state: &StreamState| state.kept.windows(text.len()).any(|window| window == text.as_bytes());
        assert!(self.stdout.wait(found), "{text:?} was not written: {}", self.said());
    }

    /// Waits until the program has written `text` to its standard error.
    ///
    /// # Panics
    /// As [`Running::wait_for`].
    pub fn wait_for_error(&self, text: &str) {
        let found = |state: &StreamState| state.kept.windows(text.len()).any(|window| window == text.as_bytes());
        assert!(self.stderr.wait(found), "{text:?} was not written: {}", self.said());
    }

    /// Waits until the program has written `count` bytes to its standard output.
    ///
    /// # Panics
    /// That does not happen before the output ends, or within [`LIMIT`] and a second for each MiB.
    pub fn wait_for_bytes(&self, count: u64) {
        let limit = LIMIT + Duration::from_secs(count >> 20);
        assert!(
            self.stdout.wait_within(limit, |state| state.total >= count),
            "fewer bytes than {count}: {}",
            self.said()
        );
    }

    /// Types on the terminal, or writes to the open input.
    ///
    /// # Panics
    /// There is neither.
    pub fn write(&mut self, text: &str) {
        let result = match (&self.terminal, &mut self.stdin) {
            (Some(terminal), _) => terminal.write(text.as_bytes()),
            (None, Some(stdin)) => stdin.write_all(text.as_bytes()),
            (None, None) => panic!("the program has no open input"),
        };
        result.unwrap_or_else(|error| panic!("cannot write {text:?}: {error}: {}", self.said()));
    }

    /// The terminal that it was started on.
    ///
    /// # Panics
    /// It was not started on one.
    #[must_use]
    pub fn terminal(&self) -> &Terminal {
        self.terminal.as_ref().expect("the program runs on no terminal")
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// The program has ended.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal);
    }

    /// Closes the open input and waits for the program's end.
    ///
    /// # Panics
    /// It does not end within [`LIMIT`], or something still holds its output afterwards.
    #[must_use]
    pub fn end(mut self) -> Ended {
        drop(self.stdin.take());
        let process = watch(self.pid());
        assert!(ends(&process, LIMIT), "does not end: {}", self.said());
        let status = self.child.wait().expect("cannot wait for a child");
        let closed = |stream: &Stream| stream.wait(|state| state.ended);
        // On a terminal there is one stream, which ends when nobody has the terminal open.
        assert!(closed(&self.stdout) && closed(&self.stderr), "its output stays open: {}", self.said());
        let (stdout, stderr) = (self.stdout.lock(), self.stderr.lock());
        Ended {
            status,
            written: stdout.total,
            stdout: stdout.kept.clone(),
            stderr: String::from_utf8_lossy(&stderr.kept).into_owned(),
        }
    }

    /// What it has written so far, for messages.
    fn said(&self) -> String {
        let end = |stream: &Stream| {
            let state = stream.lock();
            let from = state.kept.len().saturating_sub(600);
            String::from_utf8_lossy(&state.kept[from..]).into_owned()
        };
        format!("stdout: {:?}, stderr: {:?}", end(&self.stdout), end(&self.stderr))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both have ended already unless the test has failed.
        if let Ok(None) = self.child.try_wait() {
            let monitor = self.find_monitor();
            let _ = self.child.kill();
            let _ = self.child.wait();
            if let Some(monitor) = monitor.and_then(raw) {
                let _ = kill_process(monitor, Signal::KILL);
            }
        }
    }
}

/// A program that has ended.
#[derive(Debug)]
pub struct Ended {
    status: ExitStatus,
    /// How many bytes it has written to its standard output.
    pub written: u64,
    /// What it has written to its standard output, up to 16 MiB.
    pub stdout: Vec<u8>,
    /// What it has written to its standard error.
    pub stderr: String,
}

impl Ended {
    /// The exit code.
    ///
    /// # Panics
    /// A signal has ended it.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| panic!("{}: {}", self.status, self.stderr))
    }

    /// The standard output as text.
    ///
    /// # Panics
    /// It is none.
    #[must_use]
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("the output is not UTF-8")
    }

    /// The standard output of a program that did what it should: exit code 0, no errors.
    ///
    /// # Panics
    /// It did not.
    #[must_use]
    pub fn succeeded(&self) -> &str {
        assert!(self.code() == 0 && self.stderr.is_empty(), "code {}, {:?}, {}", self.code(), self.stderr, self.text());
        self.text()
    }

    /// Checks that the program failed as it should: with this code, no output, and one line of error that has all of
    /// `parts` in it.
    ///
    /// # Panics
    /// It did not.
    pub fn failed(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code(), code, "{self:?}");
        assert!(self.stdout.is_empty(), "{self:?}");
        let one_line = self.stderr.strip_suffix('\n').is_some_and(|line| !line.contains('\n'));
        assert!(one_line && self.stderr.starts_with("error: "), "not one line of error: {}", self.stderr);
        for part in parts {
            assert!(self.stderr.contains(part), "no {part:?} in {}", self.stderr);
        }
    }
}

/// A stream that a thread reads to its end.
#[derive(Default)]
struct Stream {
    state: Mutex<StreamState>,
    changed: Condvar,
}

#[derive(Default)]
struct StreamState {
    kept: Vec<u8>,
    total: u64,
    ended: bool,
}

impl Stream {
    fn follow(mut from: impl Read + Send + 'static) -> Arc<Self> {
        let stream = Arc::new(Self::default());
        let ours = Arc::clone(&stream);
        thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            // The other end of a terminal that is gone is an error, not an end.
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                let mut state = ours.lock();
                let room = KEPT_MAX.saturating_sub(state.kept.len());
                state.kept.extend_from_slice(&buffer[..count.min(room)]);
                state.total += count as u64;
                drop(state);
                ours.changed.notify_all();
            }
            ours.lock().ended = true;
            ours.changed.notify_all();
        });
        stream
    }

    fn lock(&self) -> MutexGuard<'_, StreamState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, met: impl Fn(&StreamState) -> bool) -> bool {
        self.wait_within(LIMIT, met)
    }

    /// Waits for a condition; whether it was met before the end of the stream and of the time.
    fn wait_within(&self, limit: Duration, met: impl Fn(&StreamState) -> bool) -> bool {
        let waiting = self.changed.wait_timeout_while(self.lock(), limit, |state| !met(state) && !state.ended);
        let (state, _) = waiting.unwrap_or_else(PoisonError::into_inner);
        met(&state)
    }
}

fn raw(pid: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(pid).ok()?)
}

/// Sends a signal to a process.
///
/// # Panics
/// There is no such process.
pub fn kill(pid: u32, signal: Signal) {
    let process = raw(pid).expect("a process id is positive");
    kill_process(process, signal).unwrap_or_else(|error| panic!("cannot send {signal:?} to process {pid}: {error}"));
}

/// A descriptor that tells of a process's end, whoever waits for it.
///
/// # Panics
/// There is no such process.
#[must_use]
pub fn watch(pid: u32) -> OwnedFd {
    let process = raw(pid).expect("a process id is positive");
    pidfd_open(process, PidfdFlags::empty()).unwrap_or_else(|error| panic!("cannot watch process {pid}: {error}"))
}

/// Whether the watched process ends in time.
#[must_use]
pub fn ends(process: &OwnedFd, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX), tv_nsec: 0 };
        match poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&timeout)) {
            Ok(0) if left.is_zero() => return false,
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return true,
            Err(error) => panic!("cannot wait for a process: {error}"),
        }
    }
}

/// The most memory that a process ever had resident, in KiB (`VmHWM` of proc(5)).
///
/// # Panics
/// There is no such process.
#[must_use]
pub fn peak_memory_kib(pid: u32) -> u64 {
    let mut text = String::new();
    let file = File::open(format!("/proc/{pid}/status")).and_then(|mut file| file.read_to_string(&mut text));
    file.unwrap_or_else(|error| panic!("cannot read the status of process {pid}: {error}"));
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
    number.unwrap_or_else(|| panic!("process {pid} has no peak: {text}"))
}
