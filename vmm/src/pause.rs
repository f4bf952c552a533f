//! Stopping vCPUs where they are, and letting them go on.
//!
//! A signal makes a vCPU leave the guest. It is blocked in the vCPU's thread but for the time that KVM runs the guest
//! (`KVM_SET_SIGNAL_MASK`): one that comes at any other moment stays pending, and the next `KVM_RUN` returns at once. So
//! none is ever missed, and no handler runs.
//!
//! UNSAFETY: there are no safe wrappers for that ioctl, for blocking a signal in one thread and for taking a pending one.

#![expect(unsafe_code, reason = "signals and an ioctl")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;

/// `struct kvm_signal_mask` with a mask of the kernel's size (Linux `Documentation/virt/kvm/api.rst`, 4.17).
#[repr(C)]
struct SignalMask {
    length: u32,
    blocked: [u8; 8],
}

/// `_IOW(KVMIO, 0x8b, struct kvm_signal_mask)`: the structure's own size is that of its length.
const KVM_SET_SIGNAL_MASK: libc::c_ulong = 0x4004_ae8b;

fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// What all vCPUs pass before they run the guest.
#[derive(Debug, Default)]
pub struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn closed(&self) -> MutexGuard<'_, bool> {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the gate is closed. For a vCPU's thread, when `KVM_RUN` was interrupted.
    pub fn pass(&self) {
        take_pending();
        let waiting = self.opened.wait_while(self.closed(), |closed| *closed);
        drop(waiting.unwrap_or_else(PoisonError::into_inner));
    }
}

/// The threads of all vCPUs of a VM.
#[derive(Debug, Default)]
pub struct Threads {
    gate: Arc<Gate>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Threads {
    /// The gate for the vCPUs to pass.
    pub fn gate(&self) -> Arc<Gate> {
        Arc::clone(&self.gate)
    }

    /// Adds a vCPU's thread.
    pub fn add(&self, thread: JoinHandle<()>) {
        self.threads().push(thread);
    }

    /// Has all vCPUs leave the guest and wait.
    pub fn pause(&self) {
        *self.gate.closed() = true;
        for thread in self.threads().iter() {
            // SAFETY: the thread has not been joined, so that its handle is one.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), signal()) };
        }
    }

    /// Lets all vCPUs go on.
    pub fn resume(&self) {
        *self.gate.closed() = false;
        self.gate.opened.notify_all();
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the thread that will run a vCPU interruptible while it runs the guest, and then only. The caller's thread must be
/// the one that starts it, since it inherits which signals are blocked.
///
/// # Errors
/// What the system says.
pub fn prepare(vcpu: &VcpuFd) -> io::Result<()> {
    // SAFETY: the sets are plain data that the calls fill in; no pointer to them is kept.
    let outside = unsafe {
        let (mut set, mut before) = (MaybeUninit::<libc::sigset_t>::zeroed(), MaybeUninit::<libc::sigset_t>::zeroed());
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal());
        match libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), before.as_mut_ptr()) {
            0 => before.assume_init(),
            error => return Err(io::Error::from_raw_os_error(error)),
        }
    };
    // SAFETY: the kernel's mask is the first eight bytes of the C library's.
    let mut blocked: [u8; 8] = unsafe { ptr::read(ptr::from_ref(&outside).cast()) };
    let bit = signal() - 1;
    blocked[bit as usize / 8] &= !(1 << (bit % 8));
    let mask = SignalMask { length: 8, blocked };
    // SAFETY: `mask` is a whole structure with as many bytes behind its length as that says.
    match unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, ptr::from_ref(&mask)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes the signal if it is pending.
fn take_pending() {
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: as in `prepare`; no information about the signal is asked for.
    unsafe {
        let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal());
        libc::sigtimedwait(set.as_ptr(), ptr::null_mut(), &now);
    }
}
