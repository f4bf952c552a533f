//! A packet that the guest sends (VIRTIO 1.2 §5.10.6, `struct virtio_vsock_hdr`): a header, and data in as many buffers as
//! the driver likes. Linux cuts data over 32 KiB into pages.

use vm_memory::VolatileSlice;

use super::{HEADER_LENGTH, PAYLOAD_MAX};
use crate::GuestMemory;
use crate::queue::{Buffers, Chain};

/// A packet, its header read once.
#[derive(Debug)]
pub(super) struct Incoming<'m> {
    pub(super) source_cid: u64,
    pub(super) destination_cid: u64,
    pub(super) source_port: u32,
    pub(super) destination_port: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) credit: u32,
    pub(super) forwarded: u32,
    /// The data, as long as the header says.
    pub(super) data: Vec<VolatileSlice<'m>>,
}

impl<'m> Incoming<'m> {
    /// Reads a packet from a chain.
    ///
    /// # Errors
    /// Why there is none: without knowing what was lost, no connection could go on.
    pub(super) fn parse(memory: &'m GuestMemory, chain: Chain<'m>) -> Result<Self, &'static str> {
        let mut buffers = Buffers::of(memory, chain)?;
        let mut header = [0; HEADER_LENGTH];
        buffers.take(&mut header).ok_or("a packet has no header")?;
        let mut rest = header.as_slice();
        // The header is as long as its fields, so that each is there.
        let mut field = |length: usize| {
            let (now, later) = rest.split_at(length);
            rest = later;
            now.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
        };
        let (source_cid, destination_cid) = (field(8), field(8));
        let (source_port, destination_port) = (field(4) as u32, field(4) as u32);
        let length = field(4) as u32;
        let (kind, op) = (field(2) as u16, field(2) as u16);
        let (flags, credit, forwarded) = (field(4) as u32, field(4) as u32, field(4) as u32);
        let data = data(buffers.readable, length)?;
        Ok(Self {
            source_cid,
            destination_cid,
            source_port,
            destination_port,
            kind,
            op,
            flags,
            credit,
            forwarded,
            data,
        })
    }
}

/// The first `length` bytes of the buffers.
fn data(mut buffers: Vec<VolatileSlice<'_>>, length: u32) -> Result<Vec<VolatileSlice<'_>>, &'static str> {
    if length > PAYLOAD_MAX {
        return Err("a packet claims more data than a packet may have");
    }
    let mut missing = length as usize;
    let mut used = 0;
    for buffer in &mut buffers {
        if missing == 0 {
            break;
        }
        if buffer.len() > missing {
            *buffer = buffer.subslice(0, missing).map_err(|_| "a buffer lies outside of memory")?;
        }
        missing -= buffer.len();
        used += 1;
    }
    if missing > 0 {
        return Err("a packet claims more data than it has");
    }
    buffers.truncate(used);
    Ok(buffers)
}
