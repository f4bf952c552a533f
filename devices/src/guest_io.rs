//! Positioned file input and output straight into guest memory: no copy through the monitor, no shared file position.
//!
//! UNSAFETY: the kernel reads and writes guest memory through raw pointers, which Rust slices may not alias.

#![expect(unsafe_code, reason = "preadv and pwritev take raw pointers into guest memory")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::ReadWriteFlags;
use smallvec::SmallVec;
use vm_memory::VolatileSlice;

/// The most pieces of memory passed in one call; Linux takes 1,024 (`UIO_MAXIOV`). A chain is at most a queue long, and each of
/// its buffers in two pieces where it lies across two regions of memory.
pub const PIECES_MAX: usize = 2 * crate::queue::QUEUE_SIZE_MAX as usize;

/// Reads into all of `buffers`, in order, from `offset` of the file.
///
/// # Errors
/// What the system says; `UnexpectedEof` when the file ends before the buffers are full.
pub fn read_exact_at(file: &File, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
    // SAFETY: the vectors come from `VolatileSlice`s, valid for writes of their length while borrowed here.
    with_vectors(buffers, |vectors| unsafe { read_vectors(file, vectors, offset) })
}

/// Writes all of `buffers`, in order, at `offset` of the file.
///
/// # Errors
/// What the system says; `UnexpectedEof` when nothing more can be written.
pub fn write_all_at(file: &File, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
    // SAFETY: the vectors come from `VolatileSlice`s, valid for reads of their length while borrowed here.
    with_vectors(buffers, |vectors| unsafe { write_vectors(file, vectors, offset) })
}

/// Reads as much into `buffers`, in order, from `offset` of the file as the page cache has, and says how much that is.
///
/// # Errors
/// What the system says: `WouldBlock` when it has nothing, `Unsupported` when the file system does not tell.
pub fn read_cached_at(file: &File, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
    with_vectors(buffers, |vectors| {
        let (count, position) = (count(vectors), position(offset)?);
        // SAFETY: the vectors come from `VolatileSlice`s, valid for writes of their length while borrowed here.
        let done = unsafe { libc::preadv2(file.as_raw_fd(), vectors.as_ptr(), count, position, libc::RWF_NOWAIT) };
        usize::try_from(done).map_err(|_| io::Error::last_os_error())
    })
}

/// Reads into `buffers`, in order, from `offset` of the file until they are full or the file ends, and says how much.
///
/// # Errors
/// What the system says, when nothing was read.
pub fn read_at(file: BorrowedFd<'_>, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
    with_vectors(buffers, |vectors| {
        // SAFETY: as for `read_exact_at`.
        moved(transfer_some(vectors, offset, |vectors, count, offset| unsafe {
            libc::preadv64(file.as_raw_fd(), vectors, count, offset)
        }))
    })
}

/// Writes `buffers`, in order, at `offset` of the file, or as pwritev2(2) does with these flags, and says how much was written.
///
/// # Errors
/// What the system says, when nothing was written.
pub fn write_at(
    file: BorrowedFd<'_>,
    buffers: &[VolatileSlice<'_>],
    offset: u64,
    flags: ReadWriteFlags,
) -> io::Result<usize> {
    let flags = flags.bits().cast_signed();
    with_vectors(buffers, |vectors| {
        // SAFETY: as for `write_all_at`.
        moved(transfer_some(vectors, offset, |vectors, count, offset| unsafe {
            libc::pwritev2(file.as_raw_fd(), vectors, count, offset, flags)
        }))
    })
}

/// Reads into all of `vectors`, and uses them up.
///
/// # Errors
/// As [`read_exact_at`].
///
/// # Safety
/// The vectors must be valid for writes of their length.
pub(crate) unsafe fn read_vectors(file: &File, vectors: &mut [libc::iovec], offset: u64) -> io::Result<()> {
    // SAFETY: as the caller promises.
    transfer(vectors, offset, |vectors, count, offset| unsafe {
        libc::preadv64(file.as_raw_fd(), vectors, count, offset)
    })
}

/// Writes all of `vectors`, and uses them up.
///
/// # Errors
/// As [`write_all_at`].
///
/// # Safety
/// The vectors must be valid for reads of their length.
pub(crate) unsafe fn write_vectors(file: &File, vectors: &mut [libc::iovec], offset: u64) -> io::Result<()> {
    // SAFETY: as the caller promises.
    transfer(vectors, offset, |vectors, count, offset| unsafe {
        libc::pwritev64(file.as_raw_fd(), vectors, count, offset)
    })
}

/// Calls `call` with where `buffers` are.
fn with_vectors<T>(
    buffers: &[VolatileSlice<'_>],
    call: impl FnOnce(&mut [libc::iovec]) -> io::Result<T>,
) -> io::Result<T> {
    let guards: SmallVec<[_; 4]> = buffers.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let mut vectors: SmallVec<[libc::iovec; 4]> =
        guards.iter().map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }).collect();
    call(&mut vectors)
}

/// Moves all of `vectors`.
fn transfer(
    vectors: &mut [libc::iovec],
    offset: u64,
    call: impl Fn(*const libc::iovec, i32, i64) -> isize,
) -> io::Result<()> {
    let wanted: usize = vectors.iter().map(|vector| vector.iov_len).sum();
    let (done, outcome) = transfer_some(vectors, offset, call);
    outcome?;
    if done == wanted { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Moves what can be moved. Says how much that was, and why not more.
fn transfer_some(
    mut rest: &mut [libc::iovec],
    mut offset: u64,
    call: impl Fn(*const libc::iovec, i32, i64) -> isize,
) -> (usize, io::Result<()>) {
    let mut total = 0;
    while !rest.is_empty() {
        if rest[0].iov_len == 0 {
            rest = &mut rest[1..];
            continue;
        }
        let position = match position(offset) {
            Ok(position) => position,
            Err(error) => return (total, Err(error)),
        };
        let done = match call(rest.as_ptr(), count(rest), position) {
            0 => break,
            done if done > 0 => done.unsigned_abs(),
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error => return (total, Err(error)),
            },
        };
        total += done;
        offset += done as u64;
        rest = advance(rest, done);
    }
    (total, Ok(()))
}

/// What was moved counts, also when not everything was.
fn moved((done, outcome): (usize, io::Result<()>)) -> io::Result<usize> {
    match outcome {
        Err(error) if done == 0 => Err(error),
        _ => Ok(done),
    }
}

/// How many vectors go into one call.
fn count(vectors: &[libc::iovec]) -> i32 {
    i32::try_from(vectors.len().min(PIECES_MAX)).unwrap_or(i32::MAX)
}

fn position(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Drops the first `done` bytes of `vectors`.
pub(crate) fn advance(mut vectors: &mut [libc::iovec], mut done: usize) -> &mut [libc::iovec] {
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

    #[test]
    fn what_was_just_written_is_read_from_the_cache() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let slice = memory.get_slices(GuestAddress(0), 8, Permissions::Write).unwrap().next().unwrap().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        match read_cached_at(&file, &[slice], 6) {
            Ok(count) => assert_eq!((count, memory.read_obj::<[u8; 4]>(GuestAddress(0)).unwrap()), (4, *b"6789")),
            // A file system that does not tell what it has in memory.
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::Unsupported),
        }
        let error = read_cached_at(&file, &[slice], u64::MAX).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn what_can_be_moved_is_and_appending_goes_to_the_end() {
        use std::os::fd::AsFd;

        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let slice = |at, length| {
            memory.get_slices(GuestAddress(at), length, Permissions::Write).unwrap().next().unwrap().unwrap()
        };
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        memory.write_slice(b"abcdef", GuestAddress(0x100)).unwrap();

        let appended = write_at(file.as_fd(), &[slice(0x100, 2), slice(0x104, 2)], 3, ReadWriteFlags::APPEND).unwrap();
        let written = write_at(file.as_fd(), &[slice(0x100, 2)], 1, ReadWriteFlags::DSYNC).unwrap();
        let read = read_at(file.as_fd(), &[slice(0x200, 8), slice(0x300, 8)], 0).unwrap();

        let mut content = [0; 8];
        memory.read_slice(&mut content, GuestAddress(0x200)).unwrap();
        assert_eq!((appended, written, read, &content), (4, 2, 14, b"0ab34567"));
        memory.read_slice(&mut content[..6], GuestAddress(0x300)).unwrap();
        assert_eq!(&content[..6], b"89abef");
        assert!(read_at(file.as_fd(), &[slice(0, 8)], u64::MAX).is_err());
    }
}
