//! System calls that no crate has a safe call for: every `unsafe` block of the jailer is here.
//!
//! UNSAFETY: processes that share their parent's memory until they execute or are over, and three calls that rustix lacks.
#![expect(unsafe_code, reason = "clone3 with shared memory, execve, mount_setattr and signal have no safe wrapper")]

use std::arch::asm;
use std::ffi::{CStr, CString};
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};

/// Beyond the 32 bits that clone(2) has for flags, so libc's constants of the type of those flags are 0.
const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// The stack of a child until it executes: it makes some system calls, a few calls deep.
const STACK_SIZE: usize = 64 << 10;

/// What execve(2) takes, laid out before the child is there.
pub struct Program<'a> {
    path: &'a CStr,
    arguments: Vec<*const libc::c_char>,
    environment: [*const libc::c_char; 1],
    strings: PhantomData<&'a CString>,
}

impl<'a> Program<'a> {
    /// A program with these arguments and an empty environment.
    pub fn new(path: &'a CStr, arguments: &'a [CString]) -> Self {
        let arguments = arguments.iter().map(|argument| argument.as_ptr()).chain([ptr::null()]).collect();
        Self { path, arguments, environment: [ptr::null()], strings: PhantomData }
    }

    /// Executes it in place of the caller; returns only the error.
    pub fn execute(&self) -> io::Error {
        // SAFETY: both arrays end in a null pointer and hold pointers into strings that `'a` keeps alive.
        unsafe { libc::execve(self.path.as_ptr(), self.arguments.as_ptr(), self.environment.as_ptr()) };
        io::Error::last_os_error()
    }
}

/// Ignores a signal.
///
/// # Errors
/// What signal(2) says.
pub fn ignore(signal: libc::c_int) -> rustix::io::Result<()> {
    // SAFETY: no handler is set, so that no code runs at any moment.
    if unsafe { libc::signal(signal, libc::SIG_IGN) } == libc::SIG_ERR {
        return Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL));
    }
    Ok(())
}

/// Makes a child with `namespaces` (`CLONE_NEW*`) of its own, which shares this process's memory and runs `child` on a stack
/// of its own while the calling thread waits; the child's end or its execve(2) lets the thread go on. Signal handlers are
/// not inherited. Gives the child's id and a descriptor for it.
///
/// `child` may only make system calls: it must not allocate, take a lock or panic, since another thread of this process
/// may hold what that needs.
///
/// # Errors
/// What clone3(2) says.
pub fn vfork<F: FnMut()>(
    namespaces: u64,
    cgroup: Option<BorrowedFd<'_>>,
    mut child: F,
) -> rustix::io::Result<(Pid, OwnedFd)> {
    let mut stack = stack();
    // SAFETY: the calling thread stands still until the child is over or has executed (CLONE_VFORK), so that `child` and
    // `stack` stay as they are.
    unsafe { start(libc::CLONE_VFORK as u64 | namespaces, cgroup, ptr::from_mut(&mut child), &mut stack) }
}

/// Calls `act` with a descriptor for a child that has `namespaces` (`CLONE_NEW*`) of its own, shares this process's memory, and
/// does nothing; it is over when this returns.
///
/// # Errors
/// What clone3(2) says.
pub fn beside<T>(namespaces: u64, act: impl FnOnce(BorrowedFd<'_>) -> T) -> rustix::io::Result<T> {
    /// Ends a child, and waits for that.
    struct End(OwnedFd);

    impl Drop for End {
        fn drop(&mut self) {
            _ = pidfd_send_signal(&self.0, Signal::KILL);
            while matches!(waitid(WaitId::PidFd(self.0.as_fd()), WaitIdOptions::EXITED), Err(Errno::INTR)) {}
        }
    }

    let mut stack = stack();
    let mut child = || loop {
        // SAFETY: it takes nothing, and returns only when a signal was handled, for which the child has no handlers.
        unsafe { libc::pause() };
    };
    // SAFETY: `end`, which is dropped before both, also when `act` panics, ends the child that uses `child` and `stack`.
    let (_, process) = unsafe { start(namespaces, None, ptr::from_mut(&mut child), &mut stack) }?;
    let end = End(process);
    Ok(act(end.0.as_fd()))
}

/// Zeroed by the kernel and touched only as deep as the child goes.
fn stack() -> Vec<u128> {
    vec![0u128; STACK_SIZE / size_of::<u128>()]
}

/// Makes a child that shares this process's memory and runs `child` on `stack`.
///
/// # Safety
/// Both must stay as they are, and not be used, until the child is over or has executed.
unsafe fn start<F: FnMut()>(
    flags: u64,
    cgroup: Option<BorrowedFd<'_>>,
    child: *mut F,
    stack: &mut [u128],
) -> rustix::io::Result<(Pid, OwnedFd)> {
    extern "C" fn enter<F: FnMut()>(child: *mut F) -> ! {
        // SAFETY: the pointer is to the parent's `child`, which the parent does not touch before this process is over.
        unsafe {
            (*child)();
            libc::_exit(127)
        }
    }
    let mut pidfd: RawFd = -1;
    // SAFETY: all-zero is a valid value of this plain struct of integers.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = (libc::CLONE_VM | libc::CLONE_PIDFD) as u64 | CLONE_CLEAR_SIGHAND | flags;
    arguments.pidfd = ptr::from_mut(&mut pidfd) as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.stack = stack.as_mut_ptr() as u64;
    arguments.stack_size = size_of_val(stack) as u64;
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    let result: isize;
    // SAFETY: the kernel reads a whole clone_args, which lives through the call, and writes a descriptor's number to
    // `pidfd`. The child begins behind `syscall` with the parent's registers and the end of `stack`, 16-byte aligned, as
    // its stack pointer; it calls `enter`, which never returns, so that it runs nothing of the code around it. It uses
    // `child` and `stack` alone, which the caller leaves to it.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 as isize => result,
            in("rdi") ptr::from_mut(&mut arguments),
            in("rsi") size_of::<libc::clone_args>(),
            in("r12") child,
            in("r13") enter::<F> as extern "C" fn(*mut F) -> !,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    match i32::try_from(result).ok().and_then(Pid::from_raw) {
        // SAFETY: the call succeeded, so `pidfd` is a new descriptor that nothing else owns.
        Some(pid) if result > 0 => Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) })),
        _ => Err(Errno::from_raw_os_error(-result as i32)),
    }
}

/// Duplicates a descriptor to a number. For the child of [`vfork`], whose table of descriptors is a copy.
///
/// # Errors
/// What dup2(2) says.
pub fn duplicate(descriptor: BorrowedFd<'_>, number: RawFd) -> io::Result<()> {
    // SAFETY: the numbers are those of standard streams, in a process that executes next: nothing owns them.
    if unsafe { libc::dup2(descriptor.as_raw_fd(), number) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Closes the descriptors with numbers from `first` to `last`. For the child of [`vfork`].
///
/// # Errors
/// What close_range(2) says: it needs Linux 5.9.
pub fn close_range(first: RawFd, last: RawFd) -> io::Result<()> {
    // SAFETY: the child's table is a copy, and its values that own descriptors are the parent's, which keep theirs.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, first as libc::c_uint, last as libc::c_uint, 0) };
    if closed < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets the signal mask of the calling thread.
///
/// # Errors
/// What sigprocmask(2) says.
pub fn set_mask(mask: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: the set is a whole one and is only read.
    match unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// What a mount is to be, besides what it was.
#[derive(Debug, Clone, Copy)]
pub enum Attributes<'a> {
    /// Without set-user-id programs, device nodes, programs and symbolic links that are followed, and read-only if asked for;
    /// with all mounts below it.
    Harmless {
        /// Whether nothing can be written.
        read_only: bool,
    },
    /// With owners as this user namespace maps them.
    Mapped(BorrowedFd<'a>),
}

/// Sets the attributes of a mount.
///
/// # Errors
/// What mount_setattr(2) says: it needs Linux 5.12. Before 5.14, links are followed as before.
pub fn set_mount(mount: BorrowedFd<'_>, wanted: Attributes<'_>) -> rustix::io::Result<()> {
    const MOUNT_ATTR_NOSYMFOLLOW: u64 = 0x0020_0000;
    // SAFETY: all-zero is a valid value of this plain struct of integers.
    let mut attributes: libc::mount_attr = unsafe { std::mem::zeroed() };
    let mut flags = libc::AT_EMPTY_PATH;
    match wanted {
        Attributes::Harmless { read_only } => {
            flags |= libc::AT_RECURSIVE;
            attributes.attr_set =
                libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC | MOUNT_ATTR_NOSYMFOLLOW;
            if read_only {
                attributes.attr_set |= libc::MOUNT_ATTR_RDONLY;
            }
        }
        Attributes::Mapped(namespace) => {
            attributes.attr_set = libc::MOUNT_ATTR_IDMAP;
            attributes.userns_fd = namespace.as_raw_fd() as u64;
        }
    }
    match set_attributes(mount, flags, &mut attributes) {
        // Nothing is set if one of them is not known, and that one is younger than the rest.
        Err(Errno::INVAL) if attributes.attr_set & MOUNT_ATTR_NOSYMFOLLOW != 0 => {
            attributes.attr_set &= !MOUNT_ATTR_NOSYMFOLLOW;
            set_attributes(mount, flags, &mut attributes)
        }
        set => set,
    }
}

fn set_attributes(mount: BorrowedFd<'_>, flags: i32, attributes: &mut libc::mount_attr) -> rustix::io::Result<()> {
    // SAFETY: the path is a string, and `attributes` a whole structure of the size that is given.
    let set = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            ptr::from_mut(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if set < 0 { Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)) } else { Ok(()) }
}
