//! An archive that comes out of a container: received piece by piece, and read entry by entry up to its end, which must be
//! there.
//!
//! The guest may send anything: names are held up to a length, and the tar crate is asked for bare headers because it holds
//! long ones of any length.

use std::io::{self, Read, Write};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use tar::{Archive, EntryType};
use tokio::sync::mpsc;

/// The unit of an archive.
const BLOCK: usize = 512;
/// The longest name: what the kernel takes as a path (`PATH_MAX`), with the zero behind it.
const NAME_MAX: u64 = 4097;
/// What a truncated archive is called.
const NOT_WHOLE: &str = "the archive is not whole: the copy is incomplete";

/// One entry of an archive.
#[derive(Debug)]
pub struct Entry {
    /// Its name.
    pub name: Vec<u8>,
    /// What kind of file it is.
    pub kind: EntryType,
    /// Its permission bits.
    pub mode: u32,
    /// When it was changed last, in seconds since 1970.
    pub mtime: u64,
    /// What a symbolic or hard link points to.
    pub link: Vec<u8>,
}

/// Reads an archive up to its end, two blocks of zeroes, and calls `each` with every entry and its data.
///
/// # Errors
/// What comes is no archive or ends before its end, or what `each` says.
pub fn read(input: impl Read, mut each: impl FnMut(&Entry, &mut dyn Read) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut input = Whole(input);
    let (mut name, mut link) = (None, None);
    for entry in Archive::new(&mut input).entries()?.raw(true) {
        let mut entry = entry.context("the archive cannot be read")?;
        let header = entry.header().clone();
        match header.entry_type() {
            EntryType::GNULongName => name = Some(text(&mut entry)?),
            EntryType::GNULongLink => link = Some(text(&mut entry)?),
            kind => {
                let entry_of = Entry {
                    name: name.take().unwrap_or_else(|| header.path_bytes().into_owned()),
                    kind,
                    mode: header.mode()?,
                    mtime: header.mtime()?,
                    link: link.take().or_else(|| Some(header.link_name_bytes()?.into_owned())).unwrap_or_default(),
                };
                each(&entry_of, &mut entry)?;
            }
        }
    }
    // The tar crate stops behind the first block of zeroes.
    let mut end = [0; BLOCK];
    input.read_exact(&mut end)?;
    if end.iter().any(|byte| *byte != 0) {
        bail!(NOT_WHOLE);
    }
    Ok(())
}

/// Writes an archive through as it comes.
///
/// # Errors
/// As [`read`], and what `output` says.
pub fn pass(input: impl Read, mut output: impl Write) -> anyhow::Result<()> {
    read(Tee { input, output: &mut output }, |_, _| Ok(()))?;
    Ok(output.flush()?)
}

/// The text in a header of its own for a name that is too long for the field.
fn text<R: Read>(entry: &mut tar::Entry<'_, R>) -> anyhow::Result<Vec<u8>> {
    if entry.size() > NAME_MAX {
        bail!("the archive has a name that is too long");
    }
    let mut text = Vec::new();
    entry.read_to_end(&mut text)?;
    text.truncate(text.iter().position(|byte| *byte == 0).unwrap_or(text.len()));
    Ok(text)
}

/// Input that must not end while someone reads it.
struct Whole<R>(R);

impl<R: Read> Read for Whole<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match self.0.read(to)? {
            0 if !to.is_empty() => Err(io::Error::new(io::ErrorKind::UnexpectedEof, NOT_WHOLE)),
            count => Ok(count),
        }
    }
}

/// Input that is copied to an output as it is read.
struct Tee<R, W> {
    input: R,
    output: W,
}

impl<R: Read, W: Write> Read for Tee<R, W> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(to)?;
        self.output.write_all(&to[..count])?;
        Ok(count)
    }
}

/// An archive that is received.
#[derive(Debug)]
pub struct Received {
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    piece: Bytes,
}

impl Received {
    /// What comes through a queue.
    pub fn new(pieces: mpsc::Receiver<io::Result<Bytes>>) -> Self {
        Self { pieces, piece: Bytes::new() }
    }
}

impl Read for Received {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.piece = piece?,
                None => return Ok(0),
            }
        }
        let count = to.len().min(self.piece.len());
        to[..count].copy_from_slice(&self.piece.split_to(count));
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use tar::{Builder, Header};

    use super::*;

    fn archive() -> Vec<u8> {
        let mut archive = Builder::new(Vec::new());
        for name in ["a".to_owned(), "long/".repeat(100) + "name"] {
            let mut header = Header::new_gnu();
            header.set_size(600);
            header.set_mode(0o644);
            // As much zero as an archive's end.
            archive.append_data(&mut header, name, &[0; 600][..]).unwrap();
        }
        archive.into_inner().unwrap()
    }

    #[test]
    fn all_but_a_whole_archive_is_told() {
        let whole = archive();
        let mut output = Vec::new();
        pass(&*whole, &mut output).unwrap();
        assert_eq!(output, whole);
        for length in (0..whole.len()).step_by(256) {
            let error = pass(&whole[..length], io::sink()).unwrap_err();
            assert!(format!("{error:#}").contains(NOT_WHOLE), "{length}: {error:#}");
        }
        let mut names = Vec::new();
        let padded = [whole, vec![0; 4096]].concat();
        let collected = read(&*padded, |entry, _| {
            names.push(entry.name.len());
            Ok(())
        });
        collected.unwrap();
        assert_eq!(names, [1, 504]);
    }

    #[test]
    fn what_is_no_archive_or_claims_too_much_is_refused() {
        let mut damaged = archive();
        damaged[3] ^= 1;
        assert!(pass(&*damaged, io::sink()).is_err());
        let mut damaged = archive();
        let end = damaged.len() - 1;
        damaged[end] = 1;
        assert!(pass(&*damaged, io::sink()).is_err());
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::GNULongName);
        header.set_size(u64::MAX / 2);
        header.set_cksum();
        let error = pass(&header.as_bytes()[..], io::sink()).unwrap_err();
        assert_eq!(error.to_string(), "the archive has a name that is too long");
    }
}
