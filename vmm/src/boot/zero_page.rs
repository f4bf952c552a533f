//! The zero page (Linux `Documentation/arch/x86/zero-page.rst`): where the kernel finds its command line, its initial RAM
//! file system and its memory.

use devices::GuestMemory;
use linux_loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{ByteValued, GuestMemoryBackend, GuestMemoryRegion};

use crate::layout::{COMMAND_LINE, HIGH_MEMORY, MP_TABLE, ZERO_PAGE};
use crate::memory::{self, MemoryError};

const E820_RAM: u32 = 1;
/// A loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// The kernel may be loaded at any multiple of 16 MiB.
const KERNEL_ALIGNMENT: u32 = 0x0100_0000;

/// Writes the zero page. `initramfs` is its address and length, `setup_data` the address of the first (`struct setup_data`), if
/// there is any.
///
/// # Errors
/// When guest memory ends before the zero page does.
pub fn write(
    guest: &GuestMemory,
    command_line_length: u32,
    initramfs: Option<(u32, u32)>,
    setup_data: Option<u64>,
) -> Result<(), MemoryError> {
    let mut page = boot_params::default();
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.boot_flag = BOOT_FLAG;
    page.hdr.header = HEADER_MAGIC;
    page.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    page.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    page.hdr.cmdline_size = command_line_length;
    page.hdr.setup_data = setup_data.unwrap_or(0);
    if let Some((address, length)) = initramfs {
        page.hdr.ramdisk_image = address;
        page.hdr.ramdisk_size = length;
    }
    let ram = ram(guest);
    for (entry, (start, end)) in page.e820_table.iter_mut().zip(&ram) {
        *entry = boot_e820_entry { addr: *start, size: end - start, r#type: E820_RAM };
    }
    page.e820_entries = u8::try_from(ram.len()).unwrap_or(u8::MAX);
    memory::write(guest, Page(page).as_slice(), ZERO_PAGE)
}

/// The stretches of RAM that the kernel may use: all but the MP table and the legacy hole behind it.
fn ram(guest: &GuestMemory) -> Vec<(u64, u64)> {
    let mut ram = vec![(0, MP_TABLE)];
    ram.extend(guest.iter().map(|region| {
        let start = region.start_addr().0;
        (start.max(HIGH_MEMORY), start + region.len())
    }));
    ram
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct Page(boot_params);

#[expect(unsafe_code, reason = "the zero page is written as the bytes it is")]
// SAFETY: `boot_params` is a packed C structure of integers, without padding: any bytes are valid.
unsafe impl ByteValued for Page {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_holes_out() {
        let ram = ram(&memory::reserve(4 * 1024).unwrap());
        assert_eq!(ram, [(0, 0x9_fc00), (0x10_0000, 0xc000_0000), (0x1_0000_0000, 0x1_4000_0000)]);
    }
}
