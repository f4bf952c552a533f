//! Whether `/dev/kvm` can run a guest's kernel, and how fast: a loop in ring 0 of a VM that has one page of memory.
//!
//! Some hosts offer a KVM that emulates ring 0 instruction by instruction. It opens, makes VMs and runs them, a thousand
//! times too slowly to boot anything. The loop tells the two apart in milliseconds on hardware, and in well under a
//! second on an emulator, since it begins short and is repeated ten times longer only while it was quick.
//!
//! The guest is 32-bit protected mode without paging: flat segments, no descriptor table, no interrupts, one page.
// UNSAFETY: KVM is told about the page by its address.

use std::time::{Duration, Instant};

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use serde::Serialize;
use thiserror::Error;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};

/// Where the page is in the guest: not at zero, where a jump gone wrong would run it.
const PAGE: GuestAddress = GuestAddress(0x1000);
const PAGE_SIZE: usize = 0x1000;

/// `1: dec ecx; jnz 1b; hlt`
const LOOP: [u8; 4] = [0x49, 0x75, 0xfd, 0xf4];
/// The instructions of one turn.
const PER_TURN: u64 = 2;

/// Turns of the first loop: at one instruction a microsecond it takes 10 ms.
const TURNS_FIRST: u64 = 5_000;
/// Turns of the longest loop: at a billion instructions a second it takes 20 ms.
const TURNS_MOST: u64 = 10_000_000;
/// A loop that took as long is measured well enough.
const LONG_ENOUGH: Duration = Duration::from_millis(8);
/// How often each length is run. The shortest time counts: others were interrupted.
const REPETITIONS: usize = 3;

/// The KVM API's version since 2007; there is no other.
const API_VERSION: i32 = 12;

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Probe {
    /// KVM's API version.
    pub api_version: i32,
    /// Instructions of the last loop.
    pub instructions: u64,
    /// Its time in nanoseconds.
    pub nanoseconds: u64,
    /// Millions of instructions a second.
    pub mips: f64,
}

/// Why a guest did not run.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// A call to KVM failed.
    #[error("cannot {action}")]
    Kvm {
        /// What was tried.
        action: &'static str,
        /// What the system says.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM is of another age.
    #[error("/dev/kvm has API version {found}, not {API_VERSION}")]
    ApiVersion {
        /// What it has.
        found: i32,
    },
    /// No memory for the page.
    #[error("cannot allocate a page for the guest")]
    Memory(#[source] vm_memory::mmap::FromRangesError),
    /// The program does not fit.
    #[error("cannot write the guest's program")]
    Program(#[source] vm_memory::GuestMemoryError),
    /// The guest did something else than halt.
    #[error("the guest stopped with {exit} instead of halting")]
    Exit {
        /// What it did, in KVM's words.
        exit: String,
    },
}

fn failed(action: &'static str) -> impl Fn(kvm_ioctls::Error) -> ProbeError {
    move |source| ProbeError::Kvm { action, source }
}

/// Runs the loop.
///
/// # Errors
/// There is no usable KVM.
pub fn probe() -> Result<Probe, ProbeError> {
    let kvm = Kvm::new().map_err(failed("open /dev/kvm"))?;
    let found = kvm.get_api_version();
    if found != API_VERSION {
        return Err(ProbeError::ApiVersion { found });
    }
    let vm = kvm.create_vm().map_err(failed("create a virtual machine"))?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(PAGE, PAGE_SIZE)]).map_err(ProbeError::Memory)?;
    memory.write_slice(&LOOP, PAGE).map_err(ProbeError::Program)?;
    let host = memory.get_host_address(PAGE).map_err(ProbeError::Program)?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: PAGE.0,
        memory_size: PAGE_SIZE as u64,
        userspace_addr: host as u64,
    };
    #[expect(unsafe_code, reason = "KVM takes an address")]
    // SAFETY: the region is the whole mapping behind `memory`, which outlives the VM: it was made before `vcpu`, whose
    // runs are the only ones, and nothing else maps or frees it until this function returns.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("give the guest memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("create a virtual CPU"))?;
    protected_mode(&vcpu)?;

    let entry = shortest(&mut vcpu, 1)?;
    let mut turns = TURNS_FIRST;
    loop {
        let time = shortest(&mut vcpu, turns)?.saturating_sub(entry);
        if time >= LONG_ENOUGH || turns >= TURNS_MOST {
            let instructions = turns * PER_TURN;
            let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1);
            let mips = instructions as f64 * 1000.0 / nanoseconds as f64;
            return Ok(Probe { api_version: found, instructions, nanoseconds, mips });
        }
        turns = (turns * 10).min(TURNS_MOST);
    }
}

/// The shortest of some runs of the loop.
fn shortest(vcpu: &mut VcpuFd, turns: u64) -> Result<Duration, ProbeError> {
    let mut shortest = Duration::MAX;
    for _ in 0..REPETITIONS {
        shortest = shortest.min(run(vcpu, turns)?);
    }
    Ok(shortest)
}

/// 32-bit protected mode, every segment all of memory.
fn protected_mode(vcpu: &VcpuFd) -> Result<(), ProbeError> {
    let mut sregs = vcpu.get_sregs().map_err(failed("read the virtual CPU's state"))?;
    // Types: 11 is code that can be read, 3 data that can be written, both accessed.
    let flat = |selector: u16, type_: u8| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    };
    sregs.cs = flat(8, 11);
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = flat(16, 3);
    }
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs).map_err(failed("set the virtual CPU's state"))
}

/// Runs the loop once, from its first instruction to the halt.
fn run(vcpu: &mut VcpuFd, turns: u64) -> Result<Duration, ProbeError> {
    let mut regs = vcpu.get_regs().map_err(failed("read the virtual CPU's registers"))?;
    regs.rip = PAGE.0;
    regs.rcx = turns;
    regs.rflags = 2;
    vcpu.set_regs(&regs).map_err(failed("set the virtual CPU's registers"))?;
    let start = Instant::now();
    match vcpu.run().map_err(failed("run the virtual CPU"))? {
        VcpuExit::Hlt => Ok(start.elapsed()),
        other => Err(ProbeError::Exit { exit: format!("{other:?}") }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loop_is_timed_or_its_absence_explained() {
        let start = Instant::now();
        match probe() {
            Ok(probe) => assert!(probe.mips > 0.0 && probe.instructions >= TURNS_FIRST * PER_TURN, "{probe:?}"),
            Err(error) => assert!(error.to_string().contains("/dev/kvm"), "{error}"),
        }
        assert!(start.elapsed() < Duration::from_secs(5), "the probe took {:?}", start.elapsed());
    }
}
