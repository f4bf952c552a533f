//! `cp`: files between a container and here, as a tar archive each way.
//!
//! What comes out of a container is untrusted: it is unpacked below one directory, by a reader that neither leaves it nor
//! makes anything but files, directories and links.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::mpsc as sync;
use std::thread;

use anyhow::{Context as _, bail};
use api::client::{Client, Pieces};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::Response;
use hyper::body::{Frame, Incoming};
use runtime::control::Control;
use runtime::state::RunRoot;
use serde::Deserialize;
use tar::{Archive, Builder, EntryType};

use crate::args::Cp;

/// The header that says what is at a path.
const STAT: &str = "cofferdam-path-stat";
/// Bytes moved at once.
const PIECE: usize = 64 << 10;
/// Pieces on their way to whoever unpacks them.
const QUEUE: usize = 4;
/// The file type in a mode, and the one of a directory (inode(7)).
const FILE_TYPE: u32 = 0o170_000;
const DIRECTORY: u32 = 0o040_000;

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side {
    Container(String, String),
    Here(PathBuf),
    Stream,
}

impl Side {
    /// As docker reads it: what begins with `/` or `.` is a path here, whatever colons it has.
    fn parse(text: &str) -> Self {
        match text.split_once(':') {
            _ if text == "-" => Self::Stream,
            Some((container, path)) if !container.is_empty() && !text.starts_with(['/', '.']) => {
                let slash = if path.starts_with('/') { "" } else { "/" };
                Self::Container(container.to_owned(), format!("{slash}{path}"))
            }
            _ => Self::Here(text.into()),
        }
    }
}

/// What is at a path of a container.
#[derive(Debug, Deserialize)]
struct PathStat {
    name: String,
    mode: u32,
}

impl PathStat {
    fn is_directory(&self) -> bool {
        self.mode & FILE_TYPE == DIRECTORY
    }
}

/// Copies one way or the other.
pub fn copy(args: &Cp) -> anyhow::Result<u8> {
    let root = RunRoot::open()?;
    let side = |key: &str, path| -> anyhow::Result<Remote> {
        let control = Control::find(&root, key)?;
        let files = format!("{}/files", control.living()?);
        Ok(Remote { client: control.client, files, path })
    };
    let runtime = runtime::run::runtime()?;
    match (Side::parse(&args.source), Side::parse(&args.destination)) {
        (Side::Container(..), Side::Container(..)) => {
            bail!("one side must be here: copy out of one container, then into the other")
        }
        (Side::Container(key, path), to) => runtime.block_on(copy_out(&side(&key, path)?, &to))?,
        (from, Side::Container(key, path)) => runtime.block_on(copy_in(&from, &side(&key, path)?, args.follow_link))?,
        _ => bail!("neither side is CONTAINER:PATH"),
    }
    Ok(0)
}

/// A path of a container.
struct Remote {
    client: Client,
    files: String,
    path: String,
}

impl Remote {
    fn request(&self, path: &str) -> String {
        let mut encoded = String::with_capacity(path.len());
        for byte in path.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' | b'~' => encoded.push(byte.into()),
                _ => encoded.push_str(&format!("%{byte:02X}")),
            }
        }
        format!("{}?path={encoded}", self.files)
    }

    async fn open(&self) -> anyhow::Result<(PathStat, Response<Incoming>)> {
        // A directory's contents are what comes below its own entry.
        let path = self.path.strip_suffix("/.").filter(|path| !path.is_empty()).unwrap_or(&self.path);
        let response = self.client.stream(&self.request(path)).await?;
        let stat = response.headers().get(STAT).context("the VM does not say what is at the path")?;
        Ok((serde_json::from_slice(stat.as_bytes())?, response))
    }
}

async fn copy_out(from: &Remote, to: &Side) -> anyhow::Result<()> {
    let (stat, response) = from.open().await?;
    let contents = from.path.ends_with("/.");
    let mut body = response.into_body();
    let (sender, receiver) = sync::sync_channel::<Bytes>(QUEUE);
    let unpack: Box<dyn FnOnce(Received) -> anyhow::Result<()> + Send> = match to {
        Side::Stream => Box::new(|mut archive| Ok(io::copy(&mut archive, &mut io::stdout().lock()).map(drop)?)),
        Side::Here(path) => {
            let (folder, name) = target(path, &stat, contents)?;
            Box::new(move |archive| unpack(archive, &folder, &name))
        }
        Side::Container(..) => bail!("one side must be here"),
    };
    let unpacking = thread::spawn(move || unpack(Received { from: receiver, piece: Bytes::new() }));
    let mut broken = None;
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => {
                let Ok(data) = frame.into_data() else { continue };
                // Whoever unpacks has given up, and says why.
                if sender.send(data).is_err() {
                    break;
                }
            }
            Err(error) => {
                broken = Some(error);
                break;
            }
        }
    }
    drop(sender);
    let unpacked = unpacking.join().map_err(|_| anyhow::anyhow!("unpacking failed"))?;
    match broken {
        Some(error) => Err(anyhow::Error::from(error).context("the archive broke off")),
        None => unpacked,
    }
}

/// The directory here, and the name in it, of what comes out of a container; no name for the contents of a directory.
fn target(path: &Path, stat: &PathStat, contents: bool) -> anyhow::Result<(PathBuf, PathBuf)> {
    let slash = path.as_os_str().as_encoded_bytes().ends_with(b"/");
    if path.is_dir() {
        let name = if contents { "".into() } else { stat.name.clone().into() };
        return Ok((path.to_owned(), name));
    }
    if path.exists() && stat.is_directory() {
        bail!("{} is no directory, and a directory cannot be copied onto it", path.display());
    }
    if slash && !stat.is_directory() {
        bail!("there is no directory {}", path.display());
    }
    let name = path.file_name().with_context(|| format!("{} names no file", path.display()))?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !parent.is_dir() {
        bail!("there is no directory {}", parent.display());
    }
    Ok((parent.to_owned(), name.into()))
}

/// Unpacks an archive into `folder`, where the first component of its names becomes `name`.
fn unpack(archive: Received, folder: &Path, name: &Path) -> anyhow::Result<()> {
    let (reader, writer) = io::pipe().context("cannot make a pipe")?;
    let name = name.to_owned();
    let renaming = thread::spawn(move || rename(archive, writer, &name));
    let unpacked = unpack_renamed(reader, folder);
    let renamed = renaming.join().map_err(|_| anyhow::anyhow!("reading the archive failed"))?;
    // What cannot be unpacked stops the reading too: the cause comes first.
    unpacked?;
    renamed
}

fn unpack_renamed(reader: io::PipeReader, folder: &Path) -> anyhow::Result<()> {
    let mut archive = Archive::new(reader);
    archive.set_preserve_mtime(true);
    archive.set_overwrite(true);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        match entry.header().entry_type() {
            EntryType::Regular
            | EntryType::Continuous
            | EntryType::Directory
            | EntryType::Symlink
            | EntryType::Link => {}
            other => bail!("{} is no file, directory or link ({other:?}): it cannot be copied here", path.display()),
        }
        let inside =
            entry.unpack_in(folder).with_context(|| format!("cannot write {}", folder.join(&path).display()))?;
        if !inside {
            bail!("the archive has an entry that leads out of the directory: {}", path.display());
        }
    }
    Ok(())
}

/// Copies an archive, with other names.
fn rename(archive: Received, to: io::PipeWriter, name: &Path) -> anyhow::Result<()> {
    let mut archive = Archive::new(archive);
    let mut renamed = Builder::new(to);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = renamed_path(&entry.path()?, name);
        // The contents of a directory: it is there already.
        if path.as_os_str().is_empty() {
            continue;
        }
        let mut header = entry.header().clone();
        let link = entry.link_name()?.map(std::borrow::Cow::into_owned);
        match (header.entry_type(), link) {
            (EntryType::Link, Some(link)) => renamed.append_link(&mut header, &path, renamed_path(&link, name))?,
            (EntryType::Symlink, Some(link)) => renamed.append_link(&mut header, &path, link)?,
            _ => renamed.append_data(&mut header, &path, &mut entry)?,
        }
    }
    Ok(renamed.finish()?)
}

fn renamed_path(path: &Path, name: &Path) -> PathBuf {
    let rest: PathBuf = path.components().filter(|part| *part != Component::CurDir).skip(1).collect();
    if rest.as_os_str().is_empty() { name.to_owned() } else { name.join(rest) }
}

async fn copy_in(from: &Side, to: &Remote, follow: bool) -> anyhow::Result<()> {
    let there = match to.open().await {
        // What comes of the archive is not wanted: the connection goes.
        Ok((stat, _)) => Some(stat),
        Err(_) => None,
    };
    let is_directory = there.as_ref().is_some_and(PathStat::is_directory);
    let (folder, name, source) = match from {
        Side::Stream if is_directory => (to.path.clone(), PathBuf::new(), None),
        Side::Stream => bail!("an archive is copied into a directory, and {} is none", to.path),
        Side::Here(path) => {
            let metadata = if follow { fs::metadata(path) } else { fs::symlink_metadata(path) };
            let metadata = metadata.with_context(|| format!("cannot read {}", path.display()))?;
            let contents = path.as_os_str().as_encoded_bytes().ends_with(b"/.");
            let base = || {
                path.file_name()
                    .map(PathBuf::from)
                    .or_else(|| fs::canonicalize(path).ok()?.file_name().map(PathBuf::from))
            };
            let (folder, name) = if is_directory {
                let name = if contents { PathBuf::from(".") } else { base().context("the source has no name")? };
                (to.path.clone(), name)
            } else {
                if metadata.is_dir() && there.is_some() {
                    bail!("{} is no directory, and a directory cannot be copied onto it", to.path);
                }
                if to.path.ends_with('/') && !metadata.is_dir() {
                    bail!("there is no directory {} in the container", to.path);
                }
                let path = to.path.trim_end_matches('/');
                let (folder, name) = path.rsplit_once('/').context("the path is not absolute")?;
                (if folder.is_empty() { "/".to_owned() } else { folder.to_owned() }, name.into())
            };
            (folder, name, Some((path.clone(), metadata.is_dir())))
        }
        Side::Container(..) => bail!("one side must be here"),
    };
    let (pieces, receiver) = Client::pieces();
    let packing = thread::spawn(move || pack(source, &name, follow, Sent(pieces)));
    let uploaded = to.client.upload(&to.request(&folder), receiver).await;
    let packed = packing.join().map_err(|_| anyhow::anyhow!("packing failed"))?;
    // What the container says comes first: packing ends when it takes no more.
    uploaded?;
    packed
}

fn pack(source: Option<(PathBuf, bool)>, name: &Path, follow: bool, mut to: Sent) -> anyhow::Result<()> {
    let packed = match source {
        None => io::copy(&mut io::stdin().lock(), &mut to).map(drop),
        Some((path, is_directory)) => {
            let mut archive = Builder::new(&mut to);
            archive.follow_symlinks(follow);
            let added = if is_directory {
                archive.append_dir_all(name, &path)
            } else {
                archive.append_path_with_name(&path, name)
            };
            added.and_then(|()| archive.finish())
        }
    };
    if let Err(error) = &packed {
        // The other side must not take what came so far for all of it.
        _ = to.0.blocking_send(Err(io::Error::new(error.kind(), error.to_string())));
    }
    Ok(packed?)
}

/// An archive that is received.
struct Received {
    from: sync::Receiver<Bytes>,
    piece: Bytes,
}

impl Read for Received {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.from.recv() {
                Ok(piece) => self.piece = piece,
                Err(sync::RecvError) => return Ok(0),
            }
        }
        let count = to.len().min(self.piece.len());
        to[..count].copy_from_slice(&self.piece.split_to(count));
        Ok(count)
    }
}

/// An archive that is sent.
struct Sent(Pieces);

impl Write for Sent {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(PIECE)];
        let sent = self.0.blocking_send(Ok(Frame::data(Bytes::copy_from_slice(piece))));
        sent.map(|()| piece.len()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_read_as_docker_reads_them() {
        assert_eq!(Side::parse("web:/etc"), Side::Container("web".into(), "/etc".into()));
        assert_eq!(Side::parse("web:etc"), Side::Container("web".into(), "/etc".into()));
        assert_eq!(Side::parse("./a:b"), Side::Here("./a:b".into()));
        assert_eq!(Side::parse("/a:b"), Side::Here("/a:b".into()));
        assert_eq!(Side::parse("-"), Side::Stream);
    }

    #[test]
    fn names_are_replaced_at_their_beginning() {
        for (path, name, renamed) in
            [("a", "b", "b"), ("a/x/y", "b", "b/x/y"), ("a/x", "", "x"), ("a", "", ""), ("./a/x", "b", "b/x")]
        {
            assert_eq!(renamed_path(Path::new(path), Path::new(name)), Path::new(renamed), "{path} {name}");
        }
    }

    #[test]
    fn nothing_is_unpacked_outside() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("inside");
        fs::create_dir(&inside).unwrap();
        let mut archive = Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(EntryType::Symlink);
        header.set_size(0);
        archive.append_link(&mut header, "a/out", "../..").unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        header.set_mode(0o644);
        archive.append_data(&mut header, "a/out/file", &b"x"[..]).unwrap();
        let bytes = archive.into_inner().unwrap();
        let (sender, receiver) = sync::sync_channel(1);
        sender.send(Bytes::from(bytes)).unwrap();
        drop(sender);
        assert!(unpack(Received { from: receiver, piece: Bytes::new() }, &inside, Path::new("a")).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
