//! `cp`: files between a container and here, as a tar archive each way.
//!
//! What comes out of a container is untrusted: the names here are those that the user gave, see [`unpack`].

mod archive;
mod pack;
mod unpack;

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::{fs, thread};

use anyhow::{Context as _, bail};
use api::client::{Client, ClientError};
use api::server::problem::ProblemKind;
use http_body_util::BodyExt as _;
use hyper::Response;
use hyper::body::Incoming;
use runtime::control::Control;
use runtime::state::RunRoot;
use rustix::fs::{FileType, Mode, OFlags};
use serde::Deserialize;
use tokio::sync::mpsc;

use crate::args::Cp;
use crate::report;
use archive::Received;
use pack::{Sent, Source};
use unpack::Names;

/// The header that says what is at a path.
const STAT: &str = "cofferdam-path-stat";
/// Pieces on their way to whoever unpacks them.
const QUEUE: usize = 4;
/// How many symbolic links a path may lead through: as many as for the kernel.
const LINKS_MAX: usize = 40;

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
    mode: u32,
    link_target: String,
}

impl PathStat {
    fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.mode)
    }
}

/// What was left out of a copy.
#[derive(Debug, Default)]
struct Skipped {
    first: String,
    count: usize,
}

impl Skipped {
    fn add(&mut self, name: &str) {
        if self.count == 0 {
            name.clone_into(&mut self.first);
        }
        self.count += 1;
    }

    fn tell(&self) {
        match self.count {
            0 => {}
            1 => report::warning(&format!("{} is a device or a socket: it was left out", self.first)),
            count => {
                report::warning(&format!(
                    "{} and {} more are devices or sockets: they were left out",
                    self.first,
                    count - 1
                ));
            }
        }
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
        (Side::Container(key, path), to) => runtime.block_on(copy_out(side(&key, path)?, &to, args.follow_link))?,
        (from, Side::Container(key, path)) => runtime.block_on(copy_in(&from, side(&key, path)?, args.follow_link))?,
        _ => bail!("neither side is CONTAINER:PATH"),
    }
    Ok(0)
}

/// A path of a container.
#[derive(Debug, Clone)]
struct Remote {
    client: Client,
    files: String,
    path: String,
}

impl Remote {
    /// The last component of the path, cleaned as docker and the agent do: without regard to symbolic links. `None` where
    /// a directory's contents are meant: `/.` is at its end, or it is the root.
    fn name(&self) -> Option<&str> {
        let mut components = Vec::new();
        for component in self.path.split('/') {
            match component {
                "" | "." => {}
                ".." => drop(components.pop()),
                name => components.push(name),
            }
        }
        components.pop().filter(|_| !self.path.ends_with("/."))
    }

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
        let response = self.client.stream(&self.request(&self.path)).await?;
        let stat = response.headers().get(STAT).context("the VM does not say what is at the path")?;
        Ok((serde_json::from_slice(stat.as_bytes())?, response))
    }

    /// What is at the path; `None` where there is nothing. The archive that comes with it is not wanted: the connection
    /// goes.
    async fn look(&self) -> anyhow::Result<Option<PathStat>> {
        match self.open().await {
            Ok((stat, _)) => Ok(Some(stat)),
            Err(error) => match error.downcast_ref().and_then(ClientError::kind) {
                Some(ProblemKind::InvalidRequest) => Ok(None),
                _ => Err(error),
            },
        }
    }

    /// Replaces a path that ends in a symbolic link by what that leads to, and says what is there.
    async fn follow(&mut self) -> anyhow::Result<Option<PathStat>> {
        for _ in 0..LINKS_MAX {
            let stat = match self.look().await? {
                Some(stat) if stat.kind().is_symlink() => stat,
                other => return Ok(other),
            };
            // To a directory the container's kernel finds the way, whatever the links on it.
            let directory = Self { path: format!("{}/.", self.path), ..self.clone() };
            if let Some(stat) = directory.look().await? {
                *self = directory;
                return Ok(Some(stat));
            }
            self.path = behind(&self.path, &stat.link_target);
        }
        bail!("{} leads through too many symbolic links", self.path)
    }

    /// The directory and the name of what is not a directory yet.
    fn split(&self) -> anyhow::Result<(String, PathBuf)> {
        let (folder, name) = self.path.trim_end_matches('/').rsplit_once('/').context("the path is not absolute")?;
        Ok((if folder.is_empty() { "/".to_owned() } else { folder.to_owned() }, name.into()))
    }
}

/// Where a symbolic link leads.
fn behind(link: &str, target: &str) -> String {
    match link.trim_end_matches('/').rsplit_once('/') {
        Some((folder, _)) if !target.starts_with('/') => format!("{folder}/{target}"),
        _ => target.to_owned(),
    }
}

async fn copy_out(mut from: Remote, to: &Side, follow: bool) -> anyhow::Result<()> {
    let name = from.name().map(OsString::from);
    if follow {
        from.follow().await?;
    }
    let (stat, response) = from.open().await?;
    let archive_name = from.name().unwrap_or(".").to_owned();
    let (sender, receiver) = mpsc::channel(QUEUE);
    let archive = Received::new(receiver);
    let work: Box<dyn FnOnce() -> anyhow::Result<()> + Send> = match to {
        Side::Stream => Box::new(|| archive::pass(archive, io::stdout().lock())),
        Side::Here(path) => {
            let kind = stat.kind();
            if !(kind.is_dir() || kind.is_file() || kind.is_symlink() || kind.is_fifo()) {
                bail!("{} is a device or a socket: it cannot be copied here", from.path);
            }
            let (folder, to) = target(path, name, kind.is_dir())?;
            Box::new(move || unpack::unpack(archive, folder, Names { from: archive_name, to }))
        }
        Side::Container(..) => bail!("one side must be here"),
    };
    let mut body = response.into_body();
    tokio::spawn(async move {
        while let Some(frame) = body.frame().await {
            let piece = match frame.map(hyper::body::Frame::into_data) {
                Ok(Ok(data)) => Ok(data),
                // No data: trailers.
                Ok(Err(_)) => continue,
                Err(error) => Err(io::Error::other(format!("the archive broke off: {error}"))),
            };
            // Whoever unpacks is done, or has given up and says why.
            if sender.send(piece).await.is_err() {
                break;
            }
        }
    });
    tokio::task::spawn_blocking(work).await.context("unpacking failed")?
}

/// The directory here and the name in it of what comes out of a container, as docker finds them; no name for contents that
/// go into a directory that is there. Unlike docker's, a symbolic link to anything but a directory is replaced and not
/// written through: it may be what an earlier copy of the same path brought.
fn target(path: &Path, name: Option<OsString>, is_directory: bool) -> anyhow::Result<(OwnedFd, Option<OsString>)> {
    let slash = path.as_os_str().as_encoded_bytes().ends_with(b"/");
    let (folder, name) = match fs::metadata(path) {
        Ok(there) if there.is_dir() => (path, name),
        Ok(_) if is_directory => {
            bail!("{} is no directory, and a directory cannot be copied onto it", path.display())
        }
        Ok(there) if !there.is_file() => bail!("{} is neither a directory nor a regular file", path.display()),
        _ if slash && !is_directory => bail!("there is no directory {}", path.display()),
        _ => {
            let name = path.file_name().with_context(|| format!("{} names no file", path.display()))?;
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            (parent, Some(name.to_owned()))
        }
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(folder, flags, Mode::empty());
    Ok((opened.with_context(|| format!("there is no directory {}", folder.display()))?, name))
}

async fn copy_in(from: &Side, mut to: Remote, follow: bool) -> anyhow::Result<()> {
    let there = to.follow().await?;
    let is_directory = there.as_ref().is_some_and(|there| there.kind().is_dir());
    let source = match from {
        Side::Here(path) => Some(Source::find(path, follow)?),
        _ => None,
    };
    let (folder, name) = match &source {
        None if is_directory => (to.path.clone(), PathBuf::new()),
        None => bail!("an archive is copied into a directory, and {} is none", to.path),
        Some(source) if is_directory => (to.path.clone(), source.name.clone()),
        Some(source) if source.is_directory && there.is_some() => {
            bail!("{} is no directory, and a directory cannot be copied onto it", to.path)
        }
        Some(source) if !source.is_directory && to.path.ends_with('/') => {
            bail!("there is no directory {} in the container", to.path)
        }
        Some(_) => to.split()?,
    };
    let (pieces, receiver) = Client::pieces();
    let sent = Sent::new(pieces);
    let packing = thread::spawn(move || match source {
        Some(source) => pack::pack(&source, &name, sent),
        None => pack::pass(io::stdin().lock(), sent),
    });
    let uploaded = to.client.upload(&to.request(&folder), receiver).await;
    // What the container says counts: packing ends when it takes no more, but may be waiting for standard input.
    if uploaded.as_ref().is_err_and(|error| error.kind().is_some()) {
        return Ok(uploaded?);
    }
    match packing.join().map_err(|_| anyhow::anyhow!("packing failed"))? {
        Err(error) if !is_broken_pipe(&error) => Err(error),
        _ => Ok(uploaded?),
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let cause = error.root_cause().downcast_ref::<io::Error>();
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

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
    fn what_comes_out_is_called_as_the_user_called_it() {
        for (path, name) in [
            ("/a/b", Some("b")),
            ("/a/b/", Some("b")),
            ("/a/b/.", None),
            ("/a/b/..", Some("a")),
            ("/a/..", None),
            ("/", None),
            ("/.", None),
            ("/..", None),
        ] {
            let remote = Remote { client: Client::new(Path::new("")), files: String::new(), path: path.to_owned() };
            assert_eq!(remote.name(), name, "{path}");
        }
    }

    #[test]
    fn a_link_leads_where_it_says() {
        assert_eq!(behind("/a/link", "b/c"), "/a/b/c");
        assert_eq!(behind("/link", "../b"), "/../b");
        assert_eq!(behind("/a/link", "/b"), "/b");
    }

    #[test]
    fn the_destination_here_is_found_as_docker_finds_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = |text: &str| PathBuf::from(format!("{}/{text}", folder.path().display()));
        fs::create_dir(path("directory")).unwrap();
        fs::write(path("file"), "").unwrap();
        symlink("directory", path("to-directory")).unwrap();
        symlink("directory/new", path("to-nothing")).unwrap();
        symlink("/dev/null", path("to-device")).unwrap();
        symlink("file", path("to-file")).unwrap();
        let found = |text: &str, name: Option<&str>, is_directory| {
            let (folder, name) = target(&path(text), name.map(Into::into), is_directory).ok()?;
            let status = rustix::fs::fstat(&folder).unwrap();
            Some((status.st_ino, name.map(|name| name.into_string().unwrap())))
        };
        let (above, within) = [path(""), path("directory")].map(|path| rustix::fs::stat(&path).unwrap().st_ino).into();
        let of = |folder, name: &str| Some((folder, Some(name.to_owned())));
        assert_eq!(found("directory", Some("x"), false), of(within, "x"));
        assert_eq!(found("directory/", None, true), Some((within, None)));
        assert_eq!(found("to-directory", Some("x"), true), of(within, "x"));
        assert_eq!(found("file", Some("x"), false), of(above, "file"));
        assert_eq!(found("new", Some("x"), false), of(above, "new"));
        assert_eq!(found("new/", Some("x"), true), of(above, "new"));
        assert_eq!(found("new", None, true), of(above, "new"));
        assert_eq!(found("to-nothing", Some("x"), false), of(above, "to-nothing"));
        assert_eq!(found("to-file", Some("x"), false), of(above, "to-file"));
        for (text, is_directory) in [
            ("file", true),
            ("new/", false),
            ("none/new", true),
            ("to-device", false),
            ("to-file", true),
            ("file/x", false),
        ] {
            assert_eq!(found(text, Some("x"), is_directory), None, "{text}");
        }
    }
}
