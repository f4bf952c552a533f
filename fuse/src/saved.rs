//! What is kept of a session when its VM is saved: what the guest knows and what it has open, by paths below the export.
//!
//! A path is the system's own answer to where an inode is (`/proc/self/fd`). It leads back to that inode or to none: each of
//! its components is looked up as a name of the guest's is, and what is found has to be the same inode. What is not found any
//! more is what the guest would have found it to be if it had gone on: unknown (`ESTALE`), or not open (`EBADF`).
//!
//! Not kept are locks, since whoever else wants them would have them in between; what waits for one; and what is open without a
//! name. A session with any of those is not saved. Nothing in a saved session is believed: it is checked as if the guest had
//! written it, and leads to nothing that the guest could not have looked up and opened itself.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fmt::{self, Formatter};
use std::marker::PhantomData;
use std::sync::Arc;

use fuse_abi::linux::FUSE_ROOT_ID;
use rustix::fd::AsFd;
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;

use crate::export::{Export, Root};
use crate::handle::{Directory, Handle, OpenFile};
use crate::node::{Node, stat};
use crate::server::Server;
use crate::wire::Name;

/// How long a saved session may be, in bytes; and what is in it of each inode and each open file besides its path, at most.
const SESSION_MAX: usize = 15 << 20;
const NUMBERS: usize = 40;
/// How many of them there can be, so.
const ENTRIES_MAX: usize = SESSION_MAX / NUMBERS;
/// The longest path (`PATH_MAX`).
const PATH_MAX: usize = 4096;
/// No number that is given out comes near to it, and no sum of two overflows.
const NUMBER_MAX: u64 = 1 << 62;

/// Why a session cannot be saved or restored.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SessionError {
    /// Requests wait for locks, for as long as somebody else likes.
    #[error("{0} requests wait for locks")]
    Waiting(usize),
    /// The guest has locks.
    #[error("the guest holds locks by {0} open files: they cannot be kept, and have to be released first")]
    Locked(usize),
    /// Files are open that no path leads to.
    #[error("{0} open files have no name any more: they have to be closed first")]
    Nameless(usize),
    /// The guest knows of too much.
    #[error("what the guest knows takes more than {SESSION_MAX} bytes")]
    TooLong,
    /// No guest could have brought about such a session.
    #[error("the session cannot be: {what} is {value:#x}")]
    Impossible {
        /// What is wrong.
        what: &'static str,
        /// What it is.
        value: u64,
    },
    /// The system has no room left.
    #[error("cannot hold what the guest knows")]
    System(#[source] Errno),
}

fn impossible(what: &'static str, value: u64) -> SessionError {
    SessionError::Impossible { what, value }
}

/// A session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    begun: bool,
    next_node: u64,
    next_handle: u64,
    /// In the order of their paths, so that directories come before what is in them.
    #[serde(deserialize_with = "bounded")]
    nodes: Vec<Known>,
    #[serde(deserialize_with = "bounded")]
    handles: Vec<Open>,
    /// What the guest has added, where that is limited.
    added_bytes: u64,
    added_inodes: u64,
}

/// Reads no more entries than can have been saved: the shortest ones take many times as much in memory as when they are written.
fn bounded<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    struct Entries<T>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
        type Value = Vec<T>;

        fn expecting(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
            write!(formatter, "at most {ENTRIES_MAX} entries")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Self::Value, A::Error> {
            let mut entries = Vec::new();
            while let Some(entry) = sequence.next_element()? {
                if entries.len() == ENTRIES_MAX {
                    return Err(A::Error::invalid_length(ENTRIES_MAX + 1, &self));
                }
                entries.push(entry);
            }
            Ok(entries)
        }
    }

    deserializer.deserialize_seq(Entries(PhantomData))
}

/// An inode that the guest knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    place: Place,
    number: u64,
    lookups: u64,
}

/// Something that the guest has open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Open {
    number: u64,
    what: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Kind {
    File {
        place: Place,
        flags: u32,
    },
    Directory(Place),
    /// The directory that a single file is shown in.
    Shown,
}

/// Where an inode is: its path from the root, which itself has an empty one, and its number, to be recognized by.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Place {
    path: Vec<u8>,
    ino: u64,
}

impl Server {
    /// What is to be kept of the session, which goes on.
    ///
    /// # Errors
    /// [`SessionError`] says what cannot be kept.
    pub fn save(&self) -> Result<Session, SessionError> {
        match self.waits.len() {
            0 => {}
            count => return Err(SessionError::Waiting(count)),
        }
        let is_locked = |handle: &Handle| matches!(handle, Handle::File(file) if file.is_locked());
        match self.locks.owners() + self.handles.each().filter(|(_, handle)| is_locked(handle)).count() {
            0 => {}
            count => return Err(SessionError::Locked(count)),
        }
        let mut left = SESSION_MAX;
        let mut nodes = Vec::new();
        let account = self.export.account.as_ref().map(|account| account.copy());
        for (number, node, lookups) in self.nodes.each() {
            // What has no name any more cannot be found again, and nobody but who holds it could.
            if let Some(place) = self.export.place(node) {
                left = left.checked_sub(place.path.len() + NUMBERS).ok_or(SessionError::TooLong)?;
                nodes.push(Known { place, number, lookups });
            } else if let (Some(account), Some(gone)) = (&account, node.gone()) {
                account.credit(&gone);
            }
        }
        nodes.sort_by(|one, other| one.place.cmp(&other.place));
        let (mut handles, mut nameless) = (Vec::new(), 0);
        for (number, handle) in self.handles.each() {
            let what = match handle {
                Handle::Directory(Directory::Shown) => Some(Kind::Shown),
                Handle::Directory(Directory::Host { fd, .. }) => self.export.place_again(fd).map(Kind::Directory),
                Handle::File(file) => {
                    let flags = file.flags.bits();
                    self.export.place_again(file).map(|place| Kind::File { place, flags })
                }
            };
            let Some(what) = what else {
                nameless += 1;
                continue;
            };
            if let Kind::Directory(place) | Kind::File { place, .. } = &what {
                left = left.checked_sub(place.path.len() + NUMBERS).ok_or(SessionError::TooLong)?;
            }
            handles.push(Open { number, what });
        }
        if nameless > 0 {
            return Err(SessionError::Nameless(nameless));
        }
        let account = account.as_ref();
        Ok(Session {
            begun: self.session,
            next_node: self.nodes.next(),
            next_handle: self.handles.next(),
            nodes,
            handles,
            added_bytes: account.map_or(0, |account| account.bytes()),
            added_inodes: account.map_or(0, |account| account.inodes()),
        })
    }

    /// Goes on with a session, in a server of the same export that no guest has talked to. To be called by the thread that will
    /// serve.
    ///
    /// # Errors
    /// [`SessionError`] says what is wrong with it; there is no session then.
    pub fn restore(&mut self, session: Session) -> Result<(), SessionError> {
        let restored = self.go_on(session);
        if restored.is_err() {
            self.end_session();
            self.let_go();
        }
        restored
    }

    fn go_on(&mut self, session: Session) -> Result<(), SessionError> {
        let Session { begun, next_node, next_handle, nodes, handles, added_bytes, added_inodes } = session;
        if !begun && nodes.len() + handles.len() > 0 {
            return Err(impossible("what is known without a session", (nodes.len() + handles.len()) as u64));
        }
        for next in [next_node, next_handle, added_bytes, added_inodes] {
            if next > NUMBER_MAX {
                return Err(impossible("a count", next));
            }
        }
        if next_node <= FUSE_ROOT_ID || next_handle == 0 {
            return Err(impossible("the next number", next_node.min(next_handle)));
        }
        self.nodes.go_on_at(next_node);
        self.handles.go_on_at(next_handle);
        let mut found = Found { export: &self.export, directories: BTreeMap::new() };
        for Known { place, number, lookups } in nodes {
            if let Some(node) = found.find(&place)?
                && !self.nodes.put_back(number, node, lookups)
            {
                return Err(impossible("the number of an inode", number));
            }
        }
        for Open { number, what } in handles {
            let handle = match what {
                Kind::Shown if matches!(self.export.root, Root::Shown { .. }) => {
                    Some(Handle::Directory(Directory::Shown))
                }
                Kind::Shown => return Err(impossible("a directory that is not there, open as", number)),
                Kind::Directory(place) => self.open_directory_again(&place)?,
                Kind::File { place, flags } => self.open_file_again(&place, flags)?,
            };
            if let Some(handle) = handle
                && !self.handles.put_back(number, handle)
            {
                return Err(impossible("the number of an open file", number));
            }
        }
        if let Some(account) = &self.export.account {
            account.go_on_at(added_bytes, added_inodes);
        }
        self.session = begun;
        Ok(())
    }

    fn open_directory_again(&self, place: &Place) -> Result<Option<Handle>, SessionError> {
        let Some(node) = self.find_again(place, FileType::Directory)? else { return Ok(None) };
        let opened = there(self.export.open(&node, OFlags::RDONLY | OFlags::DIRECTORY))?;
        Ok(opened.map(|fd| Handle::Directory(Directory::Host { fd: Arc::new(fd), position: None })))
    }

    fn open_file_again(&mut self, place: &Place, flags: u32) -> Result<Option<Handle>, SessionError> {
        let wrong = impossible("how a file is open", flags.into());
        let opening = self.opening(flags).ok().filter(|opening| opening.flags.bits() == flags).ok_or(wrong)?;
        let Some(node) = self.find_again(place, FileType::RegularFile)? else { return Ok(None) };
        let held = self.nodes.adopt(node);
        let node =
            held.map_err(|_| impossible("more inodes than there may be, for the file with flags", flags.into()))?;
        let opened = there(self.export.open(&node, opening.flags))?;
        Ok(opened.map(|fd| Handle::File(Arc::new(OpenFile::new(fd, node, opening.flags)))))
    }

    /// An inode of this type, which may be known already.
    fn find_again(&self, place: &Place, wanted: FileType) -> Result<Option<Arc<Node>>, SessionError> {
        let found = Found { export: &self.export, directories: BTreeMap::new() }.find(place)?;
        Ok(found.filter(|node| node.file_type() == wanted))
    }
}

impl Export {
    /// Where something that is held is, if it has a name.
    fn place(&self, held: impl AsFd) -> Option<Place> {
        let stat = stat(&held).ok().filter(|stat| stat.stx_nlink > 0)?;
        let path = match &self.root {
            // There is nothing else.
            Root::Shown { .. } => Vec::new(),
            Root::Directory(root) => {
                let (root, path) = (self.path(&**root).ok()?, self.path(held).ok()?);
                let root = root.strip_suffix(b"/").unwrap_or(&root);
                match path.strip_prefix(root)? {
                    [] | b"/" => Vec::new(),
                    [b'/', path @ ..] => path.to_vec(),
                    _ => return None,
                }
            }
        };
        Some(Place { path, ino: stat.stx_ino })
    }

    /// As [`Export::place`], where it is found again: one of several names may be gone, or have moved meanwhile.
    fn place_again(&self, held: impl AsFd) -> Option<Place> {
        let place = self.place(held)?;
        let found = Found { export: self, directories: BTreeMap::new() }.find(&place).ok()?;
        found.is_some().then_some(place)
    }
}

/// What was found, so that each directory is looked up once.
struct Found<'e> {
    export: &'e Export,
    directories: BTreeMap<Vec<u8>, Arc<Node>>,
}

impl Found<'_> {
    /// Finds an inode again, if it is still there.
    fn find(&mut self, place: &Place) -> Result<Option<Arc<Node>>, SessionError> {
        if place.path.len() > PATH_MAX {
            return Err(impossible("the length of a path", place.path.len() as u64));
        }
        let found = self.walk(&place.path)?.filter(|node| node.key().ino == place.ino);
        if let Some(node) = &found
            && node.file_type() == FileType::Directory
        {
            self.directories.insert(place.path.clone(), Arc::clone(node));
        }
        Ok(found)
    }

    fn walk(&self, path: &[u8]) -> Result<Option<Arc<Node>>, SessionError> {
        let root = match &self.export.root {
            Root::Directory(root) => root,
            Root::Shown { file, .. } if path.is_empty() => return Ok(Some(Arc::clone(file))),
            Root::Shown { .. } => return Err(impossible("the length of the path of a single file", path.len() as u64)),
        };
        // From the nearest directory that was found already.
        let parents = (0..path.len()).rev().filter(|at| path[*at] == b'/');
        let mut known = parents.filter_map(|at| Some((self.directories.get(&path[..at])?, &path[at + 1..])));
        let (start, rest) = known.next().unwrap_or((root, path));
        let mut node = Arc::clone(start);
        if rest.is_empty() {
            return if path.is_empty() { Ok(Some(node)) } else { Err(impossible("a name's length", 0)) };
        }
        for name in rest.split(|byte| *byte == b'/') {
            let wrong = || impossible("a name's length", name.len() as u64);
            let name = CString::new(name).map_err(|_| wrong())?;
            let name = Name::new(&name).map_err(|_| wrong())?;
            match there(self.export.find(&node, name))? {
                Some((found, _)) => node = Arc::new(found),
                None => return Ok(None),
            }
        }
        Ok(Some(node))
    }
}

/// What is there; not being there, for whatever reason of the file system's, is no error.
fn there<T>(outcome: Result<T, Errno>) -> Result<Option<T>, SessionError> {
    match outcome {
        Ok(found) => Ok(Some(found)),
        Err(errno @ (Errno::MFILE | Errno::NFILE | Errno::NOMEM)) => Err(SessionError::System(errno)),
        Err(_) => Ok(None),
    }
}
