//! What a guest can do to memory that it may only read, and to the registers of devices, tried by a guest of four instructions.

use std::io::Write as _;
use std::os::unix::fs::FileExt as _;

use devices::window::WINDOW;
use kvm_ioctls::VcpuExit;
use vm_memory::{Bytes as _, GuestAddress, VolatileMemory as _};

use super::*;
use crate::layout::{ABOVE_4G, HUGE_PAGE, PAGE_TABLES};

/// `mov rax, [rbx]; mov [rbx], rcx; mov rdx, [rbx]; hlt`
const PROGRAM: [u8; 10] = [0x48, 0x8b, 0x03, 0x48, 0x89, 0x0b, 0x48, 0x8b, 0x13, 0xf4];
const ENTRY: u64 = 0x1000;
const BEFORE: u64 = 0x1122_3344_5566_7788;
const WRITTEN: u64 = 0xdead_beef_dead_beef;

/// What became of the program: what it read before and after its write, and where that left the guest.
type Run = (u64, u64, Vec<u64>);

/// Runs the program in memory like this, at an address in the huge page that begins there.
fn run(ram: &GuestMemory, memory: &Arranged, windows: &Windows, address: u64) -> Run {
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    add_memory(&vm, memory, windows).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap()).unwrap();
    let mut special = vcpu.get_sregs().unwrap();
    registers::special(ram, &mut special).unwrap();
    vcpu.set_sregs(&special).unwrap();
    // The tables map the first GiB; this adds the first huge page of the GiB that the address is in.
    let (level3, level2) = (PAGE_TABLES + PAGE, PAGE_TABLES + 3 * PAGE);
    ram.write_obj(level2 | 3, GuestAddress(level3 + (address >> 30) * 8)).unwrap();
    let entry = level2 + (address >> 21 & 0x1ff) * 8;
    ram.write_obj((address & !(HUGE_PAGE - 1)) | 0x83, GuestAddress(entry)).unwrap();
    ram.write_slice(&PROGRAM, GuestAddress(ENTRY)).unwrap();
    let mut general = registers::general(ENTRY);
    (general.rbx, general.rcx) = (address, WRITTEN);
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
    (general.rax, general.rdx, written)
}

/// A VM with persistent memory, if there is a file for that.
fn arrange(pmem: Option<(&tempfile::NamedTempFile, bool)>) -> (GuestMemory, Arranged) {
    let (path, read_only) = pmem.map_or((Path::new("/none"), false), |(file, read_only)| (file.path(), read_only));
    let device = format!(r#"{{"file":{{"path":{path:?}}},"read_only":{read_only}}}"#);
    let devices = if pmem.is_some() { device.as_str() } else { "" };
    let config = format!(r#"{{"vm":{{"kernel":"/k","memory_mib":48,"pmem":[{devices}]}}}}"#);
    let config = api::config::LaunchConfig::parse(config.as_bytes()).unwrap().vm;
    let ram = memory::reserve(config.memory_mib).unwrap();
    let open = |(file, read_only): (&tempfile::NamedTempFile, bool)| {
        if read_only { File::open(file.path()) } else { file.reopen() }.unwrap()
    };
    let memory = Arranged::new(&config, &ram, pmem.map(open).into_iter().collect()).unwrap();
    (ram, memory)
}

/// Runs the program on the first 8 bytes of a file that is persistent memory; gives what the file holds then, too.
fn run_on_file(read_only: bool) -> (Run, u64) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&BEFORE.to_le_bytes()).unwrap();
    file.as_file().set_len(HUGE_PAGE).unwrap();
    let (ram, memory) = arrange(Some((&file, read_only)));
    let start = memory.persistent[0].range.start;
    let ran = run(&ram, &memory, &Windows::new(1).unwrap(), start);
    let mut content = [0; 8];
    file.as_file().read_exact_at(&mut content, 0).unwrap();
    (ran, u64::from_le_bytes(content))
}

/// CVE-2026-24834 (Kata Containers with Cloud Hypervisor): a read-only file was one by the driver's good will alone.
#[test]
fn a_guest_cannot_change_a_file_that_it_may_only_read() {
    assert_eq!(run_on_file(true), ((BEFORE, BEFORE, vec![ABOVE_4G]), BEFORE));
}

#[test]
fn a_guest_changes_a_file_that_it_may_write() {
    assert_eq!(run_on_file(false), ((BEFORE, WRITTEN, vec![]), WRITTEN));
}

/// What a driver reads does not leave the guest, which would be an exit that this guest's loop does not know.
#[test]
fn a_guest_reads_registers_where_they_are_and_writes_them_by_leaving() {
    let (ram, memory) = arrange(None);
    let windows = Windows::new(2).unwrap();
    let window = windows.region().as_volatile_slice();
    window.write_obj(BEFORE, WINDOW as usize + 8).unwrap();
    let register = layout::VIRTIO + WINDOW + 8;
    assert_eq!(run(&ram, &memory, &windows, register), (BEFORE, BEFORE, vec![register]));
}
