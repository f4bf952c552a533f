//! Landlock (Linux 5.13), where the kernel has it: what the mount namespace has taken away already, taken away once more by
//! another mechanism. Files can be read and written below the monitor's folder and what it serves alone; TCP, abstract sockets
//! of others and signals to others are forbidden where the kernel knows how.

use std::os::fd::{BorrowedFd, OwnedFd};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible as _, PathBeneath, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, Scope,
};

use rustix::fs::FileType;

use crate::error::{JailError, step};
use crate::files::Tree;

/// The newest rules that are asked for; an older kernel takes those it knows.
const NEWEST: ABI = ABI::V6;

/// Restricts this process to `folder` and to the trees that it serves, with the descriptors that lead to them.
///
/// # Errors
/// [`JailError::Landlock`]; a kernel without it is none.
pub(crate) fn restrict(folder: Option<BorrowedFd<'_>>, served: &[(&Tree<'_>, &OwnedFd)]) -> Result<(), JailError> {
    let served = served.iter().map(|(tree, root)| Ok((root, access(tree, root)?)));
    let served = served.collect::<rustix::io::Result<Vec<_>>>().map_err(step("look at the files that it serves"))?;
    let restrict = || {
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::from_all(NEWEST))?
            .create()?;
        if let Some(folder) = folder {
            let access = AccessFs::ReadFile
                | AccessFs::WriteFile
                | AccessFs::Truncate
                | AccessFs::MakeReg
                | AccessFs::RemoveFile;
            rules = rules.add_rule(PathBeneath::new(folder, access))?;
        }
        for (root, access) in served {
            rules = rules.add_rule(PathBeneath::new(root, access))?;
        }
        rules.restrict_self().map(drop)
    };
    restrict().map_err(JailError::Landlock)
}

/// What can be done in a tree: all but executing, and making device nodes.
fn access(tree: &Tree<'_>, root: &OwnedFd) -> rustix::io::Result<BitFlags<AccessFs>> {
    let (mut of_file, mut of_directory) = (BitFlags::from(AccessFs::ReadFile), BitFlags::from(AccessFs::ReadDir));
    if !tree.read_only {
        of_file |= AccessFs::WriteFile | AccessFs::Truncate;
        of_directory |= AccessFs::MakeReg
            | AccessFs::MakeDir
            | AccessFs::MakeSym
            | AccessFs::MakeFifo
            | AccessFs::MakeSock
            | AccessFs::RemoveFile
            | AccessFs::RemoveDir
            | AccessFs::Refer;
    }
    let is_directory = FileType::from_raw_mode(rustix::fs::fstat(root)?.st_mode) == FileType::Directory;
    Ok(if is_directory { of_file | of_directory } else { of_file })
}

/// Whether this kernel has Landlock, and it is switched on.
pub(crate) fn is_supported() -> bool {
    // A ruleset that may not be less than it says: the least that there is.
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    ruleset.handle_access(AccessFs::from_all(ABI::V1)).and_then(|ruleset| ruleset.create()).is_ok()
}
