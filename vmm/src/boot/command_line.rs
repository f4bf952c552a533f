//! The kernel command line (Linux `Documentation/admin-guide/kernel-parameters.rst`).

use linux_loader::cmdline::{Cmdline, Error as CmdlineError};
use vm_memory::GuestAddress;

use crate::layout::{COMMAND_LINE_SIZE, VIRTIO, VIRTIO_IRQ};
use devices::mmio::WINDOW;

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

/// Builds the command line of a guest with `devices` virtio windows.
///
/// # Errors
/// When it is longer than [`COMMAND_LINE_SIZE`].
pub fn build(devices: usize, serial: bool, extra: &str) -> Result<Cmdline, CmdlineError> {
    let mut line = Cmdline::new(COMMAND_LINE_SIZE)?;
    line.insert_str(if serial { WITH_SERIAL } else { ALWAYS })?;
    for (index, irq) in (0..devices as u64).zip(VIRTIO_IRQ..) {
        line.add_virtio_mmio_device(WINDOW, GuestAddress(VIRTIO + index * WINDOW), irq, None)?;
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
        let line = build(2, false, "init=/x").unwrap().as_cstring().unwrap().into_string().unwrap();
        assert!(line.contains("virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6"), "{line}");
        assert!(line.ends_with(" init=/x"), "{line}");
    }

    #[test]
    fn a_line_too_long_is_an_error() {
        assert!(build(0, false, &"x".repeat(COMMAND_LINE_SIZE)).is_err());
    }
}
