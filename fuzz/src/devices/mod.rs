//! Each virtio device, driven by bytes (see `driver.rs`): its registers, its queues, what it reads of requests, and what
//! happens on its other side on the host.

mod driver;

use std::collections::BTreeMap;
use std::io::{IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ::devices::balloon::Balloon;
use ::devices::balloon::host::HostBalloon;
use ::devices::blk::{Blk, Options};
use ::devices::console::{Console, ConsoleOutput};
use ::devices::device::VirtioDevice;
use ::devices::fs::Fs;
use ::devices::limit::{Limiter, Rate};
use ::devices::mem::Mem;
use ::devices::mem::host::HostMem;
use ::devices::net::tap::Tap;
use ::devices::net::{Net, NetOptions};
use ::devices::pmem::Pmem;
use ::devices::rng::Rng;
use ::devices::serial::Serial;
use ::devices::vsock::ports::HostPorts;
use ::devices::vsock::{GUEST_CID, HOST_CID, Vsock};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use self::driver::{Backend, REGION, Saved, drive, go_on, save};
use crate::files;
use crate::input::Input;
use crate::scratch;

/// The length of a region of a device that has one.
const REGION_LENGTH: u64 = 4 << 20;
/// The length of a disk.
const DISK_LENGTH: u64 = 128 << 10;
/// How much of it was written: what reads as something else than a hole, and at once.
const DISK_WRITTEN: usize = 64 << 10;

/// A limit that is soon reached, of every other input.
fn limiter(input: &mut Input<'_>) -> Option<Limiter> {
    if input.u8() % 4 != 3 {
        return None;
    }
    let rate = |size| Rate { size, refill: Duration::from_micros(50), burst: 8 };
    Some(Limiter::new(Some(rate(1000)), Some(rate(2))).expect("there are descriptors"))
}

/// A device, and what is behind it.
type Made = (Box<dyn VirtioDevice>, Box<dyn Backend>);

/// Makes a device in one of its shapes.
type Make = fn(&mut Input<'_>) -> Made;

/// Drives one of its shapes.
fn one(make: Make, bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (device, mut backend) = make(&mut input);
    drive(device, &mut *backend, &mut input);
}

macro_rules! devices {
    ($($name:ident, $make:ident;)*) => {
        $(
            #[doc = concat!("The device that `", stringify!($make), "` makes.")]
            pub fn $name(bytes: &[u8]) {
                one($make, bytes);
            }
        )*

        /// All of them.
        const DEVICES: &[Make] = &[$($make),*];
    };
}

devices! {
    balloon, make_balloon;
    blk, make_blk;
    console, make_console;
    fs, make_fs;
    mem, make_mem;
    net, make_net;
    pmem, make_pmem;
    rng, make_rng;
    vsock, make_vsock;
}

/// The state of a device that is saved, changed, and restored into another one of its shape; or one that was made up.
pub fn device_state(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let make = *input.one_of(DEVICES);
    let mut shape = Input::new(input.chunk());
    let mut again = shape.clone();
    let (device, mut backend) = make(&mut shape);
    let mut saved = if input.u8() & 1 == 0 {
        save(device, &mut *backend, &mut Input::new(input.chunk()))
    } else {
        Saved::made_up(input.chunk())
    };
    for _ in 0..input.u8() % 8 {
        let place = usize::from(input.u16());
        if let Some(byte) = saved.state.get_mut(place) {
            *byte ^= input.u8();
        }
    }
    let (device, mut backend) = make(&mut again);
    go_on(device, &mut *backend, saved, &mut input);
}

/// A device whose driver sends bytes, or says only what may be written.
struct Plain;

impl Backend for Plain {
    fn request(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        input.chunk().to_vec()
    }
}

/// The entropy device.
fn make_rng(input: &mut Input<'_>) -> Made {
    (Box::new(Rng::new(limiter(input))), Box::new(Plain))
}

struct Output(ConsoleOutput);

impl Backend for Output {
    fn request(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        input.chunk().to_vec()
    }

    fn check(&self) {
        let _ = self.0.tail();
    }
}

/// The console.
fn make_console(input: &mut Input<'_>) -> Made {
    let output = ConsoleOutput::default();
    (Box::new(Console::new(output.clone(), limiter(input))), Box::new(Output(output)))
}

/// The early console's port.
pub fn serial(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let output = ConsoleOutput::default();
    let mut serial = Serial::new(output.clone());
    while !input.is_empty() {
        let offset = input.u8();
        let offset = if offset & 0x80 == 0 { u16::from(offset) } else { input.u16() };
        if offset & 0x40 == 0 {
            serial.write(offset & !0x40, input.u8());
        } else {
            let _ = serial.read(offset & !0x40);
        }
    }
    let _ = output.tail();
}

struct Disk;

impl Backend for Disk {
    /// The ring works in threads of the kernel's.
    fn patience(&self) -> i32 {
        1
    }

    fn request(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        // VIRTIO 1.2 §5.2.6, `struct virtio_blk_req`.
        let kinds = [0u32, 0, 1, 1, 4, 8, 11, 13];
        let kind = if input.u8() & 1 == 0 { *input.one_of(&kinds) } else { input.u32() };
        let sector = if input.u8() & 1 == 0 { input.u16().into() } else { input.u64() };
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend(input.u32().to_le_bytes());
        bytes.extend(sector.to_le_bytes());
        match kind {
            11 | 13 => {
                let sector = if input.u8() & 1 == 0 { input.u16().into() } else { input.u64() };
                bytes.extend(sector.to_le_bytes());
                bytes.extend(input.u32().to_le_bytes());
                bytes.extend(input.u32().to_le_bytes());
            }
            1 => bytes.resize(bytes.len() + usize::from(input.u8() % 5) * 512, 0xa5),
            _ => {}
        }
        bytes
    }
}

/// The block device, on a file in memory.
fn make_blk(input: &mut Input<'_>) -> Made {
    let shape = input.u8();
    let options = Options {
        read_only: shape & 1 != 0,
        id: "fuzz".to_owned(),
        queues: u16::from(shape >> 1) % 3,
        limiter: limiter(input),
    };
    let mut disk = scratch::file(DISK_LENGTH);
    disk.write_all(&[0x5a; DISK_WRITTEN]).expect("a file in memory can be written");
    let device = Blk::new(disk, options).expect("a file has a length");
    (Box::new(device), Box::new(Disk))
}

struct Network(Vec<UnixDatagram>);

impl Backend for Network {
    fn request(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        // A header (VIRTIO 1.2 §5.1.6), as it comes, and a frame; or a command with its data (§5.1.6.5).
        let header = input.take(12).to_vec();
        [&header[..], input.chunk()].concat()
    }

    fn host(&mut self, input: &mut Input<'_>) {
        let tap = &self.0[usize::from(input.u8()) % self.0.len()];
        // A full queue drops.
        let _ = tap.send(input.chunk());
        while tap.recv(&mut [0; 2048]).is_ok() {}
    }
}

/// The network device, with messages in place of a tap.
fn make_net(input: &mut Input<'_>) -> Made {
    let shape = input.u8();
    let (mut taps, mut peers) = (Vec::new(), Vec::new());
    for _ in 0..=(shape & 1) {
        let (ours, theirs) = UnixDatagram::pair().expect("there are descriptors");
        for end in [&ours, &theirs] {
            end.set_nonblocking(true).expect("a socket need not block");
        }
        taps.push(Tap::stand_in(OwnedFd::from(ours)));
        peers.push(theirs);
    }
    let options = NetOptions {
        mac: (shape & 2 != 0).then_some([2, 0, 0, 0, 0, 2]),
        pinned: shape & 4 != 0,
        mtu: (shape & 8 != 0).then_some(1500),
        receive: limiter(input),
        transmit: limiter(input),
    };
    (Box::new(Net::new(taps, options)), Box::new(Network(peers)))
}

struct Sockets {
    ports: HostPorts,
    streams: BTreeMap<u32, UnixStream>,
    /// The name of the socket at which connections are asked for.
    callers: Option<Vec<u8>>,
}

/// The first of the host's ports.
const PORT: u32 = 1024;

impl Backend for Sockets {
    fn request(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        // VIRTIO 1.2 §5.10.6, `struct virtio_vsock_hdr`. What it gets wrong, another byte says.
        let wrong = input.u8();
        let cid = |bit: u8, right: u64, input: &mut Input<'_>| if wrong & bit == 0 { right } else { input.u64() };
        let (source, destination) = (cid(1, GUEST_CID, input), cid(2, HOST_CID, input));
        let ports = [70 + u32::from(input.u8() % 3), PORT + u32::from(input.u8() % 4)];
        let op = u16::from(input.u8() % 9);
        let data = if op == 5 { input.chunk() } else { &[] };
        let length = if wrong & 4 == 0 { data.len() as u32 } else { input.u32() };
        let kind = if wrong & 8 == 0 { 1 } else { input.u16() };
        let flags = if wrong & 16 == 0 { u32::from(input.u8() % 4) } else { input.u32() };
        let (room, taken) = if wrong & 32 == 0 { (64 << 10, input.u16().into()) } else { (input.u32(), input.u32()) };
        let mut bytes = Vec::with_capacity(44 + data.len());
        bytes.extend(source.to_le_bytes());
        bytes.extend(destination.to_le_bytes());
        bytes.extend([ports[0], ports[1], length].map(u32::to_le_bytes).as_flattened());
        bytes.extend([kind, op].map(u16::to_le_bytes).as_flattened());
        bytes.extend([flags, room, taken].map(u32::to_le_bytes).as_flattened());
        bytes.extend_from_slice(data);
        bytes
    }

    fn host(&mut self, input: &mut Input<'_>) {
        let what = input.u8();
        let port = PORT + u32::from(what >> 4 & 3);
        match what % 8 {
            1 if self.callers.is_some() => self.call(port, input),
            0 | 1 => {
                let (ours, theirs) = UnixStream::pair().expect("there are descriptors");
                ours.set_nonblocking(true).expect("a socket need not block");
                self.ports.offer(port, theirs);
                self.streams.insert(port, ours);
            }
            2 => self.ports.withdraw(port),
            3 => drop(self.streams.remove(&port)),
            4 => self.with(port, |stream| drop(stream.shutdown(std::net::Shutdown::Write))),
            5 => self.with(port, |mut stream| while matches!(stream.read(&mut [0; 4096]), Ok(1..)) {}),
            _ => {
                let bytes = input.chunk();
                self.with(port, |mut stream| drop(stream.write(bytes)));
            }
        }
    }

    fn close(&mut self) {
        self.streams.clear();
        self.ports.withdraw_all();
    }
}

impl Sockets {
    /// Asks for a connection to a port of the guest's, or offers one of the host's; or says anything.
    fn call(&mut self, port: u32, input: &mut Input<'_>) {
        let Some(name) = &self.callers else { return };
        let address = SocketAddrUnix::new_abstract_name(name).expect("the name is short");
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None);
        let caller = UnixStream::from(socket.expect("there are descriptors"));
        // Too many wait to be let in.
        if rustix::net::connect(&caller, &address).is_err() {
            return;
        }
        let shape = input.u8();
        let line = match shape % 4 {
            0 | 1 => format!("CONNECT {}\n", 70 + u32::from(shape >> 6)).into_bytes(),
            2 => format!("OFFER {port}\n").into_bytes(),
            _ => input.chunk().to_vec(),
        };
        let (ours, theirs) = UnixStream::pair().expect("there are descriptors");
        ours.set_nonblocking(true).expect("a socket need not block");
        let handed = [theirs.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let hands_over = shape & 8 != 0 && control.push(SendAncillaryMessage::ScmRights(&handed));
        let parts = [IoSlice::new(&line)];
        // A socket that is new has room.
        let _ = rustix::net::sendmsg(&caller, &parts, &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
        if hands_over {
            self.streams.insert(port + 4, caller);
            self.streams.insert(port, ours);
        } else {
            self.streams.insert(port, caller);
        }
    }

    fn with(&self, port: u32, what: impl FnOnce(&UnixStream)) {
        if let Some(stream) = self.streams.get(&port) {
            what(stream);
        }
    }
}

/// The socket device, of every other input with a socket of the host at which somebody asks for connections.
fn make_vsock(input: &mut Input<'_>) -> Made {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let ports = HostPorts::default();
    let callers = (input.u8() & 1 == 1).then(|| {
        let (process, number) = (std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        format!("cofferdam-fuzz-{process}-{number}").into_bytes()
    });
    let listener = callers.as_ref().map(|name| {
        let address = SocketAddr::from_abstract_name(name).expect("the name is short");
        UnixListener::bind_addr(&address).expect("nobody else has the name")
    });
    let device = Vsock::new(ports.clone(), listener, limiter(input)).expect("there are descriptors");
    (Box::new(device), Box::new(Sockets { ports, streams: BTreeMap::new(), callers }))
}

struct Ballooned(HostBalloon);

impl Backend for Ballooned {
    fn request(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        // Page numbers in the beginning of memory, or statistics, or anything (VIRTIO 1.2 §5.5.6).
        match input.u8() % 3 {
            0 => input.chunk().to_vec(),
            1 => input.chunk().iter().flat_map(|page| (u32::from(*page) * 8).to_le_bytes()).collect(),
            _ => {
                let values = input.chunk().chunks_exact(9);
                values.flat_map(|value| [&value[..1], &[0], &value[1..]].concat()).collect()
            }
        }
    }

    fn host(&mut self, input: &mut Input<'_>) {
        match input.u8() % 3 {
            0 => self.0.set_target_pages(input.u32()),
            1 => self.0.ask(Box::new(|| ())),
            _ => drop((self.0.statistics(), self.0.actual_pages())),
        }
    }
}

/// The balloon.
fn make_balloon(_: &mut Input<'_>) -> Made {
    let host = HostBalloon::new().expect("there are descriptors");
    (Box::new(Balloon::new(host.clone())), Box::new(Ballooned(host)))
}

struct Plugged(HostMem);

impl Backend for Plugged {
    fn request(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        // VIRTIO 1.2 §5.15.6, `struct virtio_mem_req`.
        let kind = u16::from(input.u8() % 5);
        let address =
            if input.u8().is_multiple_of(4) { input.u64() } else { REGION + (u64::from(input.u8() % 4) << 21) };
        let blocks = if input.u8().is_multiple_of(4) { input.u16() } else { u16::from(input.u8() % 3) };
        let mut bytes = [0; 24];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&address.to_le_bytes());
        bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
        bytes.to_vec()
    }

    fn host(&mut self, input: &mut Input<'_>) {
        self.0.request(u64::from(input.u8()) << 20);
        assert!(self.0.plugged() <= self.0.size(), "more memory is plugged than there is");
    }
}

/// The memory device.
fn make_mem(_: &mut Input<'_>) -> Made {
    let host = HostMem::new(REGION_LENGTH).expect("there are descriptors");
    host.request(REGION_LENGTH);
    (Box::new(Mem::new(host.clone(), REGION)), Box::new(Plugged(host)))
}

/// Persistent memory, on a file in memory or on one that cannot change.
fn make_pmem(input: &mut Input<'_>) -> Made {
    let file = (input.u8() & 1 == 0).then(|| scratch::file(REGION_LENGTH));
    let device = Pmem::new(file, REGION..REGION + REGION_LENGTH, limiter(input));
    (Box::new(device), Box::new(Plain))
}

struct Files(files::Host);

impl Backend for Files {
    /// Locks are waited for in threads.
    fn patience(&self) -> i32 {
        1
    }

    fn request(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        files::request(input)
    }

    fn host(&mut self, input: &mut Input<'_>) {
        self.0.change(input);
    }

    fn check(&self) {
        self.0.check();
    }
}

/// The file system device, on a directory or a file in memory.
fn make_fs(input: &mut Input<'_>) -> Made {
    let (host, server) = files::Host::serve(input);
    let device = Fs::new(server, "fuzz", 2, limiter(input)).expect("the tag fits");
    (Box::new(device), Box::new(Files(host)))
}

/// Token buckets of any size: what is never waited for is said at once, what was lifted is never waited for.
pub fn limits(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut rate = || {
        let wanted = input.u8() & 1 == 0;
        let refill = Duration::new(input.u64(), input.u32() % 1_000_000_000);
        wanted.then(|| Rate { size: input.u64(), refill, burst: input.u64() })
    };
    let (bytes, operations) = (rate(), rate());
    let mut limiter = Limiter::new(bytes, operations).expect("there are descriptors");
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        match input.u8() % 4 {
            0 => drop(limiter.admit()),
            1 => limiter.charge(input.u64()),
            2 => limiter.wake(),
            _ => limiter.reset(),
        }
    }
    limiter.lift();
    assert!(limiter.admit(), "a limiter that was lifted limits");
}

/// The most steps of one input with a limiter.
const STEPS_MAX: usize = 300;
