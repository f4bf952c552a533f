//! What the guest's CPUs say they are: what KVM supports on this host, made consistent for a VM of N CPUs in one package
//! (Intel SDM volume 2, "CPUID"; AMD64 APM volume 3, appendix E).
//!
//! KVM reports the host's own topology and leaves per-CPU fields zero; a guest that believes them counts wrong CPUs, or
//! sizes its register save area for features that it is not offered.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

const LEAF_FEATURES: u32 = 1;
const LEAF_INTEL_CACHES: u32 = 4;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_SAVE_AREA: u32 = 0xd;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_CACHES: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

const FEATURES_ECX_TSC_DEADLINE: u32 = 1 << 24;
const FEATURES_ECX_HYPERVISOR: u32 = 1 << 31;
const FEATURES_EDX_MULTITHREADING: u32 = 1 << 28;
const AMD_ECX_LEGACY_MULTICORE: u32 = 1 << 1;
const TOPOLOGY_LEVEL_THREAD: u32 = 1;
const TOPOLOGY_LEVEL_CORE: u32 = 2;
/// Legacy x87 and SSE state and the header: what a save area has before any extended feature.
const SAVE_AREA_LEGACY: u32 = 576;

/// What KVM supports, as far as it is the same for every vCPU.
///
/// # Errors
/// What KVM says.
pub fn supported(kvm: &Kvm) -> Result<CpuId, kvm_ioctls::Error> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
    let entries = cpuid.as_mut_slice();
    if let Some(features) = entries.iter_mut().find(|entry| entry.function == LEAF_FEATURES) {
        features.ecx |= FEATURES_ECX_HYPERVISOR;
        if deadline_timer {
            features.ecx |= FEATURES_ECX_TSC_DEADLINE;
        }
    }
    make_save_area_consistent(entries);
    Ok(cpuid)
}

/// Adds what differs between the CPUs of a VM.
pub fn specialize(cpuid: &mut CpuId, id: u8, vcpus: u8) {
    for entry in cpuid.as_mut_slice() {
        specialize_entry(entry, u32::from(id), u32::from(vcpus));
    }
}

fn specialize_entry(entry: &mut kvm_cpuid_entry2, id: u32, vcpus: u32) {
    // APIC ids are given in order, so the bits that tell the CPUs of the package apart are those of the last one.
    let id_bits = vcpus.next_power_of_two().trailing_zeros();
    match entry.function {
        LEAF_FEATURES => {
            entry.ebx = entry.ebx & 0xffff | id << 24 | vcpus.next_power_of_two() << 16;
            set(&mut entry.edx, FEATURES_EDX_MULTITHREADING, vcpus > 1);
        }
        LEAF_INTEL_CACHES if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { vcpus.next_power_of_two() - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | (vcpus.next_power_of_two() - 1) << 26;
        }
        LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => {
            (entry.eax, entry.ebx, entry.ecx) = match entry.index {
                0 => (0, 1, TOPOLOGY_LEVEL_THREAD << 8),
                1 => (id_bits, vcpus, TOPOLOGY_LEVEL_CORE << 8 | 1),
                index => (0, 0, index),
            };
            entry.edx = id;
        }
        LEAF_AMD_FEATURES => set(&mut entry.ecx, AMD_ECX_LEGACY_MULTICORE, vcpus > 1),
        LEAF_AMD_SIZES => entry.ecx = entry.ecx & !0xf0ff | id_bits << 12 | (vcpus - 1),
        LEAF_AMD_CACHES if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 7 >= 3 { vcpus - 1 } else { 0 };
            entry.eax = entry.eax & !(0xfff << 14) | sharing << 14;
        }
        LEAF_AMD_TOPOLOGY => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0),
        _ => {}
    }
}

/// Makes leaf 0xD agree with itself: only features that have a size, and an area that ends where the last one does.
fn make_save_area_consistent(entries: &mut [kvm_cpuid_entry2]) {
    let components: Vec<(u32, u32)> = entries
        .iter()
        .filter(|entry| entry.function == LEAF_SAVE_AREA && (2..32).contains(&entry.index) && entry.eax > 0)
        .filter(|entry| entry.ecx & 1 == 0) // supervisor state is not part of the standard format
        .map(|entry| (entry.index, entry.ebx.saturating_add(entry.eax)))
        .collect();
    let Some(main) = entries.iter_mut().find(|entry| entry.function == LEAF_SAVE_AREA && entry.index == 0) else {
        return;
    };
    main.eax &= components.iter().fold(0b11, |mask, (index, _)| mask | 1 << index);
    let end = components.iter().filter(|(index, _)| main.eax & 1 << index != 0).map(|(_, end)| *end);
    main.ecx = end.fold(SAVE_AREA_LEGACY, u32::max);
}

fn set(register: &mut u32, bit: u32, value: bool) {
    *register = if value { *register | bit } else { *register & !bit };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ..Default::default() }
    }

    #[test]
    fn topology_tells_each_cpu_its_id_and_all_the_same_count() {
        for id in 0..4 {
            let mut core = entry(LEAF_TOPOLOGY, 1);
            specialize_entry(&mut core, id, 4);
            assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (2, 4, 0x201, id));
        }
    }

    #[test]
    fn a_single_cpu_has_no_siblings() {
        let mut features = kvm_cpuid_entry2 { ebx: 0xff08_1234, edx: u32::MAX, ..entry(LEAF_FEATURES, 0) };
        specialize_entry(&mut features, 0, 1);
        assert_eq!((features.ebx, features.edx & FEATURES_EDX_MULTITHREADING), (0x0001_1234, 0));
    }

    #[test]
    fn a_feature_without_a_size_is_withdrawn() {
        let mut entries = [
            kvm_cpuid_entry2 { eax: 0b1010_0111, ecx: 2696, ..entry(LEAF_SAVE_AREA, 0) },
            kvm_cpuid_entry2 { eax: 256, ebx: 576, ..entry(LEAF_SAVE_AREA, 2) },
            kvm_cpuid_entry2 { eax: 64, ebx: 1088, ..entry(LEAF_SAVE_AREA, 5) },
        ];
        make_save_area_consistent(&mut entries);
        assert_eq!((entries[0].eax, entries[0].ecx), (0b0010_0111, 1152));
    }
}
