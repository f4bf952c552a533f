//! A vCPU: one thread that runs guest code and handles its exits.
//!
//! Exits are rare by design: queue notifications are eventfds, interrupts and timers are the kernel's. What comes here is
//! a driver that sets its device up, and the end of the guest.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{io, thread};

use devices::interrupt::Interrupt;
use devices::mmio::{INTERRUPT_ACK, MmioDevice};
use devices::serial::{self, Serial};
use devices::window::WINDOW;
use kvm_ioctls::{VcpuExit, VcpuFd};
use thiserror::Error;

use crate::confinement::Confinement;
use crate::layout::VIRTIO;
use crate::pause::{self, Gate, Threads};

/// How a guest ended by itself.
#[derive(Debug, Error)]
pub enum GuestEnd {
    /// It powered off, rebooted or panicked: all are a triple fault (see the kernel command line).
    #[error("the guest shut down")]
    Shutdown,
    /// KVM cannot run it.
    #[error("vCPU {vcpu} cannot be run")]
    Run {
        /// The vCPU's id.
        vcpu: u8,
        /// What the system says.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM gave up on it.
    #[error("KVM stopped vCPU {vcpu} at instruction address {rip:#x}: {exit}")]
    Stopped {
        /// The vCPU's id.
        vcpu: u8,
        /// Where it was.
        rip: u64,
        /// The exit.
        exit: String,
    },
}

/// What an exit may be for.
#[derive(Clone)]
pub struct Bus {
    /// The devices, in the order of their windows.
    pub devices: Arc<[Arc<Mutex<MmioDevice>>]>,
    /// Their interrupts, in the same order.
    interrupts: Arc<[Interrupt]>,
    /// The serial port, if there is one.
    pub serial: Option<Arc<Mutex<Serial>>>,
}

impl Bus {
    /// A bus with these devices, in the order of their windows.
    pub fn new(devices: Vec<Arc<Mutex<MmioDevice>>>, serial: Option<Arc<Mutex<Serial>>>) -> Self {
        let interrupt = |device: &Arc<Mutex<MmioDevice>>| lock(device).interrupt().clone();
        let interrupts = devices.iter().map(interrupt).collect();
        Self { devices: devices.into(), interrupts, serial }
    }

    fn device(&self, address: u64) -> Option<(&Mutex<MmioDevice>, &Interrupt, u64)> {
        let offset = address.checked_sub(VIRTIO)?;
        let index = usize::try_from(offset / WINDOW).ok()?;
        Some((self.devices.get(index)?, self.interrupts.get(index)?, offset % WINDOW))
    }

    /// What is written at every interrupt is not the device's, which may be at work.
    fn mmio_write(&self, address: u64, data: &[u8]) {
        match (self.device(address), data) {
            (Some((_, interrupt, INTERRUPT_ACK)), [a, b, c, d]) => {
                interrupt.acknowledge(u32::from_le_bytes([*a, *b, *c, *d]));
            }
            (Some((device, _, offset)), data) => lock(device).write(offset, data),
            (None, _) => {}
        }
    }

    fn port(&self, port: u16) -> Option<(&Mutex<Serial>, u16)> {
        let offset = port.checked_sub(serial::BASE).filter(|offset| *offset < serial::PORTS)?;
        Some((self.serial.as_deref()?, offset))
    }

    fn port_read(&self, port: u16, data: &mut [u8]) {
        // What is not there reads as all ones, as on a real bus.
        data.fill(0xff);
        if let (Some((serial, offset)), [value]) = (self.port(port), data) {
            *value = serial.lock().unwrap_or_else(PoisonError::into_inner).read(offset);
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        if let (Some((serial, offset)), [value]) = (self.port(port), data) {
            serial.lock().unwrap_or_else(PoisonError::into_inner).write(offset, *value);
        }
    }
}

/// A device, also after somebody has panicked who had it: each call leaves it whole.
pub(crate) fn lock(device: &Mutex<MmioDevice>) -> MutexGuard<'_, MmioDevice> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts the thread of a vCPU, one of `threads`, which runs the guest when all threads of the monitor are confined. `ended` is
/// called once, when the guest ends by this vCPU.
///
/// # Errors
/// When the system has no thread left, or KVM does not let the vCPU be interrupted.
pub fn spawn(
    threads: &Threads,
    id: u8,
    mut vcpu: VcpuFd,
    bus: Bus,
    confinement: Confinement,
    ended: impl FnOnce(GuestEnd) + Send + 'static,
) -> io::Result<()> {
    let gate = threads.gate();
    pause::prepare(&vcpu)?;
    let thread = thread::Builder::new().name(format!("vcpu {id}")).spawn(move || {
        confinement.enter(jailer::Thread::Vcpu);
        confinement.wait();
        ended(run(id, &mut vcpu, &bus, &gate));
    })?;
    threads.add(thread);
    Ok(())
}

fn run(id: u8, vcpu: &mut VcpuFd, bus: &Bus, gate: &Gate) -> GuestEnd {
    loop {
        match vcpu.run() {
            // Registers of devices are read where they lie: this is where there is none, and reads as on a real bus.
            Ok(VcpuExit::MmioRead(_, data)) => data.fill(0xff),
            Ok(VcpuExit::MmioWrite(address, data)) => bus.mmio_write(address, data),
            Ok(VcpuExit::IoIn(port, data)) => bus.port_read(port, data),
            Ok(VcpuExit::IoOut(port, data)) => bus.port_write(port, data),
            Ok(VcpuExit::Shutdown | VcpuExit::SystemEvent(..)) => return GuestEnd::Shutdown,
            // Nothing a guest with an in-kernel interrupt controller does on its own ends here.
            Ok(exit) => {
                let exit = format!("{exit:?}");
                let rip = vcpu.get_regs().map_or(0, |registers| registers.rip);
                return GuestEnd::Stopped { vcpu: id, rip, exit };
            }
            Err(error) if error.errno() == libc::EINTR => gate.pass(),
            // A guest that KVM wants to be run again.
            Err(error) if error.errno() == libc::EAGAIN => {}
            Err(source) => return GuestEnd::Run { vcpu: id, source },
        }
    }
}
