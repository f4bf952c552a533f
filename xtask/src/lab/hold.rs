//! Inside the lab: what has to stay so that its kernel does not rewrite its own code while it runs.
//!
//! Linux switches static keys by rewriting code that other CPUs execute, by way of a breakpoint. QEMU 7.2 with a thread per CPU
//! may keep a translation that has the breakpoint in it: a CPU that runs into it takes the exception again and again, with
//! interrupts off, for ever. The scheduler has such keys for the first VM and the last one, and for the first control group
//! whose CPU time is limited and the last one (a machine that did nothing but set and lift such a limit stood still after 43
//! times; with a limit that stays, it went on). So there is one of each from before anything else runs.
//!
//! Compiled system call filters are rewritten code of the same kind: `session.sh` has them interpreted.

use std::fs;
use std::io::Write as _;

use anyhow::{Context, Result};
use kvm_ioctls::Kvm;

/// The control group: nothing is ever in it.
const GROUP: &str = "/sys/fs/cgroup/lab-held";

/// Makes a VM and a limited control group, says so on standard output, and holds them until this process is ended.
pub fn hold() -> Result<()> {
    fs::create_dir(GROUP)
        .and_then(|()| fs::write(format!("{GROUP}/cpu.max"), "100000 100000"))
        .with_context(|| format!("cannot limit the CPU time of the control group {GROUP}"))?;
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
