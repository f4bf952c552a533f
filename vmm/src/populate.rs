//! Guest memory that every boot writes to, made present while the rest of the VM is being built.
//!
//! The host zeroes a page of guest memory when it is first touched, and a page is 2 MiB where it has huge pages. For what
//! the guest's kernel touches anyway, a thread can do that on another CPU before the guest runs. It is over when the guest
//! begins, so that no thread of a running VM is without its system call filter.
//!
//! Which memory that is follows from how Linux boots, not from where one kernel was seen to write:
//! - The kernel's zeroed data (`.bss`, `.brk`): `clear_bss` writes all of it (`arch/x86/kernel/head64.c`).
//! - An array with a `struct page` for each page of memory: `sparse_init_nid` takes it for all of memory at once,
//!   aligned to 2 MiB, and `memmap_init_range` writes every element (`mm/sparse.c`, `mm/mm_init.c`). On x86-64 memblock
//!   hands memory out from its top downwards, so that only what was taken before lies above: the initial RAM file
//!   system, the page tables of the direct map, and little else. What is taken next (per-CPU areas, hash tables) lies right
//!   below.
//! - The end of the first 128 MiB: `sparse_early_usemaps_alloc_pgdat_section` wants the bitmaps of page blocks in the same
//!   section as the node's data, which is in the kernel, and gets the top of that section.

#![expect(unsafe_code, reason = "madvise of guest memory")]

use std::ops::Range;
use std::thread::{self, JoinHandle};

use devices::GuestMemory;
use rustix::mm::{Advice, madvise};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::layout::{HUGE_PAGE, PAGE};

/// The size of Linux's `struct page` on x86-64, which is kept at a cache line (`include/linux/mm_types.h`).
const STRUCT_PAGE: u64 = 64;
/// The stretch of memory whose `struct page` array is one piece (`SECTION_SIZE_BITS` of x86-64).
const SECTION: u64 = 128 << 20;
/// The most that is made present of that array, so that the guest of a VM with much memory does not wait for it: about
/// what a CPU zeroes while the VM is being built, and all of it up to 2 GiB of guest memory.
const ARRAY_MAX: u64 = 32 << 20;
/// The most of the kernel's zeroed data; Linux has 3 MiB.
const ZEROED_MAX: u64 = 16 << 20;
/// A thread that only makes system calls needs no more.
const STACK_SIZE: usize = 64 << 10;

/// A thread that makes memory present.
pub struct Populating(Option<JoinHandle<()>>);

/// Begins to make present what every boot writes to. `zeroed` is the end of the kernel, as far as no file fills it, and
/// `initramfs` the address of the initial RAM file system.
pub fn start(guest: &GuestMemory, zeroed: Range<u64>, initramfs: Option<u64>) -> Populating {
    let stretches: Vec<_> = guest.iter().map(|region| (region.start_addr().0, region.len())).collect();
    let ranges = written_by_boot(&stretches, zeroed, initramfs);
    let guest = guest.clone();
    let thread = thread::Builder::new().name("populate".into()).stack_size(STACK_SIZE);
    // Without a thread the guest faults its memory in, as it does with everything else.
    Populating(thread.spawn(move || ranges.into_iter().for_each(|range| populate(&guest, range))).ok())
}

impl Populating {
    /// Waits for the end.
    pub fn finish(self) {
        // It cannot panic, and had it done so, the guest would fault its memory in.
        let _ = self.0.map(JoinHandle::join);
    }
}

/// The ranges of guest memory that every boot writes to, in the order in which it does. `regions` are the starts and
/// lengths of guest memory.
fn written_by_boot(regions: &[(u64, u64)], zeroed: Range<u64>, initramfs: Option<u64>) -> Vec<Range<u64>> {
    let Some(last) = regions.last() else { return Vec::new() };
    let kernel = zeroed.start..zeroed.end.min(zeroed.start.saturating_add(ZEROED_MAX));
    let mut ranges = Vec::from([kernel]);
    // Where memblock begins to hand out; what it hands out before the array fits into a huge page.
    let begin = initramfs.filter(|address| *address >= last.0).unwrap_or(last.0 + last.1);
    let array_end = begin.saturating_sub(1) / HUGE_PAGE * HUGE_PAGE;
    let sections: u64 = regions.iter().map(|(_, length)| length.div_ceil(SECTION)).sum();
    let array_start = array_end.saturating_sub(sections * (SECTION / PAGE * STRUCT_PAGE));
    // In a smaller VM, or with less memory above the hole for devices, it is elsewhere.
    let free = last.0.max(zeroed.end.next_multiple_of(HUGE_PAGE)) + HUGE_PAGE;
    if array_start < free {
        return ranges;
    }
    // One page makes a whole huge page present, and is what boot surely writes to where there are none.
    let last_page_before = |end: u64| end - PAGE..end;
    ranges.push(last_page_before(begin));
    if (zeroed.end.saturating_add(HUGE_PAGE)..=array_start - HUGE_PAGE).contains(&SECTION) {
        ranges.push(last_page_before(SECTION));
    }
    ranges.push(array_start..array_end.min(array_start + ARRAY_MAX));
    ranges.push(last_page_before(array_start));
    ranges
}

/// Makes memory present, as far as it can be.
fn populate(guest: &GuestMemory, range: Range<u64>) {
    // A huge page at a time: the system call keeps others from mapping anything as long as it takes.
    let mut address = range.start - range.start % PAGE;
    while address < range.end {
        let end = (address + 1).next_multiple_of(HUGE_PAGE).min(range.end);
        let length = (end - address).next_multiple_of(PAGE);
        let Ok(slice) = guest.get_slice(GuestAddress(address), usize::try_from(length).unwrap_or(usize::MAX)) else {
            return;
        };
        let start = slice.ptr_guard_mut().as_ptr();
        // SAFETY: the pages lie within guest memory, which is never unmapped. Making them present changes no byte of
        // them: it is as if each were written with what it holds.
        let populated = unsafe { madvise(start.cast(), slice.len(), Advice::LinuxPopulateWrite) };
        // Kernels before 5.14 do not know it, and a host may be short of memory: the guest then faults it in, or not.
        if populated.is_err() {
            return;
        }
        address = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    const MIB: u64 = 1 << 20;
    const KERNEL: Range<u64> = 0x1db_a000..0x201_6000;

    /// The ranges but for the kernel's.
    fn others(regions: &[(u64, u64)], initramfs: Option<u64>) -> Vec<Range<u64>> {
        let ranges = written_by_boot(regions, KERNEL, initramfs);
        assert_eq!(ranges[0], KERNEL);
        ranges[1..].to_vec()
    }

    #[test]
    fn the_array_is_below_the_initial_ram_file_system() {
        let (section, array) = (0x7ff_f000..0x800_0000, 0x1f60_0000..0x1fe0_0000);
        let (above, below) = (0x1fe6_c000..0x1fe6_d000, 0x1f5f_f000..0x1f60_0000);
        assert_eq!(others(&[(0, 512 * MIB)], Some(0x1fe6_d000)), [above, section, array, below]);
    }

    #[test]
    fn a_vm_of_one_section_has_the_end_of_it_present_already() {
        let (above, array, below) = (0x7e6_c000..0x7e6_d000, 0x7c0_0000..0x7e0_0000, 0x7bf_f000..0x7c0_0000);
        assert_eq!(others(&[(0, 128 * MIB)], Some(0x7e6_d000)), [above, array, below]);
    }

    #[test]
    fn the_array_is_at_the_end_of_memory_above_the_device_hole() {
        let ranges = others(&[(0, 3072 * MIB), (4096 * MIB, 1024 * MIB)], Some(0xbfe6_d000));
        let (top, start) = (0x1_4000_0000, 0x1_3be0_0000);
        assert_eq!(ranges[0], top - PAGE..top);
        assert_eq!(ranges[2..], [start..start + ARRAY_MAX, start - PAGE..start]);
        // There is no room for it in the last 16 MiB.
        assert_eq!(others(&[(0, 3072 * MIB), (4096 * MIB, 16 * MIB)], Some(0xbfe6_d000)), []);
    }

    #[test]
    fn nothing_overlaps() {
        for memory_mib in (34..140).chain([256, 512, 3072]) {
            let size = memory_mib * MIB;
            for initramfs in [None, Some(size - PAGE), Some(size - 2 * MIB), Some(size - 0x19_3000)] {
                let ranges = written_by_boot(&[(0, size)], KERNEL, initramfs);
                for (index, range) in ranges.iter().enumerate() {
                    let end = initramfs.unwrap_or(size);
                    assert!(
                        range.start >= KERNEL.start && range.end <= end.max(KERNEL.end),
                        "{memory_mib} {ranges:x?}"
                    );
                    let apart = |other: &Range<u64>| other.end <= range.start || range.end <= other.start;
                    assert!(ranges[..index].iter().all(apart), "{memory_mib} {initramfs:x?} {ranges:x?}");
                }
            }
        }
    }

    #[test]
    fn memory_is_present_afterwards_and_holds_what_it_held() {
        use vm_memory::Bytes;
        let guest = memory::reserve(64).unwrap();
        guest.write_obj(0x1234_5678_u32, GuestAddress(KERNEL.start + PAGE)).unwrap();
        start(&guest, KERNEL, None).finish();
        assert_eq!(guest.read_obj::<u32>(GuestAddress(KERNEL.start + PAGE)).unwrap(), 0x1234_5678);
        let start = guest.get_host_address(GuestAddress(KERNEL.start)).unwrap();
        let length = usize::try_from(KERNEL.end - KERNEL.start).unwrap();
        let mut resident = vec![0_u8; length / PAGE as usize];
        // SAFETY: the range is guest memory and the vector has a byte for each of its pages.
        let seen = unsafe { libc::mincore(start.cast(), length, resident.as_mut_ptr()) };
        assert_eq!(seen, 0);
        assert!(resident.iter().all(|page| page & 1 == 1));
    }

    #[test]
    fn memory_that_is_not_there_is_left_alone() {
        let guest = memory::reserve(48).unwrap();
        populate(&guest, 47 * MIB..60 * MIB);
        populate(&guest, 3000 * MIB..3002 * MIB);
    }
}
