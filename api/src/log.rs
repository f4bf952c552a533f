//! A container's log: what its first process wrote, line by line with times, in files of bounded size.
//!
//! The format is the one of the kubelet and podman (`TIME STREAM TAG TEXT`): the tag is `F` where a line ends and `P` where
//! it goes on in the next entry of its stream. The newest entries are in `log`; when that is full it becomes `log.1`, and
//! what was there goes.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};

use chrono::{DateTime, SecondsFormat, Utc};
use rustix::fs::fstat;

use crate::folder::Folder;
use crate::model::StreamKind;

/// The newest entries.
const CURRENT: &str = "log";
/// Those before.
const PREVIOUS: &str = "log.1";
/// How large one file may become, in bytes.
pub const FILE_MAX: u64 = 8 << 20;
/// The longest entry that is read: a stream is written in pieces of at most 64 KiB.
const ENTRY_MAX: u64 = 80 << 10;

/// A log that is written.
#[derive(Debug)]
pub struct LogWriter {
    folder: Folder,
    file: File,
    size: u64,
    file_max: u64,
    /// An entry after another, to be written at once.
    entries: Vec<u8>,
    /// Whether the file ends within an entry, as a crash or a full disk leaves it.
    torn: bool,
    /// How many bytes of output were lost since the last entry.
    lost: u64,
}

impl LogWriter {
    /// Opens the log in a folder, at its end.
    ///
    /// # Errors
    /// What the system says.
    pub fn open(folder: &Folder) -> io::Result<Self> {
        Self::with_limit(folder, FILE_MAX)
    }

    fn with_limit(folder: &Folder, file_max: u64) -> io::Result<Self> {
        let file = folder.append(CURRENT)?;
        let size = u64::try_from(fstat(&file)?.st_size).unwrap_or(0);
        // Whether what was there before ends as it should does not matter: an empty line is none of ours.
        let (folder, torn) = (folder.clone(), size > 0);
        Ok(Self { folder, file, size, file_max, entries: Vec::new(), torn, lost: 0 })
    }

    /// Adds what a stream brought.
    ///
    /// # Errors
    /// What the system says, for example that the disk is full; the entry is lost then, and a later one says so.
    pub fn write(&mut self, stream: StreamKind, bytes: &[u8]) -> io::Result<()> {
        let time = Utc::now().to_rfc3339_opts(SecondsFormat::Nanos, true);
        self.entries.clear();
        if self.torn {
            self.entries.push(b'\n');
        }
        // Writing to memory does not fail.
        if self.lost > 0 {
            let _ = writeln!(self.entries, "{time} stderr F [{} bytes of output could not be logged]", self.lost);
        }
        let name = name(stream);
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (tag, text) = match line.strip_suffix(b"\n") {
                Some(text) => ('F', text),
                None => ('P', line),
            };
            let _ = write!(self.entries, "{time} {name} {tag} ");
            self.entries.extend_from_slice(text);
            self.entries.push(b'\n');
        }
        let written = self.write_entries();
        match written {
            Ok(()) => (self.torn, self.lost) = (false, 0),
            Err(_) => (self.torn, self.lost) = (true, self.lost + bytes.len() as u64),
        }
        written
    }

    fn write_entries(&mut self) -> io::Result<()> {
        if self.size > 0 && self.size + self.entries.len() as u64 > self.file_max {
            self.rotate()?;
        }
        self.file.write_all(&self.entries)?;
        self.size += self.entries.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        match self.folder.rename(CURRENT, PREVIOUS) {
            // An earlier rotation got as far as this.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            renamed => renamed?,
        }
        self.file = self.folder.append(CURRENT)?;
        self.size = 0;
        Ok(())
    }
}

fn name(stream: StreamKind) -> &'static str {
    match stream {
        StreamKind::Stdout => "stdout",
        StreamKind::Stderr => "stderr",
    }
}

/// One entry of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// When it was written, in nanoseconds since 1970.
    pub time_ns: u64,
    /// The stream.
    pub stream: StreamKind,
    /// What was written, with the end of its line where it has one.
    pub text: Vec<u8>,
    /// Whether a line of its stream begins with it, as far as the selection shows that line.
    pub begins: bool,
}

impl Entry {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut words = line.splitn(4, |byte| *byte == b' ');
        let time = str::from_utf8(words.next()?).ok()?;
        let time = DateTime::parse_from_rfc3339(time).ok()?.timestamp_nanos_opt()?;
        let stream = match words.next()? {
            b"stdout" => StreamKind::Stdout,
            b"stderr" => StreamKind::Stderr,
            _ => return None,
        };
        let whole = match words.next()? {
            b"F" => true,
            b"P" => false,
            _ => return None,
        };
        let mut text = words.next()?.to_vec();
        if whole {
            text.push(b'\n');
        }
        Some(Self { time_ns: u64::try_from(time).ok()?, stream, text, begins: true })
    }

    /// The entry as it is shown: with its time before it when that is wanted and a line begins with it.
    pub fn shown(&self, timestamps: bool) -> Vec<u8> {
        let mut shown = Vec::with_capacity(self.text.len() + 32);
        if timestamps && self.begins {
            let time = DateTime::<Utc>::from_timestamp_nanos(i64::try_from(self.time_ns).unwrap_or(i64::MAX));
            shown.extend_from_slice(time.to_rfc3339_opts(SecondsFormat::Nanos, true).as_bytes());
            shown.push(b' ');
        }
        shown.extend_from_slice(&self.text);
        shown
    }
}

/// Which entries of a log are wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Selection {
    /// Only entries of this time or later, in nanoseconds since 1970.
    pub since_ns: u64,
    /// Only the last lines. One that was written in pieces is where its first piece is.
    pub tail: Option<usize>,
}

/// A log that is read from its oldest entry, and on as it grows.
#[derive(Debug)]
pub struct LogReader {
    folder: Folder,
    selection: Selection,
    /// The file that is read now.
    file: Option<BufReader<File>>,
    /// The files before it were read.
    in_current: bool,
    /// Lines to pass over.
    skip: usize,
    /// Entries that were there when the lines were counted.
    counted: usize,
    /// Of standard output and standard error: whether a line goes on in the next entry, and then whether it is shown.
    lines: [Option<bool>; 2],
    /// The beginning of an entry whose end was not written yet.
    partial: Vec<u8>,
}

impl LogReader {
    /// Reads the log in a folder. One that is not there is empty.
    ///
    /// # Errors
    /// What the system says.
    pub fn open(folder: &Folder, selection: Selection) -> io::Result<Self> {
        let mut reader = Self::at_start(folder, selection);
        if let Some(tail) = selection.tail {
            // The files are small enough to be counted first.
            let (mut entries, mut lines) = (0usize, 0usize);
            while let Some(entry) = reader.next()? {
                entries += 1;
                lines += usize::from(entry.begins);
            }
            reader = Self::at_start(folder, selection);
            (reader.skip, reader.counted) = (lines.saturating_sub(tail), entries);
        }
        Ok(reader)
    }

    fn at_start(folder: &Folder, selection: Selection) -> Self {
        let (folder, file, in_current) = (folder.clone(), None, false);
        Self { folder, selection, file, in_current, skip: 0, counted: 0, lines: [None; 2], partial: Vec::new() }
    }

    /// The next entry, or `None` when there is no further one yet.
    ///
    /// # Errors
    /// What the system says.
    #[expect(clippy::should_implement_trait, reason = "after `None` there may be more")]
    pub fn next(&mut self) -> io::Result<Option<Entry>> {
        loop {
            let Some(line) = self.line()? else { return Ok(None) };
            // A line that is none of ours, after a crash, says nothing.
            let Some(mut entry) = Entry::parse(&line) else { continue };
            if entry.time_ns < self.selection.since_ns {
                continue;
            }
            let shown = self.place(&mut entry);
            if shown {
                return Ok(Some(entry));
            }
        }
    }

    /// Finds out whether an entry begins a line; whether it is shown.
    fn place(&mut self, entry: &mut Entry) -> bool {
        let line = match entry.stream {
            StreamKind::Stdout => &mut self.lines[0],
            StreamKind::Stderr => &mut self.lines[1],
        };
        let was_there = self.counted > 0;
        self.counted = self.counted.saturating_sub(1);
        let shown = match *line {
            Some(true) => true,
            // What comes later is shown, even where it goes on a line that was passed over.
            Some(false) if was_there => false,
            _ => self.skip == 0,
        };
        entry.begins = line.is_none() || (*line == Some(false) && !was_there);
        if line.is_none() {
            self.skip = self.skip.saturating_sub(1);
        }
        *line = (entry.text.last() != Some(&b'\n')).then_some(shown);
        shown
    }

    fn line(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if self.file.is_none() && !self.open_after(None)? {
                return Ok(None);
            }
            let Some(file) = &mut self.file else { return Ok(None) };
            let mut limited = io::Read::take(&mut *file, ENTRY_MAX.saturating_sub(self.partial.len() as u64));
            limited.read_until(b'\n', &mut self.partial)?;
            if self.partial.last() == Some(&b'\n') {
                self.partial.pop();
                return Ok(Some(std::mem::take(&mut self.partial)));
            }
            if self.partial.len() as u64 >= ENTRY_MAX {
                self.partial.clear();
                continue;
            }
            // The end of the file, for now or for ever.
            if self.in_current && !self.was_rotated()? {
                return Ok(None);
            }
            self.partial.clear();
            // It is held open until the next one was chosen, so that no other file can look like it.
            if let Some(read) = self.file.take()
                && !self.open_after(Some(identity(read.get_ref())?))?
            {
                self.file = Some(read);
                return Ok(None);
            }
        }
    }

    /// Opens the file that follows the one that was read: what was rotated since then, or else the newest one.
    fn open_after(&mut self, read: Option<(u64, u64)>) -> io::Result<bool> {
        for (name, current) in [(PREVIOUS, false), (CURRENT, true)] {
            match self.folder.read(name) {
                Ok(file) => {
                    if Some(identity(&file)?) != read {
                        (self.file, self.in_current) = (Some(BufReader::new(file)), current);
                        return Ok(true);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Whether the file that is read is not the newest one any more.
    fn was_rotated(&self) -> io::Result<bool> {
        let Some(file) = &self.file else { return Ok(false) };
        let ours = identity(file.get_ref())?;
        match self.folder.read(CURRENT) {
            Ok(current) => Ok(identity(&current)? != ours),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// What tells a file from all others that are there at the same time: its device and its inode.
fn identity(file: &File) -> io::Result<(u64, u64)> {
    let stat = fstat(file)?;
    Ok((stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn place() -> (tempfile::TempDir, Folder) {
        let place = tempfile::tempdir().unwrap();
        let folder = Folder::open(place.path()).unwrap();
        (place, folder)
    }

    fn read(folder: &Folder, selection: Selection) -> Vec<u8> {
        let mut reader = LogReader::open(folder, selection).unwrap();
        std::iter::from_fn(|| reader.next().unwrap()).flat_map(|entry| entry.text).collect()
    }

    #[test]
    fn what_was_written_is_read_whole() {
        let (_place, folder) = place();
        let mut log = LogWriter::open(&folder).unwrap();
        log.write(StreamKind::Stdout, b"one\ntwo\npart").unwrap();
        log.write(StreamKind::Stderr, b"\xff\n").unwrap();
        log.write(StreamKind::Stdout, b" of three\n\n").unwrap();
        assert_eq!(read(&folder, Selection::default()), b"one\ntwo\npart\xff\n of three\n\n");
        let tail = Selection { tail: Some(2), ..Selection::default() };
        assert_eq!(read(&folder, tail), b"\xff\n\n");
        let tail = Selection { tail: Some(3), ..Selection::default() };
        assert_eq!(read(&folder, tail), b"part\xff\n of three\n\n");
        let future = Selection { since_ns: u64::MAX, ..Selection::default() };
        assert_eq!(read(&folder, future), b"");
    }

    #[test]
    fn lines_that_were_written_in_pieces_are_counted_and_timed_once() {
        let (_place, folder) = place();
        let mut log = LogWriter::open(&folder).unwrap();
        for piece in ["one\n", "x", "y", "z\n", "$ "] {
            log.write(StreamKind::Stdout, piece.as_bytes()).unwrap();
        }
        let shown = |tail| {
            let mut reader = LogReader::open(&folder, Selection { tail, ..Selection::default() }).unwrap();
            let shown = std::iter::from_fn(|| reader.next().unwrap()).flat_map(|entry| entry.shown(true));
            String::from_utf8(shown.collect()).unwrap()
        };
        let timed =
            |shown: &str| shown.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect::<Vec<_>>();
        assert_eq!(timed(&shown(None)), ["one", "xyz", "$ "]);
        assert_eq!(timed(&shown(Some(2))), ["xyz", "$ "]);
        assert_eq!(timed(&shown(Some(1))), ["$ "]);
        assert_eq!(shown(Some(0)), "");
    }

    #[test]
    fn who_wants_no_line_that_was_there_gets_what_comes() {
        let (_place, folder) = place();
        let mut log = LogWriter::open(&folder).unwrap();
        log.write(StreamKind::Stdout, b"$ ").unwrap();
        let none = Selection { tail: Some(0), ..Selection::default() };
        let mut reader = LogReader::open(&folder, none).unwrap();
        assert!(reader.next().unwrap().is_none());
        log.write(StreamKind::Stdout, b"typed").unwrap();
        let entry = reader.next().unwrap().unwrap();
        assert!(entry.begins && entry.text == b"typed");
        log.write(StreamKind::Stdout, b"!\n").unwrap();
        assert!(!reader.next().unwrap().unwrap().begins);
    }

    #[test]
    fn what_a_crash_left_harms_no_later_entry() {
        let (_place, folder) = place();
        fs::write(folder.path().join(CURRENT), b"2026-01-01T00:00:00Z stdout F torn").unwrap();
        let mut log = LogWriter::open(&folder).unwrap();
        log.write(StreamKind::Stdout, b"later\n").unwrap();
        assert_eq!(read(&folder, Selection::default()), b"torn\nlater\n");
        // A rotation that got half way.
        fs::rename(folder.path().join(CURRENT), folder.path().join(PREVIOUS)).unwrap();
        log.rotate().unwrap();
        log.lost = 7;
        log.write(StreamKind::Stdout, b"last\n").unwrap();
        let text = read(&folder, Selection::default());
        assert_eq!(text, b"torn\nlater\n[7 bytes of output could not be logged]\nlast\n");
    }

    #[test]
    fn who_follows_misses_nothing_that_is_still_there() {
        let (_place, folder) = place();
        let mut log = LogWriter::open(&folder).unwrap();
        let mut reader = LogReader::open(&folder, Selection::default()).unwrap();
        let text = |reader: &mut LogReader| -> Vec<u8> {
            std::iter::from_fn(|| reader.next().unwrap()).flat_map(|entry| entry.text).collect()
        };
        log.write(StreamKind::Stdout, b"one\n").unwrap();
        assert_eq!(text(&mut reader), b"one\n");
        for line in ["two\n", "three\n", "four\n"] {
            log.rotate().unwrap();
            log.write(StreamKind::Stdout, line.as_bytes()).unwrap();
        }
        assert_eq!(text(&mut reader), b"three\nfour\n");
        assert_eq!(text(&mut reader), b"");
    }

    #[test]
    fn what_is_no_file_is_no_log() {
        let (_place, folder) = place();
        std::os::unix::fs::symlink("/dev/null", folder.path().join(CURRENT)).unwrap();
        assert!(LogWriter::open(&folder).is_err());
    }

    #[test]
    fn a_log_that_is_not_there_is_empty() {
        let (_place, folder) = place();
        assert_eq!(read(&folder, Selection::default()), b"");
    }

    #[test]
    fn files_are_bounded_and_the_last_lines_stay() {
        let (_place, folder) = place();
        let mut log = LogWriter::with_limit(&folder, 4096).unwrap();
        for number in 0..1000 {
            log.write(StreamKind::Stdout, format!("line {number}\n").as_bytes()).unwrap();
        }
        for name in [CURRENT, PREVIOUS] {
            assert!(fs::metadata(folder.path().join(name)).unwrap().len() <= 4096, "{name}");
        }
        let text = String::from_utf8(read(&folder, Selection::default())).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.last(), Some(&"line 999"));
        let first: usize = lines[0].strip_prefix("line ").unwrap().parse().unwrap();
        assert_eq!(lines.len(), 1000 - first, "lines are missing in between");
    }

    #[test]
    fn a_reader_follows_through_a_rotation() {
        let (_place, folder) = place();
        let mut log = LogWriter::with_limit(&folder, 200).unwrap();
        let mut reader = LogReader::open(&folder, Selection::default()).unwrap();
        for number in 0..50 {
            log.write(StreamKind::Stdout, format!("{number}\n").as_bytes()).unwrap();
            let entry = reader.next().unwrap().unwrap();
            assert_eq!(entry.text, format!("{number}\n").as_bytes());
            assert!(reader.next().unwrap().is_none());
        }
    }

    #[test]
    fn lines_that_are_none_of_ours_are_passed_over() {
        let (_place, folder) = place();
        fs::write(folder.path().join(CURRENT), b"garbage\n2026-01-01T00:00:00Z stdout F fine\n2026 x").unwrap();
        assert_eq!(read(&folder, Selection::default()), b"fine\n");
    }
}
