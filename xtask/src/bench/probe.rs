//! The program that is started: it writes one byte as its first act, so that whoever reads the other end knows when the
//! first instruction of an entrypoint has run; then it waits for the end of its standard input and exits with 0.
//!
//! It is an ELF file put together by hand (System V ABI, "Object Files" and "Program Loading"): no C library starts up
//! before the first instruction, and its one page costs every contender the same.

/// The byte that says it runs.
pub const MARK: u8 = b'x';

/// Where it is loaded.
const BASE: u64 = 0x40_0000;
/// The sizes of the file header and of one program header.
const HEADERS: [u16; 2] = [64, 56];

/// `write(1, &mark, 1); read(0, &stack, 1); exit(0)` for x86-64.
const CODE: [u8; 49] = [
    0xb8, 1, 0, 0, 0, // mov eax, 1: write
    0xbf, 1, 0, 0, 0, // mov edi, 1
    0x48, 0x8d, 0x35, 32, 0, 0, 0, // lea rsi, [rip + 32]: the byte behind the code
    0xba, 1, 0, 0, 0, // mov edx, 1
    0x0f, 0x05, // syscall
    0x31, 0xc0, // xor eax, eax: read
    0x31, 0xff, // xor edi, edi
    0x48, 0x8d, 0x74, 0x24, 0xf0, // lea rsi, [rsp - 16]
    0xba, 1, 0, 0, 0, // mov edx, 1
    0x0f, 0x05, // syscall
    0xb8, 60, 0, 0, 0, // mov eax, 60: exit
    0x31, 0xff, // xor edi, edi
    0x0f, 0x05, // syscall
];

/// The program file.
pub fn program() -> Vec<u8> {
    let [file_header, program_header] = HEADERS;
    let headers = u64::from(file_header + program_header);
    let size = headers + CODE.len() as u64 + 1;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    file.extend([2u16, 62].iter().flat_map(|word| word.to_le_bytes())); // executable, x86-64
    file.extend(1u32.to_le_bytes()); // version
    // Entry point, program headers behind the file header, no section headers.
    file.extend([BASE + headers, u64::from(file_header), 0].iter().flat_map(|word| word.to_le_bytes()));
    file.extend(0u32.to_le_bytes()); // flags
    // Sizes: this header, one program header of that size, no section headers.
    file.extend([file_header, program_header, 1, 0, 0, 0].iter().flat_map(|word| word.to_le_bytes()));
    file.extend([1u32, 5].iter().flat_map(|word| word.to_le_bytes())); // to be loaded; readable and executable
    // Offset, virtual and physical address, size in the file and in memory, alignment.
    file.extend([0, BASE, BASE, size, size, 0x1000].iter().flat_map(|word| word.to_le_bytes()));
    file.extend(CODE);
    file.push(MARK);
    file
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::PermissionsExt as _;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn it_writes_its_mark_and_ends_with_its_input() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("probe");
        // Closed before it is run: a file that is open for writing cannot be.
        let mut file = std::fs::File::create(&path).unwrap();
        file.write_all(&program()).unwrap();
        file.set_permissions(std::fs::Permissions::from_mode(0o755)).unwrap();
        drop(file);
        let output = Command::new(&path).stdin(Stdio::null()).output().unwrap();
        assert_eq!((output.status.code(), output.stdout), (Some(0), vec![MARK]));
    }
}
