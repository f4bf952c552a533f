//! System calls that no crate has a safe call for: every `unsafe` block of the jailer is here.
//!
//! UNSAFETY: a process that shares its parent's memory until it executes, and two calls that rustix lacks.
#![expect(unsafe_code, reason = "clone3 with shared memory, execve and mount_setattr have no safe wrapper")]

use std::arch::asm;
use std::ffi::{CStr, CString};
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::process::Pid;

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
    extern "C" fn enter<F: FnMut()>(child: *mut F) -> ! {
        // SAFETY: the pointer is to the parent's `child`, which the parent does not touch before this process is over.
        unsafe {
            (*child)();
            libc::_exit(127)
        }
    }
    // Zeroed by the kernel and touched only as deep as the child goes.
    let mut stack = vec![0u128; STACK_SIZE / size_of::<u128>()];
    let mut pidfd: RawFd = -1;
    // SAFETY: all-zero is a valid value of this plain struct of integers.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags =
        (libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD) as u64 | CLONE_CLEAR_SIGHAND | namespaces;
    arguments.pidfd = ptr::from_mut(&mut pidfd) as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.stack = stack.as_mut_ptr() as u64;
    arguments.stack_size = STACK_SIZE as u64;
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    let result: isize;
    // SAFETY: the kernel reads a whole clone_args, which lives through the call, and writes a descriptor's number to
    // `pidfd`. The child begins behind `syscall` with the parent's registers and the end of `stack`, 16-byte aligned, as
    // its stack pointer; it calls `enter`, which never returns, so that it runs nothing of the code around it. The
    // parent's thread stands still until then (CLONE_VFORK), so that its stack, `child` and `stack` stay as they are.
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
            in("r12") ptr::from_mut(&mut child),
            in("r13") enter::<F> as extern "C" fn(*mut F) -> !,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    drop(stack);
    match i32::try_from(result).ok().and_then(Pid::from_raw) {
        // SAFETY: the call succeeded, so `pidfd` is a new descriptor that nothing else owns.
        Some(pid) if result > 0 => Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) })),
        _ => Err(rustix::io::Errno::from_raw_os_error(-result as i32)),
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

/// Forbids set-user-id programs, device nodes, programs and symbolic links on a mount.
///
/// # Errors
/// What mount_setattr(2) says: it needs Linux 5.12, and the last attribute 5.14.
pub fn harden_mount(mount: BorrowedFd<'_>) -> io::Result<()> {
    const MOUNT_ATTR_NOSYMFOLLOW: u64 = 0x0020_0000;
    // SAFETY: all-zero is a valid value of this plain struct of integers.
    let mut attributes: libc::mount_attr = unsafe { std::mem::zeroed() };
    attributes.attr_set =
        libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC | MOUNT_ATTR_NOSYMFOLLOW;
    // SAFETY: the path is a string, and `attributes` a whole structure of the size that is given.
    let set = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            ptr::from_mut(&mut attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
