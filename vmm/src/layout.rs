//! Where things are in guest-physical memory (Linux `Documentation/arch/x86/boot.rst`, "64-bit Boot Protocol").
//!
//! ```text
//!          0 .. 0x9_fc00      RAM: boot structures below, then free
//!   0x9_fc00 .. 0xa_0000      MP table, where the BIOS data area ends (Intel MP 1.4, section 4)
//!  0x10_0000 .. 0xc000_0000   RAM: kernel, … initial RAM file system at its end
//! 0xc000_0000 .. 0x1_0000_0000  devices: virtio windows, IOAPIC, local APIC
//! 0x1_0000_0000 ..            RAM beyond 3 GiB
//!   behind it, each from a multiple of 2 GiB: memory that can be plugged, persistent memory
//! ```

/// The global descriptor table.
pub const GDT: u64 = 0x500;
/// The interrupt descriptor table: empty, so an early fault is a triple fault.
pub const IDT: u64 = 0x520;
/// The zero page (`struct boot_params`).
pub const ZERO_PAGE: u64 = 0x7000;
/// The top of the stack at entry.
pub const STACK: u64 = 0x8ff0;
/// The page tables that map the first GiB to itself: three pages.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// The longest kernel command line, its final NUL included (x86 `COMMAND_LINE_SIZE`).
pub const COMMAND_LINE_SIZE: usize = 2048;
/// The devicetree, if there is one, as setup data of the boot protocol.
pub const DEVICE_TREE: u64 = 0x3_0000;
/// Where its place ends.
pub const DEVICE_TREE_END: u64 = 0x4_0000;
/// The MP table, at the end of conventional memory.
pub const MP_TABLE: u64 = 0x9_fc00;
/// The end of conventional memory and of the MP table.
pub const LOW_MEMORY_END: u64 = 0xa_0000;
/// Where RAM goes on above the legacy hole.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// Where the hole for devices below 4 GiB begins.
pub const DEVICE_HOLE: u64 = 0xc000_0000;
/// Where RAM goes on above the hole for devices.
pub const ABOVE_4G: u64 = 0x1_0000_0000;

/// What memory behind RAM is aligned to: the largest block in which Linux takes memory in on x86-64.
pub const BEHIND_RAM_ALIGNMENT: u64 = 2 << 30;

/// The interrupt of the serial console, as on every PC.
pub const SERIAL_IRQ: u32 = 4;
/// The first virtio register window.
pub const VIRTIO: u64 = 0xd000_0000;
/// The interrupt of the first virtio device; each has its own, up to [`IRQ_LAST`].
pub const VIRTIO_IRQ: u32 = 5;
/// The last pin of the I/O APIC.
pub const IRQ_LAST: u32 = 23;
/// The I/O APIC's registers, where KVM emulates them.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local APIC's registers, where KVM emulates them.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs on Intel CPUs for real mode; below the ROM, above every device.
pub const TSS: usize = 0xfffb_d000;
/// The page size.
pub const PAGE: u64 = 4096;
/// The size of a huge page.
pub const HUGE_PAGE: u64 = 2 << 20;
