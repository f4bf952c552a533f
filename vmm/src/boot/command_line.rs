//! The kernel command line (Linux `Documentation/admin-guide/kernel-parameters.rst`).

use linux_loader::cmdline::{Cmdline, Error as CmdlineError};
use vm_memory::GuestAddress;

use crate::layout::{COMMAND_LINE_SIZE, VIRTIO, VIRTIO_IRQ};
use devices::window::WINDOW;

/// What every guest is told.
///
/// - `reboot=t panic=-1`: power-off, reboot and panic are a triple fault, the one exit that needs no device.
/// - `console=hvc0 quiet`: the kernel's last words go to the virtio console; the others are not worth their exits.
/// - `tsc=reliable`: KVM vouches for the clock; checking it costs a timer for the life of the VM.
/// - `noreplace-smp`: patching lock prefixes out of a kernel with one CPU would dirty its text, which is shared with other
///   VMs while it is clean.
/// - `8250.nr_uarts=0`: no serial port is probed for.
/// - `random.trust_cpu=on`: entropy is there at the first read.
/// - `swiotlb=noforce`: with memory above 4 GiB, Linux sets 64 MiB aside, and writes to all of it, for devices that cannot
///   reach that far. Virtio devices can.
const ALWAYS: &str = "reboot=t panic=-1 console=hvc0 quiet tsc=reliable noreplace-smp 8250.nr_uarts=0 random.trust_cpu=on swiotlb=noforce";
/// With a serial port: everything is printed, from the first instruction on.
const WITH_SERIAL: &str = "reboot=t panic=-1 earlyprintk=serial console=hvc0 ignore_loglevel tsc=reliable random.trust_cpu=on swiotlb=noforce";

/// With memory that can be plugged: the guest uses it as soon as it is there, and only as much of it for what cannot be moved
/// out of the way as the ratio to other memory asks for, so that it can be unplugged again.
const WITH_PLUGGABLE: &str = "memhp_default_state=online memory_hotplug.online_policy=auto-movable";

/// Builds the command line of a guest that is to find `devices` virtio windows by it, and with memory that can be plugged if it is
/// `pluggable`.
///
/// # Errors
/// When it is longer than [`COMMAND_LINE_SIZE`].
pub fn build(devices: usize, serial: bool, pluggable: bool, extra: &str) -> Result<Cmdline, CmdlineError> {
    let mut line = Cmdline::new(COMMAND_LINE_SIZE)?;
    line.insert_str(if serial { WITH_SERIAL } else { ALWAYS })?;
    for (index, irq) in (0..devices as u64).zip(VIRTIO_IRQ..) {
        line.add_virtio_mmio_device(WINDOW, GuestAddress(VIRTIO + index * WINDOW), irq, None)?;
    }
    if pluggable {
        line.insert_str(WITH_PLUGGABLE)?;
    }
    if !extra.is_empty() {
        line.insert_str(extra)?;
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_windows_and_interrupts_of_their_own() {
        let line = build(2, false, true, "init=/x").unwrap().as_cstring().unwrap().into_string().unwrap();
        assert!(line.contains("virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6"), "{line}");
        assert!(line.ends_with(" memory_hotplug.online_policy=auto-movable init=/x"), "{line}");
    }

    #[test]
    fn a_line_too_long_is_an_error() {
        assert!(build(0, false, false, &"x".repeat(COMMAND_LINE_SIZE)).is_err());
    }
}
