//! Filters laid out as a binary search over ranges of system call numbers.

use std::collections::BTreeSet;

use seccompiler::{BpfProgram, sock_filter};

use crate::FilterError;
use crate::machine::{
    ALLOW, ARCH, ARCH_X86_64, ARGUMENTS, Call, JUMP, JUMP_EQUAL, JUMP_GREATER, JUMP_GREATER_EQUAL, KILL_PROCESS, LAST,
    LOAD, NUMBER, RETURN, at, next, run, targets,
};

/// What the kernel takes at most (BPF_MAXINSNS).
pub const INSTRUCTIONS_MAX: usize = 4096;

/// Architectures that the answers are also compared for: i386 and AArch64, of which a host knows one.
const FOREIGN: [u32; 2] = [0x4000_0003, 0xc000_00b7];

/// System calls that are newer than a policy, and are answered apart from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unknown {
    /// The first number that the policy does not know; those above it are unknown too.
    pub first: u32,
    /// What is answered.
    pub action: u32,
}

/// What is done for a number: a return, or code that looks at the arguments first.
type Leaf = BpfProgram;

/// The program that answers as `filters` do together. A later filter wins where it does not allow. Numbers that no filter
/// names get what the filters say of them, unless `unknown` covers them; other architectures end the process.
///
/// # Errors
/// [`FilterError::Empty`], [`FilterError::Length`], [`FilterError::Differs`]; [`FilterError::Instruction`],
/// [`FilterError::Load`] and [`FilterError::End`] for programs that are not seccompiler's.
pub fn search(filters: &[BpfProgram], unknown: Option<Unknown>) -> Result<BpfProgram, FilterError> {
    let mut ranges: Vec<(u32, Leaf)> = Vec::new();
    for number in starts(filters, unknown) {
        let leaf = leaf(filters, unknown, number)?;
        if ranges.last().is_none_or(|(_, last)| *last != leaf) {
            ranges.push((number, leaf));
        }
    }
    let mut program = vec![
        instruction(LOAD, ARCH),
        sock_filter { code: JUMP_EQUAL, jt: 1, jf: 0, k: ARCH_X86_64 },
        instruction(RETURN, KILL_PROCESS),
        instruction(LOAD, NUMBER),
    ];
    program.extend(branch(&ranges));
    if program.len() > INSTRUCTIONS_MAX {
        return Err(FilterError::Length { length: program.len() });
    }
    verify(filters, unknown, &program)?;
    Ok(program)
}

/// Every number where the answer can become another one: where some comparison turns out differently than before.
fn starts(filters: &[BpfProgram], unknown: Option<Unknown>) -> BTreeSet<u32> {
    let compared =
        filters.iter().flatten().filter(|at| [JUMP_EQUAL, JUMP_GREATER, JUMP_GREATER_EQUAL].contains(&at.code));
    let around = compared.flat_map(|at| [Some(at.k), at.k.checked_add(1)]).flatten();
    around.chain(unknown.map(|unknown| unknown.first)).chain([0]).collect()
}

fn leaf(filters: &[BpfProgram], unknown: Option<Unknown>, number: u32) -> Result<Leaf, FilterError> {
    if let Some(unknown) = unknown.filter(|unknown| number >= unknown.first) {
        return Ok(vec![instruction(RETURN, unknown.action)]);
    }
    let mut leaf = None;
    for filter in filters {
        let later = specialise(filter, number)?;
        if leaf.is_none() || later != [instruction(RETURN, ALLOW)] {
            leaf = Some(later);
        }
    }
    leaf.ok_or(FilterError::Empty)
}

/// A binary search for the last range that does not start after the number.
fn branch(ranges: &[(u32, Leaf)]) -> BpfProgram {
    if let [(_, leaf)] = ranges {
        return leaf.clone();
    }
    let (low, high) = ranges.split_at(ranges.len() / 2);
    let (start, low, high) = (high[0].0, branch(low), branch(high));
    let mut program = match u8::try_from(low.len()) {
        Ok(jt) => vec![sock_filter { code: JUMP_GREATER_EQUAL, jt, jf: 0, k: start }],
        // A conditional jump reaches 255 instructions; an unconditional one, everything.
        Err(_) => vec![
            sock_filter { code: JUMP_GREATER_EQUAL, jt: 0, jf: 1, k: start },
            instruction(JUMP, u32::try_from(low.len()).unwrap_or(u32::MAX)),
        ],
    };
    program.extend(low);
    program.extend(high);
    program
}

/// What is left of a program once the number is known: a return, or what follows from where it looks at an argument.
fn specialise(program: &[sock_filter], number: u32) -> Result<Leaf, FilterError> {
    let (mut position, mut accumulator) = (0, 0);
    loop {
        let at = at(program, position)?;
        match at.code {
            LOAD if at.k >= ARGUMENTS => return Ok(program[position..=last_reached(program, position)?].to_vec()),
            LOAD if at.k == NUMBER => accumulator = number,
            LOAD if at.k == ARCH => accumulator = ARCH_X86_64,
            LOAD => return Err(FilterError::Load { position, offset: at.k }),
            RETURN => return Ok(vec![instruction(RETURN, at.k)]),
            JUMP | JUMP_EQUAL | JUMP_GREATER | JUMP_GREATER_EQUAL => {}
            // Not AND either: where a number is masked, its ranges do not start where it is compared.
            code => return Err(FilterError::Instruction { position, code }),
        }
        position = next(at, position, accumulator)?;
    }
}

/// The last instruction that can be reached from a position; jumps only lead forward.
fn last_reached(program: &[sock_filter], from: usize) -> Result<usize, FilterError> {
    let mut reached = BTreeSet::from([from]);
    let mut last = from;
    while let Some(position) = reached.pop_first() {
        last = position;
        let at = at(program, position)?;
        if at.code != RETURN {
            reached.extend(targets(at, position)?);
        }
    }
    Ok(last)
}

/// Compares the answers for every number, with arguments around every value that some rule looks at.
fn verify(filters: &[BpfProgram], unknown: Option<Unknown>, program: &[sock_filter]) -> Result<(), FilterError> {
    let constants = filters.iter().flatten().map(|at| u64::from(at.k));
    let constants = constants.flat_map(|value| [value, value << 32, value << 32 | value]);
    let bits = (0..64).map(|bit| 1 << bit);
    let around = |value: u64| [value.wrapping_sub(1), value, value.wrapping_add(1)];
    let values: BTreeSet<u64> = constants.chain(bits).flat_map(around).collect();
    let numbers: BTreeSet<u32> = starts(filters, unknown).into_iter().chain(0..=LAST + 1).chain([u32::MAX]).collect();
    for number in numbers {
        for arch in FOREIGN {
            compare(filters, None, program, &Call { arch, number, arguments: [0; 6] })?;
        }
        for &value in &values {
            let call = Call { arch: ARCH_X86_64, number, arguments: [value; 6] };
            if !compare(filters, unknown, program, &call)? {
                break;
            }
        }
    }
    Ok(())
}

/// Compares the answers to one call, and tells whether they can be others for other arguments.
fn compare(
    filters: &[BpfProgram],
    unknown: Option<Unknown>,
    program: &[sock_filter],
    call: &Call,
) -> Result<bool, FilterError> {
    let mut looked = false;
    let mut expected = ALLOW;
    for filter in filters {
        let answer = run(filter, call)?;
        looked |= answer.looked;
        if answer.action != ALLOW {
            expected = answer.action;
        }
    }
    if let Some(unknown) = unknown.filter(|unknown| call.number >= unknown.first) {
        expected = unknown.action;
    }
    let found = run(program, call)?;
    if found.action != expected {
        let (number, argument) = (call.number, call.arguments[0]);
        return Err(FilterError::Differs { number, argument, expected, found: found.action });
    }
    Ok(looked || found.looked)
}

fn instruction(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;
    use seccompiler::{
        SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
    };

    use super::*;
    use crate::machine::AND;

    type Rules = BTreeMap<i64, Vec<SeccompRule>>;

    fn seccompiled(rules: Rules, mismatch: SeccompAction, matched: SeccompAction) -> BpfProgram {
        SeccompFilter::new(rules, mismatch, matched, TargetArch::x86_64).unwrap().try_into().unwrap()
    }

    fn condition() -> impl Strategy<Value = SeccompCondition> {
        let value = prop_oneof![0..4_u64, any::<u64>()];
        let operator = (0..7_u8, value.clone()).prop_map(|(kind, mask)| match kind {
            0 => SeccompCmpOp::Eq,
            1 => SeccompCmpOp::Ge,
            2 => SeccompCmpOp::Gt,
            3 => SeccompCmpOp::Le,
            4 => SeccompCmpOp::Lt,
            5 => SeccompCmpOp::MaskedEq(mask),
            _ => SeccompCmpOp::Ne,
        });
        let length =
            any::<bool>().prop_map(|long| if long { SeccompCmpArgLen::Qword } else { SeccompCmpArgLen::Dword });
        (0..6_u8, length, operator, value)
            .prop_map(|(index, length, operator, value)| SeccompCondition::new(index, length, operator, value).unwrap())
    }

    fn rules(numbers: usize) -> impl Strategy<Value = Rules> {
        let rule = vec(condition(), 1..4).prop_map(|conditions| SeccompRule::new(conditions).unwrap());
        let number = prop_oneof![0..=i64::from(LAST), Just(0x4000_0001)];
        btree_map(number, prop_oneof![3 => Just(Vec::new()), 1 => vec(rule, 1..4)], 0..numbers)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn one_filter_answers_as_before(
            rules in rules(120),
            calls in vec((0..=LAST + 2, prop::array::uniform6(prop_oneof![0..5_u64, any::<u64>()])), 200),
        ) {
            let before = seccompiled(rules, SeccompAction::KillProcess, SeccompAction::Allow);
            let after = search(std::slice::from_ref(&before), None).unwrap();
            for (number, arguments) in calls {
                for arch in [ARCH_X86_64, FOREIGN[0]] {
                    let call = Call { arch, number, arguments };
                    prop_assert_eq!(run(&after, &call).unwrap().action, run(&before, &call).unwrap().action);
                }
            }
        }

        #[test]
        fn programs_that_nobody_compiled_are_errors_at_worst(
            program in vec((prop_oneof![Just(LOAD), Just(AND), Just(JUMP), Just(JUMP_EQUAL), Just(RETURN), any::<u16>()],
                0..4_u8, 0..4_u8, prop_oneof![0..24_u32, any::<u32>()]), 0..20),
        ) {
            let program: BpfProgram =
                program.into_iter().map(|(code, jt, jf, k)| sock_filter { code, jt, jf, k }).collect();
            let _ = search(&[program], None);
        }
    }

    #[test]
    fn unknown_numbers_are_answered_apart() {
        let before = seccompiled(Rules::from([(1, vec![])]), SeccompAction::Errno(1), SeccompAction::Allow);
        let unknown = Unknown { first: 400, action: 0x0005_0026 };
        let after = search(std::slice::from_ref(&before), Some(unknown)).unwrap();
        let action = |arch, number| run(&after, &Call { arch, number, arguments: [0; 6] }).unwrap().action;
        for (number, expected) in [(0, 0x0005_0001), (1, ALLOW), (399, 0x0005_0001), (400, 0x0005_0026)] {
            assert_eq!(action(ARCH_X86_64, number), expected, "{number}");
            assert_eq!(action(FOREIGN[0], number), KILL_PROCESS, "{number}");
        }
        assert_eq!(action(ARCH_X86_64, u32::MAX), 0x0005_0026);
    }

    #[test]
    fn a_later_filter_wins_where_it_does_not_allow() {
        let allowed =
            seccompiled(Rules::from([(1, vec![]), (3, vec![])]), SeccompAction::Errno(1), SeccompAction::Allow);
        let absent =
            seccompiled(Rules::from([(3, vec![]), (4, vec![])]), SeccompAction::Allow, SeccompAction::Errno(38));
        let program = search(&[allowed, absent], None).unwrap();
        let action = |number| run(&program, &Call { arch: ARCH_X86_64, number, arguments: [0; 6] }).unwrap().action;
        assert_eq!([1, 2, 3, 4, 5].map(action), [ALLOW, 0x0005_0001, 0x0005_0026, 0x0005_0026, 0x0005_0001]);
    }

    #[test]
    fn filters_that_cannot_be_stacked_are_an_error() {
        let equals = |value| SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value).unwrap();
        let rules = Rules::from([(1, vec![SeccompRule::new(vec![equals(5)]).unwrap()])]);
        let first = seccompiled(Rules::from([(2, vec![])]), SeccompAction::KillProcess, SeccompAction::Allow);
        let later = seccompiled(rules, SeccompAction::Allow, SeccompAction::Errno(1));
        let error = search(&[first, later], None).unwrap_err();
        assert!(
            matches!(error, FilterError::Differs { number: 1, expected: KILL_PROCESS, found: ALLOW, .. }),
            "{error}"
        );
        assert!(matches!(search(&[], None), Err(FilterError::Empty)));
    }

    #[test]
    fn a_foreign_architecture_that_was_allowed_is_an_error() {
        let error = search(&[vec![instruction(RETURN, ALLOW)]], None).unwrap_err();
        assert!(matches!(error, FilterError::Differs { expected: ALLOW, found: KILL_PROCESS, .. }), "{error}");
    }

    #[test]
    fn a_program_that_the_kernel_would_not_take_is_an_error() {
        let conditions = |seed: u64| {
            let one = |index: u8| {
                SeccompCondition::new(index, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, seed << 32 | seed).unwrap()
            };
            vec![SeccompRule::new((0..6).map(one).collect()).unwrap()]
        };
        // Every one of them needs code of its own, and every other number a return and a comparison.
        let policy = |calls: i64| (0..calls).map(|number| (number * 2, conditions(number as u64))).collect::<Rules>();
        let before = seccompiled(policy(100), SeccompAction::KillProcess, SeccompAction::Allow);
        search(std::slice::from_ref(&before), None).expect("jumps beyond 255 instructions are laid out");
        // The original has its instructions already: two of them stacked have too many.
        let shifted = policy(100).into_iter().map(|(number, rules)| (number + 1, rules)).collect();
        let more = seccompiled(shifted, SeccompAction::Allow, SeccompAction::KillProcess);
        let error = search(&[before, more], None).unwrap_err();
        assert!(matches!(error, FilterError::Length { length } if length > INSTRUCTIONS_MAX), "{error}");
    }
}
