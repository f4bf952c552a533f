//! Positioned file input and output straight into guest memory: no copy through the monitor, no shared file position.
//!
//! UNSAFETY: the kernel reads and writes guest memory through raw pointers, which Rust slices may not alias.

#![expect(unsafe_code, reason = "preadv and pwritev take raw pointers into guest memory")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;

/// The most buffers passed in one call; Linux takes 1,024 (`UIO_MAXIOV`), and a chain is at most a queue long.
pub const BUFFERS_MAX: usize = crate::queue::QUEUE_SIZE_MAX as usize;

/// Reads into all of `buffers`, in order, from `offset` of the file.
///
/// # Errors
/// What the system says; `UnexpectedEof` when the file ends before the buffers are full.
pub fn read_exact_at(file: &File, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
    // SAFETY: the vectors come from `VolatileSlice`s, valid for writes of their length while borrowed here.
    transfer(buffers, offset, |vectors, count, offset| unsafe {
        libc::preadv64(file.as_raw_fd(), vectors, count, offset)
    })
}

/// Writes all of `buffers`, in order, at `offset` of the file.
///
/// # Errors
/// What the system says; `UnexpectedEof` when nothing more can be written.
pub fn write_all_at(file: &File, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
    // SAFETY: the vectors come from `VolatileSlice`s, valid for reads of their length while borrowed here.
    transfer(buffers, offset, |vectors, count, offset| unsafe {
        libc::pwritev64(file.as_raw_fd(), vectors, count, offset)
    })
}

fn transfer(
    buffers: &[VolatileSlice<'_>],
    mut offset: u64,
    call: impl Fn(*const libc::iovec, i32, i64) -> isize,
) -> io::Result<()> {
    let guards: Vec<_> = buffers.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let mut vectors: Vec<libc::iovec> =
        guards.iter().map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }).collect();
    let mut rest = vectors.as_mut_slice();
    while !rest.is_empty() {
        if rest[0].iov_len == 0 {
            rest = &mut rest[1..];
            continue;
        }
        let count = i32::try_from(rest.len().min(BUFFERS_MAX)).unwrap_or(i32::MAX);
        let position = i64::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let done = match call(rest.as_ptr(), count, position) {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            done if done > 0 => done.unsigned_abs(),
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error => return Err(error),
            },
        };
        offset += done as u64;
        rest = advance(rest, done);
    }
    Ok(())
}

/// Drops the first `done` bytes of `vectors`.
fn advance(mut vectors: &mut [libc::iovec], mut done: usize) -> &mut [libc::iovec] {
    while let Some(first) = vectors.first_mut() {
        if done < first.iov_len {
            first.iov_base = first.iov_base.cast::<u8>().wrapping_add(done).cast();
            first.iov_len -= done;
            break;
        }
        done -= first.iov_len;
        vectors = &mut vectors[1..];
    }
    vectors
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::{Bytes, GuestAddress, GuestMemory as _, Permissions};

    use super::*;
    use crate::GuestMemory;

    #[test]
    fn scattered_buffers_are_filled_in_order_and_a_short_file_is_an_error() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let slice = |at, length| {
            memory.get_slices(GuestAddress(at), length, Permissions::Write).unwrap().next().unwrap().unwrap()
        };
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();

        read_exact_at(&file, &[slice(0x100, 3), slice(0x20, 4)], 2).unwrap();

        let (mut first, mut second) = ([0; 3], [0; 4]);
        memory.read_slice(&mut first, GuestAddress(0x100)).unwrap();
        memory.read_slice(&mut second, GuestAddress(0x20)).unwrap();
        assert_eq!((&first, &second), (b"234", b"5678"));
        let error = read_exact_at(&file, &[slice(0, 8)], 4).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
