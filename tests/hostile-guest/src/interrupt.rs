//! Exceptions, which end the program, and interrupts, which are counted (Intel SDM volume 3, chapters 7 and 12).
//!
//! Interrupts arrive as they come and are acknowledged at once, so that a device can send as many as it likes. They have a
//! stack of their own: compiled code uses what is below its stack pointer.
//!
//! UNSAFETY: the processor calls into assembly.

#![expect(unsafe_code, reason = "handlers are assembly, which calls by symbol")]

use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::memory::{self, DESCRIPTOR_TABLES};
use crate::{cpu, report};

/// The vector of the first pin.
const PINS: u64 = 0x20;
const PIN_COUNT: u64 = 24;
const EXCEPTIONS: u64 = 0x20;
const SPURIOUS: u64 = 0xff;

const CODE: u64 = 0x10;
const TASK: u16 = 0x20;
/// As the monitor's own, so that selectors stay what they are; the task state takes two.
const DESCRIPTORS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

const GDT: u64 = DESCRIPTOR_TABLES;
const TSS: u64 = DESCRIPTOR_TABLES + 0x100;
const TSS_LENGTH: u64 = 104;
const IDT: u64 = DESCRIPTOR_TABLES + 0x1000;
const STACK_END: u64 = DESCRIPTOR_TABLES + 0x1_0000;

const IO_APIC: u64 = 0xfec0_0000;
const LOCAL_APIC: u64 = 0xfee0_0000;
const LOCAL_APIC_SPURIOUS: u64 = LOCAL_APIC + 0xf0;
const LOCAL_APIC_LINT0: u64 = LOCAL_APIC + 0x350;
const MASKED: u32 = 1 << 16;
const ENABLED: u32 = 1 << 8;

/// How many interrupts each pin has had.
static COUNTS: [AtomicU64; PIN_COUNT as usize] = [const { AtomicU64::new(0) }; PIN_COUNT as usize];

// A stub for each exception leaves its number on the stack, above the error code (a zero where there is none), RIP, CS, …
// One for each pin counts and acknowledges; each begins 32 bytes after the one before.
global_asm!(
    ".balign 32",
    "hostile_exceptions:",
    ".set vector, 0",
    ".rept 32",
    ".balign 32",
    ".if !((1 << vector) & 0x60227d00)",
    "push 0",
    ".endif",
    "push vector",
    "jmp hostile_exception_common",
    ".set vector, vector + 1",
    ".endr",
    "hostile_exception_common:",
    "pop rdi",
    "pop rcx",
    "pop rsi",
    "mov rdx, cr2",
    "and rsp, -16",
    "call {exception}",
    "ud2",
    ".balign 32",
    "hostile_interrupts:",
    ".set pin, 0",
    ".rept 24",
    ".balign 32",
    "push rax",
    "lock inc qword ptr [rip + {counts} + 8 * pin]",
    "mov eax, 0xfee000b0",
    "mov dword ptr [rax], 0",
    "pop rax",
    "iretq",
    ".set pin, pin + 1",
    ".endr",
    ".balign 32",
    "hostile_spurious:",
    "iretq",
    exception = sym exception,
    counts = sym COUNTS,
);

unsafe extern "C" {
    static hostile_exceptions: [u8; 32 * 32];
    static hostile_interrupts: [u8; 32 * 24];
    static hostile_spurious: [u8; 2];
}

extern "C" fn exception(vector: u64, rip: u64, address: u64, error: u64) -> ! {
    report::say(format_args!("exception {vector} at {rip:#x}, address {address:#x}, error {error:#x}"));
    cpu::power_off()
}

/// Sets everything up, and takes interrupts of all pins from now on.
pub fn enable() {
    for (at, descriptor) in (GDT..).step_by(8).zip(DESCRIPTORS) {
        memory::write(at, descriptor);
    }
    // An available 64-bit task state, of which only the first stack of interrupts is used.
    let low = (TSS & 0xff_ffff) << 16 | (TSS >> 24 & 0xff) << 56 | 0x89 << 40 | (TSS_LENGTH - 1);
    memory::write(GDT + 32, low);
    memory::write(GDT + 40, TSS >> 32);
    memory::write(TSS + 36, STACK_END);
    memory::write(TSS + 102, TSS_LENGTH as u16);
    // Only the addresses of the stubs are used.
    let (exceptions, interrupts, spurious) = (
        &raw const hostile_exceptions as u64,
        &raw const hostile_interrupts as u64,
        &raw const hostile_spurious as u64,
    );
    (0..EXCEPTIONS).for_each(|vector| gate(vector, exceptions + 32 * vector));
    (0..PIN_COUNT).for_each(|pin| gate(PINS + pin, interrupts + 32 * pin));
    gate(SPURIOUS, spurious);
    cpu::set_descriptor_tables((GDT, 6 * 8 - 1), (IDT, 256 * 16 - 1), TASK);
    memory::write(LOCAL_APIC_LINT0, MASKED);
    memory::write(LOCAL_APIC_SPURIOUS, ENABLED | SPURIOUS as u32);
    cpu::enable_interrupts();
}

/// An interrupt gate (SDM volume 3, 7.14.1 "64-Bit Mode IDT") with the first stack of the task state.
fn gate(vector: u64, handler: u64) {
    let low = handler & 0xffff | CODE << 16 | 1 << 32 | 0x8e << 40 | (handler >> 16 & 0xffff) << 48;
    memory::write(IDT + 16 * vector, low);
    memory::write(IDT + 16 * vector + 8, handler >> 32);
}

/// Connects a pin: an edge, to the first CPU.
pub fn connect(pin: u8) {
    let register = 0x10 + 2 * u32::from(pin);
    for (register, value) in [(register + 1, 0), (register, PINS as u32 + u32::from(pin))] {
        memory::write(IO_APIC, register);
        memory::write(IO_APIC + 0x10, value);
    }
}

/// How many interrupts a pin has had.
pub fn count(pin: u8) -> u64 {
    COUNTS.get(usize::from(pin)).map_or(0, |count| count.load(Ordering::Relaxed))
}

/// How many interrupts there were.
pub fn total() -> u64 {
    COUNTS.iter().map(|count| count.load(Ordering::Relaxed)).sum()
}
