//! Compiles system call policies to classic BPF while the crates that carry them are built, so that nothing is left to
//! do at a start but to hand a program to the kernel, and a policy that does not compile is a build that fails.
//!
//! The kernel walks through a new filter once for every system call, to remember those that are always allowed
//! (`seccomp_cache_prepare` in kernel/seccomp.c). seccompiler's programs compare the number with one call after the
//! other, which makes that walk, and the program, long. What they answer is therefore laid out again as a binary search
//! over ranges of numbers ([`search`]), and compared with them before it is handed out.
//!
//! For build scripts: [`compile`] reads a policy, [`source`] writes a program down as Rust, [`write`] puts it where
//! `include!` finds it.

#![forbid(unsafe_code)]

mod machine;
mod search;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

use seccompiler::{BpfProgram, TargetArch, compile_from_json, sock_filter};
use thiserror::Error;

pub use machine::{ALLOW, ARCH_X86_64, Answer, Call, KILL_PROCESS, LAST, run};
pub use search::{INSTRUCTIONS_MAX, Unknown, search};

/// Why there is no program for a policy.
#[derive(Debug, Error)]
pub enum FilterError {
    /// The policy cannot be read.
    #[error("cannot read the policy {path}")]
    Read {
        /// The policy.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The policy is not one.
    #[error("the policy {path} does not compile")]
    Compile {
        /// The policy.
        path: PathBuf,
        /// What the compiler says.
        #[source]
        source: seccompiler::Error,
    },
    /// The policy lacks a filter.
    #[error("the policy has no filter {name:?}: add it")]
    Missing {
        /// The filter.
        name: String,
    },
    /// The generated source cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// There is nothing to lay out.
    #[error("there is no filter to lay out: name at least one")]
    Empty,
    /// A program holds an instruction that seccompiler does not use, or uses elsewhere.
    #[error(
        "instruction {position} of a filter has the code {code:#x}, which is not known there: teach it to this crate"
    )]
    Instruction {
        /// Its index.
        position: usize,
        /// Its code.
        code: u16,
    },
    /// A program loads something else than an argument, the number or the architecture.
    #[error("instruction {position} of a filter loads from {offset}, where no field of seccomp_data starts")]
    Load {
        /// Its index.
        position: usize,
        /// The offset in bytes.
        offset: u32,
    },
    /// A program leads past its last instruction.
    #[error("a filter leads to instruction {position}, past its end")]
    End {
        /// The index that it leads to.
        position: usize,
    },
    /// The kernel would not take the program.
    #[error("a filter has {length} instructions, the kernel takes {INSTRUCTIONS_MAX}: remove rules")]
    Length {
        /// Instructions.
        length: usize,
    },
    /// The program does not answer as the filters it was made from: they cannot be stacked in this order.
    #[error("call {number} with {argument:#x} would be answered {found:#x} instead of {expected:#x}")]
    Differs {
        /// The system call.
        number: u32,
        /// Each of its arguments.
        argument: u64,
        /// What the filters answer together.
        expected: u32,
        /// What the program answers.
        found: u32,
    },
}

/// The filters of a policy, by name, as seccompiler writes them.
#[derive(Debug)]
pub struct Policy(BTreeMap<String, BpfProgram>);

impl Policy {
    /// Takes one filter out.
    ///
    /// # Errors
    /// [`FilterError::Missing`].
    pub fn take(&mut self, name: &str) -> Result<BpfProgram, FilterError> {
        self.0.remove(name).ok_or_else(|| FilterError::Missing { name: name.to_owned() })
    }
}

impl IntoIterator for Policy {
    type Item = (String, BpfProgram);
    type IntoIter = std::collections::btree_map::IntoIter<String, BpfProgram>;

    /// In the order of the names, so that a build can be repeated.
    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// Compiles a policy in seccompiler's JSON for x86-64.
///
/// # Errors
/// [`FilterError::Read`], [`FilterError::Compile`].
pub fn compile(path: &Path) -> Result<Policy, FilterError> {
    let json = fs::read(path).map_err(|source| FilterError::Read { path: path.to_owned(), source })?;
    let filters = compile_from_json(json.as_slice(), TargetArch::x86_64)
        .map_err(|source| FilterError::Compile { path: path.to_owned(), source })?;
    Ok(Policy(filters.into_iter().collect()))
}

/// The program as an array expression of `sock_filter`s, whichever structure has that name where it is included.
#[must_use]
pub fn source(program: &[sock_filter]) -> String {
    let mut source = String::from("[\n");
    for sock_filter { code, jt, jf, k } in program {
        writeln!(source, "    sock_filter {{ code: {code}, jt: {jt}, jf: {jf}, k: {k} }},")
            .expect("a string takes any text");
    }
    source.push_str("]\n");
    source
}

/// Writes a file into the folder that cargo gives a build script.
///
/// # Errors
/// [`FilterError::Write`].
///
/// # Panics
/// Outside of a build script.
pub fn write(name: &str, source: &str) -> Result<(), FilterError> {
    let path = Path::new(&env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join(name);
    fs::write(&path, source).map_err(|source| FilterError::Write { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_is_an_array() {
        let program = [sock_filter { code: 6, jt: 0, jf: 0, k: ALLOW }];
        assert_eq!(source(&program), "[\n    sock_filter { code: 6, jt: 0, jf: 0, k: 2147418112 },\n]\n");
    }

    #[test]
    fn a_policy_that_is_missing_is_named() {
        let error = compile(Path::new("/nowhere/policy.json")).unwrap_err();
        assert_eq!(error.to_string(), "cannot read the policy /nowhere/policy.json");
    }

    #[test]
    fn a_filter_that_is_missing_is_named() {
        let error = Policy(BTreeMap::new()).take("vcpu").unwrap_err();
        assert_eq!(error.to_string(), "the policy has no filter \"vcpu\": add it");
    }
}
