//! System calls that rustix has no safe call for: every `unsafe` block of the agent is here.
//!
//! The agent has one thread. [`fork_into`] leans on that: the child is a whole copy of the process in which nothing
//! was going on, so it may allocate, panic and call anything, as after any ordinary function call.
#![expect(unsafe_code, reason = "clone3, execve, close_range, vsock, signals and seccomp have no safe wrapper")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::Pid;

/// Turns the -1 of a C library call into the error it left behind.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Beyond the 32 bits that clone(2) has for flags, so libc's constant of the type of those flags is 0.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// Which side of a fork this is.
#[derive(Debug)]
pub enum Fork {
    /// The caller; the child's process id in the caller's pid namespace.
    Parent(Pid),
    /// The new process.
    Child,
}

/// Forks into new namespaces (`CLONE_NEW*` flags) and, if one is given, into a cgroup, so that no moment of the child's
/// life is counted elsewhere. Must be called by the only thread of the process.
///
/// # Errors
/// What clone3(2) says.
pub fn fork_into(cgroup: Option<BorrowedFd<'_>>, namespaces: libc::c_int) -> io::Result<Fork> {
    // SAFETY: all-zero is a valid value of this plain struct of integers.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = namespaces as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: `arguments` is a whole clone_args and lives through the call. There is no CLONE_VM, so the child has a
    // copy of the memory and of the stack it returns on; this is the only thread, so no lock is held by another.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, ptr::from_mut(&mut arguments), size_of::<libc::clone_args>()) };
    match libc::pid_t::try_from(pid).ok().filter(|pid| *pid >= 0).map(Pid::from_raw) {
        Some(Some(pid)) => Ok(Fork::Parent(pid)),
        Some(None) => Ok(Fork::Child),
        None => Err(io::Error::last_os_error()),
    }
}

/// Moves the process into a new cgroup namespace, whose root is the cgroup that it is in.
///
/// # Errors
/// What unshare(2) says.
pub fn unshare_cgroup_namespace() -> io::Result<()> {
    // SAFETY: unshare takes integers only, and this flag leaves descriptors and memory as they are.
    check(unsafe { libc::unshare(libc::CLONE_NEWCGROUP) }).map(drop)
}

/// Executes a program in place of this one; returns only the error.
pub fn execute(path: &CString, arguments: &[CString], environment: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
    };
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    // SAFETY: both arrays end in a null pointer and hold pointers into strings that outlive the call.
    unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

/// Ends the process without running anything that was registered for its end.
pub fn exit(code: u8) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(libc::c_int::from(code)) }
}

/// Makes a panic the end of this process and of nothing else. For the child of a fork, since the agent's own panic ends
/// the machine.
pub fn end_on_panic() {
    std::panic::set_hook(Box::new(|_| exit(1)));
}

/// Makes `kept` the descriptors 0, 1, 2, … in this order and closes every other one. For the child of a fork, whose
/// copies of the parent's descriptors nobody will use again.
///
/// # Errors
/// What dup(2) and close_range(2) say.
pub fn keep_only(kept: &[RawFd]) -> io::Result<()> {
    let count = libc::c_int::try_from(kept.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // First out of the way of the targets, so that no target overwrites a source that is still to come.
    let mut moved = Vec::with_capacity(kept.len());
    for &fd in kept {
        // SAFETY: fcntl with F_DUPFD takes integers only; a closed `fd` is an error, not undefined.
        moved.push(check(unsafe { libc::fcntl(fd, libc::F_DUPFD, count) })?);
    }
    for (target, &fd) in (0..).zip(&moved) {
        // SAFETY: as above; the descriptor that `target` named belongs to no value that is used or dropped again,
        // because the child never returns to the code that owns the parent's values.
        check(unsafe { libc::dup2(fd, target) })?;
    }
    // SAFETY: as above for all that are closed here.
    check(unsafe { libc::close_range(count as libc::c_uint, libc::c_uint::MAX, 0) })?;
    Ok(())
}

/// Sets the close-on-exec flag of a numbered descriptor and takes it as a value.
///
/// # Errors
/// What fcntl(2) says, for example when it is not open.
pub fn adopt(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl with F_SETFD takes integers only.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: it is open, as fcntl said, and the callers of `keep_only` name each number once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Leaves a descriptor open for good when it became one of the standard streams, which were closed; says whether.
pub fn leave_open_if_standard(fd: OwnedFd) -> bool {
    let standard = fd.as_raw_fd() <= libc::STDERR_FILENO;
    if standard {
        std::mem::forget(fd);
    }
    standard
}

/// Blocks SIGCHLD and gives a descriptor that is readable while one is pending. Ignores SIGPIPE, so that writing to a
/// closed stream is an error of that stream.
///
/// # Errors
/// What signalfd(2) says.
pub fn child_signals() -> io::Result<OwnedFd> {
    // SAFETY: `set` is a plain array of integers that sigemptyset initialises; the calls keep no pointer to it.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        check(libc::sigprocmask(libc::SIG_BLOCK, &set, ptr::null_mut()))?;
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        let fd = check(libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Gives a new program the signal state it expects: nothing blocked, nothing ignored. (The
/// agent has no handlers, and execve(2) would reset them.)
pub fn reset_signals() {
    unblock_signals();
    // SAFETY: the default action is no function that could be called.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Blocks no signal any more.
pub fn unblock_signals() {
    // SAFETY: as in `child_signals`.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &set, ptr::null_mut());
    }
}

/// Begins to connect to a vsock port of the host. The socket is non-blocking and may still be connecting.
///
/// # Errors
/// What socket(2) and connect(2) say.
pub fn dial_host(port: u32) -> io::Result<OwnedFd> {
    // SAFETY: socket takes integers only; its result is a new descriptor that nothing else owns.
    let socket = unsafe {
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        OwnedFd::from_raw_fd(check(libc::socket(libc::AF_VSOCK, kind, 0))?)
    };
    // SAFETY: all-zero is a valid value of this plain struct of integers.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = libc::VMADDR_CID_HOST;
    address.svm_port = port;
    let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: `address` is a whole sockaddr_vm of the length given.
    match check(unsafe { libc::connect(socket.as_raw_fd(), ptr::from_ref(&address).cast(), length) }) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket),
    }
}

/// Waits until a socket that was left connecting is connected; the kernel limits how long that takes.
///
/// # Errors
/// Why it could not be connected.
pub fn wait_connected(socket: BorrowedFd<'_>) -> io::Result<()> {
    let mut polled = [PollFd::from_borrowed_fd(socket, PollFlags::OUT)];
    rustix::io::retry_on_intr(|| poll(&mut polled, None))?;
    Ok(rustix::net::sockopt::socket_error(socket)??)
}

/// Sends a signal of any number to the processes of a group.
///
/// # Errors
/// What kill(2) says.
pub fn send_signal_to_group(leader: Pid, number: u8) -> io::Result<()> {
    // SAFETY: kill takes integers only.
    check(unsafe { libc::kill(-leader.as_raw_nonzero().get(), libc::c_int::from(number)) }).map(drop)
}

/// Sends a signal of any number to a process.
///
/// # Errors
/// What kill(2) says.
pub fn send_signal(pid: Pid, number: u8) -> io::Result<()> {
    // SAFETY: kill takes integers only.
    check(unsafe { libc::kill(pid.as_raw_nonzero().get(), libc::c_int::from(number)) }).map(drop)
}

/// Brings the loopback interface up.
///
/// # Errors
/// What the ioctls say.
pub fn bring_loopback_up() -> io::Result<()> {
    // SAFETY: socket takes integers only; `request` is a whole ifreq with a terminated name, and SIOCGIFFLAGS
    // initialises the member of the union that is read after it.
    unsafe {
        let socket =
            OwnedFd::from_raw_fd(check(libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0))?);
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
            *to = *from as libc::c_char;
        }
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request))?;
        request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request))?;
    }
    Ok(())
}

/// Sets attributes (`MOUNT_ATTR_*`) of the mount that `mount` refers to, and of those below it when `recursive`.
///
/// # Errors
/// What mount_setattr(2) says.
pub fn set_mount_attributes(mount: impl AsFd, attributes: u64, recursive: bool) -> io::Result<()> {
    let change = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    let mount = mount.as_fd().as_raw_fd();
    // SAFETY: the path is a terminated string and `change` a whole mount_attr of the size given.
    let result = unsafe {
        libc::syscall(libc::SYS_mount_setattr, mount, c"".as_ptr(), flags, ptr::from_ref(&change), size_of_val(&change))
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Adds a system call filter, a classic BPF program, that this process and its children can't shed.
///
/// # Errors
/// What seccomp(2) says; without no_new_privs it needs CAP_SYS_ADMIN.
pub fn add_seccomp_filter(program: &[libc::sock_filter]) -> io::Result<()> {
    let length = libc::c_ushort::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    // SAFETY: `program` points at `len` instructions, which the kernel copies and verifies, and never writes.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, ptr::from_ref(&program)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_execution_that_fails_returns_the_reason() {
        let path = CString::new("/nonexistent/program").unwrap();
        assert_eq!(execute(&path, std::slice::from_ref(&path), &[]).raw_os_error(), Some(libc::ENOENT));
    }

    #[test]
    fn attributes_of_what_is_no_mount_are_refused() {
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        assert_eq!(
            set_mount_attributes(&reader, libc::MOUNT_ATTR_RDONLY, false).unwrap_err().raw_os_error(),
            Some(libc::EINVAL)
        );
    }
}
