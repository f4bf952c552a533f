//! Compiles `resources/seccomp/container-default.json` to one classic BPF program, so that nothing is left to do when a
//! container starts but to hand it to the kernel.
//!
//! The kernel walks through a new filter once for every system call, to remember those that are always allowed
//! (`seccomp_cache_prepare`). seccompiler's programs compare the number with one call after the other, which made that
//! walk most of a container's start. What they answer is therefore laid out again as a binary search over ranges of
//! numbers, and compared with them for every number before it is written.

use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

use seccompiler::{BpfMap, BpfProgram, TargetArch, compile_from_json, sock_filter};

/// The filters of the profile. The later one wins where it does not allow.
const FILTERS: [&str; 2] = ["allowed", "absent"];

/// The last system call that the profile knows (mseal, Linux 6.10).
const LAST: u32 = 462;

const ALLOW: u32 = 0x7fff_0000;
const KILL_PROCESS: u32 = 0x8000_0000;
/// What a kernel that is older than a system call says of it: programs then do without, as they do not after EPERM.
const NO_SUCH_CALL: u32 = 0x0005_0000 | 38;

const ARCH_X86_64: u32 = 0xc000_003e;

// Codes of classic BPF instructions (linux/bpf_common.h), those that seccompiler uses.
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_EQUAL: u16 = 0x35;
const RETURN: u16 = 0x06;

// Offsets in struct seccomp_data (linux/seccomp.h).
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;

fn main() {
    let profile = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/seccomp/container-default.json");
    println!("cargo::rerun-if-changed={}", profile.display());
    println!("cargo::rerun-if-changed=build.rs");
    let json = fs::read(&profile).unwrap_or_else(|error| panic!("cannot read {}: {error}", profile.display()));
    let mut compiled: BpfMap = compile_from_json(json.as_slice(), TargetArch::x86_64)
        .unwrap_or_else(|error| panic!("{} does not compile: {error}", profile.display()));
    let filters = FILTERS.map(|name| compiled.remove(name).unwrap_or_else(|| panic!("the profile has no {name:?}")));
    let program = search(&filters);
    verify(&filters, &program);
    let path = Path::new(&env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("container_default.rs");
    fs::write(&path, source(&program)).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
}

fn source(program: &[sock_filter]) -> String {
    let mut source = String::from("[\n");
    for sock_filter { code, jt, jf, k } in program {
        writeln!(source, "    sock_filter {{ code: {code}, jt: {jt}, jf: {jf}, k: {k} }},")
            .expect("a string takes any");
    }
    source.push_str("]\n");
    source
}

/// What is done for a number: a return, or code that looks at the arguments first.
type Leaf = BpfProgram;

/// The program that answers as `filters` do together.
fn search(filters: &[BpfProgram; 2]) -> BpfProgram {
    let mut ranges: Vec<(u32, Leaf)> = Vec::new();
    for number in 0..=LAST {
        let [allowed, absent] = filters.each_ref().map(|filter| specialise(filter, number));
        let leaf = if absent == [instruction(RETURN, ALLOW)] { allowed } else { absent };
        if ranges.last().is_none_or(|(_, last)| *last != leaf) {
            ranges.push((number, leaf));
        }
    }
    ranges.push((LAST + 1, vec![instruction(RETURN, NO_SUCH_CALL)]));
    let mut program = vec![
        instruction(LOAD, ARCH),
        sock_filter { code: JUMP_EQUAL, jt: 1, jf: 0, k: ARCH_X86_64 },
        instruction(RETURN, KILL_PROCESS),
        instruction(LOAD, NUMBER),
    ];
    program.extend(branch(&ranges));
    program
}

/// A binary search for the last range that does not start after the number.
fn branch(ranges: &[(u32, Leaf)]) -> BpfProgram {
    if let [(_, leaf)] = ranges {
        return leaf.clone();
    }
    let (low, high) = ranges.split_at(ranges.len() / 2);
    let (start, low, high) = (high[0].0, branch(low), branch(high));
    let jt = u8::try_from(low.len()).expect("a jump reaches 255 instructions: the profile has too many rules");
    let mut program = vec![sock_filter { code: JUMP_GREATER_EQUAL, jt, jf: 0, k: start }];
    program.extend(low);
    program.extend(high);
    program
}

/// What is left of a program once the number is known: a return, or what follows from where it looks at an argument.
fn specialise(program: &BpfProgram, number: u32) -> Leaf {
    let (mut position, mut accumulator) = (0, 0);
    loop {
        let at = &program[position];
        match at.code {
            LOAD if at.k >= ARGUMENTS => return program[position..=last_reached(program, position)].to_vec(),
            RETURN => return vec![instruction(RETURN, at.k)],
            _ => (position, accumulator) = step(program, position, accumulator, number, &[0; 6]),
        }
    }
}

/// The last instruction that can be reached from a position; jumps only lead forward.
fn last_reached(program: &BpfProgram, from: usize) -> usize {
    let mut reached = vec![false; program.len()];
    reached[from] = true;
    for position in from..program.len() {
        if !reached[position] {
            continue;
        }
        let at = &program[position];
        let next = match at.code {
            RETURN => continue,
            LOAD | AND => [position + 1; 2],
            JUMP => [position + 1 + at.k as usize; 2],
            _ => [at.jt, at.jf].map(|offset| position + 1 + usize::from(offset)),
        };
        next.into_iter().for_each(|position| reached[position] = true);
    }
    reached.iter().rposition(|reached| *reached).expect("the position itself is reached")
}

fn step(program: &BpfProgram, position: usize, value: u32, number: u32, arguments: &[u64; 6]) -> (usize, u32) {
    let at = &program[position];
    let jump = |taken: bool| position + 1 + usize::from(if taken { at.jt } else { at.jf });
    match at.code {
        LOAD => (
            position + 1,
            match at.k {
                NUMBER => number,
                ARCH => ARCH_X86_64,
                offset => {
                    let argument = arguments[((offset - ARGUMENTS) / 8) as usize];
                    (argument >> ((offset - ARGUMENTS) % 8 * 8)) as u32
                }
            },
        ),
        AND => (position + 1, value & at.k),
        JUMP => (position + 1 + at.k as usize, value),
        JUMP_EQUAL => (jump(value == at.k), value),
        JUMP_GREATER => (jump(value > at.k), value),
        JUMP_GREATER_EQUAL => (jump(value >= at.k), value),
        code => panic!("seccompiler emitted the instruction {code:#x}, which this build does not know"),
    }
}

fn answer(program: &BpfProgram, number: u32, arguments: &[u64; 6]) -> u32 {
    let (mut position, mut accumulator) = (0, 0);
    while program[position].code != RETURN {
        (position, accumulator) = step(program, position, accumulator, number, arguments);
    }
    program[position].k
}

/// Compares the answers for every number, with arguments around every value that some rule looks at.
fn verify(filters: &[BpfProgram; 2], program: &BpfProgram) {
    let constants = filters.iter().flatten().map(|at| u64::from(at.k));
    let bits = (0..64).map(|bit| 1 << bit);
    let values: Vec<u64> =
        constants.chain(bits).flat_map(|value| [value.wrapping_sub(1), value, value.wrapping_add(1)]).collect();
    for number in 0..=LAST {
        for &value in &values {
            let arguments = [value; 6];
            let [allowed, absent] = filters.each_ref().map(|filter| answer(filter, number, &arguments));
            let expected = if absent == ALLOW { allowed } else { absent };
            assert_eq!(answer(program, number, &arguments), expected, "call {number} with {value:#x}");
        }
    }
}

fn instruction(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}
