//! The block device (VIRTIO 1.2 §5.2, "Block Device", device ID 2).
//!
//! One queue of requests: a 16-byte header, data, and a status byte that the device writes. Reads, writes, flushes and
//! the serial number are served; everything else is VIRTIO_BLK_S_UNSUPP. Data moves between the file and guest memory
//! without a copy. Read-only is decided here, by never writing, whatever the driver negotiated.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use vm_memory::{Bytes, VolatileSlice};

use crate::GuestMemory;
use crate::device::{Broken, Event, Resources, VirtioDevice, read_config_bytes};
use crate::guest_io::{read_exact_at, write_all_at};
use crate::queue::{Buffers, Chain, QUEUE_SIZE_MAX};

/// The unit of the capacity and of request positions (§5.2.2).
const SECTOR: u64 = 512;
/// The most data in one request. Linux asks for 1.25 MiB at most; a longer request would keep the event loop busy for as
/// long as the guest likes.
const REQUEST_MAX: u64 = 4 << 20;
/// Header and status need a descriptor each; the rest can be data.
const SEGMENTS_MAX: u32 = QUEUE_SIZE_MAX as u32 - 2;
/// The length of the serial number field (§5.2.6).
const ID_LENGTH: usize = 20;
const HEADER_LENGTH: usize = 16;
const QUEUE_SIZES: [u16; 1] = [QUEUE_SIZE_MAX];

/// The status byte of a request that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    IoError,
    Unsupported,
}

/// A block device with a file behind it.
#[derive(Debug)]
pub struct Blk {
    file: File,
    read_only: bool,
    sectors: u64,
    id: [u8; ID_LENGTH],
    configuration: [u8; 24],
}

impl Blk {
    /// A device as large as the file, in whole sectors. `id` is what the guest reads as its serial number, cut at 20 bytes.
    ///
    /// # Errors
    /// When the file's length cannot be found.
    pub fn new(mut file: File, read_only: bool, id: &str) -> io::Result<Self> {
        // Seeking gives the length of block devices too, where metadata says zero.
        let sectors = file.seek(SeekFrom::End(0))? / SECTOR;
        let mut padded = [0; ID_LENGTH];
        let length = id.len().min(ID_LENGTH);
        padded[..length].copy_from_slice(&id.as_bytes()[..length]);
        // struct virtio_blk_config (§5.2.4): capacity, size_max, seg_max, geometry, blk_size.
        let mut configuration = [0; 24];
        configuration[0..8].copy_from_slice(&sectors.to_le_bytes());
        configuration[12..16].copy_from_slice(&SEGMENTS_MAX.to_le_bytes());
        configuration[20..24].copy_from_slice(&512u32.to_le_bytes());
        Ok(Self { file, read_only, sectors, id: padded, configuration })
    }

    /// Serves one request and returns how many bytes were written into its buffers, the status byte included.
    fn serve(&self, memory: &GuestMemory, chain: Chain<'_>) -> Result<u32, &'static str> {
        let mut request = Request::parse(memory, chain)?;
        let (status, written) = match self.execute(&mut request) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Status::IoError) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Status::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
        };
        let status = u8::try_from(status).unwrap_or(u8::MAX);
        request.status.write_obj(status, 0).map_err(|_| "the status byte cannot be written")?;
        Ok(written + 1)
    }

    fn execute(&self, request: &mut Request<'_>) -> Result<u32, Status> {
        match request.kind {
            VIRTIO_BLK_T_IN => {
                let (offset, length) = self.range(request.sector, &request.input)?;
                read_exact_at(&self.file, &request.input, offset).map_err(|_| Status::IoError)?;
                Ok(length)
            }
            VIRTIO_BLK_T_OUT if !self.read_only => {
                let (offset, _) = self.range(request.sector, &request.output)?;
                write_all_at(&self.file, &request.output, offset).map_err(|_| Status::IoError)?;
                Ok(0)
            }
            VIRTIO_BLK_T_OUT => Err(Status::IoError),
            VIRTIO_BLK_T_FLUSH if self.read_only => Ok(0),
            VIRTIO_BLK_T_FLUSH => self.file.sync_data().map(|()| 0).map_err(|_| Status::IoError),
            VIRTIO_BLK_T_GET_ID => {
                let field = request.input.first().filter(|slice| slice.len() >= ID_LENGTH).ok_or(Status::IoError)?;
                field.write_slice(&self.id, 0).map_err(|_| Status::IoError)?;
                Ok(ID_LENGTH as u32)
            }
            _ => Err(Status::Unsupported),
        }
    }

    /// The file range of a transfer at `sector`, checked against the device's end.
    fn range(&self, sector: u64, buffers: &[VolatileSlice<'_>]) -> Result<(u64, u32), Status> {
        let length: u64 = buffers.iter().map(|slice| slice.len() as u64).sum();
        let end = sector.checked_add(length / SECTOR).ok_or(Status::IoError)?;
        if !length.is_multiple_of(SECTOR) || length > REQUEST_MAX || end > self.sectors {
            return Err(Status::IoError);
        }
        Ok((sector * SECTOR, u32::try_from(length).map_err(|_| Status::IoError)?))
    }
}

/// A request taken apart (§5.2.6, "Device Operation"), with no assumption about how it is cut into descriptors.
struct Request<'m> {
    kind: u32,
    sector: u64,
    /// Data from the driver.
    output: Vec<VolatileSlice<'m>>,
    /// Room for data to the driver.
    input: Vec<VolatileSlice<'m>>,
    status: VolatileSlice<'m>,
}

impl<'m> Request<'m> {
    fn parse(memory: &'m GuestMemory, chain: Chain<'m>) -> Result<Self, &'static str> {
        let mut buffers = Buffers::of(memory, chain)?;
        let mut header = [0; HEADER_LENGTH];
        buffers.take(&mut header).ok_or("a request has no header")?;
        let Buffers { readable: output, writable: mut input, .. } = buffers;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        while input.last().is_some_and(|slice| slice.is_empty()) {
            input.pop();
        }
        let last = input.pop().ok_or("a request has no status byte")?;
        let (data, status) = last.split_at(last.len() - 1).map_err(|_| "a request has no status byte")?;
        if !data.is_empty() {
            input.push(data);
        }
        Ok(Self {
            kind: u32::from_le_bytes([k0, k1, k2, k3]),
            sector: u64::from_le_bytes(sector),
            output,
            input,
            status,
        })
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let read_only = if self.read_only { 1 << VIRTIO_BLK_F_RO } else { 1 << VIRTIO_BLK_F_FLUSH };
        1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | read_only
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&self.configuration, offset, data);
    }

    fn start(&mut self, _: u64) {}

    fn process(&mut self, resources: Resources<'_>, _: Event) -> Result<(), Broken> {
        let Resources { memory, queues: [queue], .. } = resources else { return Ok(()) };
        queue.for_each(memory, |chain| self.serve(memory, chain).map_err(|reason| Broken::Chain { queue: 0, reason }))
    }

    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::desc::split::Descriptor;
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::GuestAddress;

    use super::*;

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;

    struct Fixture {
        memory: GuestMemory,
        device: Blk,
    }

    impl Fixture {
        fn new(read_only: bool) -> Self {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&[7; 4 * 512]).unwrap();
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
            Self { memory, device: Blk::new(file, read_only, "disk").unwrap() }
        }

        /// Runs one request made of `descriptors` and gives the status byte at 0x9000.
        fn run(&mut self, kind: u32, sector: u64, descriptors: &[Descriptor]) -> Result<u8, &'static str> {
            self.memory.write_obj(kind, GuestAddress(0x1000)).unwrap();
            self.memory.write_obj(sector, GuestAddress(0x1008)).unwrap();
            self.memory.write_obj(0xffu8, GuestAddress(0x9000)).unwrap();
            let queue = MockSplitQueue::create(&self.memory, GuestAddress(0x2_0000), 16);
            let raw: Vec<_> = descriptors.iter().copied().map(RawDescriptor::from).collect();
            let chain = queue.build_desc_chain(&raw).unwrap();
            self.device.serve(&self.memory, chain)?;
            Ok(self.memory.read_obj(GuestAddress(0x9000)).unwrap())
        }
    }

    fn header() -> Descriptor {
        Descriptor::new(0x1000, 16, NEXT, 1)
    }

    fn status() -> Descriptor {
        Descriptor::new(0x9000, 1, WRITE, 0)
    }

    #[test]
    fn a_read_fills_the_buffer() {
        let mut fixture = Fixture::new(true);
        let data = Descriptor::new(0x3000, 1024, NEXT | WRITE, 2);
        assert_eq!(fixture.run(VIRTIO_BLK_T_IN, 2, &[header(), data, status()]), Ok(0));
        assert_eq!(fixture.memory.read_obj::<[u8; 4]>(GuestAddress(0x33fc)).unwrap(), [7; 4]);
    }

    #[test]
    fn a_read_past_the_end_and_a_position_that_overflows_are_errors() {
        let mut fixture = Fixture::new(true);
        let data = Descriptor::new(0x3000, 1024, NEXT | WRITE, 2);
        for sector in [3, u64::MAX, u64::MAX / 512] {
            assert_eq!(fixture.run(VIRTIO_BLK_T_IN, sector, &[header(), data, status()]), Ok(1));
        }
    }

    #[test]
    fn a_write_to_a_read_only_device_changes_nothing() {
        let mut fixture = Fixture::new(true);
        let data = Descriptor::new(0x3000, 512, NEXT, 2);
        assert_eq!(fixture.run(VIRTIO_BLK_T_OUT, 0, &[header(), data, status()]), Ok(1));
        let mut content = Vec::new();
        fixture.device.file.seek(SeekFrom::Start(0)).unwrap();
        fixture.device.file.read_to_end(&mut content).unwrap();
        assert!(content.iter().all(|byte| *byte == 7));
    }

    #[test]
    fn a_write_reaches_the_file() {
        let mut fixture = Fixture::new(false);
        fixture.memory.write_slice(&[9; 512], GuestAddress(0x3000)).unwrap();
        let data = Descriptor::new(0x3000, 512, NEXT, 2);
        assert_eq!(fixture.run(VIRTIO_BLK_T_OUT, 1, &[header(), data, status()]), Ok(0));
        let mut content = [0; 1024];
        fixture.device.file.seek(SeekFrom::Start(0)).unwrap();
        fixture.device.file.read_exact(&mut content).unwrap();
        assert_eq!((content[511], content[512]), (7, 9));
    }

    #[test]
    fn an_unknown_request_is_unsupported() {
        assert_eq!(Fixture::new(false).run(99, 0, &[header(), status()]), Ok(2));
    }

    #[test]
    fn chains_without_header_status_or_memory_break_the_device() {
        let mut fixture = Fixture::new(false);
        assert!(fixture.run(0, 0, &[status()]).is_err());
        assert!(fixture.run(0, 0, &[Descriptor::new(0x1000, 16, 0, 0)]).is_err());
        assert!(fixture.run(0, 0, &[Descriptor::new(0x1000, 15, NEXT, 1), status()]).is_err());
        let outside = Descriptor::new(u64::MAX - 4096, 4096, NEXT | WRITE, 2);
        assert!(fixture.run(0, 0, &[header(), outside, status()]).is_err());
    }

    #[test]
    fn the_serial_number_needs_its_whole_field() {
        let mut fixture = Fixture::new(false);
        let field = |length| Descriptor::new(0x3000, length, NEXT | WRITE, 2);
        assert_eq!(fixture.run(VIRTIO_BLK_T_GET_ID, 0, &[header(), field(19), status()]), Ok(1));
        assert_eq!(fixture.run(VIRTIO_BLK_T_GET_ID, 0, &[header(), field(20), status()]), Ok(0));
        assert_eq!(fixture.memory.read_obj::<[u8; 5]>(GuestAddress(0x3000)).unwrap(), *b"disk\0");
    }
}
