//! The policies of this tree: laid out again, they answer as seccompiler's programs do, in fewer steps.

use std::path::{Path, PathBuf};

use filter::{ALLOW, ARCH_X86_64, Call, KILL_PROCESS, LAST, Unknown, compile, run, search};
use seccompiler::sock_filter;

/// Numbers as the kernel's table has them: the first and last known one, some of the x32 interface, the last of all.
fn numbers() -> impl Iterator<Item = u32> {
    (0..=LAST + 100).chain(0x4000_0000..0x4000_0000 + LAST).chain([u32::MAX])
}

fn policy(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/seccomp").join(name)
}

fn action(program: &[sock_filter], arch: u32, number: u32, argument: u64) -> u32 {
    run(program, &Call { arch, number, arguments: [argument; 6] }).unwrap().action
}

/// Instructions that the kernel looks at when it takes a filter.
fn walk(program: &[sock_filter]) -> usize {
    let steps = |number| run(program, &Call { arch: ARCH_X86_64, number, arguments: [0; 6] }).unwrap().steps;
    (0..=LAST).map(steps).sum()
}

#[test]
fn threads_die_of_the_calls_that_they_died_of() {
    // FIONBIO, KVM_RUN, KVM_GET_REGS, AF_UNIX, F_GETFD, PROT_EXEC, and what is near or above them.
    let arguments = [0, 1, 2, 3, 4, 5, 7, 21537, 21538, 44672, 44673, 2156965505, 2156965506, 1 << 32, 1 << 32 | 4];
    let mut names = Vec::new();
    let mut policy = compile(&policy("monitor.json")).unwrap();
    let absent = policy.take("fs_absent").unwrap();
    for (name, before) in policy {
        let after = search(std::slice::from_ref(&before), None).unwrap();
        for number in numbers() {
            for argument in arguments {
                let expected = action(&before, ARCH_X86_64, number, argument);
                assert_eq!(action(&after, ARCH_X86_64, number, argument), expected, "{name}: {number} with {argument}");
                assert!(number <= LAST || expected == KILL_PROCESS, "{name}: {number}");
            }
            assert_eq!(action(&after, 0x4000_0003, number, 0), KILL_PROCESS, "{name}: {number} of i386");
        }
        println!(
            "{name}: {} -> {} instructions, {} -> {} steps",
            before.len(),
            after.len(),
            walk(&before),
            walk(&after)
        );
        assert!(after.len() < before.len(), "{name}");
        assert!(walk(&after) * 4 < walk(&before), "{name}");
        names.push(name);
    }
    assert_eq!(names, ["api", "disk", "event_loop", "fs", "vcpu"]);
    let [clone3, no_such_call] = [435, 0x0005_0026];
    for number in numbers() {
        assert_eq!(
            action(&absent, ARCH_X86_64, number, 0),
            if number == clone3 { no_such_call } else { ALLOW },
            "{number}"
        );
    }
}

#[test]
fn containers_are_refused_what_they_were_refused() {
    let mut policy = compile(&policy("container-default.json")).unwrap();
    let filters = ["allowed", "absent"].map(|name| policy.take(name).unwrap());
    let no_such_call = 0x0005_0026;
    let after = search(&filters, Some(Unknown { first: LAST + 1, action: no_such_call })).unwrap();
    for number in numbers() {
        for argument in [0, 1, 8, 0x10000, 0x20000, 0x2000_0000, 40, 16, 0x7e02_0000, u64::MAX] {
            let [allowed, absent] = filters.each_ref().map(|filter| action(filter, ARCH_X86_64, number, argument));
            let expected = match (number > LAST, absent) {
                (true, _) => no_such_call,
                (false, ALLOW) => allowed,
                (false, absent) => absent,
            };
            assert_eq!(action(&after, ARCH_X86_64, number, argument), expected, "{number} with {argument:#x}");
        }
        assert_eq!(action(&after, 0x4000_0003, number, 0), KILL_PROCESS, "{number} of i386");
    }
}
