//! Descriptors that the process was started with, known by their number only.
//!
//! UNSAFETY: a number says nothing about who owns the descriptor; it is checked here, once, to be an open one.

#![expect(unsafe_code, reason = "an inherited descriptor is known by its number only")]

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Mutex;

use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};

/// The numbers that were taken: each has one owner.
static TAKEN: Mutex<Vec<i32>> = Mutex::new(Vec::new());

/// Takes the descriptor with this number, which no program executed from here inherits any more.
///
/// # Errors
/// `EBADF` when no descriptor of this number was inherited, it is one of the standard ones, or it was taken before.
pub fn take(number: i32) -> io::Result<OwnedFd> {
    let mut taken = TAKEN.lock().map_err(|_| Errno::BADF)?;
    if number <= 2 || taken.contains(&number) {
        return Err(Errno::BADF.into());
    }
    // SAFETY: only used for a call that says whether there is such a descriptor.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    // What this process opens itself is closed on exec from the start; what it inherited cannot be.
    if fcntl_getfd(borrowed)?.contains(FdFlags::CLOEXEC) {
        return Err(Errno::BADF.into());
    }
    fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    taken.push(number);
    // SAFETY: the descriptor is open and inherited, so nothing in this process owns it, and it is handed out once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, IntoRawFd};

    use super::*;

    #[test]
    fn only_what_was_inherited_can_be_taken_and_only_once() {
        let inherited = rustix::io::dup(std::fs::File::open("/dev/null").unwrap()).unwrap().into_raw_fd();
        let own = std::fs::File::open("/dev/null").unwrap();
        let fd = take(inherited).unwrap();
        assert_eq!(fd.as_raw_fd(), inherited);
        for number in [inherited, own.as_raw_fd(), 1, -1, 9999] {
            assert!(take(number).is_err(), "{number}");
        }
    }
}
