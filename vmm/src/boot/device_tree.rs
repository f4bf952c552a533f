//! The devicetree (Devicetree Specification 0.4, chapters 2 and 5; Linux `arch/x86/kernel/devicetree.c`): CPUs, interrupt
//! controllers and devices of a guest with a device that is found nowhere else.
//!
//! Linux then reads neither the MP table nor devices on the command line: interrupts have no numbers before somebody asks for
//! them by the tree.

use devices::GuestMemory;
use devices::generation;
use devices::window::WINDOW;
use vm_fdt::{Error as TreeError, FdtWriter};

use crate::layout::{COMMAND_LINE, DEVICE_TREE, DEVICE_TREE_END, IO_APIC, LOCAL_APIC, VIRTIO, VIRTIO_IRQ};
use crate::machine::MachineError;
use crate::memory::{self, MemoryError};

/// Setup data that is a devicetree (`arch/x86/include/uapi/asm/setup_data.h`).
const SETUP_DTB: u32 = 2;
/// By which the nodes of devices name the I/O APIC.
const IO_APIC_HANDLE: u32 = 1;
/// How a pin is used (`of_ioapic_type`): rising edges.
const EDGE_RISING: u32 = 3;
/// The size of an APIC's registers in bytes.
const APIC_SIZE: u64 = 0x1000;

const _: () = assert!(COMMAND_LINE + crate::layout::COMMAND_LINE_SIZE as u64 <= DEVICE_TREE);

/// Writes the tree, as setup data of the boot protocol, for `vcpus` CPUs with the APIC ids 0, 1, …, and `virtio` devices, behind
/// which there is the generation ID: each in its window and with its pin.
///
/// # Errors
/// The tree is too long for its place, which has room for all that a VM can have, or guest memory is too small.
pub fn write(guest: &GuestMemory, vcpus: u8, virtio: usize) -> Result<(), MachineError> {
    let tree = tree(vcpus, virtio).map_err(MachineError::DeviceTree)?;
    // `struct setup_data`: nothing follows, the type, the length, the data.
    let mut data = Vec::with_capacity(tree.len() + 16);
    data.extend_from_slice(&0u64.to_le_bytes());
    data.extend_from_slice(&SETUP_DTB.to_le_bytes());
    data.extend_from_slice(&u32::try_from(tree.len()).unwrap_or(u32::MAX).to_le_bytes());
    data.extend_from_slice(&tree);
    let length = data.len() as u64;
    if DEVICE_TREE + length > DEVICE_TREE_END {
        return Err(MemoryError::OutOfBounds { address: DEVICE_TREE, length }.into());
    }
    Ok(memory::write(guest, &data, DEVICE_TREE)?)
}

fn tree(vcpus: u8, virtio: usize) -> Result<Vec<u8>, TreeError> {
    let mut tree = FdtWriter::new()?;
    let root = tree.begin_node("")?;
    // Without a name, Linux takes the tree for an empty one (`of_have_populated_dt`).
    tree.property_string("compatible", "cofferdam,micro-vm")?;
    tree.property_u32("#address-cells", 2)?;
    tree.property_u32("#size-cells", 2)?;
    tree.property_u32("interrupt-parent", IO_APIC_HANDLE)?;
    cpus(&mut tree, vcpus)?;

    let local = tree.begin_node(&format!("interrupt-controller@{LOCAL_APIC:x}"))?;
    tree.property_string("compatible", "intel,ce4100-lapic")?;
    tree.property_array_u64("reg", &[LOCAL_APIC.into(), APIC_SIZE])?;
    // There is no switch between it and another controller (Intel MP 1.4, section 3.6.2.2).
    tree.property_null("intel,virtual-wire-mode")?;
    tree.end_node(local)?;

    let io = tree.begin_node(&format!("interrupt-controller@{IO_APIC:x}"))?;
    tree.property_string("compatible", "intel,ce4100-ioapic")?;
    tree.property_array_u64("reg", &[IO_APIC.into(), APIC_SIZE])?;
    tree.property_null("interrupt-controller")?;
    tree.property_u32("#interrupt-cells", 2)?;
    tree.property_phandle(IO_APIC_HANDLE)?;
    tree.end_node(io)?;

    for index in 0..virtio {
        device(&mut tree, "virtio_mmio", "virtio,mmio", index, WINDOW)?;
    }
    device(&mut tree, "vmgenid", "microsoft,vmgenid", virtio, generation::LENGTH as u64)?;
    tree.end_node(root)?;
    tree.finish()
}

fn cpus(tree: &mut FdtWriter, count: u8) -> Result<(), TreeError> {
    let cpus = tree.begin_node("cpus")?;
    tree.property_u32("#address-cells", 1)?;
    tree.property_u32("#size-cells", 0)?;
    for id in 0..count {
        let cpu = tree.begin_node(&format!("cpu@{id:x}"))?;
        tree.property_string("device_type", "cpu")?;
        tree.property_u32("reg", id.into())?;
        tree.end_node(cpu)?;
    }
    tree.end_node(cpus)
}

/// The device in the window at `index`, of which it has `length` bytes.
fn device(tree: &mut FdtWriter, name: &str, binding: &str, index: usize, length: u64) -> Result<(), TreeError> {
    let (address, pin) = (VIRTIO + index as u64 * WINDOW, VIRTIO_IRQ + u32::try_from(index).unwrap_or(u32::MAX));
    let node = tree.begin_node(&format!("{name}@{address:x}"))?;
    tree.property_string("compatible", binding)?;
    tree.property_array_u64("reg", &[address, length])?;
    tree.property_array_u32("interrupts", &[pin, EDGE_RISING])?;
    tree.end_node(node)
}

#[cfg(test)]
mod tests {
    use api::config::{DEVICES_MAX, VCPUS_MAX};
    use vm_memory::{Bytes as _, GuestAddress};

    use super::*;

    /// Devicetree Specification 0.4, section 5.2.
    const MAGIC: u32 = 0xd00d_feed;

    #[test]
    fn there_is_room_for_all_that_a_vm_can_have_and_no_more() {
        let guest = memory::reserve(48).unwrap();
        write(&guest, VCPUS_MAX, DEVICES_MAX - 1).unwrap();
        let words: [u32; 6] = guest.read_obj(GuestAddress(DEVICE_TREE)).unwrap();
        let [next, _, kind, length, magic, total] = words;
        assert_eq!((next, kind, magic.swap_bytes(), total.swap_bytes()), (0, SETUP_DTB, MAGIC, length));
        assert!(write(&guest, VCPUS_MAX, 10_000).is_err());
    }

    #[test]
    fn each_device_has_a_window_and_a_pin() {
        let tree = tree(2, 2).unwrap();
        let holds = |wanted: &[u8]| tree.windows(wanted.len()).any(|bytes| bytes == wanted);
        for name in ["cpu@0", "cpu@1", "virtio_mmio@d0000000", "virtio_mmio@d0001000", "vmgenid@d0002000"] {
            assert!(holds(&[name.as_bytes(), b"\0"].concat()), "{name}");
        }
        for (index, length) in [(0, WINDOW), (1, WINDOW), (2, 16)] {
            let registers = [VIRTIO + index * WINDOW, length].map(u64::to_be_bytes).concat();
            let pin = [VIRTIO_IRQ + index as u32, EDGE_RISING].map(u32::to_be_bytes).concat();
            assert!(holds(&registers) && holds(&pin), "{index}");
        }
    }
}
