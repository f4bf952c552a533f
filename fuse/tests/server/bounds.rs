//! What a guest can make the host hold is bounded, and so is what it can take back.

use std::fs;

use fuse::{Limits, Options};
use fuse_abi::linux::{self as abi, fuse_opcode};
use nix::libc;
use zerocopy::IntoBytes;

use crate::client::{Ended, Host, ROOT, parse, read_in, text};

fn options(inodes: usize, handles: usize) -> Options {
    Options { limits: Limits { inodes, handles, ..Limits::default() }, ..Options::default() }
}

#[test]
fn handles_are_as_many_as_allowed_and_come_back() {
    let host = Host::new();
    fs::write(host.path("file"), "").unwrap();
    let mut client = host.client(options(100, 10));
    let node = client.walk("file").unwrap();
    let handles: Vec<u64> = (0..10).map(|_| client.open(node, libc::O_RDONLY).unwrap()).collect();
    assert_eq!(client.open(node, libc::O_RDONLY), Err(libc::EMFILE));
    assert_eq!(client.ask(fuse_opcode::FUSE_OPENDIR, ROOT, [0u32, 0].as_bytes()), Err(libc::EMFILE));
    assert_eq!(client.create(ROOT, "new", libc::O_RDWR, 0o600).err(), Some(libc::EMFILE));
    assert!(!host.path("new").exists());
    assert_eq!(client.metric("limit_refusals"), 3);
    client.release(node, handles[3]);
    client.open(node, libc::O_RDONLY).unwrap();
}

#[test]
fn inodes_are_as_many_as_allowed_and_listing_goes_on() {
    let host = Host::new();
    for index in 0..30 {
        fs::write(host.path(&format!("file{index}")), "").unwrap();
    }
    let mut client = host.client(options(10, 10));
    assert_eq!(client.list(ROOT, 1 << 16, true).len(), 32);
    assert_eq!(client.metric("inodes"), 10);
    let refused =
        (0..30).filter(|index| client.lookup(ROOT, &format!("file{index}")).err() == Some(libc::ENFILE)).count();
    assert_eq!(refused, 20);
}

#[test]
fn what_is_open_counts_although_the_guest_forgot_it() {
    let host = Host::new();
    for index in 0..5 {
        fs::write(host.path(&format!("file{index}")), "").unwrap();
    }
    let mut client = host.client(options(3, 10));
    let mut open = Vec::new();
    for index in 0..3 {
        let node = client.walk(&format!("file{index}")).unwrap();
        open.push((node, client.open(node, libc::O_RDONLY).unwrap()));
        client.forget(node, 1);
    }
    assert_eq!(client.metric("inodes"), 0);
    assert_eq!(client.walk("file3"), Err(libc::ENFILE));
    // What is held already takes no more.
    client.walk("file0").unwrap();
    // Nor does it take room to remove something.
    client.unlink(ROOT, "file4").unwrap();
    client.release(open[1].0, open[1].1);
    client.walk("file3").unwrap();
}

#[test]
fn nothing_is_made_that_the_guest_could_not_be_told_of() {
    let host = Host::new();
    fs::write(host.path("known"), "").unwrap();
    let mut client = host.client(options(1, 10));
    client.walk("known").unwrap();
    let symlink = [text("made"), text("target")].concat();
    let mknod = [[libc::S_IFREG | 0o644, 0, 0, 0].as_bytes(), &text("made")].concat();
    assert_eq!(client.create(ROOT, "made", libc::O_RDWR, 0o600).err(), Some(libc::ENFILE));
    assert_eq!(client.mkdir(ROOT, "made").err(), Some(libc::ENFILE));
    assert_eq!(client.ask(fuse_opcode::FUSE_SYMLINK, ROOT, &symlink), Err(libc::ENFILE));
    assert_eq!(client.ask(fuse_opcode::FUSE_MKNOD, ROOT, &mknod), Err(libc::ENFILE));
    assert_eq!(fs::read_dir(host.export()).unwrap().count(), 1);
    // What is known already is opened.
    client.create(ROOT, "known", libc::O_RDWR, 0o600).unwrap();
}

#[test]
fn forgetting_too_much_or_what_is_not_known_does_no_harm() {
    let host = Host::new();
    fs::write(host.path("file"), "content").unwrap();
    let mut client = host.client(options(100, 10));
    let node = client.walk("file").unwrap();
    client.walk("file").unwrap();
    let handle = client.open(node, libc::O_RDONLY).unwrap();
    client.forget(node, 1);
    assert_eq!(client.walk("file"), Ok(node));
    for _ in 0..1000 {
        client.forget(node, u64::MAX);
        client.forget(ROOT, u64::MAX);
        client.forget(12345, 1);
    }
    assert_eq!(client.open(node, libc::O_RDONLY), Err(libc::ESTALE));
    // What is open stays so.
    assert_eq!(client.read(node, handle, 0, 3).unwrap(), b"con");
    // The root is always known; a number is never used again.
    assert_ne!(client.walk("file").unwrap(), node);
}

#[test]
fn a_batch_is_as_long_as_it_is_and_not_as_it_says() {
    let host = Host::new();
    for index in 0..4 {
        fs::write(host.path(&format!("file{index}")), "").unwrap();
    }
    let mut client = host.client(options(100, 10));
    let nodes: Vec<u64> = (0..4).map(|index| client.walk(&format!("file{index}")).unwrap()).collect();
    let mut body = [u32::MAX, 0].as_bytes().to_vec();
    for node in &nodes[..3] {
        body.extend([*node, 1].as_bytes());
    }
    let sent = client.send(fuse_opcode::FUSE_BATCH_FORGET as u32, 0, &body, 0);
    assert_eq!(sent, Ok(Ended::Nothing));
    assert_eq!(client.metric("inodes"), 1);
}

#[test]
fn sizes_that_the_guest_names_are_bounded_by_the_room_that_it_gives() {
    let host = Host::new();
    fs::write(host.path("file"), vec![1; 3 << 20]).unwrap();
    let mut client = host.client(Options::default());
    let node = client.walk("file").unwrap();
    let handle = client.open(node, libc::O_RDWR).unwrap();
    let read = fuse_opcode::FUSE_READ as u32;
    let Ok(Ended::Reply(data)) = client.send(read, node, &read_in(handle, 0, u32::MAX), 100) else { panic!() };
    assert_eq!(data.len(), 84);
    let Ok(Ended::Reply(data)) = client.send(read, node, &read_in(handle, 0, u32::MAX), 4 << 20) else { panic!() };
    assert_eq!(data.len(), 1 << 20);
    assert_eq!(client.send(read, node, &read_in(handle, 0, u32::MAX), 3), Err(libc::ERANGE));
    // A write of more than was sent.
    let write =
        abi::fuse_write_in { fh: handle, offset: 0, size: 9, write_flags: 0, lock_owner: 0, flags: 0, padding: 0 };
    assert_eq!(client.ask(fuse_opcode::FUSE_WRITE, node, &[write.as_bytes(), b"12345678"].concat()), Err(libc::EINVAL));
    // A reply that has no room.
    assert_eq!(client.send(fuse_opcode::FUSE_GETATTR as u32, node, &[0; 16], 16), Err(libc::ERANGE));
    // Arguments of any length are not looked at.
    let long = vec![b'a'; 1 << 20];
    assert_eq!(client.ask(fuse_opcode::FUSE_LOOKUP, ROOT, &long), Err(libc::E2BIG));
    assert_eq!(
        client.ask(fuse_opcode::FUSE_SYMLINK, ROOT, &[text("x"), text(&"y".repeat(5000))].concat()),
        Err(libc::ENAMETOOLONG)
    );
}

#[test]
fn offsets_at_the_end_of_numbers_are_errors() {
    let host = Host::new();
    fs::write(host.path("file"), "content").unwrap();
    let quota = fuse::Quota { bytes: Some(1 << 20), inodes: None };
    for options in [Options::default(), Options { quota, ..Options::default() }] {
        let mut client = host.client(options);
        let node = client.walk("file").unwrap();
        let handle = client.open(node, libc::O_RDWR).unwrap();
        for offset in [u64::MAX, u64::MAX - 4, 1 << 63, (1 << 63) - 1] {
            let last = offset == (1 << 63) - 1;
            assert!(client.write(node, handle, offset, b"12345678").is_err() || last);
            assert!(matches!(client.read(node, handle, offset, 8), Ok(_) | Err(libc::EINVAL)));
            let mut size = parse::<abi::fuse_setattr_in>(&[0; 88]);
            (size.valid, size.size) = (abi::FATTR_SIZE, offset);
            assert!(client.ask(fuse_opcode::FUSE_SETATTR, node, size.as_bytes()).is_err() || last);
            let space = abi::fuse_fallocate_in { fh: handle, offset, length: u64::MAX, mode: 0, padding: 0 };
            assert!(client.ask(fuse_opcode::FUSE_FALLOCATE, node, space.as_bytes()).is_err());
        }
    }
}
