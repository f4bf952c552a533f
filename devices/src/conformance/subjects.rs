//! The devices.

use std::fs::File;
use std::os::unix::net::UnixDatagram;

use fuse_abi::linux::fuse_opcode;
use tempfile::TempDir;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ};
use vm_memory::{Bytes, GuestAddress};

use super::{Subject, conformance};
use crate::balloon::Balloon;
use crate::balloon::host::HostBalloon;
use crate::blk::{Blk, Options};
use crate::console::{Console, ConsoleOutput};
use crate::device::{Event, VirtioDevice};
use crate::fs::testing;
use crate::mem::Mem;
use crate::mem::host::HostMem;
use crate::net::tap::Tap;
use crate::net::{Net, NetOptions};
use crate::pmem::Pmem;
use crate::rng::Rng;
use crate::testing::{BUFFERS, Buffer, Driver};
use crate::vsock::ports::HostPorts;
use crate::vsock::{GUEST_CID, HOST_CID, Vsock};

conformance!(rng, Entropy);
conformance!(console, Output);
conformance!(vsock, Sockets);
conformance!(blk, Disk);
conformance!(net, Network);
conformance!(balloon, Ballooned);
conformance!(mem, Memory);
conformance!(pmem, Persistent);
conformance!(fs, Files);

/// Puts bytes into memory and gives the buffer that they are.
fn data(driver: &Driver, at: u64, bytes: &[u8]) -> Buffer {
    driver.memory.write_slice(bytes, GuestAddress(BUFFERS + at)).unwrap();
    Buffer { address: BUFFERS + at, length: bytes.len() as u32, writable: false }
}

fn room(at: u64, length: u32) -> Buffer {
    Buffer { address: BUFFERS + at, length, writable: true }
}

fn read<const N: usize>(driver: &Driver, at: u64) -> [u8; N] {
    let mut bytes = [0; N];
    driver.memory.read_slice(&mut bytes, GuestAddress(BUFFERS + at)).unwrap();
    bytes
}

/// How many bytes the device wrote for what was asked.
fn used(driver: &mut Driver, queue: usize) -> u32 {
    driver.used(queue).expect("it was not served").1
}

struct Entropy;

impl Subject for Entropy {
    const QUEUE: usize = 0;
    const FEATURES: u32 = 0;
    const SERVED: &'static str = "requests";
    // It has nothing to refuse: whatever room there is can be filled.
    const REFUSED: Option<&'static str> = None;

    fn new() -> Self {
        Self
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(Rng::new(None))
    }

    fn ask(&mut self, driver: &mut Driver) {
        driver.offer(0, &[room(0, 64)]);
    }

    fn check(&mut self, driver: &mut Driver) {
        assert_eq!(used(driver, 0), 64);
    }
}

struct Output(ConsoleOutput);

impl Subject for Output {
    const QUEUE: usize = 1;
    const FEATURES: u32 = 0;
    const SERVED: &'static str = "output_bytes";
    const REFUSED: Option<&'static str> = Some("dropped_bytes");

    fn new() -> Self {
        Self(ConsoleOutput::default())
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(Console::new(self.0.clone(), None))
    }

    fn ask(&mut self, driver: &mut Driver) {
        let buffer = data(driver, 0, b"a line\n");
        driver.offer(1, &[buffer]);
    }

    fn check(&mut self, driver: &mut Driver) {
        assert_eq!(used(driver, 1), 0);
        assert!(self.0.tail().ends_with(b"a line\n"));
    }

    fn refuse(&mut self, driver: &mut Driver) {
        driver.offer(1, &[Buffer { length: 100 << 10, ..data(driver, 0, b"") }]);
        driver.device.dispatch(Event::Queue(1));
    }
}

/// A port that nobody offers: each packet is answered with a reset.
struct Sockets(HostPorts);

impl Sockets {
    fn send(driver: &mut Driver, op: u16) {
        let header = [
            &GUEST_CID.to_le_bytes()[..],
            &HOST_CID.to_le_bytes(),
            &[7, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 1, 0],
            &op.to_le_bytes(),
            &[0; 12],
        ];
        let header = data(driver, 0, &header.concat());
        driver.offer(0, &[room(0x1000, 4096)]);
        driver.offer(1, &[header]);
    }
}

impl Subject for Sockets {
    const QUEUE: usize = 1;
    const FEATURES: u32 = 0;
    const SERVED: &'static str = "connections_reset";
    const REFUSED: Option<&'static str> = Some("connections_refused");

    fn new() -> Self {
        Self(HostPorts::default())
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(Vsock::new(self.0.clone(), None, None).unwrap())
    }

    fn ask(&mut self, driver: &mut Driver) {
        // Data of no connection.
        Self::send(driver, 5);
    }

    fn check(&mut self, driver: &mut Driver) {
        assert_eq!((used(driver, 1), used(driver, 0)), (0, 44));
        assert_eq!(read::<2>(driver, 0x1000 + 30), [3, 0], "an answer that is a reset");
    }

    fn refuse(&mut self, driver: &mut Driver) {
        Self::send(driver, 1);
        driver.device.dispatch(Event::Queue(1));
    }
}

struct Disk(File);

impl Disk {
    fn request(driver: &mut Driver, kind: u32) {
        let header = [kind.to_le_bytes(), [0; 4], [1, 0, 0, 0], [0; 4]];
        let header = data(driver, 0, header.as_flattened());
        let sector = data(driver, 0x1000, &[7; 512]);
        driver.memory.write_obj(0xffu8, GuestAddress(BUFFERS + 0x2000)).unwrap();
        driver.offer(0, &[header, sector, room(0x2000, 1)]);
    }
}

impl Subject for Disk {
    const QUEUE: usize = 0;
    const FEATURES: u32 = 1 << virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
    const SERVED: &'static str = "written_bytes";
    const REFUSED: Option<&'static str> = Some("failed_requests");

    fn new() -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        Self(file)
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(Blk::new(self.0.try_clone().unwrap(), Options { queues: 2, ..Options::default() }).unwrap())
    }

    fn ask(&mut self, driver: &mut Driver) {
        Self::request(driver, 1);
    }

    fn check(&mut self, driver: &mut Driver) {
        assert_eq!(driver.wait_used(0).1, 1);
        assert_eq!(read::<1>(driver, 0x2000), [0]);
    }

    fn refuse(&mut self, driver: &mut Driver) {
        Self::request(driver, 99);
        driver.device.dispatch(Event::Queue(0));
    }
}

/// Two queues of something like a tap, and the other ends of them.
struct Network([(UnixDatagram, UnixDatagram); 2]);

impl Subject for Network {
    const QUEUE: usize = 1;
    const FEATURES: u32 = 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;
    const SERVED: &'static str = "transmitted_frames";
    const REFUSED: Option<&'static str> = Some("transmit_dropped_frames");

    fn new() -> Self {
        let pair = || UnixDatagram::pair().unwrap();
        let pairs = [pair(), pair()];
        pairs.iter().for_each(|(ours, _)| ours.set_nonblocking(true).unwrap());
        Self(pairs)
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        let taps = self.0.iter().map(|(ours, _)| Tap::stand_in(ours.try_clone().unwrap().into())).collect();
        let options = NetOptions { mac: None, pinned: false, mtu: None, receive: None, transmit: None };
        Box::new(Net::new(taps, options))
    }

    fn ask(&mut self, driver: &mut Driver) {
        let frame = data(driver, 0, &[0; 12 + 60]);
        driver.offer(1, &[frame]);
    }

    fn check(&mut self, driver: &mut Driver) {
        assert_eq!(used(driver, 1), 0);
        assert_eq!(self.0[0].1.recv(&mut [0; 256]).unwrap(), 12 + 60);
    }

    fn refuse(&mut self, driver: &mut Driver) {
        let frame = data(driver, 0, &[0; 13]);
        driver.offer(1, &[frame]);
        driver.device.dispatch(Event::Queue(1));
    }
}

struct Ballooned(HostBalloon);

impl Ballooned {
    fn inflate(driver: &mut Driver, page: u32) {
        let pages = data(driver, 0, &page.to_le_bytes());
        driver.offer(0, &[pages]);
    }
}

impl Subject for Ballooned {
    const QUEUE: usize = 0;
    // Statistics and reports.
    const FEATURES: u32 = 1 << 1 | 1 << 5;
    const SERVED: &'static str = "inflated_pages";
    const REFUSED: Option<&'static str> = Some("refused_bytes");

    fn new() -> Self {
        Self(HostBalloon::new().unwrap())
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(Balloon::new(self.0.clone()))
    }

    fn ask(&mut self, driver: &mut Driver) {
        Self::inflate(driver, (BUFFERS >> 12) as u32 + 32);
    }

    fn check(&mut self, driver: &mut Driver) {
        assert_eq!(used(driver, 0), 0);
    }

    fn refuse(&mut self, driver: &mut Driver) {
        Self::inflate(driver, u32::MAX);
        driver.device.dispatch(Event::Queue(0));
    }
}

/// A region of one block, which is not plugged.
struct Memory(HostMem);

impl Memory {
    fn request(driver: &mut Driver, kind: u16) {
        let mut request = [0; 24];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&(2u64 << 20).to_le_bytes());
        request[16] = 1;
        let request = data(driver, 0, &request);
        driver.offer(0, &[request, room(64, 10)]);
    }
}

impl Subject for Memory {
    const QUEUE: usize = 0;
    const FEATURES: u32 = 1 << 1;
    const SERVED: &'static str = "served_requests";
    const REFUSED: Option<&'static str> = Some("refused_requests");

    fn new() -> Self {
        Self(HostMem::new(2 << 20).unwrap())
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(Mem::new(self.0.clone(), 2 << 20))
    }

    fn ask(&mut self, driver: &mut Driver) {
        Self::request(driver, 3);
    }

    fn check(&mut self, driver: &mut Driver) {
        assert_eq!(used(driver, 0), 10);
        assert_eq!(read::<10>(driver, 64)[8], 1, "the block is not plugged");
    }

    fn refuse(&mut self, driver: &mut Driver) {
        // Nothing was asked for.
        Self::request(driver, 0);
        driver.device.dispatch(Event::Queue(0));
    }
}

struct Persistent(File);

impl Persistent {
    fn request(driver: &mut Driver, kind: u32) {
        let request = data(driver, 0, &kind.to_le_bytes());
        driver.offer(0, &[request, room(64, 4)]);
    }
}

impl Subject for Persistent {
    const QUEUE: usize = 0;
    const FEATURES: u32 = 0;
    const SERVED: &'static str = "flushes";
    const REFUSED: Option<&'static str> = Some("failed_requests");

    fn new() -> Self {
        Self(tempfile::tempfile().unwrap())
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(Pmem::new(Some(self.0.try_clone().unwrap()), 2 << 20..4 << 20, None))
    }

    fn ask(&mut self, driver: &mut Driver) {
        Self::request(driver, 0);
    }

    fn check(&mut self, driver: &mut Driver) {
        assert_eq!((used(driver, 0), read::<4>(driver, 64)), (4, [0; 4]));
    }

    fn refuse(&mut self, driver: &mut Driver) {
        Self::request(driver, 7);
        driver.device.dispatch(Event::Queue(0));
    }
}

/// A directory with a file in it, and what the driver has found of that.
struct Files {
    folder: TempDir,
    /// The numbers of the file and of it when it is open, as long as there is a session.
    found: Option<(u64, u64)>,
}

impl Files {
    /// Asks for something, not by the queue that is looked at, and gives what follows the header of the answer.
    fn answer(driver: &mut Driver, operation: fuse_opcode, node: u64, body: &[u8]) -> [u8; 256] {
        Self::request(driver, 2, operation, node, body);
        driver.device.dispatch(Event::Queue(2));
        used(driver, 2);
        assert_eq!(read::<4>(driver, 0x1004), [0; 4], "{operation:?}");
        read(driver, 0x1010)
    }

    fn request(driver: &mut Driver, queue: usize, operation: fuse_opcode, node: u64, body: &[u8]) {
        let message = testing::message(operation, node, body);
        let message = data(driver, 0, &message);
        driver.offer(queue, &[message, room(0x1000, 512)]);
    }

    /// Opens the file, once in a session.
    fn find(&mut self, driver: &mut Driver) -> (u64, u64) {
        // A driver that began anew begins a session.
        if driver.metric("handles") == 0 {
            self.found = None;
        }
        *self.found.get_or_insert_with(|| {
            Self::answer(driver, fuse_opcode::FUSE_INIT, 0, &testing::init());
            let number = |answer: [u8; 256]| u64::from_le_bytes(*answer.first_chunk().unwrap());
            let node = number(Self::answer(driver, fuse_opcode::FUSE_LOOKUP, 1, b"file\0"));
            (node, number(Self::answer(driver, fuse_opcode::FUSE_OPEN, node, &[2, 0, 0, 0, 0, 0, 0, 0])))
        })
    }
}

impl Subject for Files {
    const QUEUE: usize = 1;
    const FEATURES: u32 = 0;
    const SERVED: &'static str = "read_bytes";
    const REFUSED: Option<&'static str> = Some("errors");

    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), "content").unwrap();
        Self { folder, found: None }
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        testing::device_of(&self.folder, 2)
    }

    fn ask(&mut self, driver: &mut Driver) {
        let (node, handle) = self.find(driver);
        let body = [handle, 0, 100, 0, 0];
        Self::request(driver, 1, fuse_opcode::FUSE_READ, node, body.map(u64::to_le_bytes).as_flattened());
    }

    fn check(&mut self, driver: &mut Driver) {
        assert_eq!(used(driver, 1), 16 + 7);
        assert_eq!(&read::<7>(driver, 0x1010), b"content");
    }

    fn refuse(&mut self, driver: &mut Driver) {
        Self::request(driver, 1, fuse_opcode::FUSE_LOOKUP, 1, b"../file\0");
        driver.device.dispatch(Event::Queue(1));
    }
}
