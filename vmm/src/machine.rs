//! Building a VM, in phases that take each other's results: memory with the kernel in it, KVM, devices, vCPUs.
//!
//! The order is what makes it fast: memory slots come before the interrupt controller, since changing them later waits
//! for an SRCU grace period; there is no PIT, which would cost a kernel thread; devices register their eventfds last.
//! The kernel is first of all, since what the guest will write to next becomes present while the rest is made.

use std::fs::File;
use std::io;
use std::io::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use api::config::{DEVICES_MAX, VmConfig};
use devices::GuestMemory;
use devices::console::ConsoleOutput;
use devices::device::Loop;
use devices::generation::GenerationId;
use devices::mmio::MmioDevice;
use devices::serial::Serial;
use devices::window::Windows;
use fuse::Export;
use kvm_bindings::{CpuId, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::attach::memory::{Arranged, Controls};
use crate::attach::{self, Opened};
use crate::boot::{command_line, device_tree, kernel, mp_table, registers, zero_page};
use crate::cpuid;
use crate::layout::{self, IRQ_LAST, PAGE, SERIAL_IRQ, VIRTIO_IRQ};
use crate::memory::{self, MemoryError};
use crate::populate;
use crate::resources::Resources;
use crate::vcpu::{Bus, lock};

/// Why a VM was not built.
#[derive(Debug, Error)]
pub enum MachineError {
    /// A step that KVM refused.
    #[error("KVM cannot {step}")]
    Kvm {
        /// What it was asked.
        step: &'static str,
        /// What it says.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Guest memory is not as asked for.
    #[error("cannot set guest memory up")]
    Memory(#[from] MemoryError),
    /// The kernel cannot be loaded.
    #[error("cannot load the kernel {}", path.display())]
    Kernel {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: kernel::KernelError,
    },
    /// The initial RAM file system cannot be looked at.
    #[error("cannot look at the initial RAM file system {}", path.display())]
    Length {
        /// Its path.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The initial RAM file system cannot be loaded.
    #[error("cannot place the {length} bytes of the initial RAM file system {}: it is empty, or larger than the VM", path.display())]
    Initramfs {
        /// Its path.
        path: PathBuf,
        /// Its length.
        length: u64,
    },
    /// The command line is too long.
    #[error("the kernel command line is longer than {} bytes", layout::COMMAND_LINE_SIZE)]
    CommandLine(#[source] linux_loader::cmdline::Error),
    /// The devicetree cannot be made.
    #[error("cannot make the devicetree")]
    DeviceTree(#[source] vm_fdt::Error),
    /// There is nowhere to read devices in.
    #[error("cannot make the registers of devices")]
    Windows(#[source] io::Error),
    /// A device cannot be made.
    #[error("cannot make the {device} device")]
    Device {
        /// Which.
        device: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

pub(crate) fn kvm(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { step, source }
}

/// A VM, ready for its vCPUs to run.
pub struct Machine {
    /// The vCPUs, by id.
    pub vcpus: Vec<VcpuFd>,
    /// What their exits are for.
    pub bus: Bus,
    /// The event loop of each of the bus's devices.
    loops: Vec<Loop>,
    /// What the guest prints.
    pub console: ConsoleOutput,
    /// What can be done with its memory.
    pub(crate) memory: Controls,
    /// Which one it is, if its guest is to know.
    pub(crate) generation: Option<Arc<GenerationId>>,
    /// The VM itself, to be held as long as it runs.
    pub vm: Arc<VmFd>,
}

/// Builds a VM of what was opened for it; `exports` is what its file systems show.
///
/// # Errors
/// [`MachineError`] names the step, the file or the number.
pub fn build(
    config: &VmConfig,
    resources: Resources,
    exports: Vec<Export>,
    echo_console: bool,
) -> Result<Machine, MachineError> {
    let Resources { kvm: kvm_device, kernel, initramfs, drives, pmem, taps, ports, socket } = resources;
    let guest = memory::reserve(config.memory_mib)?;
    let kernel =
        kernel::load(&guest, &kernel).map_err(|source| MachineError::Kernel { path: config.kernel.clone(), source })?;
    let initramfs = match (&config.initramfs, initramfs) {
        (Some(path), Some(file)) => Some(Initramfs::place(&guest, path, file, kernel.end)?),
        _ => None,
    };
    let place = initramfs.as_ref().map(|initramfs| initramfs.address);
    let populating = populate::start(&guest, kernel.file_end..kernel.end, place);

    let memory = Arranged::new(config, &guest, pmem)?;
    let controls = memory.controls.clone();
    let vm = Arc::new(kvm_device.create_vm().map_err(kvm("create a VM"))?);
    let windows = Windows::new(DEVICES_MAX).map_err(MachineError::Windows)?;
    add_memory(&vm, &memory, &windows)?;
    vm.set_tss_address(layout::TSS).map_err(kvm("place the task state segment"))?;
    vm.create_irq_chip().map_err(kvm("create the interrupt controllers"))?;

    let console = ConsoleOutput::new(echo_console);
    let devices =
        attach::devices(config, &vm, &windows, memory, Opened { drives, taps, exports, ports, socket }, &console)?;
    let generation = config.generation_id.then(|| attach::generation(&vm, &windows, devices.len())).transpose()?;
    let event_loop = |device: &Arc<Mutex<MmioDevice>>| lock(device).event_loop();
    let loops = devices.iter().map(event_loop).collect();
    let serial = config.serial.then(|| Arc::new(Mutex::new(Serial::new(console.clone()))));
    describe(config, &guest, devices.len(), initramfs)?;
    let vcpus = add_vcpus(&kvm_device, &vm, &guest, config.vcpus, kernel.entry)?;
    populating.finish();
    Ok(Machine { vcpus, bus: Bus::new(devices, serial), loops, console, memory: controls, generation, vm })
}

fn add_memory(vm: &VmFd, memory: &Arranged, windows: &Windows) -> Result<(), MachineError> {
    let ram = memory.all.iter().map(|region| {
        let start = region.start_addr().0;
        (start, region.as_ptr(), region.len(), memory.is_writable(start))
    });
    let windows = windows.region();
    let windows = (layout::VIRTIO, windows.as_ptr(), windows.size() as u64, false);
    for (slot, (start, host, length, writable)) in (0u32..).zip(ram.chain([windows])) {
        let slot = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: start,
            memory_size: length,
            userspace_addr: host as u64,
            // A write then leaves the guest as one to a device, which ignores it where there is none.
            flags: if writable { 0 } else { KVM_MEM_READONLY },
        };
        #[expect(unsafe_code, reason = "KVM gets memory by address")]
        // SAFETY: the region is memory that was mapped for the guest, or for what it reads of devices. Neither is used
        // otherwise, and the devices, whom the vCPUs' threads hold, hold both.
        unsafe { vm.set_user_memory_region(slot) }.map_err(kvm("add guest memory"))?;
    }
    Ok(())
}

/// Puts what the kernel is told, and the initial RAM file system, into guest memory.
fn describe(
    config: &VmConfig,
    guest: &GuestMemory,
    devices: usize,
    initramfs: Option<Initramfs>,
) -> Result<(), MachineError> {
    let initramfs = initramfs.map(|initramfs| initramfs.copy(guest)).transpose()?;
    let pluggable = config.memory_max_mib.is_some();
    // A kernel looks for devices in one place.
    let named = if config.generation_id { 0 } else { devices };
    let line = command_line::build(named, config.serial, pluggable, &config.command_line);
    let line = line.map_err(MachineError::CommandLine)?;
    let line = line.as_cstring().map_err(MachineError::CommandLine)?;
    let line = line.as_bytes_with_nul();
    memory::write(guest, line, layout::COMMAND_LINE)?;
    let tree = config.generation_id.then_some(layout::DEVICE_TREE);
    zero_page::write(guest, u32::try_from(line.len()).unwrap_or(u32::MAX), initramfs, tree)?;
    if tree.is_some() {
        return device_tree::write(guest, config.vcpus, devices);
    }
    Ok(mp_table::write(guest, config.vcpus, irqs(devices, config.serial))?)
}

/// The interrupts that something is connected to.
fn irqs(devices: usize, serial: bool) -> Range<u8> {
    let first = if serial { SERIAL_IRQ } else { VIRTIO_IRQ };
    let end = VIRTIO_IRQ + u32::try_from(devices).unwrap_or(u32::MAX);
    // Every device was connected to its pin before, so that there are no more of them than pins.
    first as u8..end.min(IRQ_LAST + 1) as u8
}

/// The initial RAM file system, with its place at the end of memory below the device hole.
struct Initramfs {
    file: File,
    address: u64,
    length: u64,
    /// Address and length as the kernel is told.
    told: (u32, u32),
}

impl Initramfs {
    fn place(guest: &GuestMemory, path: &Path, file: File, kernel_end: u64) -> Result<Self, MachineError> {
        let length = file.metadata();
        let length = length.map_err(|source| MachineError::Length { path: path.to_owned(), source })?.len();
        let misfit = || MachineError::Initramfs { path: path.to_owned(), length };
        let low_end = guest.iter().next().map_or(0, GuestMemoryRegion::len);
        let address = low_end.checked_sub(length).map(|address| address - address % PAGE).ok_or_else(misfit)?;
        if length == 0 || address < kernel_end {
            return Err(misfit());
        }
        match (u32::try_from(address), u32::try_from(length)) {
            (Ok(told_address), Ok(told_length)) => {
                Ok(Self { file, address, length, told: (told_address, told_length) })
            }
            _ => Err(misfit()),
        }
    }

    /// Copies it to its place.
    fn copy(self, guest: &GuestMemory) -> Result<(u32, u32), MachineError> {
        memory::copy(guest, &self.file, 0, self.address, self.length)?;
        Ok(self.told)
    }
}

fn add_vcpus(device: &Kvm, vm: &VmFd, guest: &GuestMemory, count: u8, entry: u64) -> Result<Vec<VcpuFd>, MachineError> {
    let supported = cpuid::supported(device).map_err(kvm("tell what CPU it supports"))?;
    (0..count)
        .map(|id| {
            let vcpu = vm.create_vcpu(id.into()).map_err(kvm("create a vCPU"))?;
            let mut cpuid: CpuId = supported.clone();
            cpuid::specialize(&mut cpuid, id, count);
            vcpu.set_cpuid2(&cpuid).map_err(kvm("set a vCPU's CPUID"))?;
            // The others wait for the first one to start them (INIT-SIPI).
            if id == 0 {
                let mut special = vcpu.get_sregs().map_err(kvm("read a vCPU's registers"))?;
                registers::special(guest, &mut special)?;
                vcpu.set_sregs(&special).map_err(kvm("set a vCPU's special registers"))?;
                vcpu.set_regs(&registers::general(entry)).map_err(kvm("set a vCPU's registers"))?;
            }
            Ok(vcpu)
        })
        .collect()
}

impl Machine {
    /// Its devices in event loops of this kind.
    pub fn devices_in(&self, wanted: Loop) -> impl Iterator<Item = &Arc<Mutex<MmioDevice>>> {
        let all = self.bus.devices.iter().zip(&self.loops);
        all.filter(move |(_, event_loop)| **event_loop == wanted).map(|(device, _)| device)
    }

    /// Delivers what the guest handed over before it ended, waiting for slow receivers and for disks.
    pub fn flush(&self) {
        for device in self.devices_in(Loop::Shared) {
            lock(device).flush();
        }
        for device in self.devices_in(Loop::Disk) {
            lock(device).drain();
        }
        // Last: what it was given may end within a line. Fails when nobody watches any more.
        let _ = self.console.clone().flush();
    }
}

#[cfg(test)]
mod tests;
