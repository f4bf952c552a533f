//! The host's side of a network device: a queue of a tap interface (Linux `Documentation/networking/tuntap.rst`), which takes
//! and gives a frame a call, behind a virtio header.
//!
//! UNSAFETY: a tap is set up with `ioctl`, and the kernel reads and writes guest memory through raw pointers, which Rust
//! slices may not alias.

#![expect(unsafe_code, reason = "ioctl, readv and writev take raw pointers")]

use std::ffi::{c_int, c_uint, c_ulong};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt as _;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use thiserror::Error;
use vm_memory::VolatileSlice;

/// The length of the header before each frame (VIRTIO 1.2 §5.1.6, `struct virtio_net_hdr`), `num_buffers` included.
pub const HEADER: usize = 12;
/// Where a tap comes from.
const DEVICE: &str = "/dev/net/tun";
/// A frame a call, behind its virtio header and nothing else.
const KIND: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
/// The longest name of an interface, in bytes (`IFNAMSIZ` without its NUL).
pub const NAME_MAX: usize = libc::IFNAMSIZ - 1;

/// What frames for the guest may have left undone, by `TUN_F_` bits: the more, the better.
const OFFLOADS: [c_uint; 4] = [
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN | libc::TUN_F_UFO,
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN,
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6,
    libc::TUN_F_CSUM,
];

/// Why a tap cannot be used.
#[derive(Debug, Error)]
pub enum TapError {
    /// There are no taps here.
    #[error("cannot open {DEVICE}: the kernel's tun module may be missing, or the device is not yours")]
    Open(#[source] io::Error),
    /// The interface is not one of ours to use.
    #[error("cannot attach {queues} queues to the tap {name:?}: {}", attach_hint(.source, *.queues))]
    Attach {
        /// The interface's name.
        name: String,
        /// How many queues it should have.
        queues: usize,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A descriptor that was handed over is something else.
    #[error("descriptor {number} is not a tap")]
    NotATap {
        /// Its number.
        number: RawFd,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A descriptor that was handed over was set up in another way.
    #[error(
        "descriptor {number} has the tap flags {flags:#x}: open it with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, {KIND:#x}"
    )]
    Flags {
        /// Its number.
        number: RawFd,
        /// The flags that it has.
        flags: c_int,
    },
    /// Queues of one device that belong to several interfaces.
    #[error("descriptor {number} is a queue of the tap {name:?}, the one before it of {other:?}")]
    Mixed {
        /// Its number.
        number: RawFd,
        /// Its interface.
        name: String,
        /// The interface of the one before it.
        other: String,
    },
    /// The kernel does not do what every supported one does.
    #[error("cannot {step} of a tap")]
    Setting {
        /// What was tried.
        step: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

fn attach_hint(error: &io::Error, queues: usize) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => "make it with `ip tuntap add dev NAME mode tap user YOU`, or have CAP_NET_ADMIN",
        Some(libc::EBUSY) => "another process has it",
        Some(libc::EINVAL) if queues > 1 => "it is no tap, or was made without `multi_queue`",
        Some(libc::EINVAL) => "it is no tap",
        Some(libc::E2BIG) => "it has no more queues",
        _ => "the system says why",
    }
}

/// A queue of a tap.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Opens `queues` queues of the interface of this name. One that does not exist is made, if the process may, and goes
    /// with the last of its queues.
    ///
    /// # Errors
    /// [`TapError`] says what to do about it.
    pub fn open(name: &str, queues: usize) -> Result<Vec<Self>, TapError> {
        let failed = |source| TapError::Attach { name: name.to_owned(), queues, source };
        let many = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        (0..queues)
            .map(|_| {
                let mut options = OpenOptions::new();
                options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
                let tap = Self { file: options.open(DEVICE).map_err(TapError::Open)? };
                match tap.attach(name, KIND | many) {
                    // One that was made for several queues takes nothing else, and then has one.
                    Err(error) if many == 0 && error.raw_os_error() == Some(libc::EINVAL) => {
                        tap.attach(name, KIND | libc::IFF_MULTI_QUEUE).map_err(failed)?;
                    }
                    attached => attached.map_err(failed)?,
                }
                tap.prepared()
            })
            .collect()
    }

    /// Takes queues that another process has attached to one interface.
    ///
    /// # Errors
    /// [`TapError`] names the descriptor.
    pub fn from_descriptors(descriptors: impl IntoIterator<Item = OwnedFd>) -> Result<Vec<Self>, TapError> {
        let mut before: Option<String> = None;
        let one = |descriptor: OwnedFd| {
            let number = descriptor.as_raw_fd();
            let tap = Self { file: descriptor.into() };
            let (name, flags) = tap.interface().map_err(|source| TapError::NotATap { number, source })?;
            if flags & KIND != KIND {
                return Err(TapError::Flags { number, flags });
            }
            if let Some(other) = before.replace(name.clone()).filter(|other| *other != name) {
                return Err(TapError::Mixed { number, name, other });
            }
            tap.prepared()
        };
        descriptors.into_iter().map(one).collect()
    }

    /// Anything that gives a message a call, in place of a tap.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn stand_in(descriptor: OwnedFd) -> Self {
        Self { file: descriptor.into() }
    }

    /// Sets what does not depend on the driver.
    fn prepared(self) -> Result<Self, TapError> {
        let failed = |step| move |source| TapError::Setting { step, source };
        let flags = fcntl_getfl(&self.file).and_then(|flags| fcntl_setfl(&self.file, flags | OFlags::NONBLOCK));
        flags.map_err(|error| failed("change the mode")(error.into()))?;
        let length = HEADER as c_int;
        // SAFETY: the kernel reads an int.
        unsafe { self.ioctl(libc::TUNSETVNETHDRSZ, &raw const length as c_ulong) }
            .map_err(failed("set the header length"))?;
        Ok(self)
    }

    fn attach(&self, name: &str, flags: c_int) -> io::Result<()> {
        let mut request = request();
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = flags as i16;
        // SAFETY: the kernel reads and writes a `struct ifreq`.
        unsafe { self.ioctl(libc::TUNSETIFF, &raw mut request as c_ulong) }
    }

    /// The name of the interface and the flags of the queue.
    fn interface(&self) -> io::Result<(String, c_int)> {
        let mut request = request();
        // SAFETY: the kernel writes a `struct ifreq`.
        unsafe { self.ioctl(libc::TUNGETIFF, &raw mut request as c_ulong) }?;
        // SAFETY: every field of the union was zeroed, and the kernel has written this one.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let name = request.ifr_name.iter().map(|byte| byte.cast_unsigned()).take_while(|byte| *byte != 0).collect();
        Ok((String::from_utf8(name).unwrap_or_default(), c_int::from(flags.cast_unsigned())))
    }

    /// Finds out what the interface can leave undone in frames for the guest, as `TUN_F_` bits, and leaves it with nothing
    /// of it.
    pub(super) fn offloads(&self) -> c_uint {
        let found = OFFLOADS.into_iter().find(|offload| self.set_offload(*offload).is_ok()).unwrap_or(0);
        // The device sets it again when it has a driver.
        let _ = self.set_offload(0);
        found
    }

    /// Says what the interface may leave undone in frames for the guest, as `TUN_F_` bits: for all of its queues.
    pub(super) fn set_offload(&self, offload: c_uint) -> io::Result<()> {
        // SAFETY: the argument is a number.
        unsafe { self.ioctl(libc::TUNSETOFFLOAD, offload.into()) }
    }

    /// # Safety
    /// `argument` is what the kernel takes for this request.
    unsafe fn ioctl(&self, request: libc::Ioctl, argument: c_ulong) -> io::Result<()> {
        // SAFETY: as the caller says.
        match unsafe { libc::ioctl(self.file.as_raw_fd(), request, argument) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    pub(super) fn descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Reads a frame: its header into `head`, then `buffers`, then `tail`; gives the length of it all. What has no room in
    /// any of them is lost.
    ///
    /// # Errors
    /// What the system says; `WouldBlock` when there is no frame.
    pub(super) fn read<'m>(
        &self,
        head: &mut [u8; HEADER],
        buffers: impl Iterator<Item = VolatileSlice<'m>>,
        tail: &mut [u8],
    ) -> io::Result<usize> {
        let guards: Vec<_> = buffers.map(|buffer| buffer.ptr_guard_mut()).collect();
        let mut vectors = Vec::with_capacity(guards.len() + 2);
        vectors.push(libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: head.len() });
        vectors
            .extend(guards.iter().map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }));
        vectors.push(libc::iovec { iov_base: tail.as_mut_ptr().cast(), iov_len: tail.len() });
        let count = c_int::try_from(vectors.len()).unwrap_or(c_int::MAX);
        // SAFETY: the vectors are a `VolatileSlice` each, valid for writes of their length while borrowed here, between two
        // exclusively borrowed slices.
        once(|| unsafe { libc::readv(self.file.as_raw_fd(), vectors.as_ptr(), count) })
    }

    /// Writes a frame: `head`, which begins with the header, and then `buffers`.
    ///
    /// # Errors
    /// What the system says; `InvalidInput` for a frame that makes no sense.
    pub(super) fn write(&self, head: &[u8], buffers: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let guards: Vec<_> = buffers.iter().map(VolatileSlice::ptr_guard_mut).collect();
        let mut vectors = Vec::with_capacity(guards.len() + 1);
        vectors.push(libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() });
        vectors
            .extend(guards.iter().map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }));
        let count = c_int::try_from(vectors.len()).unwrap_or(c_int::MAX);
        // SAFETY: the vectors are a `VolatileSlice` each, valid for reads of their length while borrowed here, after a
        // borrowed slice; `writev` writes to none of them.
        once(|| unsafe { libc::writev(self.file.as_raw_fd(), vectors.as_ptr(), count) })
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn request() -> libc::ifreq {
    // SAFETY: it holds numbers and a raw pointer, which zeroes are.
    unsafe { std::mem::zeroed() }
}

fn once(call: impl Fn() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(length) => return Ok(length),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}
