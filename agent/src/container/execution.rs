//! From a child of the agent to a program of a container (OCI runtime specification, "Process" and "Lifecycle"
//! steps 6 to 8): what a container's first process and every further one have in common. Everything here but what is
//! told runs in the child.
//!
//! Order matters: the image's user database comes first, since streams and terminal are given to the user; the system
//! call filter needs CAP_SYS_ADMIN when privileges may be gained, so it comes before the user is changed; the program is
//! looked for as that user. Between `Ready` and the program nothing happens but waiting, so that starting is one message
//! and one execve(2).

use std::ffi::CString;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use protocol::container::ProcessSpec;
use protocol::{Failure, frame};
use rustix::fs::{self, Mode, OFlags, Uid};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};
use rustix::process::{setsid, umask};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use serde::{Deserialize, Serialize};

use super::error::{InStep, SetupError};
use super::mounts::Standard;
use super::root::{Missing, Root};
use super::streams::Ends;
use super::user::{self, User};
use super::{privileges, program, terminal};
use crate::{clock, sys};

/// What the child tells the agent, one datagram each.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// The set-up is done; the child waits for [`GO`]. With a terminal, its master side comes along, and then what the
    /// set-up gave to the agent.
    Ready,
    /// The program is executed next; the channel closes when it is.
    Executing {
        /// CLOCK_BOOTTIME in microseconds.
        at_us: u64,
    },
    /// The set-up or the execution failed, and the child ends.
    Failed(Failure),
}

/// The longest report: a failure with its text, which [`SetupError::failure`] limits.
pub const REPORT_MAX: usize = 4096;

/// The most descriptors that come with a report: a terminal and the container's `/dev` and `/proc`.
pub const DESCRIPTORS_MAX: usize = 3;

/// What the agent sends to have the program executed.
pub const GO: [u8; 1] = [1];

/// The descriptor of the channel to the agent, after the standard streams.
const CHANNEL: RawFd = 3;

/// The descriptors that a child keeps of the agent's.
#[derive(Debug)]
pub struct Inherited<'a> {
    /// Its standard streams.
    pub ends: &'a Ends,
    /// What takes the place of a stream that it has not.
    pub null: BorrowedFd<'a>,
    /// To report on.
    pub channel: BorrowedFd<'a>,
    /// What its set-up needs besides.
    pub others: &'a [BorrowedFd<'a>],
}

/// Runs the child of a fork until its program takes over or it fails; never returns. `prepare` sets it up, with its own
/// copies of [`Inherited::others`].
pub fn run(inherited: &Inherited<'_>, prepare: impl FnOnce(Vec<OwnedFd>) -> Result<Prepared, SetupError>) -> ! {
    sys::end_on_panic();
    let stream = |i: usize| inherited.ends.0[i].as_ref().map_or(inherited.null, OwnedFd::as_fd).as_raw_fd();
    let mut kept = vec![stream(0), stream(1), stream(2), inherited.channel.as_raw_fd()];
    kept.extend(inherited.others.iter().map(AsRawFd::as_raw_fd));
    // Without a channel there is nobody to tell: the agent sees the child end.
    if sys::keep_only(&kept).is_ok()
        && let Ok(channel) = sys::adopt(CHANNEL)
    {
        let others = (CHANNEL + 1..).take(inherited.others.len()).map(sys::adopt).collect::<Result<Vec<_>, _>>();
        let error = match others.in_step("take the agent's descriptors over").and_then(|others| begin(others, prepare))
        {
            Err(error) => error,
            Ok(prepared) => match wait_and_execute(prepared, &channel) {
                Err(error) | Ok(error) => error,
            },
        };
        let _ = report(&channel, &Report::Failed(error.failure()), &[]);
    }
    sys::exit(1)
}

fn begin(
    others: Vec<OwnedFd>,
    prepare: impl FnOnce(Vec<OwnedFd>) -> Result<Prepared, SetupError>,
) -> Result<Prepared, SetupError> {
    sys::reset_signals();
    umask(Mode::empty());
    setsid().in_step("start a session")?;
    prepare(others)
}

/// All that an execution needs.
#[derive(Debug)]
pub struct Prepared {
    path: String,
    file: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    /// What goes to the agent with [`Report::Ready`].
    descriptors: Vec<OwnedFd>,
}

/// A process that has user, streams and working directory, and still all privileges.
#[derive(Debug)]
pub struct Entered {
    user: User,
    /// The master side of its terminal.
    terminal: Option<OwnedFd>,
}

impl Entered {
    /// Whether the standard streams are a terminal.
    pub fn has_terminal(&self) -> bool {
        self.terminal.is_some()
    }
}

/// Looks the process's user up and gives it streams and working directory. Must run in the container's namespaces and
/// root.
///
/// # Errors
/// What the request names and the image has not, or the step that the kernel refused.
pub fn enter(process: &ProcessSpec, ends: &Ends, root: &Root, standard: &Standard) -> Result<Entered, SetupError> {
    let user = user::look_up(root, &process.user, &process.additional_groups)?;
    let terminal = connect_streams(process, ends, &standard.dev, &user)?;
    adjust_oom_score(&standard.proc, process.oom_score_adj)?;
    enter_working_directory(root, &process.working_directory)?;
    Ok(Entered { user, terminal })
}

/// Takes the privileges off and finds the program. `kept` goes to the agent.
///
/// # Errors
/// What the request names and the image has not, or the step that the kernel refused.
pub fn finish(process: &ProcessSpec, entered: Entered, kept: Vec<OwnedFd>) -> Result<Prepared, SetupError> {
    let Entered { user, terminal } = entered;
    umask(Mode::from_raw_mode(0o022));
    privileges::set_limits(process)?;
    privileges::drop(process, &user)?;
    resolve_program(process, &user, terminal.into_iter().chain(kept).collect())
}

fn connect_streams(
    process: &ProcessSpec,
    ends: &Ends,
    dev: &OwnedFd,
    user: &User,
) -> Result<Option<OwnedFd>, SetupError> {
    if let Some(size) = process.terminal {
        return terminal::open(dev, size, user.uid).map(Some);
    }
    let null = fs::openat(dev, "null", OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .in_step("open /dev/null")?;
    let numbered = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
    for (number, (end, stream)) in ends.0.iter().zip(numbered).enumerate() {
        match end {
            None => match number {
                0 => dup2_stdin(&null),
                1 => dup2_stdout(&null),
                _ => dup2_stderr(&null),
            }
            .in_step("make a standard stream /dev/null")?,
            // So that the user may open it again by its name in /dev or /proc/self/fd.
            Some(_) => {
                fs::fchown(stream, Some(Uid::from_raw(user.uid)), None)
                    .in_step("give a standard stream to the user")?;
            }
        }
    }
    Ok(None)
}

/// Makes descriptors the standard streams.
///
/// # Errors
/// What dup2(2) says.
pub fn replace_streams([stdin, stdout, stderr]: [&OwnedFd; 3]) -> Result<(), SetupError> {
    dup2_stdin(stdin)
        .and_then(|()| dup2_stdout(stdout))
        .and_then(|()| dup2_stderr(stderr))
        .in_step("replace the standard streams")
}

fn adjust_oom_score(proc: &OwnedFd, score: i16) -> Result<(), SetupError> {
    // The agent's own is 0, and the child's starts as the agent's.
    if score == 0 {
        return Ok(());
    }
    let step = "set the process's oom_score_adj";
    let file = fs::openat(proc, "self/oom_score_adj", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).in_step(step)?;
    rustix::io::write(&file, score.to_string().as_bytes()).in_step(step)?;
    Ok(())
}

fn enter_working_directory(root: &Root, path: &str) -> Result<(), SetupError> {
    let path = if path.is_empty() { "/" } else { path };
    let directory = root.find_or_make(path, Missing::Directory).at_path("make the working directory", path)?;
    rustix::process::fchdir(&directory).at_path("enter the working directory", path)
}

fn resolve_program(process: &ProcessSpec, user: &User, descriptors: Vec<OwnedFd>) -> Result<Prepared, SetupError> {
    let path = program::find(process.args.first().ok_or(SetupError::NoProgram)?, &process.env)?;
    let mut environment = strings(&process.env, "a variable of the environment")?;
    let has = |name: &str| process.env.iter().any(|v| v.strip_prefix(name).is_some_and(|rest| rest.starts_with('=')));
    if !has("HOME") {
        environment.push(string(&format!("HOME={}", user.home), "the home directory")?);
    }
    if process.terminal.is_some() && !has("TERM") {
        environment.push(string("TERM=xterm", "TERM")?);
    }
    Ok(Prepared {
        file: string(&path, "the program's path")?,
        arguments: strings(&process.args, "an argument")?,
        path,
        environment,
        descriptors,
    })
}

fn strings(texts: &[String], what: &'static str) -> Result<Vec<CString>, SetupError> {
    texts.iter().map(|text| string(text, what)).collect()
}

fn string(text: &str, what: &'static str) -> Result<CString, SetupError> {
    CString::new(text).map_err(|_| SetupError::ZeroByte { what })
}

/// Waits for the word and executes the program; what is returned, either way, is why it did not run.
fn wait_and_execute(prepared: Prepared, channel: &OwnedFd) -> Result<SetupError, SetupError> {
    let step = "talk to the agent";
    report(channel, &Report::Ready, &prepared.descriptors).in_step(step)?;
    drop(prepared.descriptors);
    let mut word = GO;
    let (length, _) = rustix::io::retry_on_intr(|| recv(channel, &mut word[..], RecvFlags::empty())).in_step(step)?;
    if length == 0 {
        // The agent is gone, and the machine with it.
        sys::exit(1);
    }
    report(channel, &Report::Executing { at_us: clock::boot_us() }, &[]).in_step(step)?;
    let source = sys::execute(&prepared.file, &prepared.arguments, &prepared.environment);
    Ok(SetupError::Execute { path: prepared.path, source })
}

fn report(channel: &OwnedFd, report: &Report, descriptors: &[OwnedFd]) -> rustix::io::Result<()> {
    let datagram = frame::encode(report, REPORT_MAX).map_err(|_| rustix::io::Errno::MSGSIZE)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    sendmsg(channel, &[IoSlice::new(&datagram)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}
