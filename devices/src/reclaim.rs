//! Giving guest memory back to the host.
//!
//! Memory that was given back reads as it did when the VM was made: as zeroes, or as the file that is mapped there, of which
//! the guest's own changes are lost. A guest that gives back memory that it needs harms nobody else.
//!
//! UNSAFETY: madvise takes addresses.

#![expect(unsafe_code, reason = "madvise of guest memory")]

use std::io;
use std::ops::Range;

use rustix::mm::{Advice, madvise};
use vm_memory::{GuestAddress, GuestMemory as _, Permissions, VolatileSlice};

use crate::GuestMemory;

/// The page size of the host, and the one that balloons count in.
pub const PAGE: usize = 4096;

/// Gives the whole pages of a piece of guest memory back, and tells how many bytes that are. It can be used again at any
/// time, and costs the host memory from then on.
///
/// # Errors
/// What the system says; nothing is lost then.
pub fn discard(slice: &VolatileSlice<'_>) -> io::Result<usize> {
    let guard = slice.ptr_guard_mut();
    let (start, length) = (guard.as_ptr(), guard.len());
    let skipped = start.align_offset(PAGE);
    let Some(length) = length.checked_sub(skipped).map(|length| length - length % PAGE) else { return Ok(0) };
    if length == 0 {
        return Ok(0);
    }
    // SAFETY: the pages lie within guest memory, which stays mapped, and guest memory is only reached through volatile
    // accesses, so that this is no different from a write by the guest.
    unsafe { madvise(start.wrapping_add(skipped).cast(), length, Advice::LinuxDontNeed)? };
    Ok(length)
}

/// Gives a range of guest-physical memory back, as far as there is memory and the host takes it, and tells how many bytes
/// that are.
pub fn discard_range(memory: &GuestMemory, range: &Range<u64>) -> u64 {
    let length = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX);
    let Ok(slices) = memory.get_slices(GuestAddress(range.start), length, Permissions::Write) else { return 0 };
    slices.map_while(Result::ok).map(|slice| discard(&slice).unwrap_or(0) as u64).sum()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use vm_memory::{Bytes, FileOffset};

    use super::*;

    fn slice(memory: &GuestMemory, at: u64, length: usize) -> VolatileSlice<'_> {
        memory.get_slices(GuestAddress(at), length, Permissions::Write).unwrap().next().unwrap().unwrap()
    }

    #[test]
    fn only_whole_pages_are_given_back() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 8 * PAGE)]).unwrap();
        memory.write_slice(&[7; 8 * PAGE], GuestAddress(0)).unwrap();
        let expected = [(PAGE as u64 + 1, 3 * PAGE, 2 * PAGE), (10, 100, 0), (PAGE as u64 - 1, PAGE, 0)];
        for (at, length, given) in expected {
            assert_eq!(discard(&slice(&memory, at, length)).unwrap(), given, "{at} {length}");
        }
        let mut content = [0; 8 * PAGE];
        memory.read_slice(&mut content, GuestAddress(0)).unwrap();
        let zeroes: Vec<_> = content.iter().enumerate().filter(|(_, byte)| **byte == 0).map(|(at, _)| at).collect();
        assert_eq!((zeroes.first(), zeroes.len()), (Some(&(2 * PAGE)), 2 * PAGE));
    }

    #[test]
    fn a_file_that_is_mapped_copy_on_write_is_read_again_and_does_not_change() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[9; PAGE]).unwrap();
        let region = vm_memory::MmapRegion::build(
            Some(FileOffset::new(file.try_clone().unwrap(), 0)),
            PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_NORESERVE,
        );
        let region = vm_memory::GuestRegionMmap::new(region.unwrap(), GuestAddress(0)).unwrap();
        let memory = GuestMemory::from_regions(vec![region]).unwrap();
        memory.write_slice(&[1; PAGE], GuestAddress(0)).unwrap();
        assert_eq!(discard(&slice(&memory, 0, PAGE)).unwrap(), PAGE);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(100)).unwrap(), 9);
    }
}
