//! Files of environment variables as `--env-file` takes them: a `NAME=value` or a `NAME` a line, taken literally, with
//! lines that begin with `#` and empty lines left out.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::request::{EnvEntry, RequestError};

/// The longest file read: more does not fit into a process.
const FILE_MAX: u64 = 2 << 20;

/// Why a file was refused.
#[derive(Debug, Error)]
pub enum EnvFileError {
    /// It cannot be read.
    #[error("cannot read the environment file {}", path.display())]
    Read {
        /// Its path.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// It is too long.
    #[error("the environment file {} is over {FILE_MAX} bytes", path.display())]
    TooLong {
        /// Its path.
        path: PathBuf,
    },
    /// A name has a space or a tab, most often around the `=`.
    #[error("line {line} of the environment file {} has white space in the variable's name", path.display())]
    WhiteSpace {
        /// Its path.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
    },
    /// A line is no variable.
    #[error("line {line} of the environment file {} is not a variable", path.display())]
    Entry {
        /// Its path.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// Why.
        #[source]
        source: RequestError,
    },
}

/// Reads a file.
///
/// # Errors
/// [`EnvFileError`] names the file and the line.
pub fn read(path: &Path) -> Result<Vec<EnvEntry>, EnvFileError> {
    let mut text = String::new();
    let opened = File::open(path).and_then(|file| file.take(FILE_MAX + 1).read_to_string(&mut text));
    opened.map_err(|source| EnvFileError::Read { path: path.to_owned(), source })?;
    if text.len() as u64 > FILE_MAX {
        return Err(EnvFileError::TooLong { path: path.to_owned() });
    }
    parse(path, &text)
}

fn parse(path: &Path, text: &str) -> Result<Vec<EnvEntry>, EnvFileError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut entries = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line_number = number + 1;
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let name = line.split_once('=').map_or(line, |(name, _)| name);
        if name.contains([' ', '\t']) {
            return Err(EnvFileError::WhiteSpace { path: path.to_owned(), line: line_number });
        }
        let entry = line.parse();
        entries.push(entry.map_err(|source| EnvFileError::Entry {
            path: path.to_owned(),
            line: line_number,
            source,
        })?);
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_taken_literally() {
        let text = "\u{feff}# comment\n\nA=1 2 # not a comment\n  B=\"quoted\"\nC=\nD\r\n";
        let entries = parse(Path::new("f"), text).unwrap();
        let set = |name: &str, value: &str| EnvEntry::Set(name.into(), value.into());
        let expected =
            [set("A", "1 2 # not a comment"), set("B", "\"quoted\""), set("C", ""), EnvEntry::Inherit("D".into())];
        assert_eq!(entries, expected);
    }

    #[test]
    fn a_bad_line_is_named() {
        for (text, message) in [("A=1\nB =2\n", "line 2"), ("=x", "line 1"), ("\n\nA=\0\n", "line 3")] {
            let error = parse(Path::new("vars"), text).unwrap_err().to_string();
            assert!(error.contains(message) && error.contains("vars"), "{error}");
        }
    }

    #[test]
    fn a_file_that_is_not_text_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"A=\xff\n").unwrap();
        assert!(matches!(read(file.path()), Err(EnvFileError::Read { .. })));
    }
}
