//! The tar format (POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar manual, "Basic Tar
//! Format"), one entry at a time.
//!
//! Headers are the tar crate's; its reader and its builder are not used because they hold long names and extended headers
//! of any length in memory, and change the names that they are given.

use std::io::{self, Read, Write};

use tar::{EntryType, Header};

use super::error::{CopyError, InStep, shown};
use crate::container::error::SetupError;

/// The unit of an archive.
const BLOCK: usize = 512;

/// The most bytes of an entry's extended headers: names of 4096 bytes and extended attributes of 64 KiB fit many times.
const EXTENDED_MAX: u64 = 1 << 20;

/// The longest name: what the kernel takes as a path (`PATH_MAX`).
const NAME_MAX: usize = 4096;

/// One entry of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: Vec<u8>,
    /// What kind of file it is.
    pub kind: EntryType,
    /// Its permission bits.
    pub mode: u32,
    /// Its owner.
    pub uid: u64,
    /// Its group.
    pub gid: u64,
    /// When it was changed last, in seconds since 1970.
    pub mtime: u64,
    /// How many bytes of data follow.
    pub size: u64,
    /// What a symbolic or hard link points to.
    pub link: Vec<u8>,
    /// Major and minor number of a device.
    pub device: (u32, u32),
}

/// Writes an archive.
#[derive(Debug)]
pub struct Writer<W>(W);

impl<W: Write> Writer<W> {
    /// An archive that goes to `output`.
    pub fn new(output: W) -> Self {
        Self(output)
    }

    /// Writes the headers of an entry.
    ///
    /// # Errors
    /// What the output says.
    pub fn begin(&mut self, entry: &Entry) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(entry.kind);
        header.set_mode(entry.mode);
        header.set_uid(entry.uid);
        header.set_gid(entry.gid);
        header.set_mtime(entry.mtime);
        header.set_size(entry.size);
        header.set_device_major(entry.device.0)?;
        header.set_device_minor(entry.device.1)?;
        // Too long for the field they go before the header, which keeps their beginnings.
        let old = header.as_old_mut();
        for (kind, text, field) in [
            (EntryType::GNULongLink, &entry.link, &mut old.linkname),
            (EntryType::GNULongName, &entry.name, &mut old.name),
        ] {
            if text.len() > field.len() {
                self.extension(kind, text)?;
            }
            field.iter_mut().zip(text).for_each(|(to, from)| *to = *from);
        }
        header.set_cksum();
        self.0.write_all(header.as_bytes())
    }

    fn extension(&mut self, kind: EntryType, text: &[u8]) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(text.len() as u64 + 1);
        header.as_old_mut().name[..13].copy_from_slice(b"././@LongLink");
        header.set_cksum();
        self.0.write_all(header.as_bytes())?;
        self.data(text)?;
        self.data(&[0])?;
        self.end(text.len() as u64 + 1)
    }

    /// Writes data of the entry that was begun.
    ///
    /// # Errors
    /// What the output says.
    pub fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    /// Ends an entry of `size` bytes of data.
    ///
    /// # Errors
    /// What the output says.
    pub fn end(&mut self, size: u64) -> io::Result<()> {
        self.0.write_all(&[0; BLOCK][..padding(size)])
    }

    /// Ends the archive.
    ///
    /// # Errors
    /// What the output says.
    pub fn finish(mut self) -> io::Result<()> {
        self.0.write_all(&[0; 2 * BLOCK])?;
        self.0.flush()
    }
}

/// Bytes behind `size` bytes of data up to the next block.
fn padding(size: u64) -> usize {
    (BLOCK - (size % BLOCK as u64) as usize) % BLOCK
}

/// Reads an archive.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    /// Bytes of the entry's data that were not read yet.
    remaining: u64,
    /// Bytes behind the data up to the next block.
    padding: usize,
}

/// What extended headers say of the entry behind them.
#[derive(Debug, Default)]
struct Extended {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<u64>,
}

impl<R: Read> Reader<R> {
    /// An archive that comes from `input`.
    pub fn new(input: R) -> Self {
        Self { input, remaining: 0, padding: 0 }
    }

    /// The next entry; what was left of the one before is skipped. `None` at the archive's end.
    ///
    /// # Errors
    /// What comes is no archive, or ends within.
    pub fn next(&mut self) -> Result<Option<Entry>, CopyError> {
        let (mut extended, mut length) = (Extended::default(), 0);
        loop {
            self.skip()?;
            let Some(header) = self.header()? else { return Ok(None) };
            let size = header.entry_size().map_err(|_| damaged())?;
            let kind = header.entry_type();
            if kind.is_gnu_longname() || kind.is_gnu_longlink() || kind.is_pax_local_extensions() {
                length += size.min(EXTENDED_MAX + 1);
                if length > EXTENDED_MAX {
                    return Err(CopyError::Archive { problem: "has an extended header that is too long" });
                }
            }
            self.begin(size);
            match kind {
                EntryType::GNULongName => extended.name = Some(until_zero(self.whole()?)),
                EntryType::GNULongLink => extended.link = Some(until_zero(self.whole()?)),
                EntryType::XHeader => extended.parse(&self.whole()?)?,
                // Defaults for the whole archive (git writes its commit there); docker ignores them too.
                EntryType::XGlobalHeader => {}
                _ => return self.entry(&header, extended, size).map(Some),
            }
        }
    }

    /// Reads data of the entry; 0 bytes at its end.
    ///
    /// # Errors
    /// The archive ends within.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize, CopyError> {
        let wanted = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(buffer.len());
        if wanted == 0 {
            return Ok(0);
        }
        match self.input.read(&mut buffer[..wanted]).in_step("read the archive")? {
            0 => Err(truncated()),
            length => {
                self.remaining -= length as u64;
                Ok(length)
            }
        }
    }

    fn entry(&mut self, header: &Header, extended: Extended, size: u64) -> Result<Entry, CopyError> {
        let number = |own: Option<u64>, field: io::Result<u64>| own.map_or_else(|| field.map_err(|_| damaged()), Ok);
        let mut entry = Entry {
            name: extended.name.unwrap_or_else(|| header.path_bytes().into_owned()),
            kind: header.entry_type(),
            mode: header.mode().map_err(|_| damaged())?,
            uid: number(extended.uid, header.uid())?,
            gid: number(extended.gid, header.gid())?,
            // Before 1970: the beginning of time.
            mtime: extended.mtime.or_else(|| header.mtime().ok()).unwrap_or(0),
            size: extended.size.unwrap_or(size),
            link: extended.link.or_else(|| header.link_name_bytes().map(Into::into)).unwrap_or_default(),
            device: (
                header.device_major().ok().flatten().unwrap_or(0),
                header.device_minor().ok().flatten().unwrap_or(0),
            ),
        };
        if entry.name.len().max(entry.link.len()) > NAME_MAX {
            let name = shown(&entry.name[..entry.name.len().min(64)]);
            return Err(CopyError::Entry { name, problem: "and so on has a name that is too long" });
        }
        if entry.kind.is_gnu_sparse() {
            return Err(CopyError::Entry {
                name: shown(&entry.name),
                problem: "is stored with holes: store it without",
            });
        }
        // Archives older than the type of directories.
        if entry.kind.is_file() && entry.name.ends_with(b"/") {
            entry.kind = EntryType::Directory;
        }
        self.begin(entry.size);
        Ok(entry)
    }

    fn begin(&mut self, size: u64) {
        (self.remaining, self.padding) = (size, padding(size));
    }

    /// Skips what is left of the entry.
    fn skip(&mut self) -> Result<(), CopyError> {
        let left = self.remaining.saturating_add(self.padding as u64);
        self.begin(0);
        let skipped = io::copy(&mut self.input.by_ref().take(left), &mut io::sink()).in_step("read the archive")?;
        if skipped < left { Err(truncated()) } else { Ok(()) }
    }

    /// The data of an extended header, whose length was checked.
    fn whole(&mut self) -> Result<Vec<u8>, CopyError> {
        let mut bytes = Vec::new();
        self.input.by_ref().take(self.remaining).read_to_end(&mut bytes).in_step("read the archive")?;
        if (bytes.len() as u64) < self.remaining {
            return Err(truncated());
        }
        self.remaining = 0;
        Ok(bytes)
    }

    /// The next header; `None` at the archive's end, which is a block of zeroes.
    fn header(&mut self) -> Result<Option<Header>, CopyError> {
        let mut block = [0; BLOCK];
        self.input.read_exact(&mut block).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => truncated(),
            _ => SetupError::Step { step: "read the archive", source: error }.into(),
        })?;
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let header = Header::from_byte_slice(&block);
        let sum = |range: &[u8]| range.iter().map(|byte| u32::from(*byte)).sum::<u32>();
        // The field itself counts as spaces.
        let expected = sum(&block[..148]) + 8 * u32::from(b' ') + sum(&block[156..]);
        match header.cksum() {
            Ok(stored) if stored == expected => Ok(Some(header.clone())),
            _ => Err(CopyError::Archive { problem: "is none, or is damaged" }),
        }
    }
}

/// Reads an archive with all its data up to its end or to what is wrong with it; gives how many entries it has.
#[cfg(feature = "fuzzing")]
pub fn read_archive(bytes: &[u8]) -> usize {
    let (mut reader, mut buffer, mut entries) = (Reader::new(bytes), [0; 4096], 0);
    while let Ok(Some(_)) = reader.next() {
        entries += 1;
        while matches!(reader.read(&mut buffer), Ok(1..)) {}
    }
    entries
}

fn damaged() -> CopyError {
    CopyError::Archive { problem: "has a header that cannot be read" }
}

fn truncated() -> CopyError {
    CopyError::Archive { problem: "is not whole" }
}

fn until_zero(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len()));
    bytes
}

impl Extended {
    /// Records of `LENGTH KEY=VALUE\n`, where the length counts the whole record.
    fn parse(&mut self, mut records: &[u8]) -> Result<(), CopyError> {
        while !records.is_empty() {
            let (record, rest) = split_record(records).ok_or_else(damaged)?;
            records = rest;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(damaged)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            match key {
                b"path" => self.name = Some(value.to_vec()),
                b"linkpath" => self.link = Some(value.to_vec()),
                b"size" => self.size = Some(number(value).ok_or_else(damaged)?),
                b"uid" => self.uid = Some(number(value).ok_or_else(damaged)?),
                b"gid" => self.gid = Some(number(value).ok_or_else(damaged)?),
                b"mtime" => self.mtime = Some(number(value).unwrap_or(0)),
                _ if key.starts_with(b"GNU.sparse.") => {
                    return Err(CopyError::Archive {
                        problem: "has a file that is stored with holes: store it without",
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn split_record(records: &[u8]) -> Option<(&[u8], &[u8])> {
    let space = records.iter().position(|byte| *byte == b' ')?;
    let length = usize::try_from(number(&records[..space])?).ok()?;
    let (record, rest) = records.split_at_checked(length)?;
    Some((record.get(space + 1..)?.strip_suffix(b"\n")?, rest))
}

/// A decimal number; what follows a point is cut off.
fn number(text: &[u8]) -> Option<u64> {
    str::from_utf8(text).ok()?.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &[u8], kind: EntryType, size: u64) -> Entry {
        let link = if kind.is_symlink() { b"target".repeat(40) } else { Vec::new() };
        Entry {
            name: name.to_vec(),
            kind,
            mode: 0o4755,
            uid: 1000,
            gid: 70_000,
            mtime: 1_600_000_000,
            size,
            link,
            device: (0, 0),
        }
    }

    fn written(entries: &[Entry]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes);
        for entry in entries {
            writer.begin(entry).unwrap();
            writer.data(&vec![b'd'; usize::try_from(entry.size).unwrap()]).unwrap();
            writer.end(entry.size).unwrap();
        }
        writer.finish().unwrap();
        bytes
    }

    #[test]
    fn what_is_written_is_read() {
        let entries = [
            entry(b"./a", EntryType::Regular, 0),
            entry(&b"long/".repeat(100), EntryType::Directory, 0),
            entry(&b"n".repeat(100), EntryType::Regular, 513),
            entry(b"\xff\xfe", EntryType::Symlink, 0),
        ];
        let bytes = written(&entries);
        assert_eq!(bytes.len() % BLOCK, 0);
        let mut reader = Reader::new(bytes.as_slice());
        let mut buffer = [0; 1024];
        for entry in &entries {
            assert_eq!(reader.next().unwrap().as_ref(), Some(entry));
            if entry.size > 0 {
                assert_eq!(reader.read(&mut buffer).unwrap(), 513);
                assert_eq!(reader.read(&mut buffer).unwrap(), 0);
            }
        }
        assert_eq!(reader.next().unwrap(), None);
        // Data that nobody reads is skipped.
        let mut reader = Reader::new(bytes.as_slice());
        assert_eq!(std::iter::from_fn(|| reader.next().unwrap()).count(), 4);
    }

    #[test]
    fn another_tar_reads_what_is_written() {
        let mut archive =
            tar::Archive::new(io::Cursor::new(written(&[entry(&b"x/".repeat(80), EntryType::Directory, 0)])));
        let first = archive.entries().unwrap().next().unwrap().unwrap();
        assert_eq!((first.path_bytes().len(), first.header().uid().unwrap()), (160, 1000));
    }

    #[test]
    fn extended_headers_count() {
        let mut extended = Extended::default();
        let records = b"15 path=a\nb=c d\n20 size=123456789012\n30 mtime=1350244992.023960108\n12 uid=7000\n";
        assert!(extended.parse(b"16 path=a\nb=c d\n20 size=12345678901\n").is_ok());
        assert_eq!((extended.name.as_deref(), extended.size), (Some(&b"a\nb=c d"[..]), Some(12_345_678_901)));
        assert!(extended.parse(records).is_err(), "the first length is wrong");
        for bad in [&b"x"[..], b"5 a=b", b"999 a=b\n", b"4 a\n", b"0 a=b\n", b"1 a=b\n", b"2 a=b\n"] {
            assert!(Extended::default().parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_not_whole_is_told() {
        let bytes = written(&[entry(b"a", EntryType::Regular, 1000)]);
        for length in [0, 100, 512, 1000, 1536] {
            let mut reader = Reader::new(&bytes[..length]);
            let error = std::iter::repeat_with(|| reader.next()).find_map(Result::err).unwrap();
            assert_eq!(error.to_string(), "the archive is not whole", "{length}");
        }
        let mut damaged = bytes;
        damaged[3] ^= 1;
        assert!(Reader::new(damaged.as_slice()).next().is_err());
    }

    #[test]
    fn a_header_that_claims_too_much_is_refused_unread() {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::GNULongName);
        header.set_size(u64::MAX / 2);
        header.set_cksum();
        let error = Reader::new(&header.as_bytes()[..]).next().unwrap_err();
        assert_eq!(error.to_string(), "the archive has an extended header that is too long");
    }
}
