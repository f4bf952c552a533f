//! File systems (VIRTIO 1.2 §5.11.6): FUSE requests, whose structures are those of Linux's `fuse.h`.
//!
//! A file system that is attacked shows a file [`KNOWN`] with [`KNOWN_LENGTH`] bytes of [`known`], which nobody can change whom
//! the monitor serves: it is said by no hostile request, and others own it.

use core::sync::atomic::{AtomicU64, Ordering};

use super::Opening;
use crate::honest::{Driver, Fault};
use crate::memory;
use crate::mmio::Device;
use crate::random::Random;
use crate::request::Request;

/// The length of a request's header, and of a reply's.
const HEADER: usize = 40;
const REPLY: u32 = 16;
/// The file that is read.
pub const KNOWN: &[u8] = b"known\0";
/// How long it is.
pub const KNOWN_LENGTH: u32 = 4096;
/// How many bytes of entries are asked for.
const ENTRIES: u32 = 4096;
/// The queue of requests; the one before it is for those that nobody waits for.
const REQUESTS: usize = 1;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const CREATE: u32 = 35;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const READDIRPLUS: u32 = 44;
/// FUSE_LOOKUP, _UNLINK, _RMDIR, _REMOVEXATTR: a name is all.
const NAMING: [u32; 6] = [1, 1, 1, 10, 11, 24];
/// FUSE_SYMLINK, _MKNOD, _MKDIR, _RENAME, _LINK, _CREATE, _RENAME2, _TMPFILE, each with how many words come before its names.
const MAKING: [(u32, usize); 8] = [(6, 0), (8, 2), (9, 1), (12, 1), (13, 1), (CREATE, 2), (45, 2), (51, 2)];
/// FUSE_READ, _WRITE, _RELEASE, _FSYNC, _FLUSH, _OPENDIR, _READDIR, _RELEASEDIR, _FALLOCATE, _READDIRPLUS, _LSEEK,
/// _COPY_FILE_RANGE.
const HANDLING: [u32; 16] = [15, 15, 16, 16, 18, 18, 20, 25, 27, 28, 29, 43, 44, 44, 46, 47];
/// FUSE_GETLK, _SETLK, _SETLKW.
const LOCKING: [u32; 5] = [31, 32, 32, 33, 33];
/// Everything that has a number, and some that has none.
const OPERATIONS: u64 = 64;

/// A byte of what [`KNOWN`] holds.
#[must_use]
pub fn known(at: u32) -> u8 {
    (at * 7 + 3) as u8
}

/// The arguments of a request in the making.
struct Arguments {
    bytes: [u8; 640],
    length: usize,
}

impl Arguments {
    fn new() -> Self {
        Self { bytes: [0; 640], length: 0 }
    }

    /// Adds bytes, as many as there is room for.
    fn bytes(mut self, bytes: &[u8]) -> Self {
        let room = &mut self.bytes[self.length..];
        let count = bytes.len().min(room.len());
        room[..count].copy_from_slice(&bytes[..count]);
        self.length += count;
        self
    }

    fn long(self, number: u64) -> Self {
        self.bytes(&number.to_le_bytes())
    }

    fn words(self, words: &[u32]) -> Self {
        words.iter().fold(self, |arguments, word| arguments.bytes(&word.to_le_bytes()))
    }

    /// Adds a name of an entry that is there, or could be, or cannot be.
    fn name(self, random: &mut Random) -> Self {
        let name: &[u8] = match random.below(12) {
            0 => b"..\0",
            1 => random.pick(&[
                &b".\0"[..],
                b"\0",
                b"/\0",
                b"a/b\0",
                b"../secret\0",
                b"/etc/passwd\0",
                b"d/../../secret\0",
            ]),
            // As long as a name can be, one more, and without an end.
            2 => return self.bytes(&[b'x'; 255]).bytes(b"\0"),
            3 => return self.bytes(&[b'x'; 256]).bytes(b"\0"),
            4 => return self.bytes(&[b'x'; 640]),
            5 => b"a\0b\0",
            6 => b"\xff\x01\n\0",
            _ => random.pick(&[&b"a\0"[..], b"b\0", b"d\0", b"e\0"]),
        };
        self.bytes(name)
    }

    fn get(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// The beginning of a session with what Linux offers, as far as the first half of its features goes.
fn init() -> Arguments {
    Arguments::new().words(&[7, 40, 1 << 20, u32::MAX]).bytes(&[0; 48])
}

fn header(operation: u32, length: u32, unique: u64, node: u64) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(&length.to_le_bytes());
    header[4..8].copy_from_slice(&operation.to_le_bytes());
    header[8..16].copy_from_slice(&unique.to_le_bytes());
    header[16..24].copy_from_slice(&node.to_le_bytes());
    header
}

/// The number of an inode: of the root, of one that the driver may have been told of, or of none.
fn node(random: &mut Random) -> u64 {
    match random.below(8) {
        0..4 => 1,
        4..7 => NODES.load(Ordering::Relaxed).wrapping_add(random.below(6)),
        _ => random.pick(&[0, 1 << 32, u64::MAX, 1 << 63]),
    }
}

/// The number of something that is open, maybe not any more, or never.
fn handle(random: &mut Random) -> u64 {
    let told = HANDLES.load(Ordering::Relaxed).wrapping_add(random.below(6));
    if random.one_in(8) { random.pick(&[0, 1, 1 << 32, u64::MAX]) } else { told }
}

fn offset(random: &mut Random) -> u64 {
    let near = random.below(0x3000);
    random.pick(&[0, 0, near, near, 1 << 40, i64::MAX as u64 - near, i64::MAX as u64, 1 << 63, u64::MAX - near])
}

fn size(random: &mut Random) -> u32 {
    random.pick(&[0, 1, 24, 151, 4096, 4096, 0x1_0000, 1 << 20, (1 << 20) + 1, 1 << 31, u32::MAX])
}

/// The first numbers of inodes and handles that the device told in this session: none is told twice, in no session.
static NODES: AtomicU64 = AtomicU64::new(2);
static HANDLES: AtomicU64 = AtomicU64::new(1);

/// A session, and what is found in the root: the directory is open, and so may be what was found first.
pub const OPENING: Opening = Opening { queue: REQUESTS, count: 5, compose: begin };

fn begin(request: &mut Request<'_>, number: u32, reply: u64) {
    let (operation, node, arguments) = match number {
        0 => (INIT, 0, init()),
        1 => (OPENDIR, 1, Arguments::new().long(0)),
        2 => {
            let handle = memory::read(reply + u64::from(REPLY));
            HANDLES.store(handle, Ordering::Relaxed);
            (READDIRPLUS, 1, Arguments::new().long(handle).long(0).words(&[ENTRIES, 0]).long(0).long(0))
        }
        _ => {
            if number == 3 {
                NODES.store(first_of(reply + u64::from(REPLY)), Ordering::Relaxed);
            }
            let entry = NODES.load(Ordering::Relaxed).wrapping_add(u64::from(number - 3));
            (OPEN, entry, Arguments::new().words(&[0, 0]))
        }
    };
    request.say(&header(operation, (HEADER + arguments.length) as u32, 1, node));
    request.say(arguments.get());
    request.hear(REPLY + ENTRIES);
}

/// The least number of an inode in a list of entries, each `struct fuse_entry_out` and `struct fuse_dirent`.
fn first_of(entries: u64) -> u64 {
    let (mut at, mut first) = (0, u64::MAX);
    while at + 128 + 24 <= u64::from(ENTRIES) {
        let node: u64 = memory::read(entries + at);
        let length: u32 = memory::read(entries + at + 128 + 16);
        // Those above the root have none, and neither has what is behind the last one.
        if node > 1 {
            first = first.min(node);
        }
        at += 128 + (24 + u64::from(length)).next_multiple_of(8);
    }
    first
}

/// A request that a driver could send, with names, numbers and lengths that lie.
pub fn fuse(request: &mut Request<'_>, _: u32) {
    let random = &mut *request.random;
    let (operation, arguments, data) = match random.below(16) {
        0 => (INIT, init(), 0),
        1 => (INIT, Arguments::new().words(&[random.pick(&[0, 6, 7, 8, u32::MAX]), random.below(45) as u32]), 0),
        2..5 => (random.pick(&NAMING), Arguments::new().name(random), 0),
        5..8 => making(random),
        8..11 => handling(random),
        11 => (OPEN, Arguments::new().words(&[random.pick(&[0, 1, 2, 3, 0x202, 0x8000, u32::MAX]), 0]), 0),
        12 => locking(random),
        13 => forgetting(random),
        14 => setting(random),
        _ => (
            random.below(OPERATIONS) as u32,
            (0..random.below(12)).fold(Arguments::new(), |some, _| some.long(handle(random))),
            0,
        ),
    };
    let told = HEADER as u32 + arguments.length as u32 + data;
    let length = if random.one_in(8) { random.pick(&[0, 39, 40, told - 1, told + 1, u32::MAX]) } else { told };
    let header = header(operation, length, random.long(), node(random));
    // In one piece, or in pieces, which may be cut anywhere.
    let cut = if random.one_in(12) { random.below(HEADER as u64) as usize } else { HEADER };
    let room = random.pick(&[0, 15, 16, 80, 4096, 4096, 4096, 0x1_0000, 0x10_1000]);
    request.say(&header[..cut]);
    if cut < HEADER && request.random.one_in(2) {
        request.say(&header[cut..]);
    }
    request.say(arguments.get());
    if data > 0 {
        request.say_room(data);
    }
    request.hear(room);
}

/// Makes, moves and links names, also into themselves.
fn making(random: &mut Random) -> (u32, Arguments, u32) {
    let (operation, words) = random.pick(&MAKING);
    let mode =
        random.pick(&[0o100_644, 0o100_000, 0o010_644, 0o140_000, 0o020_666, 0o060_666, 0o755, 0o7777, u32::MAX]);
    let flags = random.pick(&[0, 1, 2, 4, 8, u32::MAX]);
    let arguments = match operation {
        // The directory that it moves to, or the inode that gets a name.
        12 | 13 => Arguments::new().long(node(random)),
        45 => Arguments::new().long(node(random)).words(&[flags, 0]),
        CREATE | 51 => Arguments::new().words(&[random.pick(&[2, 0x42, 0xc2, 0x241, u32::MAX]), mode, 0, 0]),
        8 => Arguments::new().words(&[mode, flags, 0, 0]),
        _ => (0..words).fold(Arguments::new(), |arguments, _| arguments.words(&[mode, 0])),
    };
    (operation, arguments.name(random).name(random), 0)
}

/// Reads, writes, lists and closes by handles that are open, or were.
fn handling(random: &mut Random) -> (u32, Arguments, u32) {
    let operation = random.pick(&HANDLING);
    let (fh, at, size) = (handle(random), offset(random), size(random));
    let arguments = Arguments::new().long(fh);
    match operation {
        WRITE => {
            // As much as is told, or less.
            let data = if random.one_in(4) { random.pick(&[0, 1, 4096]) } else { size.min(1 << 20) };
            let flags = random.pick(&[0, 0, 1, 2, 4]);
            (operation, arguments.long(at).words(&[size, flags]).long(0).words(&[random.pick(&[0, 0x400]), 0]), data)
        }
        // Offsets, lengths and modes in the same places.
        43 => (operation, arguments.long(at).long(size.into()).words(&[random.pick(&[0, 1, 2, 3, 16, 0xff]), 0]), 0),
        46 => (operation, arguments.long(at).words(&[random.below(6) as u32, 0]), 0),
        47 => {
            let (node, to) = (node(random), handle(random));
            (operation, arguments.long(at).long(node).long(to).long(offset(random)).long(size.into()).long(0), 0)
        }
        27 => (operation, Arguments::new().long(0), 0),
        _ => (operation, arguments.long(at).words(&[size, 0]).long(0).long(0), 0),
    }
}

/// Locks, and waits for what the same guest holds: two such waits may be for each other.
fn locking(random: &mut Random) -> (u32, Arguments, u32) {
    let start = random.pick(&[0, 0, 1, i64::MAX as u64, 1 << 63, u64::MAX]);
    let end = random.pick(&[0, 1, i64::MAX as u64, i64::MAX as u64, u64::MAX]);
    let kind = random.pick(&[0, 1, 1, 1, 2, 3, u32::MAX]);
    let owner = random.below(3);
    let arguments = Arguments::new().long(handle(random)).long(owner).long(start).long(end).words(&[kind, 0]);
    (random.pick(&LOCKING), arguments.words(&[random.pick(&[0, 1, u32::MAX]), 0]), 0)
}

/// Takes back what was never told, more often than it was told, and what is under way.
fn forgetting(random: &mut Random) -> (u32, Arguments, u32) {
    let count = random.pick(&[1, 1, 0, 1 << 32, u64::MAX]);
    match random.below(3) {
        0 => (FORGET, Arguments::new().long(count), 0),
        1 => (INTERRUPT, Arguments::new().long(random.long()), 0),
        _ => {
            let told = random.pick(&[1, 30, 1000, u32::MAX]);
            let some = (0..30).fold(Arguments::new().words(&[told, 0]), |some, _| some.long(node(random)).long(count));
            (BATCH_FORGET, some, 0)
        }
    }
}

/// Changes sizes, modes, owners and times.
fn setting(random: &mut Random) -> (u32, Arguments, u32) {
    let valid = random.pick(&[1, 2, 8, 0x10, 0x40, 0x1ff, u32::MAX]);
    let mode = random.pick(&[0, 0o644, 0o7777, u32::MAX]);
    let arguments = Arguments::new().words(&[valid, 0]).long(handle(random)).long(offset(random)).long(0);
    let arguments = (0..3).fold(arguments, |arguments, _| arguments.long(random.long()));
    let owner = random.pick(&[0, 1000, u32::MAX]);
    (SETATTR, arguments.words(&[random.word(), random.word(), random.word(), mode, 0, owner, owner, 0]), 0)
}

/// Sends a request, and gives its reply if it is as long as it says and no error.
fn exchange(driver: &mut Driver, operation: u32, node: u64, body: &[u8], room: u32) -> Result<u64, Fault> {
    let header = header(operation, (HEADER + body.len()) as u32, 1, node);
    let chain = [driver.says(&header), driver.says(body), driver.hears(REPLY + room)];
    let length = driver.ask(REQUESTS, &chain)?;
    let reply = chain[2].address;
    if length < REPLY || length != memory::read::<u32>(reply) {
        return Err("a reply is not as long as it says");
    }
    if memory::read::<u32>(reply + 4) != 0 {
        return Err("it does not show the file that it has");
    }
    Ok(reply + u64::from(REPLY))
}

/// Finds the file, opens it and reads what is in it.
pub fn ask_file(device: Device) -> Result<(), Fault> {
    let mut driver = Driver::start(device, 1 + REQUESTS)?;
    exchange(&mut driver, INIT, 0, init().get(), 64)?;
    // Who may write may close his own directory. Where it is read-only nothing has been closed, and this is refused.
    let mode = (0..6).fold(Arguments::new().words(&[1, 0]), |arguments, _| arguments.long(0));
    let _ = exchange(&mut driver, SETATTR, 1, mode.words(&[0, 0, 0, 0o755, 0, 0, 0, 0]).get(), 128);
    let entry = exchange(&mut driver, LOOKUP, 1, KNOWN, 128)?;
    let node = memory::read::<u64>(entry);
    let opened = exchange(&mut driver, OPEN, node, Arguments::new().words(&[0, 0]).get(), 16)?;
    let handle = memory::read::<u64>(opened);
    let read = Arguments::new().long(handle).long(0).words(&[KNOWN_LENGTH + 1, 0]).long(0).long(0);
    let data = exchange(&mut driver, READ, node, read.get(), KNOWN_LENGTH + 1)?;
    let same = (0..KNOWN_LENGTH).all(|at| memory::read::<u8>(data + u64::from(at)) == known(at));
    // And nothing behind its end.
    let length = memory::read::<u32>(data - u64::from(REPLY));
    if same && length == REPLY + KNOWN_LENGTH { Ok(()) } else { Err("it does not read what is in its file") }
}
