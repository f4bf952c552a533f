//! Guest memory: anonymous, reserved but not committed, in huge pages where the host has them, with files mapped over it
//! copy-on-write.
//!
//! What the guest only reads is mapped, which costs nothing per byte and is shared by all VMs of the host through its page
//! cache; what it writes is copied (`docs/decisions/0005-guest-memory.md`).
//!
//! UNSAFETY: memory is mapped by hand, since no safe wrapper maps a file over a part of another mapping.

#![expect(unsafe_code, reason = "mmap of guest memory")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr::null_mut;
use std::sync::Arc;

use devices::GuestMemory;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous};
use thiserror::Error;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion, ReadVolatile,
    VolatileMemoryError,
};

use crate::layout::{ABOVE_4G, BEHIND_RAM_ALIGNMENT, DEVICE_HOLE, HUGE_PAGE, PAGE};

/// Why guest memory is not as asked for.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The host has no address space, or no memory, for it.
    #[error("cannot reserve {size_mib} MiB of guest memory")]
    Reserve {
        /// The size of the part, in MiB.
        size_mib: u64,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The parts do not make up guest memory.
    #[error("cannot arrange guest memory")]
    Arrange(#[source] vm_memory::mmap::FromRangesError),
    /// A file cannot be mapped.
    #[error("cannot map a file into guest memory")]
    Map(#[source] io::Error),
    /// A file cannot be read.
    #[error("cannot read a file into guest memory")]
    Read(#[source] VolatileMemoryError),
    /// The guest has no RAM there.
    #[error("{length:#x} bytes at {address:#x} do not fit into guest memory")]
    OutOfBounds {
        /// The guest-physical address.
        address: u64,
        /// The length in bytes.
        length: u64,
    },
}

/// Reserves guest memory: up to 3 GiB from 0, the rest from 4 GiB.
///
/// # Errors
/// [`MemoryError::Reserve`] when the host refuses.
pub fn reserve(size_mib: u32) -> Result<GuestMemory, MemoryError> {
    let size = u64::from(size_mib) << 20;
    let low = size.min(DEVICE_HOLE);
    let mut regions = vec![region(0, low)?];
    if size > low {
        regions.push(region(ABOVE_4G, size - low)?);
    }
    GuestMemory::from_regions(regions).map_err(|error| MemoryError::Arrange(error.into()))
}

/// Reserves more memory behind all that there is, for devices and the guest to reach, but of which the guest is not told as of
/// RAM; and says where it begins.
///
/// # Errors
/// As [`reserve`].
pub fn reserve_behind(memory: &GuestMemory, size: u64) -> Result<(GuestMemory, u64), MemoryError> {
    let end = memory.iter().map(|region| region.start_addr().0 + region.len()).max().unwrap_or(0);
    let start = end.max(ABOVE_4G).next_multiple_of(BEHIND_RAM_ALIGNMENT);
    let all = memory.insert_region(Arc::new(region(start, size)?));
    Ok((all.map_err(|error| MemoryError::Arrange(error.into()))?, start))
}

/// Maps a file of `length` bytes behind all memory that there is, and says where: whole huge pages, of which zeroes fill what
/// the file does not.
///
/// The file of a read-only mapping does not change, whoever writes to it: it is mapped copy-on-write. A device writes to a
/// page of its own then; the guest cannot, since its memory slot is read-only.
///
/// # Errors
/// As [`reserve`], or [`MemoryError::Map`].
pub fn map_behind(
    memory: &GuestMemory,
    file: &File,
    length: u64,
    read_only: bool,
) -> Result<(GuestMemory, Range<u64>), MemoryError> {
    let size = length.next_multiple_of(HUGE_PAGE);
    let (all, start) = reserve_behind(memory, size)?;
    let out_of_bounds = || MemoryError::OutOfBounds { address: start, length };
    let count = usize::try_from(length).map_err(|_| out_of_bounds())?;
    let region = all.find_region(GuestAddress(start)).ok_or_else(out_of_bounds)?;
    let sharing = if read_only { MapFlags::PRIVATE | MapFlags::NORESERVE } else { MapFlags::SHARED };
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the region was made for this and is at least as long; nobody knows it yet.
    unsafe { mmap(region.as_ptr().cast(), count, protection, sharing | MapFlags::FIXED, file, 0) }
        .map_err(|error| MemoryError::Map(error.into()))?;
    Ok((all, start..start + size))
}

fn region(base: u64, size: u64) -> Result<GuestRegionMmap, MemoryError> {
    let failed = |source: io::Error| MemoryError::Reserve { size_mib: size >> 20, source };
    let too_large = || failed(io::ErrorKind::OutOfMemory.into());
    let length = usize::try_from(size).map_err(|_| too_large())?;
    // KVM maps huge pages only where guest and host addresses begin huge pages together: room for that, with guard pages
    // in what is left of it.
    let alignment = HUGE_PAGE as usize;
    let room = length.checked_add(alignment).ok_or_else(too_large)?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing. The region replaces a part of it: it
    // begins less than `alignment` bytes after it, which is as much longer. It is never unmapped: guest memory lives as
    // long as the process, so every pointer into it stays valid.
    let mapping = unsafe {
        let reserved =
            mmap_anonymous(null_mut(), room, ProtFlags::empty(), flags).map_err(|error| failed(error.into()))?;
        let start = reserved.cast::<u8>();
        let start = start.add(start.align_offset(alignment));
        mmap_anonymous(start.cast(), length, ProtFlags::READ | ProtFlags::WRITE, flags | MapFlags::FIXED)
            .map_err(|error| failed(error.into()))?;
        MmapRegion::build_raw(start, length, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE)
    };
    let mapping = mapping.map_err(|error| failed(io::Error::other(error)))?;
    GuestRegionMmap::new(mapping, GuestAddress(base)).ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))
}

/// Puts `length` bytes of a file from `offset` at `address`, for the guest to read: whole pages are mapped when the offset
/// within a page allows, the rest is copied. The caller has checked that the file is that long.
///
/// # Errors
/// [`MemoryError::OutOfBounds`] when it does not fit into one stretch of RAM; the others as they say.
pub fn map(memory: &GuestMemory, file: &File, offset: u64, address: u64, length: u64) -> Result<(), MemoryError> {
    let out_of_bounds = MemoryError::OutOfBounds { address, length };
    let region = memory.find_region(GuestAddress(address));
    let Some(region) = region
        .filter(|region| address.checked_add(length).is_some_and(|end| end <= region.start_addr().0 + region.len()))
    else {
        return Err(out_of_bounds);
    };
    let end = address + length;
    let (mut first, mut last) = (address.next_multiple_of(PAGE), end - end % PAGE);
    if address % PAGE != offset % PAGE || first >= last {
        (first, last) = (end, end);
    }
    if first < last {
        let start = region.as_ptr().wrapping_add(usize::try_from(first - region.start_addr().0).unwrap_or(usize::MAX));
        let size = usize::try_from(last - first).unwrap_or(usize::MAX);
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::FIXED);
        // SAFETY: the pages lie within a region of guest memory, which was checked above, and guest memory is only
        // reached through volatile accesses, so that replacing its content is no different from a write by the guest.
        unsafe { mmap(start.cast(), size, protection, flags, file, offset + (first - address)) }
            .map_err(|error| MemoryError::Map(error.into()))?;
    }
    // Copied last: what surrounds the mapped pages is then too small for a huge page, which would be zeroed as a whole.
    copy(memory, file, offset, address, first.min(end) - address)?;
    copy(memory, file, offset + (last - address), last, end - last)?;
    Ok(())
}

/// Copies `length` bytes of a file from `offset` to `address`, for the guest to write: a page that is mapped and then
/// written costs three faults and a copy. The caller has checked that the file is that long.
///
/// # Errors
/// [`MemoryError::OutOfBounds`] when it does not fit into one stretch of RAM; the others as they say.
pub fn copy(memory: &GuestMemory, file: &File, offset: u64, address: u64, length: u64) -> Result<(), MemoryError> {
    use std::io::Seek;
    if length == 0 {
        return Ok(());
    }
    let mut file = file;
    file.seek(io::SeekFrom::Start(offset)).map_err(MemoryError::Map)?;
    let size = usize::try_from(length).map_err(|_| MemoryError::OutOfBounds { address, length })?;
    let mut slice =
        memory.get_slice(GuestAddress(address), size).map_err(|_| MemoryError::OutOfBounds { address, length })?;
    file.read_exact_volatile(&mut slice).map_err(MemoryError::Read)
}

/// Writes bytes at `address`.
///
/// # Errors
/// [`MemoryError::OutOfBounds`] when the guest has no RAM there.
pub fn write(memory: &GuestMemory, bytes: &[u8], address: u64) -> Result<(), MemoryError> {
    let length = bytes.len() as u64;
    memory.write_slice(bytes, GuestAddress(address)).map_err(|_| MemoryError::OutOfBounds { address, length })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn memory_over_3_gib_goes_on_above_the_device_hole() {
        let memory = reserve(3 * 1024 + 16).unwrap();
        let regions: Vec<_> = memory.iter().map(|region| (region.start_addr().0, region.len())).collect();
        assert_eq!(regions, [(0, DEVICE_HOLE), (ABOVE_4G, 16 << 20)]);
    }

    #[test]
    fn memory_behind_ram_is_no_part_of_it() {
        for (ram_mib, expected) in [(64, ABOVE_4G), (3 * 1024, ABOVE_4G), (3 * 1024 + 16, 6 << 30)] {
            let ram = reserve(ram_mib).unwrap();
            let (all, start) = reserve_behind(&ram, 128 << 20).unwrap();
            assert_eq!(start, expected, "{ram_mib}");
            assert_eq!(all.num_regions(), ram.num_regions() + 1);
            all.write_obj(7u8, GuestAddress(start + (128 << 20) - 1)).unwrap();
            assert!(ram.write_obj(7u8, GuestAddress(start)).is_err());
            // Both are the same memory.
            all.write_obj(9u8, GuestAddress(0x1000)).unwrap();
            assert_eq!(ram.read_obj::<u8>(GuestAddress(0x1000)).unwrap(), 9);
        }
    }

    #[test]
    fn a_file_behind_ram_changes_only_if_it_may() {
        use std::os::unix::fs::FileExt as _;
        for read_only in [true, false] {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&[3; 5000]).unwrap();
            let (all, range) = map_behind(&reserve(64).unwrap(), &file, 5000, read_only).unwrap();
            assert_eq!(range, ABOVE_4G..ABOVE_4G + HUGE_PAGE);
            let read = |offset| all.read_obj::<u8>(GuestAddress(range.start + offset)).unwrap();
            assert_eq!((read(4999), read(5000), read(HUGE_PAGE - 1)), (3, 0, 0));
            all.write_obj(9u8, GuestAddress(range.start + 7)).unwrap();
            assert_eq!(read(7), 9);
            let mut byte = [0];
            file.read_exact_at(&mut byte, 7).unwrap();
            assert_eq!(byte, [if read_only { 3 } else { 9 }]);
        }
    }

    #[test]
    fn a_file_that_cannot_be_written_is_mapped_read_only() {
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().set_len(HUGE_PAGE).unwrap();
        let file = File::open(path.path()).unwrap();
        let ram = reserve(64).unwrap();
        let (all, range) = map_behind(&ram, &file, HUGE_PAGE, true).unwrap();
        all.write_obj(9u8, GuestAddress(range.start)).unwrap();
        assert!(matches!(map_behind(&ram, &file, HUGE_PAGE, false), Err(MemoryError::Map(_))));
    }

    #[test]
    fn a_file_is_loaded_whatever_its_alignment() {
        let memory = reserve(48).unwrap();
        let content: Vec<u8> = (0..5 * PAGE).map(|i| (i / 7 % 251) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&content).unwrap();
        for (offset, address, length) in
            [(0, 0x20_0000, 5 * PAGE), (100, 0x30_0064, 3 * PAGE), (5, 0x40_0000, 2 * PAGE), (9, 0x50_0009, 10)]
        {
            map(&memory, &file, offset, address, length).unwrap();
            let mut loaded = vec![0; length as usize];
            memory.read_slice(&mut loaded, GuestAddress(address)).unwrap();
            assert_eq!(loaded, content[offset as usize..][..length as usize], "{offset} {address:#x} {length}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let memory = reserve(48).unwrap();
        let file = tempfile::tempfile().unwrap();
        for (address, length) in [(48 << 20, 1), (47 << 20, 2 << 20), (u64::MAX - 10, 100), (DEVICE_HOLE, PAGE)] {
            assert!(matches!(map(&memory, &file, 0, address, length), Err(MemoryError::OutOfBounds { .. })));
        }
    }
}
