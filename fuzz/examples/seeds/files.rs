//! Seeds of the targets that are asked for files.

use fuse_abi::linux::fuse_opcode::{self, self as op};
use serde_json::json;

use crate::{PAGE, START, Seed, chunk};

/// A number of a request's arguments, as long as it is there.
fn long(number: u8) -> Vec<u8> {
    vec![0, number]
}

fn word(number: u32) -> Vec<u8> {
    [&[3][..], &number.to_le_bytes()].concat()
}

/// A name of the table.
fn name(index: u8) -> Vec<u8> {
    vec![4, index]
}

/// A request for a file system, as its targets read it.
fn fuse(operation: fuse_opcode, node: u8, arguments: &[Vec<u8>]) -> Vec<u8> {
    let place = fuzz::files::OPERATIONS.iter().position(|known| *known as u32 == operation as u32);
    let place = u8::try_from(place.expect("the operation is in the table")).expect("the table is short");
    [&[0, place, 0, node, arguments.len() as u8][..], &arguments.concat(), &[0]].concat()
}

type Story = (&'static str, Vec<Vec<u8>>);

fn begin() -> Vec<u8> {
    fuse(op::FUSE_INIT, 0, &[word(7), word(40), word(1 << 20), word(u32::MAX)])
}

fn look(parent: u8, index: u8) -> Vec<u8> {
    fuse(op::FUSE_LOOKUP, parent, &[name(index)])
}

fn open(node: u8, flags: u32) -> Vec<u8> {
    fuse(op::FUSE_OPEN, node, &[word(flags), word(0)])
}

fn read(operation: fuse_opcode, node: u8) -> Vec<u8> {
    fuse(operation, node, &[long(1), long(0), word(4096), word(0), long(0), long(0)])
}

fn flush() -> Vec<u8> {
    fuse(op::FUSE_FLUSH, 2, &[long(1), long(0), long(1)])
}

fn lock(operation: fuse_opcode, owner: u8, kind: u32, flags: u32) -> Vec<u8> {
    let whose = [long(1), long(owner)];
    let range = [long(0), word(99), word(0), word(kind), word(0)];
    fuse(operation, 2, &[&whose[..], &range, &[word(flags), word(0)]].concat())
}

/// What guests do with files: the first node that they are told of has the number 2, the first handle 1.
fn stories() -> Vec<Story> {
    let opened = fuse(op::FUSE_OPENDIR, 1, &[word(0), word(0)]);
    let listed = [read(op::FUSE_READDIRPLUS, 1), read(op::FUSE_READDIR, 1)];
    let locks = vec![
        begin(),
        look(1, 0),
        open(2, 2),
        lock(op::FUSE_SETLK, 1, 1, 0),
        lock(op::FUSE_GETLK, 2, 1, 0),
        lock(op::FUSE_SETLKW, 2, 1, 0),
        lock(op::FUSE_SETLK, 1, 2, 0),
        lock(op::FUSE_SETLK, 1, 1, 1),
        flush(),
    ];
    let attributes = vec![
        begin(),
        look(1, 0),
        fuse(op::FUSE_SETXATTR, 2, &[word(3), word(0), name(6), vec![5, 3, 0, 1, 2, 3]]),
        fuse(op::FUSE_GETXATTR, 2, &[word(64), word(0), name(6)]),
        fuse(op::FUSE_LISTXATTR, 2, &[word(64), word(0)]),
        fuse(op::FUSE_GETATTR, 2, &[word(0), word(0), long(0)]),
        fuse(op::FUSE_STATFS, 1, &[]),
        look(1, 9),
        fuse(op::FUSE_DESTROY, 0, &[]),
    ];
    vec![
        ("read", vec![begin(), look(1, 0), open(2, 0), read(op::FUSE_READ, 2), flush()]),
        ("list", [&[begin(), look(1, 1), opened][..], &listed].concat()),
        ("write", writing()),
        ("names", naming()),
        ("locks", locks),
        ("attributes", attributes),
    ]
}

fn writing() -> Vec<Vec<u8>> {
    let text = [&[5][..], &chunk(b"written")].concat();
    let set = [
        vec![word(1 << 3 | 1), word(0), long(0), long(3)],
        vec![long(0); 7],
        vec![word(0o600), word(0), word(0), word(0), word(0)],
    ];
    vec![
        begin(),
        fuse(op::FUSE_CREATE, 1, &[word(2), word(0o644), word(0), word(0), name(4)]),
        fuse(op::FUSE_WRITE, 2, &[long(1), long(0), word(7), word(0), long(0), word(0), word(0), text]),
        fuse(op::FUSE_SETATTR, 2, &set.concat()),
        fuse(op::FUSE_FALLOCATE, 2, &[long(1), long(0), long(99), word(0), word(0)]),
        fuse(op::FUSE_COPY_FILE_RANGE, 2, &[1, 0, 2, 1, 100, 7, 0].map(long)),
        fuse(op::FUSE_LSEEK, 2, &[long(1), long(0), word(4), word(0)]),
        fuse(op::FUSE_RELEASE, 2, &[1, 0, 0].map(long)),
    ]
}

fn naming() -> Vec<Vec<u8>> {
    vec![
        begin(),
        look(1, 0),
        fuse(op::FUSE_MKDIR, 1, &[word(0o755), word(0), name(5)]),
        fuse(op::FUSE_LINK, 1, &[long(2), name(4)]),
        fuse(op::FUSE_RENAME2, 1, &[long(1), word(0), word(0), name(0), name(4)]),
        fuse(op::FUSE_SYMLINK, 1, &[name(3), name(9)]),
        fuse(op::FUSE_UNLINK, 1, &[name(4)]),
        fuse(op::FUSE_RMDIR, 1, &[name(5)]),
        fuse(op::FUSE_FORGET, 2, &[long(1)]),
        fuse(op::FUSE_TMPFILE, 1, &[word(2), word(0o600), word(0), word(0)]),
    ]
}

/// The seeds of both targets.
pub fn seeds() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for (index, (title, requests)) in (0u8..).zip(stories()) {
        // Straight to the server: each with its room, and at last the session is saved and goes on.
        let direct = requests.iter().flat_map(|request| [&[0, 0, 16][..], request].concat());
        seeds.push(("fuse_message", title, [index << 4].into_iter().chain(direct).chain([14]).collect()));
        // By the device: each by the first queue of requests, with a page for the reply.
        let chained = requests.iter().flat_map(|request| [&[0, 1, 1 << 2][..], request, &PAGE].concat());
        seeds.push(("fs", title, [&[0, 0][..], &START].concat().into_iter().chain(chained).chain([10]).collect()));
    }
    let session = json!({
        "begun": true, "next_node": 3, "next_handle": 2, "added_bytes": 0, "added_inodes": 0,
        "nodes": [{"place": {"path": b"file".to_vec(), "ino": 3}, "number": 2, "lookups": 1}],
        "handles": [{"number": 1, "what": {"File": {"place": {"path": b"folder/inner".to_vec(), "ino": 4}, "flags": 2}}}],
    });
    let claim = [&[0, 15][..], &chunk(session.to_string().as_bytes()), &[14]].concat();
    let changed = [0, 13, 0, 4, 4, 13, 1, 4, 1];
    seeds.extend([("fuse_message", "claim", claim), ("fuse_message", "changed", changed.to_vec())]);
    // What is read-only, and a single file, are asked for the same.
    for (shape, title, story) in [(1, "read-only", 2), (8, "single", 0)] {
        let (_, requests) = stories().swap_remove(story);
        let direct = requests.iter().flat_map(|request| [&[0, 0, 16][..], request].concat());
        seeds.push(("fuse_message", title, [shape].into_iter().chain(direct).collect()));
    }
    seeds
}
