//! Landlock (Linux 5.13), where the kernel has it: what the mount namespace has taken away already, taken away once more by
//! another mechanism. Files can be read and written below the monitor's folder alone; TCP, abstract sockets of others and
//! signals to others are forbidden where the kernel knows how.

use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, PathBeneath, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, Scope,
};

use crate::error::JailError;

/// The newest rules that are asked for; an older kernel takes those it knows.
const NEWEST: ABI = ABI::V6;

/// Restricts this process to `folder`.
///
/// # Errors
/// [`JailError::Landlock`]; a kernel without it is none.
pub(crate) fn restrict(folder: Option<BorrowedFd<'_>>) -> Result<(), JailError> {
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
        rules.restrict_self().map(drop)
    };
    restrict().map_err(JailError::Landlock)
}

/// Whether this kernel has Landlock, and it is switched on.
pub(crate) fn is_supported() -> bool {
    // A ruleset that may not be less than it says: the least that there is.
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    ruleset.handle_access(AccessFs::from_all(ABI::V1)).and_then(|ruleset| ruleset.create()).is_ok()
}
