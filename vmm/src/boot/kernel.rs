//! Loading an uncompressed kernel (`vmlinux`): an ELF64 image whose PT_LOAD segments are put where they say.
//!
//! Those that the kernel only reads and executes are mapped, so that all VMs share them; those that it writes are copied.
//! The ELF structures are the `linux-loader` crate's, whose own loader copies every segment.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use devices::GuestMemory;
use linux_loader::elf::{EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, EM_X86_64, Elf64_Ehdr, Elf64_Phdr, PF_W, PT_LOAD};
use thiserror::Error;
use vm_memory::ByteValued;

use crate::layout::HIGH_MEMORY;
use crate::memory::{self, MemoryError};

/// More program headers than any kernel has; Linux has five.
const PROGRAM_HEADERS_MAX: usize = 32;

/// Why a kernel was not loaded.
#[derive(Debug, Error)]
pub enum KernelError {
    /// The file cannot be read.
    #[error("cannot read it")]
    Read(#[source] io::Error),
    /// The file is something else.
    #[error("it is not an uncompressed x86-64 ELF kernel (vmlinux): {0}")]
    Format(&'static str),
    /// A segment does not fit.
    #[error("a segment does not fit: give the VM more memory")]
    Segment(#[source] MemoryError),
}

/// A loaded kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    /// The guest-physical address of the 64-bit entry point.
    pub entry: u64,
    /// Where the file's last byte ends.
    pub file_end: u64,
    /// The first address behind the kernel, zeroed data included.
    pub end: u64,
}

/// Loads a kernel into guest memory.
///
/// # Errors
/// [`KernelError`]; guest memory may then hold a part of the kernel.
pub fn load(guest: &GuestMemory, file: &File) -> Result<Kernel, KernelError> {
    let file_length = file.metadata().map_err(KernelError::Read)?.len();
    let mut header = Elf64_Ehdr::default();
    file.read_exact_at(header.as_mut_slice(), 0).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => KernelError::Format("it is too short"),
        _ => KernelError::Read(error),
    })?;
    check(&header)?;
    let mut kernel = Kernel { entry: header.e_entry, file_end: 0, end: 0 };
    for index in 0..u64::from(header.e_phnum) {
        let mut segment = Elf64_Phdr::default();
        let at = index * size_of::<Elf64_Phdr>() as u64;
        let at = header.e_phoff.checked_add(at).ok_or(KernelError::Format("its program headers are out of bounds"))?;
        file.read_exact_at(segment.as_mut_slice(), at)
            .map_err(|_| KernelError::Format("its program headers are out of bounds"))?;
        if segment.p_type == PT_LOAD && segment.p_memsz > 0 {
            kernel.end = kernel.end.max(load_segment(guest, file, file_length, &segment)?);
            kernel.file_end = kernel.file_end.max(segment.p_paddr.saturating_add(segment.p_filesz));
        }
    }
    if !(HIGH_MEMORY..kernel.end).contains(&kernel.entry) {
        return Err(KernelError::Format("its entry point is not in a segment"));
    }
    Ok(kernel)
}

fn check(header: &Elf64_Ehdr) -> Result<(), KernelError> {
    let format = |reason| Err(KernelError::Format(reason));
    if header.e_ident[..4] != *b"\x7fELF" {
        return format("it has no ELF magic");
    }
    let (class, data) = (header.e_ident[EI_CLASS], header.e_ident[EI_DATA]);
    if class != ELFCLASS64 || data != ELFDATA2LSB || header.e_machine != EM_X86_64 {
        return format("it is for another machine");
    }
    if header.e_phentsize as usize != size_of::<Elf64_Phdr>() || header.e_phnum as usize > PROGRAM_HEADERS_MAX {
        return format("its program headers are malformed");
    }
    Ok(())
}

/// Loads one segment and returns its end.
fn load_segment(guest: &GuestMemory, file: &File, file_length: u64, segment: &Elf64_Phdr) -> Result<u64, KernelError> {
    let bounds = || KernelError::Format("a segment is out of bounds");
    let end = segment.p_paddr.checked_add(segment.p_memsz).ok_or_else(bounds)?;
    let in_file = segment.p_offset.checked_add(segment.p_filesz).is_some_and(|end| end <= file_length);
    if !in_file || segment.p_filesz > segment.p_memsz || segment.p_paddr < HIGH_MEMORY {
        return Err(bounds());
    }
    // What follows the file's bytes (.bss) is zero, as guest memory is where nothing was put.
    let (address, length) = (segment.p_paddr, segment.p_filesz);
    let load = if segment.p_flags & PF_W == 0 { memory::map } else { memory::copy };
    load(guest, file, segment.p_offset, address, length).map_err(KernelError::Segment)?;
    if vm_memory::GuestMemory::check_range(
        guest,
        vm_memory::GuestAddress(address),
        usize::try_from(segment.p_memsz).map_err(|_| bounds())?,
        vm_memory::Permissions::ReadWrite,
    ) {
        Ok(end)
    } else {
        Err(KernelError::Segment(MemoryError::OutOfBounds { address, length: segment.p_memsz }))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn load_bytes(bytes: &[u8]) -> Result<Kernel, KernelError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        load(&memory::reserve(48).unwrap(), &file)
    }

    fn image(change: impl Fn(&mut Elf64_Ehdr, &mut Elf64_Phdr)) -> Vec<u8> {
        let mut header =
            Elf64_Ehdr { e_entry: 0x100_0000, e_phoff: 64, e_phentsize: 56, e_phnum: 1, ..Default::default() };
        header.e_ident[..6].copy_from_slice(b"\x7fELF\x02\x01");
        header.e_machine = EM_X86_64;
        let mut segment = Elf64_Phdr { p_type: PT_LOAD, p_offset: 120, p_paddr: 0x100_0000, ..Default::default() };
        (segment.p_filesz, segment.p_memsz) = (16, 8192);
        change(&mut header, &mut segment);
        [header.as_slice(), segment.as_slice(), &[0xcc; 16]].concat()
    }

    #[test]
    fn a_small_image_loads() {
        assert_eq!(
            load_bytes(&image(|_, _| {})).unwrap(),
            Kernel { entry: 0x100_0000, file_end: 0x100_0010, end: 0x100_2000 }
        );
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        for bytes in [&b""[..], b"#!/bin/sh\n", &[0; 4096]] {
            assert!(matches!(load_bytes(bytes), Err(KernelError::Format(_))));
        }
    }

    #[test]
    fn hostile_headers_are_refused() {
        type Change = fn(&mut Elf64_Ehdr, &mut Elf64_Phdr);
        let changes: [Change; 8] = [
            |_, s| s.p_filesz = u64::MAX,
            |_, s| s.p_offset = u64::MAX,
            |_, s| s.p_paddr = u64::MAX - 4,
            |_, s| s.p_paddr = 0x1000,
            |_, s| s.p_memsz = 1 << 40,
            |h, _| h.e_phnum = u16::MAX,
            |h, _| h.e_phoff = u64::MAX,
            |h, _| h.e_entry = 0,
        ];
        for (number, change) in changes.into_iter().enumerate() {
            assert!(load_bytes(&image(change)).is_err(), "change {number}");
        }
    }
}
