//! A FUSE message in guest memory (VIRTIO 1.2 §5.11.6, "Device Operation").

use fuse::Message;
use fuse::wire::REPLY_HEADER;
use rustix::fd::BorrowedFd;
use rustix::io::{Errno, ReadWriteFlags};
use vm_memory::{Bytes, GuestAddress, VolatileSlice};

use crate::GuestMemory;
use crate::guest_io::{read_at, write_at};
use crate::queue::{Buffers, Chain};

/// The most room for a reply that is kept, in buffers: Linux gives its header one.
const ROOM_MAX: usize = 2;

/// A message and the room for its reply.
pub(super) struct GuestMessage<'m> {
    buffers: Buffers<'m>,
}

impl<'m> GuestMessage<'m> {
    /// The message in a chain.
    ///
    /// # Errors
    /// What is wrong with the chain.
    pub fn of(memory: &'m GuestMemory, chain: Chain<'m>) -> Result<Self, &'static str> {
        Ok(Self { buffers: Buffers::of(memory, chain)? })
    }

    /// Writes a reply, behind whose header `data` bytes are in place already. Gives the length of both, or nothing where there
    /// is no room.
    ///
    /// # Errors
    /// When the room is not there any more.
    pub fn reply(&self, mut reply: &[u8], data: usize) -> Result<u32, &'static str> {
        let length = reply.len() + data;
        if length > self.room() {
            return Ok(0);
        }
        for slice in &self.buffers.writable {
            let (now, later) = reply.split_at(reply.len().min(slice.len()));
            slice.write_slice(now, 0).map_err(|_| "a reply cannot be written")?;
            reply = later;
        }
        u32::try_from(length).map_err(|_| "a reply is too long")
    }
}

impl Message for GuestMessage<'_> {
    fn take(&mut self, bytes: &mut [u8]) -> Option<()> {
        self.buffers.take(bytes)
    }

    fn remaining(&self) -> usize {
        total(&self.buffers.readable)
    }

    fn room(&self) -> usize {
        total(&self.buffers.writable)
    }

    fn read_from(&mut self, file: BorrowedFd<'_>, offset: u64, length: usize) -> Result<usize, Errno> {
        let room = part(&self.buffers.writable, REPLY_HEADER, length).ok_or(Errno::FAULT)?;
        read_at(file, &room, offset).map_err(error)
    }

    fn write_to(
        &mut self,
        file: BorrowedFd<'_>,
        at: u64,
        length: usize,
        flags: ReadWriteFlags,
    ) -> Result<usize, Errno> {
        let data = part(&self.buffers.readable, 0, length).ok_or(Errno::FAULT)?;
        write_at(file, &data, at, flags).map_err(error)
    }
}

fn error(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::INVAL)
}

fn total(slices: &[VolatileSlice<'_>]) -> usize {
    slices.iter().map(VolatileSlice::len).fold(0, usize::saturating_add)
}

/// `length` bytes of `slices` behind the first `skip`; less where they end.
fn part<'m>(slices: &[VolatileSlice<'m>], mut skip: usize, mut length: usize) -> Option<Vec<VolatileSlice<'m>>> {
    let mut found = Vec::with_capacity(slices.len());
    for slice in slices {
        let skipped = skip.min(slice.len());
        let count = length.min(slice.len() - skipped);
        (skip, length) = (skip - skipped, length - count);
        if count > 0 {
            found.push(slice.subslice(skipped, count).ok()?);
        }
    }
    Some(found)
}

/// Where the reply of a request goes that is kept.
#[derive(Debug)]
pub(super) struct Room(Vec<(GuestAddress, usize)>);

impl Room {
    /// The room in a chain, as far as a header needs it.
    pub fn of(chain: Chain<'_>) -> Self {
        let buffers = chain.writable().take(ROOM_MAX);
        Self(buffers.map(|descriptor| (descriptor.addr(), descriptor.len() as usize)).collect())
    }

    /// Writes a reply and gives its length, or nothing where it has no room.
    pub fn write(&self, memory: &GuestMemory, mut reply: &[u8]) -> u32 {
        let length = u32::try_from(reply.len()).unwrap_or(0);
        for (address, room) in &self.0 {
            let (now, later) = reply.split_at(reply.len().min(*room));
            if memory.write_slice(now, *address).is_err() {
                return 0;
            }
            reply = later;
        }
        if reply.is_empty() { length } else { 0 }
    }
}
