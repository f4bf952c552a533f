//! A packet for the guest (VIRTIO 1.2 §5.10.6, `struct virtio_vsock_hdr`): where it goes, and its header.

use vm_memory::VolatileSlice;

use super::connection::CREDIT;
use super::muxer::Key;
use super::{GUEST_CID, HEADER_LENGTH, PAYLOAD_MAX};
use crate::GuestMemory;
use crate::queue::{Chain, walk};

/// A receive buffer of the driver's: a header in its first descriptor, and data behind that or in the next one.
#[derive(Debug)]
pub(super) struct Room<'m> {
    header: VolatileSlice<'m>,
    /// Room for data.
    pub(super) data: Option<VolatileSlice<'m>>,
}

impl<'m> Room<'m> {
    /// Takes a chain apart.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn of(memory: &'m GuestMemory, chain: Chain<'m>) -> Result<Self, &'static str> {
        const NO_HEADER: &str = "a receive buffer has no room for a packet";
        let mut pieces = [None; 2];
        let mut count = 0;
        walk(memory, chain, |descriptor, slice| {
            if let (true, Some(piece)) = (descriptor.is_write_only(), pieces.get_mut(count)) {
                *piece = Some(slice);
                count += 1;
            }
        })?;
        let [first, second] = pieces;
        let first = first.ok_or(NO_HEADER)?;
        let header = first.subslice(0, HEADER_LENGTH).map_err(|_| NO_HEADER)?;
        let behind = first.offset(HEADER_LENGTH).ok().filter(|behind| !behind.is_empty());
        let data = behind.or(second).and_then(|data| data.subslice(0, data.len().min(PAYLOAD_MAX as usize)).ok());
        Ok(Self { header, data })
    }
}

/// What a packet is about.
pub(super) struct Header {
    pub(super) key: Key,
    /// Whom the guest takes it to come from.
    pub(super) host_cid: u64,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) forwarded: u32,
    pub(super) length: u32,
}

impl Header {
    /// Writes it all at once: there is one for each few kilobytes of data.
    pub(super) fn write(&self, room: &Room<'_>) {
        let (Key { host, guest }, mut bytes, mut at) = (self.key, [0; HEADER_LENGTH], 0);
        // They are as long as a header, all together.
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        [self.host_cid, GUEST_CID].iter().for_each(|field| put(&field.to_le_bytes()));
        [host, guest, self.length].iter().for_each(|field| put(&field.to_le_bytes()));
        [self.kind, self.op].iter().for_each(|field| put(&field.to_le_bytes()));
        [self.flags, CREDIT, self.forwarded].iter().for_each(|field| put(&field.to_le_bytes()));
        room.header.copy_from(&bytes);
    }
}
