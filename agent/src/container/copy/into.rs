//! A tar archive, unpacked into a directory of a container.
//!
//! Neither the archive nor what is in the directory is believed: every path is resolved by the kernel below the directory
//! (`openat2` with `RESOLVE_BENEATH`), whatever symbolic links were there, came along, or appear meanwhile; the last
//! component is never followed, and owner and mode are given to what was made and is open.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{self, AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use rustix::process::umask;
use tar::EntryType;

use super::BUFFER;
use super::archive::{Entry, Reader};
use super::error::{CopyError, InStep, shown};
use crate::container::root::{Root, open_beneath};

/// How many bytes of names of directories are remembered, for their times to be set behind their contents. The times of
/// those behind are the times of the copy.
const REMEMBERED_MAX: usize = 1 << 20;

/// Unpacks an archive up to its end.
///
/// # Errors
/// There is no such directory, or the entry that can't be unpacked.
pub fn unpack(root: &Root, path: &str, archive: &mut File) -> Result<(), CopyError> {
    umask(Mode::empty());
    let directory = root.open(path, OFlags::PATH | OFlags::DIRECTORY).map_err(|source| CopyError::Path {
        action: "find the directory",
        path: path.to_owned(),
        source: source.into(),
    })?;
    let mut target = Target { directory, times: Vec::new(), remembered: 0, buffer: vec![0; BUFFER] };
    let mut reader = Reader::new(archive);
    while let Some(entry) = reader.next()? {
        target.add(&entry, &mut reader)?;
    }
    target.set_times();
    Ok(())
}

/// The directory that is unpacked into.
struct Target {
    directory: OwnedFd,
    /// Directories and the times that they are to have.
    times: Vec<(Vec<u8>, u64)>,
    /// How many bytes of names those have.
    remembered: usize,
    buffer: Vec<u8>,
}

/// The components of a name; `None` of one that goes up.
fn components(name: &[u8]) -> Option<Vec<&[u8]>> {
    let components = name.split(|byte| *byte == b'/').filter(|component| !matches!(*component, b"" | b"."));
    components.map(|component| (component != b"..").then_some(component)).collect()
}

impl Target {
    fn add(&mut self, entry: &Entry, reader: &mut Reader<&mut File>) -> Result<(), CopyError> {
        let Some(path) = components(&entry.name) else { return Err(unfit(entry, "leads out of the directory")) };
        let Some((name, parents)) = path.split_last() else {
            // The directory itself is there, and stays as it is.
            return if entry.kind.is_dir() { Ok(()) } else { Err(unfit(entry, "is the directory itself")) };
        };
        let parent = self.make_directories(parents, entry)?;
        match entry.kind {
            EntryType::Directory => self.add_directory(&parent, name, &path, entry),
            EntryType::Regular | EntryType::Continuous => self.add_file(&parent, name, entry, reader),
            EntryType::Symlink => add_symlink(&parent, name, entry),
            EntryType::Link => self.add_link(&parent, name, &path, entry),
            EntryType::Char => add_node(&parent, name, entry, FileType::CharacterDevice),
            EntryType::Block => add_node(&parent, name, entry, FileType::BlockDevice),
            EntryType::Fifo => add_node(&parent, name, entry, FileType::Fifo),
            _ => Err(unfit(entry, "is of an unknown kind")),
        }
    }

    /// Opens a directory below the target, making those that are missing.
    fn make_directories(&self, path: &[&[u8]], entry: &Entry) -> Result<OwnedFd, CopyError> {
        let mut depth = path.len();
        let mut directory = loop {
            match self.open(&path[..depth], OFlags::PATH | OFlags::DIRECTORY) {
                Err(Errno::NOENT) if depth > 0 => depth -= 1,
                Err(Errno::XDEV) => return Err(unfit(entry, "leads out of the directory through a symbolic link")),
                result => break result.of_entry("find the directory of", &entry.name)?,
            }
        };
        for component in &path[depth..] {
            match fs::mkdirat(&directory, *component, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                result => result.of_entry("make a directory for", &entry.name)?,
            }
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            directory = fs::openat(&directory, *component, flags, Mode::empty())
                .of_entry("open a directory for", &entry.name)?;
        }
        Ok(directory)
    }

    fn open(&self, path: &[&[u8]], flags: OFlags) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { b".".to_vec() } else { path.join(&b'/') };
        open_beneath(&self.directory, path.as_slice(), flags)
    }

    fn add_directory(&mut self, parent: &OwnedFd, name: &[u8], path: &[&[u8]], entry: &Entry) -> Result<(), CopyError> {
        match fs::mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            result => result.of_entry("make the directory", &entry.name)?,
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match fs::openat(parent, name, flags, Mode::empty()) {
            Ok(directory) => own(directory.as_fd(), entry)?,
            // A link to a directory does as one, as long as it stays below, but is not the archive's to change.
            Err(Errno::LOOP | Errno::NOTDIR) => {
                let found = self.open(path, OFlags::PATH | OFlags::DIRECTORY);
                return found.map(drop).map_err(|_| unfit(entry, "is a directory and would replace what is none"));
            }
            Err(error) => return Err(error).of_entry("open the directory", &entry.name),
        }
        self.remembered += entry.name.len();
        if self.remembered <= REMEMBERED_MAX {
            self.times.push((path.join(&b'/'), entry.mtime));
        }
        Ok(())
    }

    fn add_file(
        &mut self,
        parent: &OwnedFd,
        name: &[u8],
        entry: &Entry,
        reader: &mut Reader<&mut File>,
    ) -> Result<(), CopyError> {
        let mut file = File::from(create(parent, name, entry)?);
        loop {
            let length = reader.read(&mut self.buffer)?;
            if length == 0 {
                break;
            }
            file.write_all(&self.buffer[..length]).of_entry("write", &entry.name)?;
        }
        own(file.as_fd(), entry)?;
        fs::futimens(&file, &times(entry.mtime)).of_entry("set the time of", &entry.name)
    }

    fn add_link(&self, parent: &OwnedFd, name: &[u8], path: &[&[u8]], entry: &Entry) -> Result<(), CopyError> {
        let Some(source) = components(&entry.link) else {
            return Err(unfit(entry, "is a link that leads out of the directory"));
        };
        let Some((source_name, parents)) = source.split_last() else {
            return Err(unfit(entry, "is a link to the directory itself"));
        };
        if source == path {
            return Ok(());
        }
        let action = "find what is linked by";
        let source = match self.open(parents, OFlags::PATH | OFlags::DIRECTORY) {
            Err(Errno::XDEV) => return Err(unfit(entry, "is a link that leads out of the directory")),
            result => result.of_entry(action, &entry.name)?,
        };
        remove(parent, name, entry)?;
        fs::linkat(&source, *source_name, parent, name, AtFlags::empty()).of_entry("make the link", &entry.name)
    }

    /// Gives the directories their times, the inner ones first.
    fn set_times(&self) {
        for (path, mtime) in self.times.iter().rev() {
            // One that was replaced meanwhile needs none.
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
            if let Ok(directory) = open_beneath(&self.directory, path.as_slice(), flags) {
                let _ = fs::futimens(&directory, &times(*mtime));
            }
        }
    }
}

fn unfit(entry: &Entry, problem: &'static str) -> CopyError {
    CopyError::Entry { name: shown(&entry.name), problem }
}

fn times(mtime: u64) -> Timestamps {
    let time = Timespec { tv_sec: i64::try_from(mtime).unwrap_or(i64::MAX), tv_nsec: 0 };
    Timestamps { last_access: time, last_modification: time }
}

fn ids(entry: &Entry) -> Result<(Option<Uid>, Option<Gid>), CopyError> {
    let id = |number: u64| u32::try_from(number).ok().filter(|id| *id != u32::MAX);
    match (id(entry.uid), id(entry.gid)) {
        (Some(uid), Some(gid)) => Ok((Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))),
        _ => Err(unfit(entry, "has an owner that is out of range")),
    }
}

/// Gives an open file owner and mode; the mode last, since the other takes set-user-id bits away.
fn own(file: BorrowedFd<'_>, entry: &Entry) -> Result<(), CopyError> {
    let (uid, gid) = ids(entry)?;
    fs::fchown(file, uid, gid).of_entry("set the owner of", &entry.name)?;
    fs::fchmod(file, Mode::from_raw_mode(entry.mode & 0o7777)).of_entry("set the mode of", &entry.name)
}

/// Makes room for what is no directory.
fn remove(parent: &OwnedFd, name: &[u8], entry: &Entry) -> Result<(), CopyError> {
    match fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR) => Err(unfit(entry, "would replace a directory")),
        Err(error) => Err(error).of_entry("replace", &entry.name),
    }
}

/// Makes a new file. One that something is mounted on stays, and is written anew: /etc/hosts is such a file.
fn create(parent: &OwnedFd, name: &[u8], entry: &Entry) -> Result<OwnedFd, CopyError> {
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    match fs::unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::BUSY) => {
            let file = fs::openat(parent, name, flags, Mode::empty()).of_entry("open", &entry.name)?;
            let status = fs::fstat(&file).of_entry("look at", &entry.name)?;
            if !FileType::from_raw_mode(status.st_mode).is_file() {
                return Err(unfit(entry, "would replace what is mounted"));
            }
            fs::ftruncate(&file, 0).of_entry("empty", &entry.name)?;
            return Ok(file);
        }
        Err(Errno::ISDIR) => return Err(unfit(entry, "would replace a directory")),
        Ok(()) | Err(Errno::NOENT) => {}
        result => result.of_entry("replace", &entry.name)?,
    }
    let flags = flags | OFlags::CREATE | OFlags::EXCL;
    fs::openat(parent, name, flags, Mode::from_raw_mode(0o600)).of_entry("make", &entry.name)
}

fn add_symlink(parent: &OwnedFd, name: &[u8], entry: &Entry) -> Result<(), CopyError> {
    remove(parent, name, entry)?;
    fs::symlinkat(entry.link.as_slice(), parent, name).of_entry("make the link", &entry.name)?;
    let (uid, gid) = ids(entry)?;
    let link = open_made(parent, name, entry, FileType::Symlink)?;
    fs::chownat(&link, "", uid, gid, AtFlags::EMPTY_PATH).of_entry("set the owner of", &entry.name)?;
    // Without consequence even if it is another's by now.
    let _ = fs::utimensat(parent, name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW);
    Ok(())
}

fn add_node(parent: &OwnedFd, name: &[u8], entry: &Entry, kind: FileType) -> Result<(), CopyError> {
    remove(parent, name, entry)?;
    let device = fs::makedev(entry.device.0, entry.device.1);
    let mode = Mode::from_raw_mode(entry.mode & 0o7777);
    fs::mknodat(parent, name, kind, mode, device).of_entry("make", &entry.name)?;
    let (uid, gid) = ids(entry)?;
    let node = open_made(parent, name, entry, kind)?;
    fs::chownat(&node, "", uid, gid, AtFlags::EMPTY_PATH).of_entry("set the owner of", &entry.name)?;
    let _ = fs::utimensat(parent, name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW);
    Ok(())
}

/// Refers to what was just made. Who may write to the directory may have put another file in its place: one that has other
/// names too, or belongs to someone already, is not it.
fn open_made(parent: &OwnedFd, name: &[u8], entry: &Entry, kind: FileType) -> Result<OwnedFd, CopyError> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = fs::openat(parent, name, flags, Mode::empty()).of_entry("open", &entry.name)?;
    let status = fs::fstat(&made).of_entry("look at", &entry.name)?;
    if FileType::from_raw_mode(status.st_mode) != kind || status.st_nlink != 1 || status.st_uid != 0 {
        return Err(unfit(entry, "was replaced while it was made"));
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_goes_up_is_none() {
        assert_eq!(components(b"/a//./b/"), Some(vec![&b"a"[..], b"b"]));
        assert_eq!(components(b"./"), Some(Vec::new()));
        assert_eq!(components(b"a/../b"), None);
        assert_eq!(components(b"..a/b.."), Some(vec![&b"..a"[..], b"b.."]));
    }
}
