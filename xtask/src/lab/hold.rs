//! Inside the lab: one VM that is never run and never closed.
//!
//! With the first VM, and again after the last one, KVM switches static keys, and Linux rewrites the scheduler's code for
//! them while other CPUs execute it, by way of a breakpoint. QEMU 7.2 with a thread per CPU may keep a translation that has
//! the breakpoint in it: a CPU that runs into it takes the exception again and again, with interrupts off, for ever. With a
//! VM that stays the code is rewritten once, before anything else runs.
//!
//! Compiled system call filters are rewritten code of the same kind: `session.sh` has them interpreted.

use std::io::Write as _;

use anyhow::{Context, Result};
use kvm_ioctls::Kvm;

/// Makes the VM, says so on standard output, and holds it until this process is ended.
pub fn hold() -> Result<()> {
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let vm = kvm.create_vm().context("cannot create a VM")?;
    vm.create_irq_chip().context("cannot create interrupt controllers")?;
    // A local APIC that its guest has not enabled is another such key.
    let vcpu = vm.create_vcpu(0).context("cannot create a vCPU")?;
    println!("held");
    std::io::stdout().flush()?;
    loop {
        std::thread::park();
        // It wakes up for no reason at times.
        let _ = (&vm, &vcpu);
    }
}
