//! The ranges of a file that one owner has locked, as the host's kernel has them.
//!
//! The kernel keeps each range in memory that it charges to nobody, and does not tell how many there are. So they are counted
//! here, by the same rules (`posix_lock_inode` of Linux): what overlaps is replaced, and neighbours of one kind are one.

use std::collections::BTreeMap;

use nix::libc;

use super::Kind;

/// The ranges of one owner: none overlaps another, and no neighbours are of one kind.
#[derive(Debug, Default)]
pub struct Ranges(BTreeMap<i64, (i64, Kind)>);

/// What a request is about: the first byte, the last byte, the kind.
type Request = (i64, i64, Kind);

fn request(range: &libc::flock) -> Request {
    let last = if range.l_len == 0 { i64::MAX } else { range.l_start.saturating_add(range.l_len - 1) };
    let kind = match i32::from(range.l_type) {
        libc::F_RDLCK => Kind::Shared,
        libc::F_WRLCK => Kind::Exclusive,
        _ => Kind::Unlock,
    };
    (range.l_start, last, kind)
}

impl Ranges {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The most that a request can add.
    pub fn growth(&self, range: &libc::flock) -> usize {
        let (start, last, kind) = request(range);
        let around = self.0.range(..start).next_back();
        let splits = around.is_some_and(|(_, (end, other))| *end > last && *other != kind);
        usize::from(splits) + usize::from(kind != Kind::Unlock)
    }

    /// Notes that a request was granted.
    pub fn note(&mut self, range: &libc::flock) {
        let (start, last, kind) = request(range);
        let before = self.0.range(..start).next_back();
        let first = before.filter(|(_, (end, _))| *end >= start - 1).map_or(start, |(begin, _)| *begin);
        let touched: Vec<Request> =
            self.0.range(first..=last.saturating_add(1)).map(|(begin, (end, other))| (*begin, *end, *other)).collect();
        let (mut from, mut to) = (start, last);
        for (begin, end, other) in touched {
            self.0.remove(&begin);
            if other == kind {
                (from, to) = (from.min(begin), to.max(end));
                continue;
            }
            if begin < start {
                self.0.insert(begin, (start - 1, other));
            }
            if end > last {
                self.0.insert(begin.max(last + 1), (end, other));
            }
        }
        if kind != Kind::Unlock {
            self.0.insert(from, (to, kind));
        }
    }

    /// Notes that nothing is locked any more, and gives how many ranges there were.
    pub fn clear(&mut self) -> usize {
        std::mem::take(&mut self.0).len()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::MetadataExt as _;

    use nix::fcntl::{FcntlArg, fcntl};
    use proptest::prelude::*;

    use super::*;

    /// What the kernel has for an inode, as `/proc/locks` tells it: kind, first and last byte.
    fn of_kernel(inode: u64) -> Vec<(bool, i64, i64)> {
        let mut found = Vec::new();
        for line in std::fs::read_to_string("/proc/locks").unwrap().lines() {
            let words: Vec<_> = line.split_whitespace().collect();
            let [_, "OFDLCK", _, kind, _, file, start, end] = words[..] else { continue };
            if file.rsplit(':').next().unwrap().parse() == Ok(inode) {
                let last = if end == "EOF" { i64::MAX } else { end.parse().unwrap() };
                found.push((kind == "WRITE", start.parse().unwrap(), last));
            }
        }
        found.sort_by_key(|(_, start, _)| *start);
        found
    }

    fn lock(kind: i32, start: i64, length: i64) -> libc::flock {
        libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: start, l_len: length, l_pid: 0 }
    }

    proptest! {
        #[test]
        fn they_are_those_of_the_kernel(
            requests in prop::collection::vec(
                (prop::sample::select(vec![libc::F_RDLCK, libc::F_WRLCK, libc::F_UNLCK]), 0i64..24, 0i64..8), 1..40
            )
        ) {
            let file: File = tempfile::tempfile().unwrap();
            let inode = file.metadata().unwrap().ino();
            let mut ranges = Ranges::default();
            for (kind, start, length) in requests {
                let range = lock(kind, start, length);
                let most = ranges.count() + ranges.growth(&range);
                fcntl(&file, FcntlArg::F_OFD_SETLK(&range)).unwrap();
                ranges.note(&range);
                prop_assert!(ranges.count() <= most);
                let ours: Vec<_> =
                    ranges.0.iter().map(|(start, (last, kind))| (*kind == Kind::Exclusive, *start, *last)).collect();
                prop_assert_eq!(ours, of_kernel(inode));
            }
        }
    }

    #[test]
    fn the_ends_of_a_file_are_no_trouble() {
        let mut ranges = Ranges::default();
        for (kind, start, length) in [
            (libc::F_WRLCK, i64::MAX, 1),
            (libc::F_RDLCK, i64::MAX - 1, 1),
            (libc::F_RDLCK, 0, 0),
            (libc::F_WRLCK, i64::MAX - 1, 0),
            (libc::F_UNLCK, 0, 1),
            (libc::F_UNLCK, 0, 0),
        ] {
            ranges.note(&lock(kind, start, length));
        }
        assert_eq!(ranges.count(), 0);
    }
}
