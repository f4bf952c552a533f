//! The bare-metal program that [`hostile_guest`] is, booted as `vm.kernel` of a monitor's configuration.
//!
//! It is built in the release profile, whose panics abort (see `build.rs`). Built otherwise, it only says so.

#![cfg_attr(panic = "abort", no_std)]
#![cfg_attr(panic = "abort", no_main)]
#![cfg_attr(
    panic = "abort",
    expect(unsafe_code, reason = "there is no runtime: the entry and what compilers call are ours")
)]

/// The first instructions, and the functions that compilers call.
#[cfg(panic = "abort")]
mod entry {
    use core::arch::global_asm;
    use core::panic::PanicInfo;

    // The monitor enters in long mode with interrupts off, and the zero page's address in RSI (64-bit boot protocol). SSE is
    // switched on first: compiled code uses it everywhere.
    global_asm!(
        ".globl hostile_start",
        "hostile_start:",
        "mov rax, cr0",
        "and eax, 0xfffffffb",
        "or eax, 2",
        "mov cr0, rax",
        "mov rax, cr4",
        "or eax, 0x600",
        "mov cr4, rax",
        "lea rsp, [rip + hostile_stack_end]",
        "xor ebp, ebp",
        "mov rdi, rsi",
        "call hostile_main",
        "2: hlt",
        "jmp 2b",
        // void *memcpy(void *to, const void *from, size_t count)
        ".globl memcpy",
        "memcpy:",
        "mov rax, rdi",
        "mov rcx, rdx",
        "rep movsb",
        "ret",
        // void *memmove(void *to, const void *from, size_t count)
        ".globl memmove",
        "memmove:",
        "mov rax, rdi",
        "mov rcx, rdx",
        "mov r8, rdi",
        "sub r8, rsi",
        "cmp r8, rdx",
        "jae 3f",
        "lea rdi, [rdi + rdx - 1]",
        "lea rsi, [rsi + rdx - 1]",
        "std",
        "rep movsb",
        "cld",
        "ret",
        "3: rep movsb",
        "ret",
        // void *memset(void *to, int byte, size_t count)
        ".globl memset",
        "memset:",
        "mov r8, rdi",
        "mov eax, esi",
        "mov rcx, rdx",
        "rep stosb",
        "mov rax, r8",
        "ret",
        // int memcmp(const void *a, const void *b, size_t count), and bcmp
        ".globl memcmp",
        ".globl bcmp",
        "memcmp:",
        "bcmp:",
        "xor eax, eax",
        "mov rcx, rdx",
        "cmp rcx, rcx",
        "repe cmpsb",
        "je 4f",
        "movzx eax, byte ptr [rdi - 1]",
        "movzx ecx, byte ptr [rsi - 1]",
        "sub ecx, eax",
        "mov eax, ecx",
        "4: ret",
        ".section .bss",
        ".balign 16",
        ".skip 262144",
        "hostile_stack_end:",
        ".text",
    );

    /// What the first instructions call.
    // SAFETY: no other symbol has this name.
    #[unsafe(no_mangle)]
    extern "C" fn hostile_main(zero_page: u64) -> ! {
        hostile_guest::run(zero_page)
    }

    #[panic_handler]
    fn panicked(info: &PanicInfo<'_>) -> ! {
        hostile_guest::give_up(info)
    }
}

#[cfg(not(panic = "abort"))]
fn main() {
    eprintln!("this is a kernel in the release profile only: cargo build --release --package hostile-guest");
    std::process::exit(2);
}
