//! Files by name, in a directory or in a tar archive that stays packed.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, IoContext};
use crate::layer::{MemberKind, TarReader};
use crate::limits::DOCUMENT_BYTES_MAX;

/// Files in an archive: some for each of at most 512 layers and a few images; each costs some bytes of memory.
const MEMBERS_MAX: usize = 100_000;

/// Where files are looked up.
#[derive(Debug)]
pub(crate) enum Files {
    Directory(PathBuf),
    Archive(Archive),
}

/// A tar archive and what is where in it.
#[derive(Debug)]
pub(crate) struct Archive {
    file: File,
    path: PathBuf,
    members: HashMap<Vec<u8>, Place>,
}

#[derive(Clone, Debug)]
enum Place {
    Data {
        offset: u64,
        bytes: u64,
    },
    /// Old versions of docker link layers that two images share.
    Link(Vec<u8>),
}

/// A file's contents and its size.
pub(crate) type Opened<'a> = (Box<dyn Read + Send + 'a>, u64);

impl Files {
    pub(crate) fn directory(path: &Path) -> Files {
        Files::Directory(path.to_owned())
    }

    /// Where the files are, for messages.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Files::Directory(path) => path,
            Files::Archive(archive) => &archive.path,
        }
    }

    /// A file's contents and size, or `None` if there is no such file.
    ///
    /// # Errors
    /// It can't be opened, or is no regular file.
    pub(crate) fn open(&self, name: &Path) -> Result<Option<Opened<'_>>, Error> {
        match self {
            Files::Directory(directory) => {
                let path = directory.join(name);
                match open_regular(&path) {
                    Ok((file, bytes)) => Ok(Some((Box::new(file), bytes))),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                    Err(error) => Err(error).during("open", &path),
                }
            }
            Files::Archive(archive) => Ok(archive.open(name).map(|(file, bytes)| (Box::new(file) as Box<_>, bytes))),
        }
    }

    /// A document's bytes, or `None` if there is no such file.
    ///
    /// # Errors
    /// It can't be read or is too large.
    pub(crate) fn read(&self, name: &Path) -> Result<Option<Vec<u8>>, Error> {
        let Some((file, bytes)) = self.open(name)? else { return Ok(None) };
        if bytes > DOCUMENT_BYTES_MAX {
            let what = self.path().join(name).display().to_string();
            return Err(Error::TooLarge { what, bytes, limit: DOCUMENT_BYTES_MAX });
        }
        let mut content = Vec::new();
        file.take(DOCUMENT_BYTES_MAX).read_to_end(&mut content).during("read", &self.path().join(name))?;
        Ok(Some(content))
    }

    /// A short text that changes with a file's content.
    ///
    /// # Errors
    /// The file can't be read or does not exist.
    pub(crate) fn stamp(&self, name: &Path) -> Result<String, Error> {
        let content = self.read(name)?.ok_or_else(|| Error::NoSuchImage {
            reference: self.path().display().to_string(),
            detail: format!("there is no {} in it", name.display()),
        })?;
        Ok(crate::Digest::of(&content).to_string())
    }
}

/// A short text that changes when a file is replaced or written.
///
/// # Errors
/// The file can't be examined.
pub(crate) fn file_stamp(path: &Path) -> Result<String, Error> {
    let metadata = std::fs::metadata(path).during("examine", path)?;
    Ok(format!("{}:{}:{}.{:09}", metadata.ino(), metadata.len(), metadata.mtime(), metadata.mtime_nsec()))
}

/// Opens a file that must be a regular one: a FIFO would block, a device never end.
pub(crate) fn open_regular(path: &Path) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().read(true).custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    Ok((file, metadata.len()))
}

impl Archive {
    /// Reads an archive's table of contents.
    ///
    /// # Errors
    /// It is damaged or has too many files.
    pub(crate) fn index(file: File, path: &Path) -> Result<Archive, Error> {
        let malformed = |reason: String| Error::Malformed { what: format!("the archive {}", path.display()), reason };
        let clone = file.try_clone().during("open", path)?;
        let mut reader = TarReader::new(BufReader::with_capacity(256 << 10, clone));
        let mut members = HashMap::new();
        loop {
            let member = match reader.next() {
                Ok(Some(member)) => member,
                Ok(None) => break,
                Err(problem) => return Err(malformed(problem.to_string())),
            };
            let place = match member.kind {
                MemberKind::File { size, sparse: None } => Place::Data { offset: reader.position(), bytes: size },
                MemberKind::Symlink(target) => Place::Link(target),
                MemberKind::Directory => continue,
                _ => return Err(malformed(format!("`{}` is not a plain file", member.path.escape_ascii()))),
            };
            members.insert(normal(&member.path), place);
            if members.len() > MEMBERS_MAX {
                return Err(malformed(format!("it has more than {MEMBERS_MAX} files")));
            }
        }
        Ok(Archive { file, path: path.to_owned(), members })
    }

    fn open(&self, name: &Path) -> Option<(Section<'_>, u64)> {
        let name = normal(name.as_os_str().as_encoded_bytes());
        let (offset, bytes) = match self.members.get(&name)? {
            Place::Data { offset, bytes } => (*offset, *bytes),
            // `../ID/layer.tar`, from one image's directory to another's; never a chain.
            Place::Link(target) => match self.members.get(&normal(target.strip_prefix(b"../")?))? {
                Place::Data { offset, bytes } => (*offset, *bytes),
                Place::Link(_) => return None,
            },
        };
        Some((Section { file: &self.file, offset, left: bytes }, bytes))
    }
}

fn normal(path: &[u8]) -> Vec<u8> {
    path.strip_prefix(b"./").unwrap_or(path).to_vec()
}

/// A part of a file.
struct Section<'a> {
    file: &'a File,
    offset: u64,
    left: u64,
}

impl Read for Section<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let count = self.file.read_at(&mut buffer[..wanted], self.offset)?;
        self.offset += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}
