//! What all devices have in common: each figure that one counts is a figure that something makes it count, and nothing that
//! makes it count takes a system call that the thread may not make which the device is on.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{IoSlice, PipeWriter, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::AsFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use fuse::{Export, Limits, Options as ExportOptions, Quota, Server, Source};
use fuse_abi::linux::{FUSE_LK_FLOCK, FUSE_ROOT_ID};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MQ};
use vm_memory::{Bytes, GuestAddress};

use crate::balloon::Balloon;
use crate::balloon::host::HostBalloon;
use crate::blk::{Blk, Options};
use crate::console::{Console, ConsoleOutput};
use crate::device::{Event, Loop, VirtioDevice};
use crate::fs::Fs;
use crate::limit::{Limiter, Rate};
use crate::mem::Mem;
use crate::mem::host::HostMem;
use crate::net::peer::{SHORT_HEADER, Wire, tap};
use crate::net::{Net, NetOptions};
use crate::pmem::Pmem;
use crate::ring_io::RingIo;
use crate::rng::Rng;
use crate::testing::{BUFFERS, Buffer, Driver};
use crate::vsock::ports::HostPorts;
use crate::vsock::{GUEST_CID, HOST_CID, Vsock};

fn room(at: u64, length: u32) -> Buffer {
    Buffer { address: BUFFERS + at, length, writable: true }
}

fn data(at: u64, length: u32) -> Buffer {
    Buffer { address: BUFFERS + at, length, writable: false }
}

/// So little that whoever does anything twice has to wait, until [`Driver::device`] is flushed.
fn limiter() -> Option<Limiter> {
    let rate = Rate { size: 1, refill: Duration::from_secs(3600), burst: 0 };
    Some(Limiter::new(None, Some(rate)).unwrap())
}

/// Set for a test that is to do its work as a device's thread does it.
const CONFINED: &str = "DEVICES_CONFINED";
/// The exit code of its process, which has to end there: such a thread never ends by itself, and may not.
const CONFINED_CODE: i32 = 42;

/// Starts a device, has `drive` make it count, and breaks and resets it; gives the figures that are still zero.
fn idle_figures(device: Box<dyn VirtioDevice>, queue: u16, drive: impl FnOnce(&mut Driver)) -> BTreeSet<&'static str> {
    idle_figures_of(Driver::new(device).start(), queue, drive)
}

fn idle_figures_of(mut driver: Driver, queue: u16, drive: impl FnOnce(&mut Driver)) -> BTreeSet<&'static str> {
    if std::env::var_os(CONFINED).is_some() {
        let kind = match driver.device.event_loop() {
            Loop::Shared => jailer::Thread::EventLoop,
            Loop::Disk => jailer::Thread::Disk,
            Loop::Files => jailer::Thread::Fs,
        };
        jailer::thread(kind).unwrap();
    }
    drive(&mut driver);
    driver.set_available(queue.into(), 5000);
    while driver.metric("broken") == 0 {
        driver.device.dispatch(Event::Queue(queue));
        if driver.metric("broken") == 0 {
            driver.turn();
        }
    }
    driver.write(0x70, 0);
    if std::env::var_os(CONFINED).is_some() {
        std::process::exit(CONFINED_CODE);
    }
    let metrics = driver.device.metrics();
    let names: BTreeSet<_> = metrics.iter().map(|(name, _)| *name).collect();
    assert_eq!(names.len(), metrics.len(), "two figures have one name: {metrics:?}");
    metrics.into_iter().filter(|(_, value)| *value == 0).map(|(name, _)| name).collect()
}

/// Runs a test of this module in a process of its own: a thread's filter cannot be taken off, and what is not allowed kills.
fn confined(test: &str) {
    let program = std::env::current_exe().unwrap();
    let output =
        Command::new(program).args(["--exact", &format!("tests::{test}")]).env(CONFINED, "1").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(CONFINED_CODE), "{test}: {} {text}", output.status);
}

#[test]
fn devices_do_nothing_that_is_not_allowed_to_their_threads() {
    for device in [
        "the_entropy_device",
        "the_console",
        "the_socket_device",
        "a_disk",
        "a_disk_without_a_ring",
        "a_network_device",
        "a_balloon",
        "a_memory_device",
        "a_persistent_memory_device",
        "a_file_system_device",
        "a_file_system_device_that_is_read_only",
    ] {
        confined(&format!("every_figure_of_{device}_counts"));
    }
}

/// The register that resets a device is written by a vCPU's thread.
#[test]
fn connections_are_let_go_of_with_what_is_allowed_to_a_vcpu() {
    if std::env::var_os(CONFINED).is_none() {
        return confined("connections_are_let_go_of_with_what_is_allowed_to_a_vcpu");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let vsock = Vsock::new(HostPorts::default(), Some(UnixListener::bind(&path).unwrap()), None).unwrap();
    let mut driver = Driver::new(Box::new(vsock)).start();
    let caller = call(&path, "CONNECT 7\n", None);
    driver.device.dispatch(Event::Backend(0));
    caller.set_nonblocking(true).unwrap();
    let vcpu = std::thread::spawn(move || {
        jailer::thread(jailer::Thread::Vcpu).unwrap();
        driver.write(0x70, 0);
        driver
    });
    let _driver = vcpu.join().unwrap();
    // What the caller was connected with is closed.
    assert_eq!(rustix::io::read(&caller, &mut [0]), Ok(0));
    std::process::exit(CONFINED_CODE);
}

#[test]
fn files_are_let_go_of_with_what_is_allowed_to_a_vcpu_and_later() {
    if std::env::var_os(CONFINED).is_none() {
        return confined("files_are_let_go_of_with_what_is_allowed_to_a_vcpu_and_later");
    }
    let folder = tempfile::tempdir().unwrap();
    let mut driver = Driver::new(shared(&folder, false)).start();
    look_around(&mut driver);
    // A folder that was made, counts, and is removed while the guest holds it.
    ask(&mut driver, 11, FUSE_ROOT_ID, b"made\0");
    let added = driver.metric("added_bytes");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // As a vCPU's thread, which is over without ending the process.
            jailer::thread(jailer::Thread::Vcpu).unwrap();
            driver.write(0x70, 0);
        });
    });
    let held = driver.metric("added_bytes");
    driver.device.dispatch(Event::Backend(0));
    assert_eq!((added > 0, held, driver.metric("added_bytes")), (true, added, 0));
    std::process::exit(CONFINED_CODE);
}

#[test]
fn every_figure_of_the_entropy_device_counts() {
    let idle = idle_figures(Box::new(Rng::new(limiter())), 0, |driver| {
        driver.offer(0, &[room(0, 64)]);
        driver.offer(0, &[room(0, 64)]);
        driver.device.dispatch(Event::Queue(0));
        driver.device.flush();
    });
    assert_eq!(idle, BTreeSet::new());
}

#[test]
fn every_figure_of_the_console_counts() {
    let console = Console::new(ConsoleOutput::default(), limiter());
    let idle = idle_figures(Box::new(console), 1, |driver| {
        driver.offer(1, &[data(0, 100 << 10)]);
        driver.offer(1, &[data(0, 1)]);
        driver.device.dispatch(Event::Queue(1));
        driver.device.flush();
    });
    assert_eq!(idle, BTreeSet::new());
}

#[test]
fn every_figure_of_the_socket_device_counts() {
    let ports = HostPorts::default();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let vsock = Vsock::new(ports.clone(), Some(UnixListener::bind(&path).unwrap()), limiter()).unwrap();
    let (mut host, offered) = UnixStream::pair().unwrap();
    ports.offer(1024, offered);
    host.write_all(b"hello").unwrap();
    let (_reader, writer) = std::io::pipe().unwrap();
    let _callers: Vec<_> = [("CONNECT 7\n", None), ("OFFER 9\n", Some(&writer)), ("?\n", None)]
        .into_iter()
        .map(|(words, descriptor)| call(&path, words, descriptor))
        .collect();
    let idle = idle_figures(Box::new(vsock), 1, |driver| {
        let header = |driver: &Driver, at: u64, port: u32, length: u32, op: u16| {
            let memory = &driver.memory;
            memory.write_obj([GUEST_CID, HOST_CID], GuestAddress(BUFFERS + at)).unwrap();
            memory.write_obj([7u32, port, length], GuestAddress(BUFFERS + at + 16)).unwrap();
            memory.write_obj([1u16, op], GuestAddress(BUFFERS + at + 28)).unwrap();
            memory.write_obj([0u32, 4096, 0], GuestAddress(BUFFERS + at + 32)).unwrap();
        };
        // A connection with data on it, one that nobody takes, one to a pipe, and the answer to one that the host asks for.
        for (at, port, length, op) in
            [(0, 1024, 0, 1), (64, 1024, 3, 5), (128, 8, 0, 1), (192, 9, 0, 1), (256, 1 << 30, 0, 2)]
        {
            header(driver, at, port, length, op);
            driver.offer(1, &[data(at, 44 + length)]);
            driver.offer(0, &[room((port as u64 % 7 + 1) * 4096, 4096)]);
            driver.device.dispatch(Event::Queue(1));
            driver.device.dispatch(Event::Backend(0));
            driver.device.dispatch(Event::Backend(1));
        }
        driver.device.flush();
    });
    assert_eq!(idle, BTreeSet::new());
}

/// Comes to a VM's socket and says something.
fn call(path: &Path, words: &str, descriptor: Option<&PipeWriter>) -> UnixStream {
    let caller = UnixStream::connect(path).unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<_> = descriptor.iter().map(|writer| writer.as_fd()).collect();
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
    }
    sendmsg(&caller, &[IoSlice::new(words.as_bytes())], &mut control, SendFlags::empty()).unwrap();
    caller
}

fn disk() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    file
}

fn limited_disk() -> Box<Blk> {
    Box::new(Blk::new(disk(), Options { limiter: limiter(), ..Options::default() }).unwrap())
}

/// Each kind of request.
fn use_disk(driver: &mut Driver) {
    let mut run = |kind: u32, buffer: Option<Buffer>, lift: bool| {
        driver.memory.write_obj([kind, 0, 0, 0], GuestAddress(BUFFERS)).unwrap();
        driver.memory.write_obj([0u32, 0, 8, 0], GuestAddress(BUFFERS + 0x1000)).unwrap();
        let chain: Vec<_> = [data(0, 16)].into_iter().chain(buffer).chain([room(16, 1)]).collect();
        driver.offer(0, &chain);
        driver.device.dispatch(Event::Queue(0));
        if lift {
            driver.device.flush();
        }
        driver.wait_used(0);
    };
    run(1, Some(data(0x1000, 512)), false);
    run(0, Some(room(0x2000, 512)), true);
    run(4, None, false);
    run(8, Some(room(0x2000, 20)), false);
    run(11, Some(data(0x1000, 16)), false);
    run(13, Some(data(0x1000, 16)), false);
    run(99, None, false);
}

// That too much is under way takes a slow disk; `blk::tests` makes one.

#[test]
fn every_figure_of_a_disk_counts() {
    let mut io = RingIo::new(disk());
    io.make_ring();
    let mut expected = BTreeSet::from(["stalls"]);
    if !io.has_ring() {
        // What this host does without has no figures.
        expected.extend(["uring", "cached_read_requests"]);
    }
    assert_eq!(idle_figures(limited_disk(), 0, use_disk), expected);
}

#[test]
fn every_figure_of_a_disk_without_a_ring_counts() {
    let idle = idle_figures_of(Driver::unprepared(limited_disk()).start(), 0, use_disk);
    assert_eq!(idle, BTreeSet::from(["stalls", "uring", "cached_read_requests"]));
}

// That a tap is full, or fails, takes another tap; `net::tests` has them.

#[test]
fn every_figure_of_a_network_device_counts() {
    let taps = tap(2);
    let wire = Wire::open();
    let (guest, host) = ([2, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 1]);
    let options = NetOptions { mac: Some(guest), pinned: true, mtu: None, receive: limiter(), transmit: limiter() };
    let driver = Driver::new(Box::new(Net::new(taps, options)));
    // Checksums left to the guest, of which the tap has to be told, and a control queue.
    let driver = driver.start_with(1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ);
    let frame = |to: [u8; 6], from: [u8; 6]| [&to[..], &from, &[0x88, 0xb5], &[0; 50]].concat();
    let idle = idle_figures_of(driver, 0, |driver| {
        let taps_are_ready = |driver: &mut Driver| (0..2).for_each(|tap| driver.device.dispatch(Event::Backend(tap)));
        let send = |driver: &mut Driver, from: [u8; 6], length: u32| {
            let bytes = [&[0; 12][..], &frame(host, from)].concat();
            driver.memory.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
            driver.offer(1, &[data(0, length)]);
            driver.device.dispatch(Event::Queue(1));
        };
        wire.send([0; SHORT_HEADER], &frame(guest, host));
        taps_are_ready(driver);
        for _ in 0..2 {
            driver.offer(0, &[room(4096, 2048)]);
            wire.send([0; SHORT_HEADER], &frame(guest, host));
        }
        driver.device.dispatch(Event::Queue(0));
        for (from, length) in [(host, 76), (guest, 76)] {
            send(driver, from, length);
        }
        driver.device.flush();
        send(driver, guest, 13);
        // Too little room for what is still in the tap.
        driver.offer(0, &[room(4096, 20)]);
        driver.device.dispatch(Event::Queue(0));
        driver.offer(4, &[data(0, 2), room(4096, 1)]);
        driver.device.dispatch(Event::Queue(4));
    });
    assert_eq!(idle, BTreeSet::from(["tap_errors", "transmit_tap_full"]));
}

#[test]
fn every_figure_of_a_balloon_counts() {
    let host = HostBalloon::new().unwrap();
    // Statistics, and reports, which have the queue after those.
    let driver = Driver::new(Box::new(Balloon::new(host.clone()))).start_with(1 << 1 | 1 << 5);
    let (ask, heard) = mpsc::channel();
    let idle = idle_figures_of(driver, 0, |driver| {
        driver.memory.write_obj([BUFFERS as u32 >> 12, u32::MAX], GuestAddress(BUFFERS)).unwrap();
        for (queue, buffer) in [(0, data(0, 8)), (1, data(0, 4)), (2, data(0, 0)), (3, room(0x1000, 4096))] {
            driver.offer(queue, &[buffer]);
            driver.device.dispatch(Event::Queue(queue as u16));
        }
        host.set_target_pages(2);
        host.ask(Box::new(move || ask.send(()).unwrap()));
        driver.turn();
        driver.offer(2, &[data(0, 0)]);
        driver.device.dispatch(Event::Queue(2));
        heard.recv().unwrap();
        driver.device.flush();
    });
    assert_eq!(idle, BTreeSet::new());
}

#[test]
fn every_figure_of_a_memory_device_counts() {
    // The region is the second half of the driver's memory; what it asks is in the first.
    let (host, start) = (HostMem::new(2 << 20).unwrap(), 2 << 20);
    let driver = Driver::new(Box::new(Mem::new(host.clone(), start))).start_with(1 << 1);
    let idle = idle_figures_of(driver, 0, |driver| {
        host.request(2 << 20);
        driver.turn();
        // Plug it, twice, ask for its state, and unplug it.
        for kind in [0u64, 0, 3, 1] {
            driver.memory.write_obj([kind, start, 1], GuestAddress(0x1000)).unwrap();
            let buffer = |address, length, writable| Buffer { address, length, writable };
            driver.offer(0, &[buffer(0x1000, 24, false), buffer(0x2000, 10, true)]);
            driver.device.dispatch(Event::Queue(0));
        }
        driver.device.flush();
    });
    assert_eq!(idle, BTreeSet::new());
}

#[test]
fn every_figure_of_a_persistent_memory_device_counts() {
    let device = Pmem::new(Some(disk()), 1 << 32..(1 << 32) + (1 << 20), limiter());
    assert_eq!(device.event_loop(), Loop::Disk);
    let idle = idle_figures(Box::new(device), 0, |driver| {
        // A flush, and something else that has to wait.
        driver.memory.write_obj([0u32, 9], GuestAddress(BUFFERS)).unwrap();
        for request in [0, 4] {
            driver.offer(0, &[data(request, 4), room(0x1000, 4)]);
            driver.device.dispatch(Event::Queue(0));
        }
        driver.device.flush();
    });
    assert_eq!(idle, BTreeSet::new());
}

#[test]
fn a_chain_longer_than_any_queue_is_not_followed_to_its_end() {
    let (balloon, mem) = (HostBalloon::new().unwrap(), HostMem::new(2 << 20).unwrap());
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(1 << 20).unwrap();
    let devices: [(Box<dyn VirtioDevice>, usize); 5] = [
        (Box::new(Blk::new(disk, Options { queues: 1, ..Options::default() }).unwrap()), 0),
        (Box::new(Balloon::new(balloon)), 0),
        (Box::new(Mem::new(mem, 0)), 0),
        (Box::new(Pmem::new(None, 0..0, None)), 0),
        (Box::new(Vsock::new(HostPorts::default(), None, None).unwrap()), 1),
    ];
    for (device, queue) in devices {
        let mut driver = Driver::new(device).start();
        driver.offer_endless(queue, data(0, 1));
        driver.device.dispatch(Event::Queue(queue as u16));
        assert_eq!(driver.read(0x70) & 0x40, 0x40, "{}", driver.device.kind());
    }
    // Those two have nothing to say of a request but how much of it they took.
    let mut driver = Driver::new(Box::new(Rng::default())).start();
    let head = driver.offer_endless(0, room(0, 1));
    driver.device.dispatch(Event::Queue(0));
    assert_eq!((driver.used(0), driver.metric("entropy_bytes")), (Some((head, 0)), 0));
    let mut driver = Driver::new(Box::new(Console::new(ConsoleOutput::default(), None))).start();
    let head = driver.offer_endless(1, data(0, 1));
    driver.device.dispatch(Event::Queue(1));
    assert_eq!((driver.used(1), driver.metric("output_bytes")), (Some((head, 0)), 0));
}

/// A directory with a file in it of ten bytes, of which the guest may hold little and add less.
fn shared(folder: &tempfile::TempDir, read_only: bool) -> Box<Fs> {
    std::fs::write(folder.path().join("file"), "0123456789").unwrap();
    let quota = Quota { bytes: Some(16 << 10), inodes: Some(1) };
    let limits = Limits { handles: 2, ..Limits::default() };
    let options = ExportOptions { read_only, noexec: true, quota, limits, ..ExportOptions::default() };
    let source = Source::Directory(File::open(folder.path()).unwrap().into());
    let export = Export::new(source, options, fuse::descriptors().unwrap()).unwrap();
    fuse::prepare_thread(options.ownership, None).unwrap();
    Box::new(Fs::new(Server::new(export).unwrap(), "tag", 1, limiter()).unwrap())
}

/// Asks a file system device for something; gives the number that follows the reply's header.
fn ask(driver: &mut Driver, opcode: u32, node: u64, body: &[u8]) -> u64 {
    let (length, unique) = (40 + body.len() as u32, 1u64);
    driver.memory.write_obj([length, opcode], GuestAddress(BUFFERS)).unwrap();
    driver.memory.write_obj([unique, node, 0, 0], GuestAddress(BUFFERS + 8)).unwrap();
    driver.memory.write_slice(body, GuestAddress(BUFFERS + 40)).unwrap();
    driver.offer(1, &[data(0, length), room(0x1000, 4096)]);
    driver.device.dispatch(Event::Queue(1));
    driver.memory.read_obj(GuestAddress(BUFFERS + 0x1010)).unwrap()
}

/// Begins a session, which is all that the limits admit, finds the file, and tries to make one and a folder.
fn look_around(driver: &mut Driver) -> u64 {
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    ask(driver, 26, 0, &words(&[&[7, 40, 0, u32::MAX][..], &[0; 12]].concat()));
    ask(driver, 1, FUSE_ROOT_ID, b"file\0");
    driver.device.flush();
    for name in [b"made\0", b"more\0"] {
        ask(driver, 9, FUSE_ROOT_ID, &[&words(&[0o755, 0])[..], name].concat());
    }
    let node = ask(driver, 1, FUSE_ROOT_ID, b"file\0");
    // To execute it.
    ask(driver, 14, node, &words(&[0x20, 0]));
    node
}

#[test]
fn every_figure_of_a_file_system_device_counts() {
    let folder = tempfile::tempdir().unwrap();
    let mut idle = idle_figures(shared(&folder, false), 1, |driver| {
        let node = look_around(driver);
        let numbers = |numbers: &[u64]| numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>();
        let [first, second, _] = [0; 3].map(|_| ask(driver, 14, node, &numbers(&[2])));
        ask(driver, 16, node, &[&numbers(&[first, 0, 4, 0, 0])[..], b"data"].concat());
        ask(driver, 15, node, &numbers(&[first, 0, 4, 0, 0]));
        for handle in [first, second] {
            // For writing, which is in the way of itself.
            ask(driver, 33, node, &numbers(&[handle, 1, 0, u64::MAX >> 1, 1, u64::from(FUSE_LK_FLOCK)]));
        }
    });
    // Whoever waits for a lock has it some time after the reset.
    idle.remove("lock_waiters");
    // Nothing is held once it was reset.
    assert_eq!(idle, BTreeSet::from(["inodes", "handles", "lock_ranges", "read_only_refusals"]));
}

#[test]
fn every_figure_of_a_file_system_device_that_is_read_only_counts() {
    let folder = tempfile::tempdir().unwrap();
    let idle = idle_figures(shared(&folder, true), 1, |driver| {
        look_around(driver);
    });
    assert!(!idle.contains("read_only_refusals") && idle.contains("added_bytes"), "{idle:?}");
}
