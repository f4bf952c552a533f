//! The tar format (POSIX.1-2017, pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format").
//!
//! Headers are the tar crate's; its iterator is not used because it reads long names and extended headers into
//! memory whatever size they claim.

use std::borrow::Cow;
use std::io::{self, Read};

use tar::{EntryType, Header};

use super::pax::PaxRecords;
use super::sparse::SparseMap;
use crate::limits::EXTENDED_HEADER_BYTES_MAX;
use crate::problem::Problem;
use crate::tree::Device;

const BLOCK_BYTES: u64 = 512;

/// One entry of an archive, as it was written there.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: MemberKind,
    pub(crate) permissions: u16,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    pub(crate) mtime: (i64, u32),
    /// Full names and values, in the order of the archive.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What an entry is.
#[derive(Debug)]
pub(crate) enum MemberKind {
    /// `size` bytes once holes are filled in.
    File {
        size: u64,
        sparse: Option<SparseMap>,
    },
    Directory,
    Symlink(Vec<u8>),
    HardLink(Vec<u8>),
    Character(Device),
    Block(Device),
    Fifo,
}

/// Reads an archive entry by entry.
#[derive(Debug)]
pub(crate) struct TarReader<R> {
    input: R,
    /// Bytes read so far.
    position: u64,
    /// Bytes of the current entry's data that were not read yet.
    remaining: u64,
    /// Bytes behind the data up to the next block.
    padding: u64,
    /// Path of the entry at hand, for messages.
    path: Vec<u8>,
}

impl<R: Read> TarReader<R> {
    pub(crate) fn new(input: R) -> TarReader<R> {
        TarReader { input, position: 0, remaining: 0, padding: 0, path: Vec::new() }
    }

    /// The path of the entry that is being read, as far as it is known.
    pub(crate) fn current_path(&self) -> &[u8] {
        &self.path
    }

    /// Where the next byte of the archive stands: after [`TarReader::next`], the entry's data.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// The reader below, to read what follows the archive.
    pub(crate) fn into_inner(self) -> R {
        self.input
    }

    /// The next entry; what was left of the one before is skipped.
    ///
    /// # Errors
    /// The archive is damaged, truncated, or has something that is not supported.
    pub(crate) fn next(&mut self) -> Result<Option<Member>, Problem> {
        self.path.clear();
        let mut pax = PaxRecords::default();
        let mut long_name = None;
        let mut long_link = None;
        let mut extended = 0;
        loop {
            self.skip_rest()?;
            let Some(header) = self.read_header()? else { return Ok(None) };
            let stored = number(&header.as_old().size, "size")?;
            let kind = header.entry_type();
            if kind.is_gnu_longname() || kind.is_gnu_longlink() || kind.is_pax_local_extensions() {
                // An entry may have several; together they obey the same bound.
                extended += stored;
                if extended > EXTENDED_HEADER_BYTES_MAX {
                    return Err(Problem::HeaderTooLarge(extended));
                }
            }
            match kind {
                EntryType::GNULongName => long_name = Some(until_nul(self.read_extended(stored)?)),
                EntryType::GNULongLink => long_link = Some(until_nul(self.read_extended(stored)?)),
                EntryType::XHeader => pax.parse(&self.read_extended(stored)?)?,
                // Defaults for the whole archive (git writes its commit there); docker ignores them too.
                EntryType::XGlobalHeader => self.set_data(stored),
                _ => {
                    pax.path = pax.path.or(long_name);
                    pax.link_path = pax.link_path.or(long_link);
                    return self.member(&header, pax, stored).map(Some);
                }
            }
        }
    }

    /// Reads data of the current file, as stored.
    ///
    /// # Errors
    /// Reading failed or the archive ends.
    pub(crate) fn read_data(&mut self, buffer: &mut [u8]) -> Result<usize, Problem> {
        let wanted = buffer.len().min(usize::try_from(self.remaining).unwrap_or(usize::MAX));
        if wanted == 0 {
            return Ok(0);
        }
        let count = read_some(&mut self.input, &mut buffer[..wanted])?;
        if count == 0 {
            return Err(Problem::Truncated);
        }
        self.position += count as u64;
        self.remaining -= count as u64;
        Ok(count)
    }

    fn member(&mut self, header: &Header, pax: PaxRecords, stored: u64) -> Result<Member, Problem> {
        let path = pax.sparse.name.clone().or(pax.path.clone()).unwrap_or_else(|| header.path_bytes().into_owned());
        self.path.clone_from(&path);
        let old = header.as_old();
        let link = || pax.link_path.clone().or(header.link_name_bytes().map(Cow::into_owned)).unwrap_or_default();
        // Only files have data; the size of others is a remark (POSIX) that writers fill in differently.
        let kind = match header.entry_type() {
            EntryType::Regular | EntryType::Continuous if path.ends_with(b"/") => MemberKind::Directory,
            EntryType::Regular | EntryType::Continuous => self.file(&pax, stored)?,
            EntryType::GNUSparse => self.gnu_sparse(header, pax.size.unwrap_or(stored))?,
            EntryType::Directory => MemberKind::Directory,
            EntryType::Symlink => MemberKind::Symlink(link()),
            EntryType::Link => MemberKind::HardLink(link()),
            EntryType::Char => MemberKind::Character(device(header)?),
            EntryType::Block => MemberKind::Block(device(header)?),
            EntryType::Fifo => MemberKind::Fifo,
            other => return Err(Problem::UnknownType(other.as_byte())),
        };
        Ok(Member {
            path,
            kind,
            permissions: (number(&old.mode, "mode")? & 0o7777) as u16,
            uid: pax.uid.map_or_else(|| number(&old.uid, "uid"), Ok)?,
            gid: pax.gid.map_or_else(|| number(&old.gid, "gid"), Ok)?,
            mtime: pax.mtime.map_or_else(|| signed(&old.mtime, "mtime").map(|seconds| (seconds, 0)), Ok)?,
            xattrs: pax.xattrs,
        })
    }

    fn file(&mut self, pax: &PaxRecords, stored: u64) -> Result<MemberKind, Problem> {
        let stored = pax.size.unwrap_or(stored);
        self.set_data(stored);
        if pax.sparse.major == Some(1) {
            let mut counted = CountedRead { input: &mut self.input, position: &mut self.position };
            let (map, taken) = SparseMap::read_lines(&pax.sparse, stored, &mut counted)?;
            self.remaining -= taken;
            return Ok(MemberKind::File { size: map.real_size(), sparse: Some(map) });
        }
        if pax.sparse.real_size.is_some() {
            let map = SparseMap::from_records(&pax.sparse, stored)?;
            return Ok(MemberKind::File { size: map.real_size(), sparse: Some(map) });
        }
        Ok(MemberKind::File { size: stored, sparse: None })
    }

    fn gnu_sparse(&mut self, header: &Header, stored: u64) -> Result<MemberKind, Problem> {
        let gnu = header.as_gnu().ok_or(Problem::BadSparseMap)?;
        let mut counted = CountedRead { input: &mut self.input, position: &mut self.position };
        let map = SparseMap::read_gnu(gnu, stored, &mut counted)?;
        self.set_data(stored);
        Ok(MemberKind::File { size: map.real_size(), sparse: Some(map) })
    }

    fn set_data(&mut self, stored: u64) {
        self.remaining = stored;
        self.padding = (BLOCK_BYTES - stored % BLOCK_BYTES) % BLOCK_BYTES;
    }

    /// The next header, or `None` at the end: a block of zeroes, or no more bytes.
    fn read_header(&mut self) -> Result<Option<Header>, Problem> {
        let mut header = Header::new_old();
        let start = self.position;
        let count = read_full(&mut self.input, header.as_mut_bytes())?;
        self.position += count as u64;
        if count == 0 || (count as u64 == BLOCK_BYTES && header.as_bytes().iter().all(|byte| *byte == 0)) {
            return Ok(None);
        }
        if (count as u64) < BLOCK_BYTES {
            return Err(Problem::Truncated);
        }
        // The checksum counts its own field as spaces.
        let bytes = header.as_bytes();
        let sum = |range: std::ops::Range<usize>| bytes[range].iter().map(|byte| u64::from(*byte)).sum::<u64>();
        if number(&header.as_old().cksum, "checksum")? != sum(0..148) + 8 * u64::from(b' ') + sum(156..512) {
            return Err(Problem::BadChecksum(start));
        }
        Ok(Some(header))
    }

    /// The data of an extended header, whole; its size was checked.
    fn read_extended(&mut self, stored: u64) -> Result<Vec<u8>, Problem> {
        self.set_data(stored);
        let mut bytes = vec![0; stored as usize];
        let mut filled = 0;
        while filled < bytes.len() {
            filled += self.read_data(&mut bytes[filled..])?;
        }
        Ok(bytes)
    }

    fn skip_rest(&mut self) -> Result<(), Problem> {
        self.remaining = self.remaining.checked_add(self.padding).ok_or(Problem::BadField("size"))?;
        self.padding = 0;
        let mut scratch = [0; 8192];
        while self.read_data(&mut scratch)? > 0 {}
        Ok(())
    }
}

/// Keeps count of what a sparse map takes from the archive.
struct CountedRead<'a, R> {
    input: &'a mut R,
    position: &'a mut u64,
}

impl<R: Read> Read for CountedRead<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        *self.position += count as u64;
        Ok(count)
    }
}

fn device(header: &Header) -> Result<Device, Problem> {
    // The same place in ustar and GNU headers; the old format has no devices.
    let bytes = header.as_bytes();
    let (major, minor) = (number(&bytes[329..337], "devmajor")?, number(&bytes[337..345], "devminor")?);
    if major > 0xfff || minor > 0xf_ffff {
        return Err(Problem::BadDevice { major, minor });
    }
    Ok(Device { major: major as u32, minor: minor as u32 })
}

/// A numeric field: octal digits between blanks or NULs (none count as 0), or GNU's base-256 form.
fn number(field: &[u8], name: &'static str) -> Result<u64, Problem> {
    u64::try_from(signed(field, name)?).map_err(|_| Problem::BadField(name))
}

fn signed(field: &[u8], name: &'static str) -> Result<i64, Problem> {
    let bad = || Problem::BadField(name);
    if field[0] & 0x80 != 0 {
        // Two's complement without its first bit, which marks the form; bit 6 is the sign then.
        let first = i128::from(field[0] & 0x3f) - i128::from(field[0] & 0x40);
        let value = field[1..].iter().try_fold(first, |value, byte| {
            value.checked_mul(256).map(|value| value + i128::from(*byte)).filter(|v| i64::try_from(*v).is_ok())
        });
        return value.and_then(|value| i64::try_from(value).ok()).ok_or_else(bad);
    }
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    let digits = field[..end].trim_ascii();
    if digits.is_empty() {
        return Ok(0);
    }
    if !digits.iter().all(|digit| (b'0'..=b'7').contains(digit)) {
        return Err(bad());
    }
    std::str::from_utf8(digits).ok().and_then(|text| i64::from_str_radix(text, 8).ok()).ok_or_else(bad)
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}

/// Fills the buffer; an early end means a truncated archive.
pub(super) fn read_exact(input: &mut impl Read, buffer: &mut [u8]) -> Result<(), Problem> {
    if read_full(input, buffer)? < buffer.len() {
        return Err(Problem::Truncated);
    }
    Ok(())
}

/// Fills the buffer as far as there are bytes.
fn read_full(input: &mut impl Read, buffer: &mut [u8]) -> Result<usize, Problem> {
    let mut filled = 0;
    while filled < buffer.len() {
        match read_some(input, &mut buffer[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

fn read_some(input: &mut impl Read, buffer: &mut [u8]) -> Result<usize, Problem> {
    loop {
        match input.read(buffer) {
            Ok(count) => return Ok(count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(super::stream::read_problem(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_base_256() {
        assert_eq!(number(b"0000644\0", "mode").unwrap(), 0o644);
        assert_eq!(number(b"   644 \0", "mode").unwrap(), 0o644);
        assert_eq!(number(b"\0\0\0\0\0\0\0\0", "mode").unwrap(), 0);
        assert_eq!(number(b"\x80\0\0\0\0\0\0\0\x01\0\0\0", "size").unwrap(), 1 << 24);
        assert_eq!(signed(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe", "mtime").unwrap(), -2);
        assert!(number(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe", "size").is_err());
        assert!(number(b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "size").is_err());
        assert!(number(b"0000648\0", "mode").is_err());
        assert!(number(b"-000644\0", "mode").is_err());
    }

    #[test]
    fn an_archive_may_end_without_its_zero_blocks() {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = Header::new_gnu();
        header.set_size(3);
        builder.append_data(&mut header, "a", &b"abc"[..]).unwrap();
        let bytes = builder.into_inner().unwrap();
        let mut reader = TarReader::new(&bytes[..1024]);
        assert_eq!(reader.next().unwrap().unwrap().path, b"a");
        assert!(reader.next().unwrap().is_none());
        let mut reader = TarReader::new(&bytes[..600]);
        assert!(reader.next().unwrap().is_some());
        assert!(matches!(reader.next(), Err(Problem::Truncated)));
    }
}
