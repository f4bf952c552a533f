//! From the configuration to devices that are connected with the VM: one file for each kind that has a backend on the host.

mod drive;
pub(crate) mod filesystem;
mod limits;
pub(crate) mod memory;
mod network;

use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};

use api::config::VmConfig;
use devices::balloon::Balloon;
use devices::blk::Blk;
use devices::console::{Console, ConsoleOutput};
use devices::device::VirtioDevice;
use devices::generation::GenerationId;
use devices::interrupt::{Interrupt, Line};
use devices::mem::Mem;
use devices::mmio::{INTERRUPT_ACK, MmioDevice, QUEUE_NOTIFY};
use devices::net::tap::Tap;
use devices::pmem::Pmem;
use devices::rng::Rng;
use devices::vsock::Vsock;
use devices::vsock::ports::HostPorts;
use devices::window::{WINDOW, Windows};
use fuse::Export;
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::memory::{Arranged, Persistent};
use crate::layout::{VIRTIO, VIRTIO_IRQ};
use crate::machine::{MachineError, kvm};

/// What was opened for devices before the monitor entered its jail, each kind in the order of the configuration.
pub(crate) struct Opened {
    /// Behind the block devices.
    pub drives: Vec<File>,
    /// The queues of the taps behind the network devices.
    pub taps: Vec<Vec<Tap>>,
    /// What the file system devices show.
    pub exports: Vec<Export>,
    /// The host's ports that the guest can connect to.
    pub ports: HostPorts,
    /// Where the host can ask for connections to the guest.
    pub socket: Option<UnixListener>,
}

/// Makes the devices that the configuration asks for, in the order in which the guest finds them.
///
/// # Errors
/// [`MachineError`] names the device.
pub(crate) fn devices(
    config: &VmConfig,
    vm: &Arc<VmFd>,
    windows: &Windows,
    memory: Arranged,
    opened: Opened,
    console: &ConsoleOutput,
) -> Result<Vec<Arc<Mutex<MmioDevice>>>, MachineError> {
    let failed = |device| move |source| MachineError::Device { device, source };
    let Opened { drives, taps, exports, ports, socket } = opened;
    let limiter = limits::limiter(config.vsock_limits).map_err(failed("vsock"))?;
    let vsock = Vsock::new(ports, socket, limiter).map_err(failed("vsock"))?;
    // Vsock first: the agent waits for it, and the kernel probes in this order.
    let mut devices: Vec<(&'static str, Box<dyn VirtioDevice>)> = vec![("vsock", Box::new(vsock))];
    for (index, (drive, file)) in config.drives.iter().zip(drives).enumerate() {
        let blk = drive::options(drive, index, config.vcpus).and_then(|options| Blk::new(file, options));
        let blk = blk.map_err(failed("block"))?;
        devices.push(("block", Box::new(blk)));
    }
    for (network, taps) in config.networks.iter().zip(taps) {
        devices.push(("network", Box::new(network::attach(network, taps).map_err(failed("network"))?)));
    }
    let limiter = limits::limiter(config.entropy_limits).map_err(failed("entropy"))?;
    devices.push(("entropy", Box::new(Rng::new(limiter))));
    let limiter = limits::limiter(config.console_limits).map_err(failed("console"))?;
    devices.push(("console", Box::new(Console::new(console.clone(), limiter))));
    for (filesystem, export) in config.filesystems.iter().zip(exports) {
        let fs = filesystem::attach(filesystem, export).map_err(failed("file system"))?;
        devices.push(("file system", Box::new(fs)));
    }
    // Last: nobody waits for those.
    if let Some(balloon) = &memory.controls.balloon {
        devices.push(("balloon", Box::new(Balloon::new(balloon.clone()))));
    }
    if let Some((mem, start)) = &memory.controls.mem {
        devices.push(("memory", Box::new(Mem::new(mem.clone(), *start))));
    }
    for Persistent { file, range, limiter } in memory.persistent {
        devices.push(("pmem", Box::new(Pmem::new(file, range, limiter))));
    }

    let acknowledged = EventFd::new(EFD_NONBLOCK).map_err(failed("eventfd of every"))?;
    (0u32..)
        .zip(devices)
        .map(|(index, (name, device))| {
            let line = Arc::new(Pin { vm: Arc::clone(vm), number: VIRTIO_IRQ + index });
            let none = || io::Error::other("there are too many devices");
            let window = windows.window(index as usize).ok_or_else(none).map_err(failed(name))?;
            let device = MmioDevice::new(device, memory.all.clone(), window, line).map_err(failed(name))?;
            connect(vm, &device, &acknowledged, index)?;
            Ok(Arc::new(Mutex::new(device)))
        })
        .collect()
}

/// Makes the generation ID, in the window and with the pin behind those of the `virtio` devices.
///
/// # Errors
/// [`MachineError`] names it, or what KVM refused.
pub(crate) fn generation(vm: &VmFd, windows: &Windows, virtio: usize) -> Result<Arc<GenerationId>, MachineError> {
    let failed = |source| MachineError::Device { device: "generation ID", source };
    let none = || failed(io::Error::other("there are too many devices"));
    let window = windows.window(virtio).ok_or_else(none)?;
    let pin = u32::try_from(virtio).ok().and_then(|index| VIRTIO_IRQ.checked_add(index)).ok_or_else(none)?;
    let changed = EventFd::new(EFD_NONBLOCK).map_err(failed)?;
    // Whoever changes it may not interrupt the guest by himself, and it is not often.
    vm.register_irqfd(&changed, pin).map_err(kvm("connect the generation ID's interrupt"))?;
    GenerationId::new(window, changed).map(Arc::new).map_err(failed)
}

/// A pin of the VM's I/O APIC, which the guest uses for edges.
///
/// Not an irqfd: of those that are no message-signalled interrupts, KVM leaves each to a thread of the kernel's
/// (`irqfd_inject`), and whoever waits for the interrupt waits for two more changes between threads.
#[derive(Debug)]
struct Pin {
    vm: Arc<VmFd>,
    number: u32,
}

impl Line for Pin {
    fn pulse(&self) {
        for active in [true, false] {
            // Fails for a VM without an interrupt controller, and this one has one.
            let _ = self.vm.set_irq_line(self.number, active);
        }
    }
}

/// Connects what a driver writes while it is at work with the VM, so that it does not come to the monitor: notifications, and
/// acknowledgements of interrupts for used buffers, of which nobody hears at all. That the device used a buffer is then still
/// among the reasons when it interrupts for another one, and the driver looks at its queues once more.
fn connect(vm: &VmFd, device: &MmioDevice, acknowledged: &EventFd, index: u32) -> Result<(), MachineError> {
    let register = |offset| IoEventAddress::Mmio(VIRTIO + u64::from(index) * WINDOW + offset);
    for (number, queue) in (0u32..).zip(device.queues()) {
        let connected = vm.register_ioevent(queue.kick(), &register(QUEUE_NOTIFY), number);
        connected.map_err(kvm("connect a queue's notification"))?;
    }
    let connected = vm.register_ioevent(acknowledged, &register(INTERRUPT_ACK), Interrupt::USED);
    connected.map_err(kvm("connect a device's acknowledgements"))
}
