//! An archive of a container, unpacked here.
//!
//! The guest made it and is not believed: every name is below the one that the user gave, every path is resolved by the
//! kernel below one directory and through no symbolic link (`openat2`), and what is made are files, directories, links and
//! FIFOs, the caller's own and without set-id bits.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use rustix::fs::{self, AtFlags, Mode, OFlags, ResolveFlags, Timespec, Timestamps};
use rustix::io::Errno;
use tar::EntryType;

use super::Skipped;
use super::archive::{self, Entry};

/// Bytes written at once.
const PIECE: usize = 64 << 10;
/// What the owner needs to fill a directory.
const OWNER_ALL: u32 = 0o700;
/// The bits of a mode that are kept.
const PERMISSIONS: u32 = 0o777;

/// What the names in an archive become here.
#[derive(Debug)]
pub struct Names {
    /// The component that all begin with.
    pub from: String,
    /// What it becomes; `None` of a directory whose contents are copied into one that is there.
    pub to: Option<OsString>,
}

impl Names {
    /// The path here, relative and without anything but names in it; `None` of a name that has no business in the archive.
    fn here(&self, name: &[u8]) -> Option<PathBuf> {
        let rest = name.strip_prefix(self.from.as_bytes())?;
        if !matches!(rest, [] | [b'/', ..]) {
            return None;
        }
        let mut path: PathBuf = self.to.iter().collect();
        for component in rest.split(|byte| *byte == b'/') {
            match component {
                b"" | b"." => {}
                b".." => return None,
                name => path.push(OsStr::from_bytes(name)),
            }
        }
        Some(path)
    }
}

/// Unpacks an archive into a directory.
///
/// # Errors
/// The archive is not whole, or the entry that cannot or must not be unpacked.
pub fn unpack(input: impl Read, folder: OwnedFd, names: Names) -> anyhow::Result<()> {
    let mut target =
        Target { folder, names, entered: Vec::new(), entries: 0, skipped: Skipped::default(), buffer: vec![0; PIECE] };
    archive::read(input, |entry, data| target.add(entry, data))?;
    if target.entries == 0 {
        bail!("nothing was copied: it is a socket, or was removed meanwhile");
    }
    target.leave(|_| true)?;
    target.skipped.tell();
    Ok(())
}

/// A directory that is being filled, and what it is to have in the end: a mode may forbid to fill it, and to do so sets
/// its time.
#[derive(Debug)]
struct Directory {
    path: PathBuf,
    mode: Mode,
    mtime: u64,
}

#[derive(Debug)]
struct Target {
    folder: OwnedFd,
    names: Names,
    /// The directories that lead to the entry at hand, as far as they came in the archive.
    entered: Vec<Directory>,
    /// How many entries there were.
    entries: usize,
    skipped: Skipped,
    buffer: Vec<u8>,
}

impl Target {
    fn add(&mut self, entry: &Entry, data: &mut dyn Read) -> anyhow::Result<()> {
        let shown = String::from_utf8_lossy(&entry.name).into_owned();
        let Some(path) = self.names.here(&entry.name) else {
            bail!("the archive has an entry that leads elsewhere: {shown}");
        };
        self.entries += 1;
        self.leave(|directory| path == directory || !path.starts_with(directory))?;
        let Some(name) = path.file_name() else {
            // A directory that is there stays as it is.
            return if entry.kind.is_dir() { Ok(()) } else { bail!("{shown} is no directory") };
        };
        let cannot = || format!("cannot write {}", path.display());
        let parent = self.open(path.parent().unwrap_or(Path::new("")), OFlags::PATH).with_context(cannot)?;
        match entry.kind {
            EntryType::Directory => {
                self.add_directory(&parent, name, entry).with_context(cannot)?;
                self.entered.push(Directory { mode: permissions(entry), mtime: entry.mtime, path });
            }
            EntryType::Regular | EntryType::Continuous => {
                remove(&parent, name).with_context(cannot)?;
                self.add_file(&parent, name, entry, data)?;
            }
            EntryType::Symlink => {
                remove(&parent, name).with_context(cannot)?;
                fs::symlinkat(OsStr::from_bytes(&entry.link), &parent, name).with_context(cannot)?;
                fs::utimensat(&parent, name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW).with_context(cannot)?;
            }
            EntryType::Link => self.add_link(&parent, name, &path, entry).with_context(cannot)?,
            EntryType::Fifo => {
                remove(&parent, name).with_context(cannot)?;
                fs::mkfifoat(&parent, name, permissions(entry)).with_context(cannot)?;
                fs::utimensat(&parent, name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW).with_context(cannot)?;
            }
            EntryType::Char | EntryType::Block => self.skipped.add(&shown),
            other => bail!("{shown} is of an unknown kind ({other:?})"),
        }
        Ok(())
    }

    /// Opens a directory below the folder. No link leads to it: the archive's would lead where the guest likes, and ours
    /// are not the guest's to know.
    fn open(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let flags = flags | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let bounds = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        fs::openat2(&self.folder, path, flags, Mode::empty(), bounds)
    }

    fn add_directory(&self, parent: &OwnedFd, name: &OsStr, entry: &Entry) -> anyhow::Result<()> {
        match fs::mkdirat(parent, name, Mode::from_raw_mode(OWNER_ALL)) {
            Ok(()) | Err(Errno::EXIST) => {}
            result => result?,
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = match fs::openat(parent, name, flags, Mode::empty()) {
            Err(Errno::NOTDIR | Errno::LOOP) => bail!("a directory would replace what is none"),
            result => result?,
        };
        Ok(fs::fchmod(directory, permissions(entry) | Mode::from_raw_mode(OWNER_ALL))?)
    }

    fn add_file(&mut self, parent: &OwnedFd, name: &OsStr, entry: &Entry, data: &mut dyn Read) -> anyhow::Result<()> {
        let cannot = || format!("cannot write {}", name.display());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR).with_context(cannot)?;
        let mut file = File::from(file);
        loop {
            let count = data.read(&mut self.buffer)?;
            if count == 0 {
                break;
            }
            file.write_all(&self.buffer[..count]).with_context(cannot)?;
        }
        fs::fchmod(&file, permissions(entry)).with_context(cannot)?;
        fs::futimens(&file, &times(entry.mtime)).with_context(cannot)
    }

    /// Makes another name for a file that came before.
    fn add_link(&self, parent: &OwnedFd, name: &OsStr, path: &Path, entry: &Entry) -> anyhow::Result<()> {
        let to = self.names.here(&entry.link);
        let Some((to, to_name)) = to.as_deref().and_then(|to| Some((to, to.file_name()?))) else {
            bail!("it is a link that leads elsewhere: {}", OsString::from_vec(entry.link.clone()).display());
        };
        if to == path {
            return Ok(());
        }
        let to = self.open(to.parent().unwrap_or(Path::new("")), OFlags::PATH)?;
        remove(parent, name)?;
        Ok(fs::linkat(to, to_name, parent, name, AtFlags::empty())?)
    }

    /// Gives the directories that are left their modes and times, the inner ones first.
    fn leave(&mut self, left: impl Fn(&Path) -> bool) -> anyhow::Result<()> {
        while let Some(directory) = self.entered.pop_if(|directory| left(&directory.path)) {
            let cannot = || format!("cannot set the mode of {}", directory.path.display());
            let opened = self.open(&directory.path, OFlags::RDONLY).with_context(cannot)?;
            fs::fchmod(&opened, directory.mode).with_context(cannot)?;
            fs::futimens(&opened, &times(directory.mtime)).with_context(cannot)?;
        }
        Ok(())
    }
}

/// Makes room for what is no directory.
fn remove(parent: &OwnedFd, name: &OsStr) -> anyhow::Result<()> {
    match fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR) => bail!("it would replace a directory"),
        Err(error) => Err(error.into()),
    }
}

fn permissions(entry: &Entry) -> Mode {
    Mode::from_raw_mode(entry.mode & PERMISSIONS)
}

fn times(mtime: u64) -> Timestamps {
    let time = Timespec { tv_sec: mtime.try_into().unwrap_or(i64::MAX), tv_nsec: 0 };
    Timestamps { last_access: time, last_modification: time }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, symlink};

    use tar::Header;
    use tempfile::TempDir;

    use super::*;

    const FILE: EntryType = EntryType::Regular;
    const FOLDER: EntryType = EntryType::Directory;
    const SYMLINK: EntryType = EntryType::Symlink;
    const HARD: EntryType = EntryType::Link;

    /// An archive of entries: name, type, mode, link or content.
    fn archive(entries: &[(&str, EntryType, u32, &str)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (name, kind, mode, text) in entries {
            let content = if kind.is_file() { text } else { "" };
            let mut header = Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(*mode);
            header.set_mtime(1_000_000_000);
            header.set_size(content.len() as u64);
            let old = header.as_old_mut();
            old.name[..name.len()].copy_from_slice(name.as_bytes());
            if !kind.is_file() {
                old.linkname[..text.len()].copy_from_slice(text.as_bytes());
            }
            header.set_cksum();
            bytes.extend_from_slice(header.as_bytes());
            bytes.extend_from_slice(content.as_bytes());
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
        bytes.resize(bytes.len() + 1024, 0);
        bytes
    }

    /// A folder `inside` another, which has to stay as it is.
    struct Sandbox(TempDir);

    impl Sandbox {
        fn new() -> Self {
            let sandbox = Self(tempfile::tempdir().unwrap());
            fs::create_dir(sandbox.inside("")).unwrap();
            fs::write(sandbox.0.path().join("outside"), "untouched").unwrap();
            sandbox
        }

        fn inside(&self, path: &str) -> PathBuf {
            self.0.path().join("inside").join(path)
        }

        fn unpack(&self, from: &str, to: Option<&str>, entries: &[(&str, EntryType, u32, &str)]) -> anyhow::Result<()> {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let folder = rustix::fs::open(self.inside(""), flags, Mode::empty()).unwrap();
            let names = Names { from: from.into(), to: to.map(Into::into) };
            let result = unpack(&*archive(entries), folder, names);
            assert_eq!(fs::read_dir(self.0.path()).unwrap().count(), 2);
            let outside = self.0.path().join("outside");
            assert_eq!(fs::read_to_string(&outside).unwrap(), "untouched");
            assert_eq!(fs::metadata(outside).unwrap().nlink(), 1);
            result
        }

        fn names(&self) -> Vec<String> {
            let names = fs::read_dir(self.inside("")).unwrap().map(|entry| entry.unwrap().file_name());
            let mut names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
            names.sort();
            names
        }
    }

    #[test]
    fn names_are_replaced_at_their_beginning() {
        let here = |name: &str, from: &str, to: Option<&str>| {
            let names = Names { from: from.into(), to: to.map(Into::into) };
            names.here(name.as_bytes()).map(|path| path.to_str().unwrap().to_owned())
        };
        for (name, from, to, path) in [
            ("a", "a", Some("b"), Some("b")),
            ("a/", "a", Some("b"), Some("b")),
            ("a/x//./y", "a", Some("b"), Some("b/x/y")),
            ("./", ".", None, Some("")),
            ("./bin/sh", ".", None, Some("bin/sh")),
            ("./bin/sh", ".", Some("new"), Some("new/bin/sh")),
            ("ab", "a", Some("b"), None),
            ("c", "a", Some("b"), None),
            ("/a", "a", Some("b"), None),
            ("/etc/passwd", ".", None, None),
            ("..", ".", None, None),
            (".ssh/authorized_keys", ".", None, None),
            ("a/../x", "a", Some("b"), None),
            ("a/x/..", "a", Some("b"), None),
        ] {
            assert_eq!(here(name, from, to).as_deref(), path, "{name} {from} {to:?}");
        }
    }

    #[test]
    fn nothing_is_unpacked_elsewhere() {
        let cases: [&[(&str, EntryType, u32, &str)]; 14] = [
            // Not what was asked for.
            &[(".ssh/authorized_keys", FILE, 0o644, "x")],
            &[("b", FILE, 0o644, "x")],
            &[("/a", FILE, 0o644, "x")],
            &[("a/../../outside", FILE, 0o644, "x")],
            // Through links that come along.
            &[("a", SYMLINK, 0o777, "."), ("a/.bashrc", FILE, 0o644, "x")],
            &[("a", SYMLINK, 0o777, ".."), ("a/outside", FILE, 0o644, "x")],
            &[("a", FOLDER, 0o755, ""), ("a/l", SYMLINK, 0o777, "../.."), ("a/l/outside", FILE, 0o644, "x")],
            &[("a", FOLDER, 0o755, ""), ("a/l", SYMLINK, 0o777, "."), ("a/l/x", FILE, 0o644, "x")],
            &[("a", FOLDER, 0o755, ""), ("a/l", SYMLINK, 0o777, ".."), ("a/l", FOLDER, 0o755, "")],
            // Below what is no directory.
            &[("a", FILE, 0o644, "x"), ("a/b", FILE, 0o644, "x")],
            // Other names of files elsewhere.
            &[("a", HARD, 0o644, "../outside")],
            &[("a", FOLDER, 0o755, ""), ("a/x", HARD, 0o644, "outside")],
            &[("a", FOLDER, 0o755, ""), ("a/l", SYMLINK, 0o777, "../.."), ("a/x", HARD, 0o644, "a/l/outside")],
            &[("a", EntryType::GNUSparse, 0o644, "")],
        ];
        for entries in cases {
            let sandbox = Sandbox::new();
            let error = sandbox.unpack("a", Some("a"), entries).unwrap_err();
            assert!(sandbox.names().iter().all(|name| name == "a"), "{entries:?}: {error:#}");
        }
    }

    #[test]
    fn a_hard_link_to_a_link_is_the_link() {
        let sandbox = Sandbox::new();
        let entries = [("a", FOLDER, 0o755, ""), ("a/l", SYMLINK, 0o777, "../../outside"), ("a/x", HARD, 0o644, "a/l")];
        sandbox.unpack("a", Some("a"), &entries).unwrap();
        assert!(sandbox.inside("a/x").is_symlink());
        // A file in its place replaces it.
        sandbox.unpack("a", Some("a"), &[("a", FOLDER, 0o755, ""), ("a/x", FILE, 0o600, "x")]).unwrap();
        assert_eq!(fs::read_to_string(sandbox.inside("a/x")).unwrap(), "x");
    }

    #[test]
    fn what_is_there_is_no_way_out() {
        let sandbox = Sandbox::new();
        symlink("..", sandbox.inside("l")).unwrap();
        symlink("../outside", sandbox.inside("f")).unwrap();
        let error = sandbox.unpack("l", Some("l"), &[("l", FOLDER, 0o755, "")]).unwrap_err();
        assert_eq!(format!("{error:#}"), "cannot write l: a directory would replace what is none");
        assert!(sandbox.unpack(".", None, &[("./l/outside", FILE, 0o644, "x")]).is_err());
        sandbox.unpack("f", Some("f"), &[("f", FILE, 0o644, "x")]).unwrap();
        assert!(!sandbox.inside("f").is_symlink());
        let error = sandbox.unpack("f", Some("f"), &[("f", FOLDER, 0o755, "")]).unwrap_err();
        assert_eq!(format!("{error:#}"), "cannot write f: a directory would replace what is none");
        fs::create_dir(sandbox.inside("d")).unwrap();
        let error = sandbox.unpack("d", Some("d"), &[("d", FILE, 0o644, "x")]).unwrap_err();
        assert_eq!(format!("{error:#}"), "cannot write d: it would replace a directory");
    }

    #[test]
    fn a_tree_is_unpacked_more_than_once() {
        let sandbox = Sandbox::new();
        let entries = [
            ("./", FOLDER, 0o700, ""),
            ("./closed/", FOLDER, 0o2555, ""),
            ("./closed/sub/", FOLDER, 0o555, ""),
            ("./closed/sub/file", FILE, 0o4755, "content"),
            ("./closed/hard", HARD, 0o755, "./closed/sub/file"),
            ("./fifo", EntryType::Fifo, 0o600, ""),
            ("./null", EntryType::Char, 0o666, ""),
            ("./disk", EntryType::Block, 0o666, ""),
            ("./link", SYMLINK, 0o777, "closed/sub/file"),
        ];
        let before = fs::metadata(sandbox.inside("")).unwrap().mode();
        for _ in 0..2 {
            sandbox.unpack(".", None, &entries).unwrap();
            // Devices are left out.
            assert_eq!(sandbox.names(), ["closed", "fifo", "link"]);
        }
        assert_eq!(fs::read_to_string(sandbox.inside("link")).unwrap(), "content");
        assert!(fs::metadata(sandbox.inside("fifo")).unwrap().file_type().is_fifo());
        let status = |path: &str| fs::metadata(sandbox.inside(path)).unwrap();
        assert_eq!(status("closed/hard").ino(), status("closed/sub/file").ino());
        for (path, mode) in [("closed", 0o555), ("closed/sub", 0o555), ("closed/sub/file", 0o755)] {
            assert_eq!((status(path).mode() & 0o7777, status(path).mtime()), (mode, 1_000_000_000), "{path}");
        }
        assert_eq!(status("").mode(), before);
    }

    #[test]
    fn nothing_is_not_taken_for_a_copy() {
        assert!(Sandbox::new().unpack("a", Some("a"), &[]).is_err());
    }
}
