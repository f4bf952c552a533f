//! A tree here, packed for a container.
//!
//! It may change meanwhile, by somebody else's hand: what the user named is opened once, and everything in it is found by the
//! kernel below that and through no symbolic link (`openat2`). What is packed is what was opened, whatever has its name by
//! then.

use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, Seek as _, Write};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use api::client::Pieces;
use bytes::Bytes;
use hyper::body::Frame;
use rustix::fs::{CWD, Dir, Mode, OFlags, ResolveFlags, major, minor, openat, openat2, readlinkat};
use rustix::io::Errno;
use tar::{Builder, Header};

use super::Skipped;

/// Bytes sent at once.
const PIECE: usize = 64 << 10;

/// What is to be packed.
#[derive(Debug)]
pub struct Source {
    /// Where it is, for who is told of it.
    path: PathBuf,
    /// What stands for it, as [`Source::open`] gives it.
    file: File,
    /// What it is called; `.` where a directory's contents are meant.
    pub name: PathBuf,
    /// Whether it is a directory.
    pub is_directory: bool,
}

impl Source {
    /// Finds what is at a path, as docker reads it: with `/.` at its end a directory's contents are meant. A symbolic link
    /// is itself, or with `follow` what it leads to, under its own name.
    ///
    /// # Errors
    /// There is nothing to be read.
    pub fn find(path: &Path, follow: bool) -> anyhow::Result<Self> {
        let cannot = || format!("cannot read {}", path.display());
        let text = path.as_os_str().as_encoded_bytes();
        let contents = text == b"." || text.ends_with(b"/.");
        let real = fs::canonicalize(path);
        // The root has no name.
        let name = match path.file_name().or_else(|| real.as_ref().ok()?.file_name()) {
            Some(name) if !contents => name.into(),
            _ => PathBuf::from("."),
        };
        let end = if follow { OFlags::empty() } else { OFlags::NOFOLLOW };
        let file = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC | end, Mode::empty());
        let file = File::from(file.with_context(cannot)?);
        let is_directory = file.metadata().with_context(cannot)?.is_dir();
        Ok(Self { path: path.to_owned(), file, name, is_directory })
    }

    /// Opens what is at a path in it, itself where that is empty: a descriptor that stands for it, a symbolic link included,
    /// and cannot be read.
    fn open(&self, path: &Path) -> io::Result<File> {
        if path.as_os_str().is_empty() {
            return self.file.try_clone();
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let bounds = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        Ok(openat2(&self.file, path, flags, Mode::empty(), bounds)?.into())
    }
}

/// Packs a tree under another name and sends it.
///
/// # Errors
/// What cannot be read, or the broken pipe of an archive that nobody takes any more.
pub fn pack(source: &Source, name: &Path, to: Sent) -> anyhow::Result<()> {
    let mut archive = Builder::new(to);
    let packed = tree(&mut archive, source, name).and_then(|()| Ok(archive.finish()?));
    // The other side must not take what came so far for all of it, although a builder that is dropped ends its archive.
    packed.inspect_err(|error| archive.get_mut().fail(error))
}

/// Sends an archive that someone else packed.
///
/// # Errors
/// As [`pack`].
pub fn pass(mut input: impl io::Read, mut to: Sent) -> anyhow::Result<()> {
    match io::copy(&mut input, &mut to) {
        Ok(_) => Ok(()),
        Err(error) => {
            let error = error.into();
            to.fail(&error);
            Err(error)
        }
    }
}

fn tree<W: Write>(archive: &mut Builder<W>, source: &Source, name: &Path) -> anyhow::Result<()> {
    let mut skipped = Skipped::default();
    let mut left = vec![(PathBuf::new(), name.to_owned())];
    while let Some((path, name)) = left.pop() {
        let shown = || source.path.join(&path);
        let file = source.open(&path).with_context(|| format!("cannot read {}", shown().display()))?;
        let metadata = file.metadata().with_context(|| format!("cannot read {}", shown().display()))?;
        if metadata.file_type().is_socket() {
            skipped.add(&shown().to_string_lossy());
            continue;
        }
        add(archive, &file, &name, &metadata).with_context(|| format!("cannot pack {}", shown().display()))?;
        if metadata.is_dir() {
            let names = list(&file).with_context(|| format!("cannot list {}", shown().display()))?;
            left.extend(names.into_iter().map(|file| (path.join(&file), name.join(&file))));
        }
    }
    skipped.tell();
    Ok(())
}

/// The names in a directory.
fn list(directory: &File) -> Result<Vec<PathBuf>, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut names = Vec::new();
    for entry in Dir::new(openat(directory, ".", flags, Mode::empty())?)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(OsStr::from_bytes(entry.file_name().to_bytes()).into());
        }
    }
    Ok(names)
}

fn add<W: Write>(archive: &mut Builder<W>, file: &File, name: &Path, metadata: &Metadata) -> anyhow::Result<()> {
    let mut header = Header::new_gnu();
    if metadata.is_file() {
        // What was looked at, by its descriptor: a regular file, which nobody waits for.
        let mut file = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        let metadata = file.metadata()?;
        header.set_metadata(&metadata);
        header.set_size(metadata.len());
        archive.append_data(&mut header, name, io::Read::take(&mut file, metadata.len()))?;
        if file.stream_position()? < metadata.len() {
            bail!("it became shorter meanwhile");
        }
        return Ok(());
    }
    header.set_metadata(metadata);
    header.set_size(0);
    if metadata.is_symlink() {
        let target = readlinkat(file, c"", Vec::new())?;
        return Ok(archive.append_link(&mut header, name, OsStr::from_bytes(target.to_bytes()))?);
    }
    header.set_device_major(major(metadata.rdev()))?;
    header.set_device_minor(minor(metadata.rdev()))?;
    Ok(archive.append_data(&mut header, name, io::empty())?)
}

/// An archive that is sent; `None` when it broke off.
#[derive(Debug)]
pub struct Sent(Option<Pieces>);

impl Sent {
    /// To a queue.
    pub fn new(pieces: Pieces) -> Self {
        Self(Some(pieces))
    }

    /// Tells that there will be no whole archive.
    fn fail(&mut self, error: &anyhow::Error) {
        if let Some(pieces) = self.0.take() {
            _ = pieces.blocking_send(Err(io::Error::other(error.to_string())));
        }
    }
}

impl Write for Sent {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(PIECE)];
        let pieces = self.0.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        let sent = pieces.blocking_send(Ok(Frame::data(Bytes::copy_from_slice(piece))));
        sent.map(|()| piece.len()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;
    use std::sync::atomic::{AtomicBool, Ordering};

    use api::client::Client;
    use tar::{Archive, EntryType};

    use super::*;

    #[test]
    fn a_source_is_called_as_docker_calls_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = |text: &str| PathBuf::from(format!("{}/{text}", folder.path().display()));
        fs::create_dir_all(path("tree/deep")).unwrap();
        symlink("tree", path("link")).unwrap();
        let named = |text: &str, follow| {
            let source = Source::find(&path(text), follow).unwrap();
            (source.name.to_str().unwrap().to_owned(), source.is_directory)
        };
        for (text, follow, name, is_directory) in [
            ("tree", false, "tree", true),
            ("tree/", false, "tree", true),
            ("tree/.", false, ".", true),
            ("tree/deep/..", false, "tree", true),
            ("link", false, "link", false),
            ("link", true, "link", true),
            ("link/.", false, ".", true),
        ] {
            assert_eq!(named(text, follow), (name.to_owned(), is_directory), "{text}");
        }
        assert_eq!(Source::find(Path::new("/"), false).unwrap().name, Path::new("."));
        assert_eq!(Source::find(Path::new("."), false).unwrap().name, Path::new("."));
        assert!(Source::find(&path("nothing"), true).is_err());
    }

    #[test]
    fn a_tree_is_packed_with_all_that_an_archive_has() {
        let folder = tempfile::tempdir().unwrap();
        let tree_path = folder.path().join("tree");
        fs::create_dir_all(tree_path.join("deep")).unwrap();
        let sparse = File::create(tree_path.join("sparse")).unwrap();
        sparse.set_len(8 << 20).unwrap();
        symlink("deep", tree_path.join("link")).unwrap();
        rustix::fs::mkfifoat(CWD, tree_path.join("fifo"), Mode::RUSR).unwrap();
        let _socket = UnixListener::bind(tree_path.join("socket")).unwrap();
        for (name, prefix) in [("new", "new/"), (".", "")] {
            let mut archive = Builder::new(Vec::new());
            let source = Source::find(&tree_path.join("."), false).unwrap();
            tree(&mut archive, &source, Path::new(name)).unwrap();
            let bytes = archive.into_inner().unwrap();
            let mut archive = Archive::new(&*bytes);
            let entries = archive.entries().unwrap().map(|entry| {
                let entry = entry.unwrap();
                (entry.path().unwrap().to_str().unwrap().to_owned(), (entry.header().entry_type(), entry.size()))
            });
            let expected = [
                (name.to_owned(), (EntryType::Directory, 0)),
                (format!("{prefix}deep"), (EntryType::Directory, 0)),
                (format!("{prefix}fifo"), (EntryType::Fifo, 0)),
                (format!("{prefix}link"), (EntryType::Symlink, 0)),
                // Not stored with holes, which the other side does not read.
                (format!("{prefix}sparse"), (EntryType::Regular, 8 << 20)),
            ];
            assert_eq!(entries.collect::<BTreeMap<_, _>>(), BTreeMap::from(expected));
        }
    }

    #[test]
    fn an_archive_that_breaks_off_does_not_end_as_a_whole_one() {
        let (pieces, mut receiver) = Client::pieces();
        // No archive has an absolute name.
        let source = Source::find(Path::new("/dev/null"), false).unwrap();
        let packing = std::thread::spawn(move || pack(&source, Path::new("/x"), Sent::new(pieces)));
        assert!(receiver.blocking_recv().unwrap().is_err());
        assert!(receiver.blocking_recv().is_none());
        assert!(packing.join().unwrap().is_err());
    }

    #[test]
    fn nothing_is_packed_from_elsewhere_while_a_tree_changes() {
        let folder = tempfile::tempdir().unwrap();
        let path = |text: &str| folder.path().join(text);
        for (file, text) in [("elsewhere/file", "secret"), ("tree/inner/file", "own")] {
            fs::create_dir_all(path(file).parent().unwrap()).unwrap();
            fs::write(path(file), text).unwrap();
        }
        symlink("../elsewhere", path("tree/other")).unwrap();
        let (done, mut leaked) = (AtomicBool::new(false), false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let (one, other) = (path("tree/inner"), path("tree/other"));
                    let flags = rustix::fs::RenameFlags::EXCHANGE;
                    rustix::fs::renameat_with(CWD, one, CWD, other, flags).unwrap();
                }
            });
            leaked = (0..1000).any(|_| {
                let mut archive = Builder::new(Vec::new());
                let source = Source::find(&path("tree"), false).unwrap();
                // It may break off, when what was a directory is a link.
                _ = tree(&mut archive, &source, Path::new("x"));
                let bytes = archive.into_inner().unwrap();
                bytes.windows(6).any(|bytes| bytes == b"secret")
            });
            done.store(true, Ordering::Relaxed);
        });
        assert!(!leaked);
    }

    #[test]
    fn a_directory_that_became_a_link_leads_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        let path = |text: &str| folder.path().join(text);
        fs::create_dir_all(path("tree")).unwrap();
        fs::write(path("secret"), "").unwrap();
        symlink("..", path("tree/deep")).unwrap();
        let source = Source::find(&path("tree"), false).unwrap();
        assert!(source.open(Path::new("deep")).unwrap().metadata().unwrap().is_symlink());
        for leads_out in ["deep/secret", "../secret", "/etc/passwd"] {
            assert!(source.open(Path::new(leads_out)).is_err(), "{leads_out}");
        }
        // What was opened stays what is packed, whatever has its name now.
        fs::rename(path("tree"), path("moved")).unwrap();
        symlink("/", path("tree")).unwrap();
        assert_eq!(list(&source.open(Path::new("")).unwrap()).unwrap(), [PathBuf::from("deep")]);
    }
}
