//! What a guest asks of a file system: FUSE messages (`linux/fuse.h`) of any kind, straight to the server, in a directory of
//! the host that others change meanwhile.
//!
//! The directory is in memory and takes little: what a guest adds has a quota, or is refused.

use std::fs::{self, Permissions};
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use fuse::testing::Bytes;
use fuse::wire::{REPLY_HEADER, REQUEST_HEADER};
use fuse::{Cache, Export, Limits, Options, Quota, Served, Server, Session, Source};
use fuse_abi::linux::fuse_opcode as op;
use rustix::fs::{CWD, Mode, OFlags, RenameFlags};
use tempfile::TempDir;

use crate::input::Input;
use crate::scratch;

/// The most steps of one input.
const STEPS_MAX: usize = 200;
/// What a guest may add, in bytes and inodes.
const QUOTA: Quota = Quota { bytes: Some(256 << 10), inodes: Some(64) };
/// What it may hold. One that waits for a lock never waits for another one, and so ends with what it waits for.
const LIMITS: Limits = Limits { inodes: 16, handles: 16, lock_owners: 4, lock_ranges: 8, lock_waiters: 1 };

/// What a guest can ask for; by their places in here, seeds know them.
pub const OPERATIONS: [op; 45] = [
    op::FUSE_INIT,
    op::FUSE_LOOKUP,
    op::FUSE_FORGET,
    op::FUSE_GETATTR,
    op::FUSE_SETATTR,
    op::FUSE_READLINK,
    op::FUSE_SYMLINK,
    op::FUSE_MKNOD,
    op::FUSE_MKDIR,
    op::FUSE_UNLINK,
    op::FUSE_RMDIR,
    op::FUSE_RENAME,
    op::FUSE_LINK,
    op::FUSE_OPEN,
    op::FUSE_READ,
    op::FUSE_WRITE,
    op::FUSE_STATFS,
    op::FUSE_RELEASE,
    op::FUSE_FSYNC,
    op::FUSE_SETXATTR,
    op::FUSE_GETXATTR,
    op::FUSE_LISTXATTR,
    op::FUSE_REMOVEXATTR,
    op::FUSE_FLUSH,
    op::FUSE_OPENDIR,
    op::FUSE_READDIR,
    op::FUSE_RELEASEDIR,
    op::FUSE_FSYNCDIR,
    op::FUSE_GETLK,
    op::FUSE_SETLK,
    op::FUSE_SETLKW,
    op::FUSE_ACCESS,
    op::FUSE_CREATE,
    op::FUSE_INTERRUPT,
    op::FUSE_DESTROY,
    op::FUSE_IOCTL,
    op::FUSE_BATCH_FORGET,
    op::FUSE_FALLOCATE,
    op::FUSE_READDIRPLUS,
    op::FUSE_RENAME2,
    op::FUSE_LSEEK,
    op::FUSE_COPY_FILE_RANGE,
    op::FUSE_SYNCFS,
    op::FUSE_TMPFILE,
    op::FUSE_SETUPMAPPING,
];

/// Names of what is there, of what could be, and of what no entry has.
const NAMES: [&str; 12] =
    ["file", "folder", "link", "inner", "new", "other", "user.name", ".", "..", "../secret", "folder/inner", ""];

/// A directory of the host that is exported, with a secret beside it.
#[derive(Debug)]
pub struct Host {
    folder: TempDir,
    /// The directory, or the file in it that is shown alone.
    exported: OwnedFd,
    shape: u8,
}

impl Host {
    /// A new one, to be exported in the way that `shape` says.
    fn new(shape: u8) -> Self {
        let folder = scratch::folder();
        let export = folder.path().join("export");
        let made = fs::create_dir_all(export.join("folder"))
            .and_then(|()| fs::write(folder.path().join("secret"), "secret"))
            .and_then(|()| fs::write(export.join("file"), "content"))
            .and_then(|()| fs::write(export.join("folder/inner"), "inner"))
            .and_then(|()| symlink("../secret", export.join("link")));
        made.expect("a folder in memory takes files");
        let path = if shape & 8 == 0 { export } else { export.join("file") };
        let exported = rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        Self { folder, exported: exported.expect("it was just made"), shape }
    }

    fn is_read_only(&self) -> bool {
        self.shape & 1 != 0
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("export").join(name)
    }

    /// A directory, and a server of it, in one of many ways.
    pub fn serve(input: &mut Input<'_>) -> (Self, Server) {
        let host = Self::new(input.u8());
        let server = host.server();
        (host, server)
    }

    fn server(&self) -> Server {
        let shape = self.shape;
        let options = Options {
            read_only: self.is_read_only(),
            noexec: shape & 2 != 0,
            cache: [Cache::Auto, Cache::Never, Cache::Always][usize::from(shape >> 4) % 3],
            shared_locks: shape & 4 == 0,
            xattrs: true,
            quota: QUOTA,
            limits: LIMITS,
            ..Options::default()
        };
        let descriptors = fuse::descriptors().expect("there is a procfs");
        let exported = self.exported.try_clone().expect("there are descriptors");
        let source = if shape & 8 == 0 {
            Source::Directory(exported)
        } else {
            Source::File { file: exported, name: c"file".to_owned() }
        };
        let export = Export::new(source, options, descriptors).expect("it can be exported");
        Server::new(export).expect("there are descriptors")
    }

    /// Somebody else changes what is exported.
    pub fn change(&self, input: &mut Input<'_>) {
        if self.is_read_only() {
            return;
        }
        let names = ["file", "folder", "link", "folder/inner", "new"];
        let mut path = || {
            let name = *input.one_of(&names);
            self.path(name)
        };
        let (one, other) = (path(), path());
        // What fails was a change that the guest was faster with.
        let _ = match input.u8() % 5 {
            0 => fs::remove_file(one),
            1 => fs::rename(one, other),
            2 => rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).map_err(Into::into),
            3 => symlink("../secret", one),
            // What the guest made a link or a FIFO is not for us to follow or to wait for.
            _ => {
                let mut options = fs::File::options();
                options
                    .write(true)
                    .create(true)
                    .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
                    .open(other)
                    .and_then(|mut file| {
                        file.write_all(b"changed")?;
                        fs::hard_link(&one, self.path("new"))
                    })
            }
        };
    }

    /// What is in the export, as far as a guest could have changed it.
    fn content(&self) -> [Option<Vec<u8>>; 3] {
        ["file", "folder/inner", "new"].map(|name| fs::read(self.path(name)).ok())
    }

    /// Nothing beside the export has changed; nor has anything in it, if it is read-only.
    pub fn check(&self) {
        let mut names: Vec<_> = fs::read_dir(self.folder.path()).expect("it is ours").flatten().collect();
        names.sort_by_key(fs::DirEntry::file_name);
        let names: Vec<_> = names.iter().map(fs::DirEntry::file_name).collect();
        assert_eq!(names, ["export", "secret"], "something beside the export has changed");
        let secret = fs::read(self.folder.path().join("secret")).expect("the secret is there");
        assert_eq!(secret, b"secret", "the secret has changed");
        if self.is_read_only() {
            let expected = [Some(b"content".to_vec()), Some(b"inner".to_vec()), None];
            assert_eq!(self.content(), expected, "what is read-only has changed");
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        open_all(&self.path(""));
    }
}

/// Gives the owner back the right to remove everything below a directory.
fn open_all(directory: &Path) {
    let _ = fs::set_permissions(directory, Permissions::from_mode(0o700));
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            open_all(&entry.path());
        }
    }
}

/// A request: an operation, an inode and arguments, of which most make sense.
pub fn request(input: &mut Input<'_>) -> Vec<u8> {
    let operation = if input.u8() & 1 == 0 { *input.one_of(&OPERATIONS) as u32 } else { input.u32() };
    let node = if input.u8() & 1 == 0 { u64::from(input.u8() % 16) } else { input.u64() };
    let mut body = Vec::new();
    for _ in 0..input.u8() % 24 {
        match input.u8() % 6 {
            0 => body.extend(u64::from(input.u8()).to_le_bytes()),
            1 => body.extend(input.u64().to_le_bytes()),
            2 => body.extend(u32::from(input.u8()).to_le_bytes()),
            3 => body.extend(input.u32().to_le_bytes()),
            4 => {
                body.extend(input.one_of(&NAMES).bytes());
                body.push(0);
            }
            _ => body.extend(input.chunk()),
        }
    }
    let length = if input.u8() % 8 == 7 { input.u32() } else { (REQUEST_HEADER + body.len()) as u32 };
    let mut header = [0; REQUEST_HEADER];
    header[..4].copy_from_slice(&length.to_le_bytes());
    header[4..8].copy_from_slice(&operation.to_le_bytes());
    header[8..16].copy_from_slice(&9u64.to_le_bytes());
    header[16..24].copy_from_slice(&node.to_le_bytes());
    [&header[..], &body].concat()
}

/// Serves a message, and checks what comes of it.
fn serve(server: &mut Server, bytes: &[u8], room: usize) {
    let mut message = Bytes::new(bytes, room);
    if let Served::Reply { reply, data } = server.serve(&mut message) {
        assert_eq!(data, message.data.len());
        assert!(reply.len() + data <= room.max(REPLY_HEADER), "a reply is longer than its room");
        let length = reply.first_chunk().map(|length| u32::from_le_bytes(*length));
        assert_eq!(length, u32::try_from(reply.len() + data).ok(), "a reply has another length than it says");
    }
    let _ = server.over();
    for (name, limit) in [("inodes", LIMITS.inodes), ("handles", LIMITS.handles)] {
        let metrics = server.metrics();
        let held = metrics.iter().find(|(known, _)| *known == name).expect("it is counted").1;
        assert!(held <= limit as u64, "the guest holds {held} {name}");
    }
}

/// A server with a guest that sends anything, saves its session and goes on elsewhere, or claims to have had another one.
pub fn messages(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (host, mut server) = Host::serve(&mut input);
    let mut believed = true;
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        match input.u8() % 16 {
            0..=11 => {
                let room = usize::from(input.u16() % 0x3000);
                serve(&mut server, &request(&mut input), room);
            }
            12 => serve(&mut server, input.chunk(), 256),
            13 => host.change(&mut input),
            14 => {
                if let Ok(session) = server.save() {
                    drop(server);
                    server = host.server();
                    let restored = server.restore(session);
                    assert!(restored.is_ok() || !believed, "what was saved does not go on: {restored:?}");
                }
            }
            _ => {
                let claimed: Option<Session> = serde_json::from_slice(input.chunk()).ok();
                server = host.server();
                believed = false;
                let _ = claimed.map(|session| server.restore(session));
            }
        }
    }
    drop(server);
    host.check();
}
