//! Rings, and doing without one.

use std::io::{Read as _, Seek as _, SeekFrom, Write as _};

use vm_memory::{Bytes as _, GuestAddress};

use super::*;

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap()
}

fn slice(memory: &GuestMemory, at: u64, length: usize) -> VolatileSlice<'_> {
    let mut slices = GuestMemoryBackend::get_slices(memory, GuestAddress(at), length);
    slices.next().unwrap().unwrap()
}

/// With and without a ring, as far as this host has one.
fn both(content: &[u8]) -> [RingIo; 2] {
    let file = || {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    };
    let mut rings = [file(), file()].map(RingIo::new);
    rings[0].make_ring();
    rings
}

fn finish(io: &mut RingIo) -> (Token, io::Result<()>) {
    loop {
        if let Some(outcome) = io.completed() {
            return outcome;
        }
        assert!(io.under_way() > 0);
        let ring = io.ring.as_ref().unwrap();
        ring.submit_and_wait(1).unwrap();
    }
}

fn content(io: &RingIo) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut file = io.file();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn what_was_written_is_read_back_in_the_order_of_the_buffers() {
    for mut io in both(&[b'.'; 12]) {
        let memory = memory();
        memory.write_slice(b"abcdef", GuestAddress(0x100)).unwrap();
        for durable in [false, true] {
            let buffers = [slice(&memory, 0x102, 4), slice(&memory, 0x100, 2)];
            let token = io.start(&memory, Operation::Write { buffers: &buffers, offset: 3, durable });
            let (done, outcome) = finish(&mut io);
            outcome.unwrap();
            assert_eq!((Some(done), io.under_way()), (token, 0));
        }
        assert_eq!(content(&io), b"...cdefab...");
        let buffers = [slice(&memory, 0x200, 3), slice(&memory, 0x300, 3)];
        io.start(&memory, Operation::Read { buffers: &buffers, offset: 3, done: 4 }).unwrap();
        finish(&mut io).1.unwrap();
        assert_eq!(memory.read_obj::<[u8; 3]>(GuestAddress(0x200)).unwrap(), [0; 3]);
        assert_eq!(memory.read_obj::<[u8; 3]>(GuestAddress(0x300)).unwrap(), *b"\0ab");
    }
}

#[test]
fn zeros_are_written_in_pieces_and_holes_are_made() {
    let length = ZEROS.len() as u32 + 10;
    for mut io in both(&vec![7; 3 * ZEROS.len()]) {
        let memory = memory();
        io.start(&memory, Operation::Zero { offset: 5, length, durable: true }).unwrap();
        finish(&mut io).1.unwrap();
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let offset = 2 * ZEROS.len() as u64;
        io.start(&memory, Operation::Allocate { mode, offset, length: 4096 }).unwrap();
        finish(&mut io).1.unwrap();
        io.start(&memory, Operation::Sync).unwrap();
        finish(&mut io).1.unwrap();
        let content = content(&io);
        let zeros: Vec<_> = (0..content.len()).filter(|at| content[*at] == 0).collect();
        let (first, hole) = (5..5 + length as usize, offset as usize..offset as usize + 4096);
        assert_eq!(zeros, first.chain(hole).collect::<Vec<_>>());
    }
}

#[test]
fn a_file_that_ends_early_and_memory_of_somebody_else_are_refused() {
    for mut io in both(b"short") {
        let (memory, other) = (memory(), memory());
        io.start(&memory, Operation::Read { buffers: &[slice(&memory, 0, 6)], offset: 0, done: 0 }).unwrap();
        assert_eq!(finish(&mut io).1.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let buffers = &[slice(&other, 0, 1)];
        assert_eq!(io.start(&other, Operation::Read { buffers, offset: 0, done: 0 }), None);
        assert_eq!(io.under_way(), 0);
    }
}

#[test]
fn no_more_is_started_than_there_is_room_for_and_draining_waits_for_all_of_it() {
    for mut io in both(&[0; 4096]) {
        let memory = memory();
        for _ in 0..DEPTH {
            io.start(&memory, Operation::Sync).unwrap();
        }
        assert_eq!((io.start(&memory, Operation::Sync), io.has_room()), (None, false));
        io.drain(Duration::from_secs(600));
        assert_eq!((io.under_way(), io.has_room()), (0, true));
    }
}

#[test]
fn a_ring_that_is_given_up_completes_what_it_has_and_the_rest_is_done_without_it() {
    let [mut io, _] = both(&[1; 4096]);
    let memory = memory();
    let read = |io: &mut RingIo, at| {
        io.start(&memory, Operation::Read { buffers: &[slice(&memory, at, 4)], offset: 0, done: 0 }).unwrap()
    };
    let first = read(&mut io, 0);
    io.submit();
    let second = read(&mut io, 8);
    io.retire();
    let third = read(&mut io, 16);
    assert!(!io.has_ring());
    let mut tokens = vec![];
    while tokens.len() < 3 {
        if let Some((token, outcome)) = io.completed() {
            outcome.unwrap();
            tokens.push(token);
        }
    }
    tokens.sort_unstable();
    let mut expected = [first, second, third];
    expected.sort_unstable();
    assert_eq!(tokens, expected);
    assert_eq!(memory.read_obj::<[u8; 20]>(GuestAddress(0)).unwrap()[16..], [1; 4]);
}

#[test]
fn a_ring_does_nothing_else_and_works_with_no_other_file() {
    let [mut io, _] = both(b"");
    // A host that has no ring for us has none that could do anything else.
    let Some(ring) = &mut io.ring else { return };
    let stranger = tempfile::tempfile().unwrap();
    let entries = [
        opcode::Nop::new().build(),
        opcode::Fsync::new(types::Fd(stranger.as_raw_fd())).build(),
        opcode::Close::new(types::Fd(stranger.as_raw_fd())).build(),
        opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build(),
    ];
    for entry in entries {
        // SAFETY: the entries point at nothing.
        unsafe { ring.submission().push(&entry) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        assert_eq!(ring.completion().next().unwrap().result(), -libc::EACCES);
    }
    assert!(ring.submitter().register_files(&[stranger.as_raw_fd()]).is_err());
}
