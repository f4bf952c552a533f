//! What is at a path of a container, as a tar archive.
//!
//! The container's programs run meanwhile and may change anything at any time: each name is looked up on its own, in a
//! directory that is open, without following symbolic links, and what is open is what is written.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{BufWriter, Read};
use std::os::fd::{AsFd, OwnedFd};

use protocol::report::PathInfo;
use rustix::fs::{self, AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use tar::EntryType;

use super::BUFFER;
use super::archive::{Entry, Writer};
use super::error::{CopyError, InStep, shown};
use crate::container::root::Root;

/// How deep directories may be in each other: each one that is open takes a descriptor, of which there are 1024.
const DEPTH_MAX: usize = 512;

/// How many files with several names are remembered. Those behind are written once for each name.
const LINKS_MAX: usize = 16 << 10;

/// The file systems that show the kernel and not the container's data (`statfs(2)`): proc, sysfs, cgroup2, devpts, mqueue,
/// debugfs, tracefs, securityfs, bpf.
const OF_THE_KERNEL: [i64; 9] = [
    0x9fa0,
    0x6265_6572,
    0x6367_7270,
    0x1cd1,
    0x1980_0202,
    0x6462_6720,
    0x7472_6163,
    0x7363_6673,
    0xcafe_4a11_u32 as i64,
];

/// What is to be copied.
#[derive(Debug)]
pub struct Source {
    directory: OwnedFd,
    /// Its name in the directory.
    name: CString,
    /// Its name in the archive.
    shown: Vec<u8>,
    status: Stat,
    info: PathInfo,
}

impl Source {
    /// Finds what is at `path`. Its last component is followed only where the path says that it is a directory, as by
    /// `/` or `/.` at its end; in the latter case, and at the root, the archive's names begin with `.`.
    ///
    /// # Errors
    /// What openat2(2) says.
    pub fn find(root: &Root, path: &str) -> Result<Self, CopyError> {
        let failed = |source: Errno| CopyError::Path { action: "find", path: path.to_owned(), source: source.into() };
        let components = clean(path);
        let whole_directory = path.ends_with('/') || path.ends_with("/.") || components.is_empty();
        let parents = components.len() - usize::from(!whole_directory);
        let parent = format!("/{}", components[..parents].join("/"));
        let directory = root.open(parent.as_str(), OFlags::PATH | OFlags::DIRECTORY).map_err(failed)?;
        let last = components.last().copied().unwrap_or("/");
        let contents = path.ends_with("/.") || components.is_empty();
        let name = CString::new(if whole_directory { "." } else { last }).map_err(|_| failed(Errno::INVAL))?;
        let status = fs::statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
        let link_target = match FileType::from_raw_mode(status.st_mode) {
            FileType::Symlink => fs::readlinkat(&directory, &name, Vec::new()).map_err(failed)?,
            _ => CString::default(),
        };
        let info = PathInfo {
            name: if contents && !components.is_empty() { "." } else { last }.to_owned(),
            mode: status.st_mode,
            size: u64::try_from(status.st_size).unwrap_or(0),
            modified: status.st_mtime as i64,
            link_target: link_target.to_string_lossy().into_owned(),
        };
        let shown = if contents { b".".to_vec() } else { last.as_bytes().to_vec() };
        Ok(Self { directory, name, shown, status, info })
    }

    /// What the host is to know of it.
    pub fn info(&self) -> PathInfo {
        self.info.clone()
    }

    /// Writes it and all that is below it.
    ///
    /// # Errors
    /// What can't be read, or what the connection says.
    pub fn write(self, connection: File) -> Result<(), CopyError> {
        let writer = Writer::new(BufWriter::with_capacity(BUFFER, connection));
        let mut walk =
            Walk { writer, name: self.shown, links: HashMap::new(), levels: Vec::new(), buffer: vec![0; BUFFER] };
        walk.add(&self.directory, &self.name, &self.status)?;
        walk.descend()?;
        walk.writer.finish().in_step("write the archive")
    }
}

/// The components of a path, as docker cleans it: without regard to symbolic links.
fn clean(path: &str) -> Vec<&str> {
    let mut components = Vec::new();
    for component in path.split('/') {
        match component {
            "" | "." => {}
            ".." => drop(components.pop()),
            name => components.push(name),
        }
    }
    components
}

/// A directory whose content is being written.
struct Level {
    entries: Dir,
    /// How much of the name is the directory's.
    name: usize,
}

/// A walk through a tree.
struct Walk {
    writer: Writer<BufWriter<File>>,
    /// The name in the archive of what is being looked at.
    name: Vec<u8>,
    /// The first name of each file that has several, by its numbers.
    links: HashMap<(u64, u64), Vec<u8>>,
    /// The directories from the first to the one at hand.
    levels: Vec<Level>,
    buffer: Vec<u8>,
}

impl Walk {
    /// Writes all that is in the directories that were added.
    fn descend(&mut self) -> Result<(), CopyError> {
        while let Some(Level { entries, name }) = self.levels.last_mut() {
            self.name.truncate(*name);
            let Some(entry) = entries.read() else {
                self.levels.pop();
                continue;
            };
            let entry = entry.of_file("list", &self.name)?;
            if matches!(entry.file_name().to_bytes(), b"." | b"..") {
                continue;
            }
            self.name.push(b'/');
            self.name.extend_from_slice(entry.file_name().to_bytes());
            let directory = entries.fd().and_then(|fd| fd.try_clone_to_owned().map_err(|_| Errno::MFILE));
            let directory = directory.of_file("open", &self.name)?;
            let status = unless_removed(fs::statat(&directory, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW));
            if let Some(status) = status.of_file("look at", &self.name)? {
                self.add(&directory, entry.file_name(), &status)?;
            }
        }
        Ok(())
    }

    /// Writes one file, and makes a directory the next to be gone through. One that was removed since it was looked at is
    /// left out.
    fn add(&mut self, directory: &OwnedFd, file: &CStr, status: &Stat) -> Result<(), CopyError> {
        let kind = FileType::from_raw_mode(status.st_mode);
        let mut entry = self.entry(status);
        match kind {
            FileType::Directory => {
                // Before it is written: one that was replaced is not half there.
                let Some(opened) = self.open(directory, file, OFlags::DIRECTORY)? else { return Ok(()) };
                entry.name.push(b'/');
                self.begin(&entry)?;
                return self.enter(opened);
            }
            FileType::RegularFile => {
                if status.st_nlink > 1 && self.has_name(status) {
                    entry.link = self.links.get(&numbers(status)).cloned().unwrap_or_default();
                    entry.kind = EntryType::Link;
                    return self.begin(&entry);
                }
                return self.add_file(directory, file);
            }
            FileType::Symlink => {
                entry.kind = EntryType::Symlink;
                let target = unless_removed(fs::readlinkat(directory, file, Vec::new()));
                let Some(target) = target.of_file("read the link", &self.name)? else { return Ok(()) };
                entry.link = target.into_bytes();
            }
            FileType::CharacterDevice => entry.kind = EntryType::Char,
            FileType::BlockDevice => entry.kind = EntryType::Block,
            FileType::Fifo => entry.kind = EntryType::Fifo,
            // The format has no sockets, and they mean nothing without who listens.
            _ => return Ok(()),
        }
        self.begin(&entry)
    }

    fn entry(&self, status: &Stat) -> Entry {
        let kind = match FileType::from_raw_mode(status.st_mode) {
            FileType::Directory => EntryType::Directory,
            _ => EntryType::Regular,
        };
        Entry {
            name: self.name.clone(),
            kind,
            mode: status.st_mode & 0o7777,
            uid: status.st_uid.into(),
            gid: status.st_gid.into(),
            mtime: u64::try_from(status.st_mtime).unwrap_or(0),
            size: 0,
            link: Vec::new(),
            device: (fs::major(status.st_rdev), fs::minor(status.st_rdev)),
        }
    }

    fn begin(&mut self, entry: &Entry) -> Result<(), CopyError> {
        self.writer.begin(entry).in_step("write the archive")
    }

    /// Whether the file has a name in the archive already; if not, it has this one.
    fn has_name(&mut self, status: &Stat) -> bool {
        let numbers = numbers(status);
        if self.links.contains_key(&numbers) {
            return true;
        }
        if self.links.len() < LINKS_MAX {
            self.links.insert(numbers, self.name.clone());
        }
        false
    }

    /// Opens a file that may have become anything since it was looked at, and is `None` when it was removed; never waits
    /// for another program.
    fn open(&self, directory: &OwnedFd, file: &CStr, flags: OFlags) -> Result<Option<OwnedFd>, CopyError> {
        let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        unless_removed(fs::openat(directory, file, flags, Mode::empty())).of_file("open", &self.name)
    }

    fn enter(&mut self, directory: OwnedFd) -> Result<(), CopyError> {
        let system = fs::fstatfs(&directory).of_file("look at the file system of", &self.name)?;
        if OF_THE_KERNEL.contains(&(system.f_type as i64)) {
            return Ok(());
        }
        if self.levels.len() >= DEPTH_MAX {
            return Err(CopyError::Source { name: shown(&self.name), problem: "is too deep" });
        }
        let entries = Dir::new(directory).of_file("list", &self.name)?;
        self.levels.push(Level { entries, name: self.name.len() });
        Ok(())
    }

    fn add_file(&mut self, directory: &OwnedFd, file: &CStr) -> Result<(), CopyError> {
        let Some(opened) = self.open(directory, file, OFlags::empty())? else {
            // Its other names must not refer to this one.
            self.links.retain(|_, name| *name != self.name);
            return Ok(());
        };
        let mut opened = File::from(opened);
        let status = fs::fstat(opened.as_fd()).of_file("look at", &self.name)?;
        if !FileType::from_raw_mode(status.st_mode).is_file() {
            return Err(CopyError::Source { name: shown(&self.name), problem: "was replaced meanwhile" });
        }
        let size = u64::try_from(status.st_size).unwrap_or(0);
        self.begin(&Entry { size, ..self.entry(&status) })?;
        let mut left = size;
        while left > 0 {
            let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(BUFFER);
            let length = opened.read(&mut self.buffer[..wanted]).of_file("read", &self.name)?;
            if length == 0 {
                return Err(CopyError::Source { name: shown(&self.name), problem: "became shorter meanwhile" });
            }
            self.writer.data(&self.buffer[..length]).in_step("write the archive")?;
            left -= length as u64;
        }
        self.writer.end(size).in_step("write the archive")
    }
}

/// `None` for a file that was removed since it was listed.
fn unless_removed<T>(result: Result<T, Errno>) -> Result<Option<T>, Errno> {
    match result {
        Err(Errno::NOENT) => Ok(None),
        result => result.map(Some),
    }
}

/// What tells a file from all others.
fn numbers(status: &Stat) -> (u64, u64) {
    (status.st_dev, status.st_ino)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_cleaned_as_docker_does() {
        assert_eq!(clean("/a//b/./c/../d/"), ["a", "b", "d"]);
        assert_eq!(clean("/../../a"), ["a"]);
        assert!(clean("/a/..").is_empty() && clean("").is_empty());
    }
}
