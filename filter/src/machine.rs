//! What the kernel does with a filter: the part of classic BPF that seccompiler writes (linux/bpf_common.h), over
//! struct seccomp_data (linux/seccomp.h).

use seccompiler::sock_filter;

use crate::FilterError;

/// The last system call that this crate knows (mseal, Linux 6.10).
pub const LAST: u32 = 462;

/// The answer that lets a call through.
pub const ALLOW: u32 = 0x7fff_0000;
/// The answer that ends the process.
pub const KILL_PROCESS: u32 = 0x8000_0000;
/// The only architecture whose calls are looked at (AUDIT_ARCH_X86_64).
pub const ARCH_X86_64: u32 = 0xc000_003e;

pub(crate) const LOAD: u16 = 0x20;
pub(crate) const AND: u16 = 0x54;
pub(crate) const JUMP: u16 = 0x05;
pub(crate) const JUMP_EQUAL: u16 = 0x15;
pub(crate) const JUMP_GREATER: u16 = 0x25;
pub(crate) const JUMP_GREATER_EQUAL: u16 = 0x35;
pub(crate) const RETURN: u16 = 0x06;

// Offsets in struct seccomp_data.
pub(crate) const NUMBER: u32 = 0;
pub(crate) const ARCH: u32 = 4;
pub(crate) const ARGUMENTS: u32 = 16;

/// What a filter is asked about.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// The architecture, as linux/audit.h numbers them.
    pub arch: u32,
    /// The system call.
    pub number: u32,
    /// Its arguments.
    pub arguments: [u64; 6],
}

/// What a filter says to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// The action, with its data in the low 16 bits.
    pub action: u32,
    /// How many instructions it took.
    pub steps: usize,
    /// Whether an argument was looked at; the answer is that for any arguments otherwise.
    pub looked: bool,
}

/// Runs a filter.
///
/// # Errors
/// [`FilterError::Instruction`], [`FilterError::Load`], [`FilterError::End`].
pub fn run(program: &[sock_filter], call: &Call) -> Result<Answer, FilterError> {
    let (mut position, mut accumulator, mut looked) = (0, 0, false);
    // Jumps only lead forward: this ends.
    for steps in 1.. {
        let at = at(program, position)?;
        match at.code {
            RETURN => return Ok(Answer { action: at.k, steps, looked }),
            LOAD => {
                accumulator = load(position, at.k, call)?;
                looked |= at.k >= ARGUMENTS;
            }
            AND => accumulator &= at.k,
            _ => {}
        }
        position = next(at, position, accumulator)?;
    }
    unreachable!("a program is not endless")
}

/// One instruction.
pub(crate) fn at(program: &[sock_filter], position: usize) -> Result<&sock_filter, FilterError> {
    program.get(position).ok_or(FilterError::End { position })
}

/// Where an instruction that does not return leads.
pub(crate) fn next(at: &sock_filter, position: usize, accumulator: u32) -> Result<usize, FilterError> {
    let [yes, no] = targets(at, position)?;
    let taken = match at.code {
        JUMP_EQUAL => accumulator == at.k,
        JUMP_GREATER => accumulator > at.k,
        JUMP_GREATER_EQUAL => accumulator >= at.k,
        _ => true,
    };
    Ok(if taken { yes } else { no })
}

/// Where an instruction that does not return can lead.
pub(crate) fn targets(at: &sock_filter, position: usize) -> Result<[usize; 2], FilterError> {
    let after = position + 1;
    match at.code {
        LOAD | AND => Ok([after; 2]),
        JUMP => Ok([after + at.k as usize; 2]),
        JUMP_EQUAL | JUMP_GREATER | JUMP_GREATER_EQUAL => Ok([at.jt, at.jf].map(|offset| after + usize::from(offset))),
        code => Err(FilterError::Instruction { position, code }),
    }
}

fn load(position: usize, offset: u32, call: &Call) -> Result<u32, FilterError> {
    match offset {
        NUMBER => return Ok(call.number),
        ARCH => return Ok(call.arch),
        _ => {}
    }
    let failed = FilterError::Load { position, offset };
    let Some(within) = offset.checked_sub(ARGUMENTS).filter(|within| within % 4 == 0) else { return Err(failed) };
    let argument = call.arguments.get((within / 8) as usize).ok_or(failed)?;
    Ok((argument >> (within % 8 * 8)) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALL: Call = Call { arch: ARCH_X86_64, number: 7, arguments: [0, 0x1_0000_0002, 0, 0, 0, 6] };

    fn plain(code: u16, k: u32) -> sock_filter {
        sock_filter { code, jt: 0, jf: 0, k }
    }

    #[test]
    fn fields_are_where_the_kernel_has_them() {
        for (offset, value) in [(0, 7), (4, ARCH_X86_64), (16, 0), (24, 2), (28, 1), (56, 6), (60, 0)] {
            let equal = sock_filter { code: JUMP_EQUAL, jt: 0, jf: 1, k: value };
            let program = [plain(LOAD, offset), equal, plain(RETURN, ALLOW), plain(RETURN, KILL_PROCESS)];
            let expected = Answer { action: ALLOW, steps: 3, looked: offset >= 16 };
            assert_eq!(run(&program, &CALL).unwrap(), expected, "{offset}");
        }
    }

    #[test]
    fn broken_programs_are_errors() {
        let broken = |program: &[sock_filter]| run(program, &CALL).unwrap_err().to_string();
        assert_eq!(broken(&[]), "a filter leads to instruction 0, past its end");
        assert_eq!(broken(&[plain(JUMP, 3)]), "a filter leads to instruction 4, past its end");
        assert!(broken(&[plain(JUMP, u32::MAX)]).ends_with("past its end"));
        assert!(broken(&[plain(0x87, 0)]).contains("0x87"));
        for offset in [8, 12, 17, 64, u32::MAX] {
            assert!(broken(&[plain(LOAD, offset)]).contains(&format!("loads from {offset}")));
        }
    }
}
