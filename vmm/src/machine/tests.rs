//! What a guest can do to memory that it may only read, tried by a guest of four instructions.

use std::io::Write as _;
use std::os::unix::fs::FileExt as _;

use kvm_ioctls::VcpuExit;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::layout::{ABOVE_4G, HUGE_PAGE, PAGE_TABLES};

/// `mov rax, [rbx]; mov [rbx], rcx; mov rdx, [rbx]; hlt`
const PROGRAM: [u8; 10] = [0x48, 0x8b, 0x03, 0x48, 0x89, 0x0b, 0x48, 0x8b, 0x13, 0xf4];
const ENTRY: u64 = 0x1000;
const BEFORE: u64 = 0x1122_3344_5566_7788;
const WRITTEN: u64 = 0xdead_beef_dead_beef;

/// Runs the program on the first 8 bytes of a file that is persistent memory: what it read before and after its write, where
/// it left the guest, and what the file holds then.
fn run(read_only: bool) -> (u64, u64, Vec<u64>, u64) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&BEFORE.to_le_bytes()).unwrap();
    file.as_file().set_len(HUGE_PAGE).unwrap();
    let device = format!(r#"{{"file":{{"path":{:?}}},"read_only":{read_only}}}"#, file.path());
    let config = format!(r#"{{"vm":{{"kernel":"/k","memory_mib":48,"pmem":[{device}]}}}}"#);
    let config = api::config::LaunchConfig::parse(config.as_bytes()).unwrap().vm;

    let ram = memory::reserve(config.memory_mib).unwrap();
    let backing = if read_only { File::open(file.path()) } else { file.reopen() };
    let memory = Arranged::new(&config, &ram, vec![backing.unwrap()]).unwrap();
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    let windows = Windows::new(1).unwrap();
    add_memory(&vm, &memory, &windows).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap()).unwrap();
    let mut special = vcpu.get_sregs().unwrap();
    registers::special(&ram, &mut special).unwrap();
    vcpu.set_sregs(&special).unwrap();
    // The tables map the first GiB; this adds the first huge page of the fifth.
    let (level3, level2) = (PAGE_TABLES + PAGE, PAGE_TABLES + 3 * PAGE);
    ram.write_obj(level2 | 3, GuestAddress(level3 + 4 * 8)).unwrap();
    ram.write_obj(ABOVE_4G | 0x83, GuestAddress(level2)).unwrap();
    ram.write_slice(&PROGRAM, GuestAddress(ENTRY)).unwrap();
    let mut general = registers::general(ENTRY);
    (general.rbx, general.rcx) = (memory.persistent[0].range.start, WRITTEN);
    vcpu.set_regs(&general).unwrap();

    let mut written = Vec::new();
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::MmioWrite(address, data) => {
                assert_eq!(data, WRITTEN.to_le_bytes());
                written.push(address);
            }
            VcpuExit::Hlt => break,
            exit => panic!("{exit:?}"),
        }
    }
    let general = vcpu.get_regs().unwrap();
    let mut content = [0; 8];
    file.as_file().read_exact_at(&mut content, 0).unwrap();
    (general.rax, general.rdx, written, u64::from_le_bytes(content))
}

/// CVE-2026-24834 (Kata Containers with Cloud Hypervisor): a read-only file was one by the driver's good will alone.
#[test]
fn a_guest_cannot_change_a_file_that_it_may_only_read() {
    assert_eq!(run(true), (BEFORE, BEFORE, vec![ABOVE_4G], BEFORE));
}

#[test]
fn a_guest_changes_a_file_that_it_may_write() {
    assert_eq!(run(false), (BEFORE, WRITTEN, vec![], WRITTEN));
}
