//! Starting a monitor: its process is born in namespaces and a cgroup of its own, with nothing of its parent's but what is
//! named.
//!
//! One clone3(2) makes it, without a copy of the parent's memory; it lays its descriptors out and executes the monitor,
//! which does the rest itself ([`crate::enter`]). No helper runs, and nobody is waited for but the execution.
//!
//! A user namespace has to come first where the caller has no privileges: it gives the right to make the others. Where the
//! caller has them, the others stay out of the reach of the user namespace that the monitor gives itself last.

use std::cell::Cell;
use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, getegid, geteuid, pidfd_send_signal, setsid, waitid};
use rustix::thread::{CapabilitySet, LinkNameSpaceType, capabilities, move_into_link_name_space};

use crate::cgroup::Group;
use crate::error::{JailError, step};
use crate::sys;

/// Tells a monitor that it was born as it should be.
pub const BORN: &str = "--born";

/// What a monitor is started with.
#[derive(Debug)]
pub struct Birth<'a> {
    /// The executable.
    pub program: &'a Path,
    /// Its words, without its name.
    pub arguments: &'a [&'a OsStr],
    /// Standard input, output and error.
    pub streams: [BorrowedFd<'a>; 3],
    /// Descriptors that it gets under their own numbers.
    pub descriptors: &'a [BorrowedFd<'a>],
    /// The signal mask that it gets, if that is not its parent's.
    pub mask: Option<&'a libc::sigset_t>,
    /// Its namespaces and cgroup; without, it is an ordinary process in a session of its own.
    pub jail: Option<Place<'a>>,
}

/// Where a monitor is born.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The network namespace that it is in; without, an empty one of its own.
    pub network: Option<&'a Path>,
    /// Its cgroup.
    pub cgroup: Option<&'a Group>,
}

/// A process that was started.
#[derive(Debug)]
pub struct Born {
    /// Its id.
    pub pid: Pid,
    /// Readable when it has ended.
    pub process: OwnedFd,
}

/// What a child writes into its own user namespace before anything else: it is root there.
struct Maps {
    uid: Vec<u8>,
    gid: Vec<u8>,
}

impl Birth<'_> {
    /// Starts it.
    ///
    /// # Errors
    /// [`JailError`] names the step.
    pub fn start(&self) -> Result<Born, JailError> {
        let program = CString::new(self.program.as_os_str().as_bytes())?;
        let mut arguments = vec![program.clone()];
        if self.jail.is_some() {
            arguments.push(CString::new(BORN)?);
        }
        for argument in self.arguments {
            arguments.push(CString::new(argument.as_bytes())?);
        }
        let program = sys::Program::new(&program, &arguments);
        let (mut namespaces, mut maps) = (0, None);
        if let Some(place) = self.jail {
            namespaces = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
            if place.network.is_none() {
                namespaces |= libc::CLONE_NEWNET;
            }
            if !is_privileged().map_err(step("read this process's capabilities"))? {
                namespaces |= libc::CLONE_NEWUSER;
                maps = Some(Maps::new());
            }
        }
        let network = Network::enter(self.jail.and_then(|place| place.network))?;
        let group = self.jail.and_then(|place| place.cgroup);
        let mut closed = self.gaps();
        closed.retain(|(first, last)| first <= last);
        let failure: Cell<Option<(&'static str, Errno)>> = Cell::new(None);
        let born = sys::vfork(namespaces as u64, group.and_then(Group::unified), || {
            let prepared = self.prepare(maps.as_ref(), group, &closed);
            failure.set(prepared.err().or_else(|| Some(("execute it", errno(&program.execute())))));
        });
        let left = network.leave();
        let (pid, process) = born.map_err(step("make its process"))?;
        let failed = match failure.get() {
            Some((failed, errno)) => Err(step(failed)(errno)),
            None => left,
        };
        if failed.is_err() {
            _ = pidfd_send_signal(&process, Signal::KILL);
            _ = waitid(WaitId::PidFd(process.as_fd()), WaitIdOptions::EXITED);
        }
        failed.map(|()| Born { pid, process })
    }

    /// In the child, before it executes: system calls only.
    fn prepare(
        &self,
        maps: Option<&Maps>,
        group: Option<&Group>,
        closed: &[(RawFd, RawFd)],
    ) -> Result<(), (&'static str, Errno)> {
        let failed = |step| move |errno: Errno| (step, errno);
        let io_failed = |step| move |error: io::Error| (step, errno(&error));
        // First, so that as much as can be is counted there.
        for procs in group.map_or(&[][..], Group::procs) {
            rustix::io::write(procs, b"0").map_err(failed("put it into its cgroup"))?;
        }
        if let Some(maps) = maps {
            maps.write().map_err(failed("map its user"))?;
        }
        setsid().map_err(failed("give it a session"))?;
        for (number, stream) in (0..).zip(self.streams) {
            sys::duplicate(stream, number).map_err(io_failed("give it its standard streams"))?;
        }
        for descriptor in self.descriptors {
            fcntl_setfd(descriptor, FdFlags::empty()).map_err(failed("give it its descriptors"))?;
        }
        for (first, last) in closed {
            sys::close_range(*first, *last).map_err(io_failed("close what it need not have"))?;
        }
        self.mask.map_or(Ok(()), sys::set_mask).map_err(io_failed("set its signal mask"))
    }

    /// The numbers that are none of the descriptors it gets.
    fn gaps(&self) -> Vec<(RawFd, RawFd)> {
        let mut numbers: Vec<RawFd> = self.descriptors.iter().map(|descriptor| descriptor.as_raw_fd()).collect();
        numbers.sort_unstable();
        let firsts = std::iter::once(3).chain(numbers.iter().map(|number| number + 1));
        let lasts = numbers.iter().map(|number| number - 1).chain([RawFd::MAX]);
        firsts.zip(lasts).collect()
    }
}

impl Maps {
    fn new() -> Self {
        Self {
            uid: format!("0 {} 1", geteuid().as_raw()).into_bytes(),
            gid: format!("0 {} 1", getegid().as_raw()).into_bytes(),
        }
    }

    fn write(&self) -> rustix::io::Result<()> {
        // Without this, groups could be dropped that somebody was put into to keep him out of something (user_namespaces(7)).
        let files = [(c"/proc/self/setgroups", &b"deny"[..]), (c"/proc/self/uid_map", &self.uid)];
        for (path, text) in files.into_iter().chain([(c"/proc/self/gid_map", &self.gid[..])]) {
            let file = open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
            rustix::io::write(&file, text)?;
        }
        Ok(())
    }
}

/// Whether this process can make namespaces, and a process of another user.
pub(crate) fn is_privileged() -> rustix::io::Result<bool> {
    let needed = CapabilitySet::SYS_ADMIN | CapabilitySet::SETUID | CapabilitySet::SETGID | CapabilitySet::CHOWN;
    Ok(capabilities(None)?.effective.contains(needed))
}

/// The calling thread in the network namespace that its child is to be in, before a user namespace takes the right away.
struct Network(Option<OwnedFd>);

impl Network {
    fn enter(path: Option<&Path>) -> Result<Self, JailError> {
        let Some(path) = path else { return Ok(Self(None)) };
        let failed = |errno: Errno| JailError::Path {
            step: "enter the network namespace",
            path: path.to_owned(),
            source: errno.into(),
        };
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let ours =
            open(c"/proc/thread-self/ns/net", flags, Mode::empty()).map_err(step("open our network namespace"))?;
        let theirs = open(path, flags, Mode::empty()).map_err(failed)?;
        move_into_link_name_space(theirs.as_fd(), Some(LinkNameSpaceType::Network)).map_err(failed)?;
        Ok(Self(Some(ours)))
    }

    fn leave(self) -> Result<(), JailError> {
        let Some(ours) = self.0 else { return Ok(()) };
        move_into_link_name_space(ours.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(step("return to our network namespace"))
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
