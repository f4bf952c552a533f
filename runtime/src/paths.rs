//! Where the monitor, the guest kernel and the initramfs are: beside the running executable, where a build leaves them,
//! or in the library directories of an installation. An environment variable or a flag names another file.

use std::env;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// The guest kernel's file name.
const KERNEL: &str = "vmlinux";
/// The initramfs's file name.
const INITRAMFS: &str = "initramfs.cpio";
/// The monitor's file name.
const MONITOR: &str = "cofferdam-vmm";

/// Names the guest kernel.
pub const KERNEL_VARIABLE: &str = "COFFERDAM_KERNEL";
/// Names the initramfs.
pub const INITRAMFS_VARIABLE: &str = "COFFERDAM_INITRAMFS";
/// Names the monitor.
pub const MONITOR_VARIABLE: &str = "COFFERDAM_VMM";

/// Why a part of the installation was not found.
#[derive(Debug, Error)]
pub enum PathError {
    /// The file that was named is not there.
    #[error("the {what} {} named by {by} cannot be opened", path.display())]
    Named {
        /// What it should be.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Who named it.
        by: &'static str,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// None of the usual places has it.
    #[error("the {what} {name} is in none of {}: install it there, or name it with {variable}", list(places))]
    Missing {
        /// What it should be.
        what: &'static str,
        /// The file name looked for.
        name: &'static str,
        /// Where it was looked for.
        places: Vec<PathBuf>,
        /// The variable that names one.
        variable: &'static str,
    },
    /// The path cannot be told to the monitor.
    #[error("the path {} is not UTF-8: rename it", path.display())]
    NotUtf8 {
        /// The path.
        path: PathBuf,
    },
}

fn list(places: &[PathBuf]) -> String {
    let places: Vec<_> = places.iter().map(|place| place.display().to_string()).collect();
    places.join(", ")
}

/// The guest kernel: `flag`, else `COFFERDAM_KERNEL`, else one of the usual places.
///
/// # Errors
/// It is not there.
pub fn kernel(flag: Option<&Path>) -> Result<PathBuf, PathError> {
    const WHAT: &str = "guest kernel";
    match flag {
        Some(path) => named(WHAT, path.to_owned(), "--kernel"),
        None => find(WHAT, KERNEL, KERNEL_VARIABLE),
    }
}

/// The initramfs: `COFFERDAM_INITRAMFS`, else one of the usual places.
///
/// # Errors
/// It is not there.
pub fn initramfs() -> Result<PathBuf, PathError> {
    find("initramfs", INITRAMFS, INITRAMFS_VARIABLE)
}

/// The monitor: `COFFERDAM_VMM`, else one of the usual places, else one on `PATH`.
///
/// # Errors
/// It is not there.
pub fn monitor() -> Result<PathBuf, PathError> {
    find("monitor", MONITOR, MONITOR_VARIABLE).or_else(|error| {
        let PathError::Missing { .. } = error else { return Err(error) };
        let path = env::var_os("PATH").unwrap_or_default();
        // An empty entry of PATH is the working directory, which nobody means.
        let on_path = env::split_paths(&path).filter(|place| place.is_absolute()).map(|place| place.join(MONITOR));
        on_path.into_iter().find(|path| path.is_file()).ok_or(error)
    })
}

fn find(what: &'static str, name: &'static str, variable: &'static str) -> Result<PathBuf, PathError> {
    if let Some(path) = env::var_os(variable).filter(|path| !path.is_empty()) {
        return named(what, PathBuf::from(path), variable);
    }
    let places = places();
    let found = places.iter().map(|place| place.join(name)).find(|path| path.is_file());
    found.ok_or(PathError::Missing { what, name, places, variable })
}

/// The directory of the executable and the library directories of an installation below the same prefix and below /usr.
fn places() -> Vec<PathBuf> {
    let mut places = Vec::with_capacity(3);
    if let Some(beside) = env::current_exe().ok().as_deref().and_then(Path::parent) {
        places.push(beside.to_owned());
        if let Some(prefix) = beside.parent() {
            places.push(prefix.join("lib/cofferdam"));
        }
    }
    let installed = PathBuf::from("/usr/lib/cofferdam");
    if !places.contains(&installed) {
        places.push(installed);
    }
    places
}

/// A path as it was given, checked to lead somewhere: the monitor would say it too, but only after it has started.
fn named(what: &'static str, path: PathBuf, by: &'static str) -> Result<PathBuf, PathError> {
    if OsStr::to_str(path.as_os_str()).is_none() || path.as_os_str().as_bytes().contains(&0) {
        return Err(PathError::NotUtf8 { path });
    }
    match path.metadata() {
        Ok(_) => Ok(path),
        Err(source) => Err(PathError::Named { what, path, by, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_is_named_and_missing_is_an_error_with_its_name() {
        let error = kernel(Some(Path::new("/nowhere/vmlinux"))).unwrap_err();
        assert_eq!(error.to_string(), "the guest kernel /nowhere/vmlinux named by --kernel cannot be opened");
    }

    #[test]
    fn places_begin_beside_the_executable() {
        let here = env::current_exe().unwrap();
        assert_eq!(places()[0], here.parent().unwrap());
        assert_eq!(places().last().unwrap(), Path::new("/usr/lib/cofferdam"));
    }

    #[test]
    fn what_is_missing_everywhere_says_where_and_how_to_name_it() {
        let error = find("thing", "no-such-file", "COFFERDAM_NO_SUCH").unwrap_err().to_string();
        assert!(error.contains("/usr/lib/cofferdam: ") && error.contains("COFFERDAM_NO_SUCH"), "{error}");
    }
}
