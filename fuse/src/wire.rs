//! FUSE messages taken apart and put together (`linux/fuse.h`, protocol 7).

use std::ffi::CStr;
use std::time::Duration;

use fuse_abi::linux as abi;
use rustix::fd::BorrowedFd;
use rustix::fs::{FileType, Statx};
use rustix::io::{Errno, ReadWriteFlags};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The most bytes that a READ or a WRITE moves.
pub const DATA_MAX: u32 = 1 << 20;
/// The most bytes of a request that are not data: an extended attribute of 64 KiB with its name is the longest there is.
pub const ARGUMENTS_MAX: usize = 72 << 10;
/// The most bytes of directory entries in a reply.
pub const ENTRIES_MAX: usize = 1 << 20;
/// The length of a reply's header.
pub const REPLY_HEADER: usize = size_of::<abi::fuse_out_header>();
/// The length of a request's header.
pub const REQUEST_HEADER: usize = size_of::<abi::fuse_in_header>();
/// The longest name of a file (`NAME_MAX`).
pub const NAME_MAX: usize = 255;

/// A request and the room for its reply, in the guest's memory. Offsets and lengths are bytes.
pub trait Message {
    /// Moves the next bytes of the request into `bytes`; `None` when there are not as many.
    fn take(&mut self, bytes: &mut [u8]) -> Option<()>;

    /// How many bytes of the request have not been taken.
    fn remaining(&self) -> usize;

    /// How many bytes the reply can have, its header included.
    fn room(&self) -> usize;

    /// Reads from a file into the room behind the reply's header. Ends early at the end of the file.
    ///
    /// # Errors
    /// What the system says, when nothing was read.
    fn read_from(&mut self, file: BorrowedFd<'_>, offset: u64, length: usize) -> Result<usize, Errno>;

    /// Writes the next bytes of the request to a file, as pwritev2(2) does with these flags: at its end, whatever the offset, or
    /// through to the disk.
    ///
    /// # Errors
    /// What the system says, when nothing was written.
    fn write_to(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        length: usize,
        flags: ReadWriteFlags,
    ) -> Result<usize, Errno>;
}

/// The name of a directory's entry: one component, neither empty nor `.` nor `..`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name<'a>(&'a CStr);

impl<'a> Name<'a> {
    /// Checks a name.
    ///
    /// # Errors
    /// `EINVAL` when it could be anything but one component, `ENAMETOOLONG` when no file can have it.
    pub fn new(name: &'a CStr) -> Result<Self, Errno> {
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            bytes if bytes.len() > NAME_MAX => Err(Errno::NAMETOOLONG),
            _ => Ok(Self(name)),
        }
    }

    /// The name, to be resolved against a directory.
    pub fn get(self) -> &'a CStr {
        self.0
    }
}

/// What follows the header of a request, taken from front to back.
#[derive(Debug)]
pub struct Arguments<'a>(&'a [u8]);

impl<'a> Arguments<'a> {
    /// The arguments in `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The next structure.
    ///
    /// # Errors
    /// `EINVAL` when the request is too short.
    pub fn take<T: FromBytes>(&mut self) -> Result<T, Errno> {
        let (value, rest) = T::read_from_prefix(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = rest;
        Ok(value)
    }

    /// The next text, up to its NUL.
    ///
    /// # Errors
    /// `EINVAL` when there is none.
    pub fn text(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = self.0.get(text.count_bytes() + 1..).unwrap_or_default();
        Ok(text)
    }

    /// The next text, which names an entry.
    ///
    /// # Errors
    /// As [`Name::new`].
    pub fn name(&mut self) -> Result<Name<'a>, Errno> {
        Name::new(self.text()?)
    }

    /// The next bytes.
    ///
    /// # Errors
    /// `EINVAL` when there are not as many.
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], Errno> {
        let (bytes, rest) = self.0.split_at_checked(count).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(bytes)
    }
}

/// Adds a structure to a reply.
pub fn put<T: IntoBytes + Immutable>(reply: &mut Vec<u8>, value: &T) {
    reply.extend_from_slice(value.as_bytes());
}

/// The header of a reply of `length` bytes, the header included.
pub fn reply_header(unique: u64, length: usize, error: Option<Errno>) -> [u8; REPLY_HEADER] {
    let header = abi::fuse_out_header {
        len: u32::try_from(length).unwrap_or(u32::MAX),
        error: error.map_or(0, |error| -error.raw_os_error()),
        unique,
    };
    zerocopy::transmute!(header)
}

/// The attributes of an inode as the host knows them, owner and mode included.
pub fn attributes(stat: &Statx, ino: u64) -> abi::fuse_attr {
    let (major, minor) = (stat.stx_rdev_major, stat.stx_rdev_minor);
    abi::fuse_attr {
        ino,
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        atime: stat.stx_atime.tv_sec.cast_unsigned(),
        mtime: stat.stx_mtime.tv_sec.cast_unsigned(),
        ctime: stat.stx_ctime.tv_sec.cast_unsigned(),
        atimensec: stat.stx_atime.tv_nsec,
        mtimensec: stat.stx_mtime.tv_nsec,
        ctimensec: stat.stx_ctime.tv_nsec,
        mode: stat.stx_mode.into(),
        nlink: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        // As Linux' new_encode_dev().
        rdev: minor & 0xff | (major & 0xfff) << 8 | (minor & 0xfff00) << 12,
        blksize: stat.stx_blksize,
        flags: 0,
    }
}

/// What is known of a name: the inode, and for how long the guest may believe it.
pub fn entry(nodeid: u64, attr: abi::fuse_attr, valid: Duration) -> abi::fuse_entry_out {
    abi::fuse_entry_out {
        nodeid,
        // Numbers are never used again.
        generation: 0,
        entry_valid: valid.as_secs(),
        attr_valid: valid.as_secs(),
        entry_valid_nsec: valid.subsec_nanos(),
        attr_valid_nsec: valid.subsec_nanos(),
        attr,
    }
}

/// The length of the fixed part of a directory entry (`struct fuse_dirent`).
const ENTRY_HEADER: usize = 24;

/// Adds a directory entry to a reply, padded as the protocol asks. `offset` is where the next one is read from.
pub fn put_entry(reply: &mut Vec<u8>, ino: u64, offset: u64, kind: FileType, name: &[u8]) {
    let end = reply.len() + entry_length(name.len());
    // What is not known (DT_UNKNOWN) has a number that no mode has.
    let kind = if kind == FileType::Unknown { 0 } else { kind.as_raw_mode() >> 12 };
    put(reply, &[ino, offset]);
    put(reply, &[u32::try_from(name.len()).unwrap_or(u32::MAX), kind]);
    reply.extend_from_slice(name);
    reply.resize(end, 0);
}

/// How long a directory entry with a name of this length is.
pub fn entry_length(name: usize) -> usize {
    (ENTRY_HEADER + name).next_multiple_of(8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_component() {
        for name in [c"", c".", c"..", c"/", c"/etc", c"a/b", c"a/", c"../x"] {
            assert_eq!(Name::new(name), Err(Errno::INVAL), "{name:?}");
        }
        for name in [c"a", c"...", c".hidden", c"\xff\n"] {
            assert!(Name::new(name).is_ok(), "{name:?}");
        }
        let long = std::ffi::CString::new([b'a'; 256]).unwrap();
        assert_eq!(Name::new(&long), Err(Errno::NAMETOOLONG));
    }

    #[test]
    fn arguments_that_are_cut_off_are_errors() {
        assert!(Arguments::new(&[0; 15]).take::<abi::fuse_getattr_in>().is_err());
        assert!(Arguments::new(b"no end").text().is_err());
        assert!(Arguments::new(b"abc").bytes(4).is_err());
        let mut arguments = Arguments::new(b"one\0two\0");
        assert_eq!((arguments.text(), arguments.text()), (Ok(c"one"), Ok(c"two")));
    }

    #[test]
    fn an_entry_of_a_type_that_is_not_known_says_so() {
        for (kind, number) in [(FileType::Unknown, 0), (FileType::RegularFile, 8), (FileType::Directory, 4)] {
            let mut reply = Vec::new();
            put_entry(&mut reply, 1, 2, kind, b"x");
            assert_eq!(reply[20..24], u32::to_ne_bytes(number), "{kind:?}");
        }
    }

    #[test]
    fn entries_are_padded_to_eight_bytes() {
        for length in 0..20 {
            let mut reply = Vec::new();
            put_entry(&mut reply, 1, 2, FileType::RegularFile, &vec![b'x'; length]);
            assert_eq!(reply.len(), entry_length(length));
            assert!(reply.len().is_multiple_of(8));
        }
    }
}
