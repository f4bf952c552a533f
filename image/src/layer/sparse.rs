//! Maps of sparse files: old GNU headers, and GNU tar's PAX versions 0.0, 0.1 and 1.0 (GNU tar manual, "Storing
//! Sparse Files").

use std::io::Read;

use tar::{GnuExtSparseHeader, GnuHeader, GnuSparseHeader};

use super::pax::{SparseRecords, parse_decimal};
use crate::limits::SPARSE_SEGMENTS_MAX;
use crate::problem::Problem;

/// Where a sparse file's stored bytes belong.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct SparseMap {
    /// (offset, length), ascending and apart from each other.
    segments: Vec<(u64, u64)>,
    real_size: u64,
}

impl SparseMap {
    /// Checks a map against the file's size and the bytes stored for it.
    fn new(segments: Vec<(u64, u64)>, real_size: u64, stored: u64) -> Result<SparseMap, Problem> {
        let mut end = 0;
        let mut total = 0u64;
        for (offset, length) in &segments {
            if *offset < end {
                return Err(Problem::BadSparseMap);
            }
            end = offset.checked_add(*length).ok_or(Problem::BadSparseMap)?;
            total += length; // no overflow: segments don't overlap, and the last one ends below 2^64
        }
        if end > real_size || total != stored {
            return Err(Problem::BadSparseMap);
        }
        Ok(SparseMap { segments, real_size })
    }

    pub(super) fn segments(&self) -> &[(u64, u64)] {
        &self.segments
    }

    pub(super) fn real_size(&self) -> u64 {
        self.real_size
    }

    /// The map of an old GNU sparse entry (type `S`), which may go on in blocks behind the header.
    pub(super) fn read_gnu(header: &GnuHeader, stored: u64, input: &mut impl Read) -> Result<SparseMap, Problem> {
        let mut segments = Vec::new();
        push_gnu(&mut segments, &header.sparse)?;
        let mut more = header.is_extended();
        while more {
            let mut block = GnuExtSparseHeader::new();
            super::tarball::read_exact(input, block.as_mut_bytes())?;
            push_gnu(&mut segments, block.sparse())?;
            more = block.is_extended();
        }
        let real_size = header.real_size().map_err(|_| Problem::BadSparseMap)?;
        SparseMap::new(segments, real_size, stored)
    }

    /// The map of versions 0.0 and 0.1, which stands in the extended header.
    pub(super) fn from_records(records: &SparseRecords, stored: u64) -> Result<SparseMap, Problem> {
        let real_size = records.real_size.ok_or(Problem::BadSparseMap)?;
        if !records.map.len().is_multiple_of(2) || records.map.len() / 2 > SPARSE_SEGMENTS_MAX {
            return Err(Problem::BadSparseMap);
        }
        let segments = records.map.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
        SparseMap::new(segments, real_size, stored)
    }

    /// The map of version 1.0, which stands in front of the data: decimal numbers, a line each, padded to a block.
    /// Also tells how many of the `stored` bytes it took.
    pub(super) fn read_lines(
        records: &SparseRecords,
        stored: u64,
        input: &mut impl Read,
    ) -> Result<(SparseMap, u64), Problem> {
        let real_size = records.real_size.ok_or(Problem::BadSparseMap)?;
        let mut lines = Lines { input, block: [0; 512], next: 512, taken: 0, stored };
        let count = usize::try_from(lines.number()?).ok().filter(|count| *count <= SPARSE_SEGMENTS_MAX);
        let mut segments = Vec::new();
        for _ in 0..count.ok_or(Problem::BadSparseMap)? {
            segments.push((lines.number()?, lines.number()?));
        }
        let taken = lines.taken;
        Ok((SparseMap::new(segments, real_size, stored - taken)?, taken))
    }
}

fn push_gnu(segments: &mut Vec<(u64, u64)>, headers: &[GnuSparseHeader]) -> Result<(), Problem> {
    for header in headers.iter().filter(|header| !header.is_empty()) {
        let offset = header.offset().map_err(|_| Problem::BadSparseMap)?;
        let length = header.length().map_err(|_| Problem::BadSparseMap)?;
        if segments.len() >= SPARSE_SEGMENTS_MAX {
            return Err(Problem::BadSparseMap);
        }
        segments.push((offset, length));
    }
    Ok(())
}

/// Reads numbers out of 512-byte blocks.
struct Lines<'a, R> {
    input: &'a mut R,
    block: [u8; 512],
    next: usize,
    taken: u64,
    stored: u64,
}

impl<R: Read> Lines<'_, R> {
    fn number(&mut self) -> Result<u64, Problem> {
        let mut digits = Vec::new();
        loop {
            if self.next == self.block.len() {
                if self.taken + 512 > self.stored {
                    return Err(Problem::BadSparseMap);
                }
                super::tarball::read_exact(self.input, &mut self.block)?;
                self.taken += 512;
                self.next = 0;
            }
            let byte = self.block[self.next];
            self.next += 1;
            if byte == b'\n' {
                return parse_decimal(&digits).ok_or(Problem::BadSparseMap);
            }
            // 20 digits hold every 64-bit number.
            if digits.len() == 20 {
                return Err(Problem::BadSparseMap);
            }
            digits.push(byte);
        }
    }
}
