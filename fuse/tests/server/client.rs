//! A guest that speaks FUSE, and a directory of the host for it.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use fuse::testing::Bytes;
use fuse::wire::REPLY_HEADER;
use fuse::{Export, Options, Served, Server, Source};
use fuse_abi::linux::{self as abi, fuse_opcode};
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, ReadWriteFlags};
use tempfile::TempDir;
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub const ROOT: u64 = abi::FUSE_ROOT_ID;

/// A request's bytes.
pub fn request(opcode: u32, unique: u64, nodeid: u64, body: &[u8]) -> Vec<u8> {
    let header = abi::fuse_in_header {
        len: (40 + body.len()) as u32,
        opcode,
        unique,
        nodeid,
        uid: 0,
        gid: 0,
        pid: 1,
        total_extlen: 0,
        padding: 0,
    };
    [header.as_bytes(), body].concat()
}

/// A guest with a session.
pub struct Client {
    pub server: Server,
    /// The user and the group that ask.
    pub caller: (u32, u32),
    /// How the last request wrote data.
    pub written: ReadWriteFlags,
    unique: u64,
}

/// How a request ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    Reply(Vec<u8>),
    Nothing,
    Waiting(u64),
}

impl Client {
    pub fn new(export: Export) -> Self {
        let (server, written) = (Server::new(export).unwrap(), ReadWriteFlags::empty());
        let mut client = Self { server, caller: (0, 0), written, unique: 0 };
        client.init();
        client
    }

    pub fn of(path: &Path, options: Options) -> Self {
        Self::new(Export::new(Source::Directory(open_path(path)), options, fuse::descriptors().unwrap()).unwrap())
    }

    pub fn init(&mut self) -> abi::fuse_init_out {
        let mut init = abi::fuse_init_in::read_from_bytes(&[0; 64]).unwrap();
        (init.major, init.minor, init.max_readahead) = (7, 40, 1 << 20);
        (init.flags, init.flags2) = (u32::MAX, u32::MAX);
        parse(&self.ask(fuse_opcode::FUSE_INIT, 0, init.as_bytes()).unwrap())
    }

    /// Sends a request and gives what the server makes of it; an error as its number.
    pub fn send(&mut self, opcode: u32, nodeid: u64, body: &[u8], room: usize) -> Result<Ended, i32> {
        self.unique += 1;
        let mut request = request(opcode, self.unique, nodeid, body);
        request[24..28].copy_from_slice(&self.caller.0.to_le_bytes());
        request[28..32].copy_from_slice(&self.caller.1.to_le_bytes());
        let mut message = Bytes::new(&request, room);
        let (mut reply, data) = match self.server.serve(&mut message) {
            Served::Reply { reply, data } => (reply.to_vec(), data),
            Served::Nothing => return Ok(Ended::Nothing),
            Served::Waiting(ticket) => return Ok(Ended::Waiting(ticket)),
            Served::Malformed => panic!("a whole request was malformed"),
        };
        assert_eq!(message.data.len(), data);
        self.written = message.flags;
        reply.extend(message.data);
        assert!(reply.len() <= room.max(REPLY_HEADER));
        let header: abi::fuse_out_header = parse(&reply);
        assert_eq!((header.unique, header.len as usize), (self.unique, reply.len()));
        if header.error == 0 { Ok(Ended::Reply(reply.split_off(REPLY_HEADER))) } else { Err(-header.error) }
    }

    /// Sends a request that is answered at once.
    pub fn ask(&mut self, opcode: fuse_opcode, nodeid: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        match self.send(opcode as u32, nodeid, body, (1 << 20) + 4096)? {
            Ended::Reply(reply) => Ok(reply),
            ended => panic!("{ended:?}"),
        }
    }

    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<abi::fuse_entry_out, i32> {
        let entry: abi::fuse_entry_out = parse(&self.ask(fuse_opcode::FUSE_LOOKUP, parent, &text(name))?);
        // As a guest's kernel takes it: that there is nothing, which it may keep.
        if entry.nodeid == 0 { Err(Errno::NOENT.raw_os_error()) } else { Ok(entry) }
    }

    /// Looks a path up, component by component, as a guest's kernel does.
    pub fn walk(&mut self, path: &str) -> Result<u64, i32> {
        path.split('/').try_fold(ROOT, |parent, name| self.lookup(parent, name).map(|entry| entry.nodeid))
    }

    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let body = [flags as u32, 0];
        let reply = self.ask(fuse_opcode::FUSE_OPEN, node, body.as_bytes())?;
        Ok(parse::<abi::fuse_open_out>(&reply).fh)
    }

    pub fn create(
        &mut self,
        parent: u64,
        name: &str,
        flags: i32,
        mode: u32,
    ) -> Result<(abi::fuse_entry_out, u64), i32> {
        let body = [[flags as u32, mode, 0, 0].as_bytes(), &text(name)].concat();
        let reply = self.ask(fuse_opcode::FUSE_CREATE, parent, &body)?;
        Ok((parse(&reply), parse::<abi::fuse_open_out>(&reply[size_of::<abi::fuse_entry_out>()..]).fh))
    }

    pub fn mkdir(&mut self, parent: u64, name: &str) -> Result<abi::fuse_entry_out, i32> {
        let body = [[0o755u32, 0].as_bytes(), &text(name)].concat();
        self.ask(fuse_opcode::FUSE_MKDIR, parent, &body).map(|reply| parse(&reply))
    }

    pub fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        self.ask(fuse_opcode::FUSE_READ, node, &read_in(handle, offset, size))
    }

    pub fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        self.write_with(node, handle, offset, data, 0, 0)
    }

    pub fn write_with(
        &mut self,
        node: u64,
        fh: u64,
        offset: u64,
        data: &[u8],
        write_flags: u32,
        flags: u32,
    ) -> Result<u32, i32> {
        let size = data.len() as u32;
        let head = abi::fuse_write_in { fh, offset, size, write_flags, lock_owner: 0, flags, padding: 0 };
        let reply = self.ask(fuse_opcode::FUSE_WRITE, node, &[head.as_bytes(), data].concat())?;
        Ok(parse::<abi::fuse_write_out>(&reply).size)
    }

    pub fn unlink(&mut self, parent: u64, name: &str) -> Result<(), i32> {
        self.ask(fuse_opcode::FUSE_UNLINK, parent, &text(name)).map(drop)
    }

    pub fn release(&mut self, node: u64, fh: u64) {
        let body = abi::fuse_release_in { fh, flags: 0, release_flags: 0, lock_owner: 0 };
        self.ask(fuse_opcode::FUSE_RELEASE, node, body.as_bytes()).unwrap();
    }

    pub fn forget(&mut self, node: u64, count: u64) {
        let sent = self.send(fuse_opcode::FUSE_FORGET as u32, node, count.as_bytes(), 0);
        assert_eq!(sent, Ok(Ended::Nothing));
    }

    pub fn metric(&self, name: &str) -> u64 {
        self.server.metrics().iter().find(|(known, _)| *known == name).expect(name).1
    }

    /// The names in a directory, read in pieces of `size` bytes.
    pub fn list(&mut self, node: u64, size: u32, plus: bool) -> Vec<String> {
        let reply = self.ask(fuse_opcode::FUSE_OPENDIR, node, [0u32, 0].as_bytes()).unwrap();
        let handle = parse::<abi::fuse_open_out>(&reply).fh;
        let opcode = if plus { fuse_opcode::FUSE_READDIRPLUS } else { fuse_opcode::FUSE_READDIR };
        let (mut names, mut offset) = (Vec::new(), 0);
        loop {
            let reply = self.ask(opcode, node, &read_in(handle, offset, size)).unwrap();
            if reply.is_empty() {
                break;
            }
            let mut rest = &reply[..];
            while !rest.is_empty() {
                let entry = if plus { &rest[size_of::<abi::fuse_entry_out>()..] } else { rest };
                let [_, next]: [u64; 2] = parse(entry);
                let [length, _]: [u32; 2] = parse(&entry[16..]);
                names.push(String::from_utf8(entry[24..24 + length as usize].to_vec()).unwrap());
                offset = next;
                rest = &entry[(24 + length as usize).next_multiple_of(8)..];
            }
        }
        let body = abi::fuse_release_in { fh: handle, flags: 0, release_flags: 0, lock_owner: 0 };
        self.ask(fuse_opcode::FUSE_RELEASEDIR, node, body.as_bytes()).unwrap();
        names.sort();
        names
    }
}

pub fn read_in(fh: u64, offset: u64, size: u32) -> Vec<u8> {
    let body = abi::fuse_read_in { fh, offset, size, read_flags: 0, lock_owner: 0, flags: 0, padding: 0 };
    body.as_bytes().to_vec()
}

/// A request's text, with its NUL.
pub fn text(text: &str) -> Vec<u8> {
    CString::new(text).unwrap().into_bytes_with_nul()
}

/// A structure at the beginning of a reply.
pub fn parse<T: FromBytes + Immutable>(bytes: &[u8]) -> T {
    T::read_from_prefix(bytes).unwrap().0
}

pub fn open_path(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

/// A directory with an export in it and a secret beside that.
pub struct Host {
    pub folder: TempDir,
}

impl Host {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("export")).unwrap();
        fs::write(folder.path().join("secret"), "secret").unwrap();
        Self { folder }
    }

    pub fn export(&self) -> std::path::PathBuf {
        self.folder.path().join("export")
    }

    pub fn path(&self, name: &str) -> std::path::PathBuf {
        self.export().join(name)
    }

    pub fn client(&self, options: Options) -> Client {
        Client::of(&self.export(), options)
    }

    /// Whether `secret` is as it was and nothing was made beside the export.
    pub fn is_intact(&self) -> bool {
        let mut names: Vec<_> =
            fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        let names: Vec<_> = names.iter().map(|name| name.as_bytes()).collect();
        names == [&b"export"[..], b"secret"] && fs::read(self.folder.path().join("secret")).unwrap() == b"secret"
    }
}
