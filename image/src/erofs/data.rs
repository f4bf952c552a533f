//! The data area: regular files one after the other, holes for blocks of zeroes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::BLOCK_BYTES;

/// Bytes collected before they are written: large enough that small files don't cost a system call each.
const BUFFER_BYTES: usize = 1 << 20;

/// Writes file after file into the data area, and can take freed space back.
#[derive(Debug)]
pub(crate) struct DataWriter {
    file: File,
    /// What comes next, from `buffer_block` on.
    buffer: Vec<u8>,
    buffer_block: u64,
}

impl DataWriter {
    /// Starts the data area of an empty file, behind the superblock's block.
    pub(crate) fn new(file: File) -> DataWriter {
        DataWriter { file, buffer: Vec::with_capacity(BUFFER_BYTES), buffer_block: 1 }
    }

    /// Begins a file at the next block boundary and tells its block.
    ///
    /// # Errors
    /// Writing failed, or the image has outgrown the 16 TiB that EROFS can address.
    pub(crate) fn begin(&mut self) -> io::Result<u32> {
        let used = self.buffer.len().next_multiple_of(BLOCK_BYTES as usize);
        self.buffer.resize(used, 0);
        if self.buffer.len() >= BUFFER_BYTES {
            self.flush()?;
        }
        let block = self.buffer_block + self.buffer.len() as u64 / BLOCK_BYTES;
        u32::try_from(block).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))
    }

    /// Appends bytes to the file that was begun last.
    ///
    /// # Errors
    /// Writing failed.
    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(BUFFER_BYTES - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            if self.buffer.len() == BUFFER_BYTES {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Appends `count` zeroes to the file that was begun last, without writing the blocks they fill.
    ///
    /// # Errors
    /// Writing failed.
    pub(crate) fn hole(&mut self, mut count: u64) -> io::Result<()> {
        let open = (self.buffer.len() as u64).next_multiple_of(BLOCK_BYTES) - self.buffer.len() as u64;
        let head = open.min(count);
        self.write(&[0; BLOCK_BYTES as usize][..head as usize])?;
        count -= head;
        let blocks = count / BLOCK_BYTES;
        if blocks > 0 {
            self.flush()?;
            self.buffer_block += blocks;
        }
        self.write(&[0; BLOCK_BYTES as usize][..(count % BLOCK_BYTES) as usize])
    }

    /// Gives the space of data that nothing refers to any more back to the host. Reads of it give zeroes then.
    ///
    /// # Errors
    /// The host refused for another reason than that its filesystem can't do it.
    pub(crate) fn discard(&mut self, block: u32, bytes: u64) -> io::Result<()> {
        self.flush()?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let length = bytes.next_multiple_of(BLOCK_BYTES);
        match fallocate(&self.file, flags, u64::from(block) * BLOCK_BYTES, length) {
            // Without the operation the space stays taken; that is all.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Ends the data area: the file, and the first block behind the data.
    ///
    /// # Errors
    /// Writing failed.
    pub(crate) fn finish(mut self) -> io::Result<(File, u32)> {
        let end = self.begin()?;
        self.flush()?;
        Ok((self.file, end))
    }

    /// Writes the buffer's blocks except those of zeroes. The buffer ends at a block boundary, or the file ends.
    fn flush(&mut self) -> io::Result<()> {
        let used = self.buffer.len().next_multiple_of(BLOCK_BYTES as usize);
        self.buffer.resize(used, 0);
        let mut run = 0..0;
        for (index, block) in self.buffer.chunks_exact(BLOCK_BYTES as usize).enumerate() {
            let start = index * BLOCK_BYTES as usize;
            if block.iter().all(|byte| *byte == 0) {
                self.write_run(run)?;
                run = 0..0;
            } else if run.is_empty() {
                run = start..start + block.len();
            } else {
                run.end = start + block.len();
            }
        }
        self.write_run(run)?;
        self.buffer_block += self.buffer.len() as u64 / BLOCK_BYTES;
        self.buffer.clear();
        Ok(())
    }

    fn write_run(&self, run: std::ops::Range<usize>) -> io::Result<()> {
        let offset = self.buffer_block * BLOCK_BYTES + run.start as u64;
        self.file.write_all_at(&self.buffer[run], offset)
    }
}
