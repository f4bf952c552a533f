//! The container's first process from its birth to its program (OCI runtime specification, "Process" and "Lifecycle"
//! steps 2 to 8). Everything here runs in the child.
//!
//! Order matters: mounts and devices need every privilege; the image's user database must be read before the root is
//! the only thing left; the system call filter needs CAP_SYS_ADMIN when privileges may be gained, so it comes before
//! the user is changed; the program is looked for as that user. Between `Ready` and the program nothing happens but
//! waiting, so that starting is one message and one execve(2).

use std::ffi::CString;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use protocol::container::{ContainerSpec, ProcessSpec, Seccomp};
use protocol::{Failure, frame};
use rustix::fs::{self, Gid, Mode, OFlags, Uid};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};
use rustix::process::{Resource, Rlimit, setrlimit, setsid, umask};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::thread::{
    CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
    set_thread_gid, set_thread_groups, set_thread_uid,
};
use serde::{Deserialize, Serialize};

use super::error::{InStep, SetupError};
use super::root::{Missing, Root};
use super::user::{self, User};
use super::{mounts, program, rootfs, terminal};
use crate::{clock, seccomp, sys};

/// What the child tells the agent, one datagram each.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// The set-up is done; the child waits for [`GO`]. With a terminal, its master side comes along.
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

/// What the agent sends to have the program executed.
pub const GO: [u8; 1] = [1];

/// The descriptor of the channel to the agent, after the standard streams.
const CHANNEL: RawFd = 3;

/// The highest capability number plus one that the kernel's interface has room for.
const CAPABILITY_BITS: u32 = 64;

/// Resource limits by their number on Linux x86-64.
const RESOURCES: [Resource; 16] = [
    Resource::Cpu,
    Resource::Fsize,
    Resource::Data,
    Resource::Stack,
    Resource::Core,
    Resource::Rss,
    Resource::Nproc,
    Resource::Nofile,
    Resource::Memlock,
    Resource::As,
    Resource::Locks,
    Resource::Sigpending,
    Resource::Msgqueue,
    Resource::Nice,
    Resource::Rtprio,
    Resource::Rttime,
];

/// The first process's streams, as the agent gives them to its child. A stream without one becomes `/dev/null`.
#[derive(Debug, Default)]
pub struct Streams {
    /// Standard input, output and error.
    pub ends: [Option<OwnedFd>; 3],
}

/// Runs the child of a fork until its program takes over or it fails; never returns.
pub fn run(spec: &ContainerSpec, streams: &Streams, null: BorrowedFd<'_>, channel: BorrowedFd<'_>) -> ! {
    use std::os::fd::AsRawFd;
    let stream = |i: usize| streams.ends[i].as_ref().map_or(null, OwnedFd::as_fd).as_raw_fd();
    let kept = [stream(0), stream(1), stream(2), channel.as_raw_fd()];
    // Without a channel there is nobody to tell: the agent sees the child end.
    if sys::keep_only(&kept).is_ok()
        && let Ok(channel) = sys::adopt(CHANNEL)
    {
        let error = live(spec, streams, &channel);
        let _ = report(&channel, &Report::Failed(error.failure()), None);
    }
    sys::exit(1)
}

fn live(spec: &ContainerSpec, streams: &Streams, channel: &OwnedFd) -> SetupError {
    match prepare(spec, streams) {
        Err(error) => error,
        Ok(prepared) => match wait_and_execute(prepared, channel) {
            Err(error) | Ok(error) => error,
        },
    }
}

/// All that an execution needs.
struct Prepared {
    path: String,
    file: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    terminal: Option<OwnedFd>,
}

fn prepare(spec: &ContainerSpec, streams: &Streams) -> Result<Prepared, SetupError> {
    let process = &spec.process;
    sys::reset_signals();
    umask(Mode::empty());
    setsid().in_step("start a session")?;
    // Only now: at the fork the new namespace would have had the agent's cgroup as its root.
    sys::unshare_cgroup_namespace().in_step("make a cgroup namespace")?;
    rustix::system::sethostname(spec.hostname.as_bytes()).in_step("set the hostname")?;
    let rootfs = rootfs::mount(spec)?;
    let root = rootfs.enter()?;
    let standard = mounts::mount_standard(&root, spec.shm_bytes)?;
    mounts::mount_requested(&root, &spec.mounts)?;
    mounts::attach_files(&root, &spec.files, &rootfs.files)?;
    let user = user::look_up(&root, &process.user, &process.additional_groups)?;
    let terminal = connect_streams(process, streams, &standard.dev, &user)?;
    adjust_oom_score(&standard.proc, process.oom_score_adj)?;
    mounts::hide_and_protect(&root, &standard.dev, spec)?;
    enter_working_directory(&root, &process.working_directory)?;
    if spec.rootfs.read_only {
        rootfs::make_read_only(&root)?;
    }
    drop((root, rootfs, standard));
    umask(Mode::from_raw_mode(0o022));
    set_limits(process)?;
    drop_privileges(process, &user)?;
    resolve_program(process, &user, terminal)
}

fn connect_streams(
    process: &ProcessSpec,
    streams: &Streams,
    dev: &OwnedFd,
    user: &User,
) -> Result<Option<OwnedFd>, SetupError> {
    if let Some(size) = process.terminal {
        return terminal::open(dev, size, user.uid).map(Some);
    }
    let null = fs::openat(dev, "null", OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .in_step("open /dev/null")?;
    let numbered = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
    for (number, (end, stream)) in streams.ends.iter().zip(numbered).enumerate() {
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

fn set_limits(process: &ProcessSpec) -> Result<(), SetupError> {
    let value = |limit: u64| (limit != u64::MAX).then_some(limit);
    for limit in &process.rlimits {
        let resource = *RESOURCES
            .get(usize::from(limit.resource))
            .ok_or(SetupError::UnknownResource { resource: limit.resource })?;
        setrlimit(resource, Rlimit { current: value(limit.soft), maximum: value(limit.hard) })
            .in_step("set a resource limit")?;
    }
    Ok(())
}

fn drop_privileges(process: &ProcessSpec, user: &User) -> Result<(), SetupError> {
    let held = rustix::thread::capabilities(None).in_step("read the capabilities")?.permitted;
    for bit in 0..CAPABILITY_BITS {
        let capability = 1 << bit;
        if held.bits() & capability != 0 && process.capabilities & capability == 0 {
            remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(capability))
                .in_step("drop a capability from the bounding set")?;
        }
    }
    if process.no_new_privileges {
        set_no_new_privs(true).in_step("set no_new_privs")?;
    }
    if process.seccomp == Seccomp::Default {
        seccomp::confine().in_step("filter system calls")?;
    }
    let groups: Vec<Gid> = user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    set_thread_groups(&groups).in_step("set the supplementary groups")?;
    set_thread_gid(Gid::from_raw(user.gid)).in_step("set the group")?;
    set_thread_uid(Uid::from_raw(user.uid)).in_step("set the user")?;
    // Inheritable stays empty, as docker and podman have it since CVE-2022-24769: execve(2) gives root the bounding set
    // anyway, and a file's inheritable capabilities must not give another user anything.
    let kept = if user.uid == 0 { process.capabilities & held.bits() } else { 0 };
    let kept = CapabilitySet::from_bits_retain(kept);
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).in_step("set the capabilities")
}

fn resolve_program(process: &ProcessSpec, user: &User, terminal: Option<OwnedFd>) -> Result<Prepared, SetupError> {
    let path = program::find(process.args.first().ok_or(SetupError::NoProgram)?, &process.env)?;
    let mut environment = strings(&process.env, "a variable of the environment")?;
    let has = |name: &str| process.env.iter().any(|v| v.strip_prefix(name).is_some_and(|rest| rest.starts_with('=')));
    if !has("HOME") {
        environment.push(string(&format!("HOME={}", user.home), "the home directory")?);
    }
    if terminal.is_some() && !has("TERM") {
        environment.push(string("TERM=xterm", "TERM")?);
    }
    Ok(Prepared {
        file: string(&path, "the program's path")?,
        arguments: strings(&process.args, "an argument")?,
        path,
        environment,
        terminal,
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
    report(channel, &Report::Ready, prepared.terminal.as_ref()).in_step(step)?;
    drop(prepared.terminal);
    let mut word = GO;
    let (length, _) = rustix::io::retry_on_intr(|| recv(channel, &mut word[..], RecvFlags::empty())).in_step(step)?;
    if length == 0 {
        // The agent is gone, and the machine with it.
        sys::exit(1);
    }
    report(channel, &Report::Executing { at_us: clock::boot_us() }, None).in_step(step)?;
    let source = sys::execute(&prepared.file, &prepared.arguments, &prepared.environment);
    Ok(SetupError::Execute { path: prepared.path, source })
}

fn report(channel: &OwnedFd, report: &Report, descriptor: Option<&OwnedFd>) -> rustix::io::Result<()> {
    let datagram = frame::encode(report, REPORT_MAX).map_err(|_| rustix::io::Errno::MSGSIZE)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.map(AsFd::as_fd);
    if let Some(descriptor) = &descriptors {
        ancillary.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(descriptor)));
    }
    sendmsg(channel, &[IoSlice::new(&datagram)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}
