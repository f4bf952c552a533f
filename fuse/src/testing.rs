//! A message that is in a program's own memory, for those that test and attack the server without a guest.

use std::io::{IoSlice, IoSliceMut};

use rustix::fd::BorrowedFd;
use rustix::io::{Errno, ReadWriteFlags, preadv, pwritev2};

use crate::wire::{Message, REPLY_HEADER};

/// A request's bytes, and those of a file for its reply.
#[derive(Debug)]
pub struct Bytes<'a> {
    /// What was not taken yet.
    pub request: &'a [u8],
    /// How many bytes the reply can have, its header included.
    pub room: usize,
    /// What was read for the reply.
    pub data: Vec<u8>,
    /// How data was written last.
    pub flags: ReadWriteFlags,
}

impl<'a> Bytes<'a> {
    /// A request, and room for its reply.
    pub fn new(request: &'a [u8], room: usize) -> Self {
        Self { request, room, data: Vec::new(), flags: ReadWriteFlags::empty() }
    }
}

/// Panics where the server does what a message does not allow it to do.
impl Message for Bytes<'_> {
    fn take(&mut self, bytes: &mut [u8]) -> Option<()> {
        let (taken, rest) = self.request.split_at_checked(bytes.len())?;
        bytes.copy_from_slice(taken);
        self.request = rest;
        Some(())
    }

    fn remaining(&self) -> usize {
        self.request.len()
    }

    fn room(&self) -> usize {
        self.room
    }

    fn read_from(&mut self, file: BorrowedFd<'_>, offset: u64, length: usize) -> Result<usize, Errno> {
        assert!(length + REPLY_HEADER <= self.room, "more is read than there is room for");
        let mut data = vec![0; length];
        let read = preadv(file, &mut [IoSliceMut::new(&mut data)], offset)?;
        data.truncate(read);
        self.data = data;
        Ok(read)
    }

    fn write_to(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        length: usize,
        flags: ReadWriteFlags,
    ) -> Result<usize, Errno> {
        self.flags = flags;
        let written = pwritev2(file, &[IoSlice::new(&self.request[..length])], offset, flags)?;
        self.request = &self.request[written..];
        Ok(written)
    }
}
