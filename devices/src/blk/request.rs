//! A request of the block device's driver (VIRTIO 1.2 §5.2.6, "Device Operation"): taken apart with no assumption about how
//! it is cut into descriptors, and checked, once, against what the device is.

use vm_memory::{GuestAddress, VolatileSlice};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::{DISCARD_MAX, ID_LENGTH, REQUEST_MAX, SECTOR};
use crate::GuestMemory;
use crate::queue::{Buffers, Chain};

const HEADER_LENGTH: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`: first sector, number of sectors, flags.
const SEGMENT_LENGTH: usize = 16;

/// Why a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    /// It cannot be done here and now, or at all on a read-only device.
    Io,
    /// The device does not know how.
    Unsupported,
}

impl Failure {
    /// The status byte.
    pub(super) fn status(self) -> u8 {
        // Both are 1 and 2.
        match self {
            Self::Io => VIRTIO_BLK_S_IOERR as u8,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
        }
    }
}

/// What a request may do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// The device's size in sectors.
    pub(super) sectors: u64,
    /// Whether nothing may be changed.
    pub(super) read_only: bool,
}

/// A request.
#[derive(Debug)]
pub(super) struct Request<'m> {
    kind: u32,
    sector: u64,
    buffers: Buffers<'m>,
    /// Where its status byte goes.
    pub(super) status: GuestAddress,
}

/// What a request asks for, within the device's limits. Offsets and lengths are in bytes.
#[derive(Debug)]
pub(super) enum Action<'m> {
    /// Fill buffers.
    Read { buffers: Vec<VolatileSlice<'m>>, offset: u64, length: u32 },
    /// Write buffers.
    Write { buffers: Vec<VolatileSlice<'m>>, offset: u64, length: u32 },
    /// Bring all completed writes to the disk.
    Flush,
    /// Let go of a range, whatever it reads as from then on.
    Discard { offset: u64, length: u64 },
    /// Have a range read as zeros; `unmap` says whether it may be let go of.
    Zero { offset: u64, length: u32, unmap: bool },
    /// Put the serial number into buffers.
    Identify { buffers: Vec<VolatileSlice<'m>> },
}

impl<'m> Request<'m> {
    /// Takes a chain apart.
    ///
    /// # Errors
    /// Why there is no request in it, or no place for its status.
    pub(super) fn parse(memory: &'m GuestMemory, chain: Chain<'m>) -> Result<Self, &'static str> {
        const NO_STATUS: &str = "a request has no status byte";
        let mut buffers = Buffers::of(memory, chain)?;
        let mut header = [0; HEADER_LENGTH];
        buffers.take(&mut header).ok_or("a request has no header")?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let status = buffers.writable_end.ok_or(NO_STATUS)?;
        let last = buffers.writable.last_mut().ok_or(NO_STATUS)?;
        *last = last.subslice(0, last.len() - 1).map_err(|_| NO_STATUS)?;
        let (kind, sector) = (u32::from_le_bytes([k0, k1, k2, k3]), u64::from_le_bytes(sector));
        Ok(Self { kind, sector, buffers, status })
    }

    /// What it asks for.
    ///
    /// # Errors
    /// What it is answered if that cannot be.
    pub(super) fn action(self, limits: Limits) -> Result<Action<'m>, Failure> {
        let Self { kind, sector, buffers, .. } = self;
        match kind {
            VIRTIO_BLK_T_IN => {
                let buffers = buffers.writable;
                let (offset, length) = limits.transfer(sector, &buffers)?;
                Ok(Action::Read { buffers, offset, length })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Action::Flush),
            VIRTIO_BLK_T_GET_ID if length(&buffers.writable) < ID_LENGTH as u64 => Err(Failure::Io),
            VIRTIO_BLK_T_GET_ID => Ok(Action::Identify { buffers: buffers.writable }),
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if limits.read_only => Err(Failure::Io),
            VIRTIO_BLK_T_OUT => {
                let buffers = buffers.readable;
                let (offset, length) = limits.transfer(sector, &buffers)?;
                Ok(Action::Write { buffers, offset, length })
            }
            VIRTIO_BLK_T_DISCARD => {
                let (offset, length, flags) = limits.segment(buffers, DISCARD_MAX)?;
                if flags == 0 { Ok(Action::Discard { offset, length }) } else { Err(Failure::Unsupported) }
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let (offset, length, flags) = limits.segment(buffers, REQUEST_MAX)?;
                let length = u32::try_from(length).map_err(|_| Failure::Io)?;
                let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
                let known = flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP == 0;
                if known { Ok(Action::Zero { offset, length, unmap }) } else { Err(Failure::Unsupported) }
            }
            _ => Err(Failure::Unsupported),
        }
    }
}

impl Limits {
    /// Offset and length of a transfer.
    fn transfer(self, sector: u64, buffers: &[VolatileSlice<'_>]) -> Result<(u64, u32), Failure> {
        let length = length(buffers);
        if !length.is_multiple_of(SECTOR) {
            return Err(Failure::Io);
        }
        let offset = self.offset(sector, length, REQUEST_MAX)?;
        Ok((offset, u32::try_from(length).map_err(|_| Failure::Io)?))
    }

    /// Offset, length and flags of the one segment of a request that has no data.
    fn segment(self, mut buffers: Buffers<'_>, most: u64) -> Result<(u64, u64, u32), Failure> {
        let mut segment = [0; SEGMENT_LENGTH];
        if length(&buffers.readable) != SEGMENT_LENGTH as u64 {
            return Err(Failure::Io);
        }
        buffers.take(&mut segment).ok_or(Failure::Io)?;
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = segment;
        let length = u64::from(u32::from_le_bytes([n0, n1, n2, n3])) * SECTOR;
        let offset = self.offset(u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]), length, most)?;
        Ok((offset, length, u32::from_le_bytes(flags)))
    }

    /// Where in the file a range of so many bytes begins, checked against its end.
    fn offset(self, sector: u64, length: u64, most: u64) -> Result<u64, Failure> {
        let end = sector.checked_add(length / SECTOR).ok_or(Failure::Io)?;
        // What lies before the device's end in sectors is a position in bytes, too: the device's end is one.
        if length <= most && end <= self.sectors { Ok(sector * SECTOR) } else { Err(Failure::Io) }
    }
}

fn length(buffers: &[VolatileSlice<'_>]) -> u64 {
    buffers.iter().map(|slice| slice.len() as u64).sum()
}
