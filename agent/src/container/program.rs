//! Which file a container executes: the program's name looked up in the process's own `PATH`, as Go's `exec.LookPath`
//! does for docker, with its words for what goes wrong.

use std::io;

use rustix::fs::{self, Access, AtFlags, CWD, FileType};
use rustix::io::Errno;

use super::error::SetupError;

/// Where programs are looked for when the process has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Finds the file to execute. Must run as the process's user, in its root and working directory.
///
/// # Errors
/// That there is none, or why it is not executable.
pub fn find(program: &str, environment: &[String]) -> Result<String, SetupError> {
    if program.is_empty() {
        return Err(SetupError::NoProgram);
    }
    if program.contains('/') {
        return executable(program).map(|()| program.to_owned());
    }
    let path = environment.iter().rev().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    candidates(path, program)
        .find(|candidate| executable(candidate).is_ok())
        .ok_or_else(|| SetupError::NotInPath { program: program.to_owned() })
}

/// The paths that a program may have, in order; an empty element of the search path is the working directory.
fn candidates(path: &str, program: &str) -> impl Iterator<Item = String> {
    path.split(':').map(move |directory| match directory {
        "" => format!("./{program}"),
        _ => format!("{directory}/{program}"),
    })
}

fn executable(path: &str) -> Result<(), SetupError> {
    let program = || path.to_owned();
    let status =
        fs::stat(path).map_err(|error| SetupError::NoSuchProgram { program: program(), source: error.into() })?;
    match FileType::from_raw_mode(status.st_mode) {
        FileType::Directory => Err(SetupError::ProgramIsDirectory { program: program() }),
        // What the kernel would say of a device or a pipe, said before anything is started.
        kind if !kind.is_file() => Err(not_executable(path, Errno::ACCESS)),
        _ => fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS).map_err(|error| not_executable(path, error)),
    }
}

fn not_executable(path: &str, error: Errno) -> SetupError {
    SetupError::ProgramNotExecutable { program: path.to_owned(), source: io::Error::from(error) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use protocol::FailureKind;

    use super::*;

    fn file(path: &Path, mode: u32) {
        std::fs::write(path, "").unwrap();
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    }

    #[test]
    fn the_first_executable_file_in_the_path_is_taken() {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().to_str().unwrap();
        for name in ["a", "b", "c"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        std::fs::create_dir(directory.path().join("a/tool")).unwrap();
        file(&directory.path().join("b/tool"), 0o644);
        file(&directory.path().join("c/tool"), 0o755);
        let environment = ["PATH=/ignored".to_owned(), format!("PATH={base}/none:{base}/a:{base}/b:{base}/c")];
        assert_eq!(find("tool", &environment).unwrap(), format!("{base}/c/tool"));
        let error = find("nope", &environment).unwrap_err();
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (FailureKind::CommandNotFound, "exec: \"nope\": executable file not found in $PATH")
        );
    }

    #[test]
    fn a_path_is_taken_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let plain = directory.path().join("plain");
        file(&plain, 0o644);
        let kind = |path: &str| find(path, &[]).unwrap_err().kind();
        assert_eq!(kind("/nonexistent"), FailureKind::CommandNotFound);
        assert_eq!(kind("/etc/passwd/x"), FailureKind::CommandNotFound);
        assert_eq!(kind("/etc"), FailureKind::CommandNotExecutable);
        assert_eq!(kind("/dev/null"), FailureKind::CommandNotExecutable);
        assert_eq!(kind(plain.to_str().unwrap()), FailureKind::CommandNotExecutable);
        assert_eq!(find("/bin/sh", &[]).unwrap(), "/bin/sh");
    }

    #[test]
    fn an_empty_element_is_the_working_directory() {
        assert_eq!(candidates("/a::b", "x").collect::<Vec<_>>(), ["/a/x", "./x", "b/x"]);
    }
}
