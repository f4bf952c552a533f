//! Read-only is decided by the server, whatever the guest's kernel has mounted how.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use fuse::Options;
use fuse_abi::linux::{self as abi, fuse_opcode};
use nix::libc;
use zerocopy::IntoBytes;

use crate::client::{Client, Ended, Host, ROOT, parse, text};

/// Everything there is below a directory, with what can be changed of it.
fn snapshot(path: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(path).unwrap() {
        let entry = entry.unwrap();
        let metadata = entry.path().symlink_metadata().unwrap();
        let content = if metadata.is_file() { fs::read(entry.path()).unwrap() } else { Vec::new() };
        let text = format!("{:?} {:?} {:?}", metadata.permissions(), metadata.modified().unwrap(), content);
        found.insert(entry.path().display().to_string(), text);
        if metadata.is_dir() {
            found.extend(snapshot(&entry.path()));
        }
    }
    found
}

fn export() -> Host {
    let host = Host::new();
    fs::write(host.path("file"), "content").unwrap();
    fs::write(host.path("other"), "").unwrap();
    fs::create_dir(host.path("folder")).unwrap();
    host
}

/// Every operation that changes something, as it should be asked for.
fn changes(file: u64, handle: u64) -> Vec<(fuse_opcode, u64, Vec<u8>)> {
    let mut size = parse::<abi::fuse_setattr_in>(&[0; 88]);
    size.valid = abi::FATTR_SIZE;
    let mut time = size;
    time.valid = abi::FATTR_MTIME;
    let mut mode = size;
    (mode.valid, mode.mode) = (abi::FATTR_MODE, 0o777);
    let data =
        abi::fuse_write_in { fh: handle, offset: 0, size: 1, write_flags: 0, lock_owner: 0, flags: 2, padding: 0 };
    let copy = abi::fuse_copy_file_range_in {
        fh_in: handle,
        off_in: 0,
        nodeid_out: file,
        fh_out: handle,
        off_out: 100,
        len: 4,
        flags: 0,
    };
    let space = abi::fuse_fallocate_in { fh: handle, offset: 0, length: 4096, mode: 0, padding: 0 };
    let flags = libc::O_RDWR as u32;
    let open = |flags: i32| (fuse_opcode::FUSE_OPEN, file, [flags as u32, 0].as_bytes().to_vec());
    vec![
        (fuse_opcode::FUSE_SETATTR, file, size.as_bytes().to_vec()),
        (fuse_opcode::FUSE_SETATTR, file, time.as_bytes().to_vec()),
        (fuse_opcode::FUSE_SETATTR, file, mode.as_bytes().to_vec()),
        (fuse_opcode::FUSE_SYMLINK, ROOT, [text("new"), text("target")].concat()),
        (fuse_opcode::FUSE_MKNOD, ROOT, [[0o100_644u32, 0, 0, 0].as_bytes(), &text("new")].concat()),
        (fuse_opcode::FUSE_MKDIR, ROOT, [[0o755u32, 0].as_bytes(), &text("new")].concat()),
        (fuse_opcode::FUSE_UNLINK, ROOT, text("file")),
        (fuse_opcode::FUSE_RMDIR, ROOT, text("folder")),
        (fuse_opcode::FUSE_RENAME, ROOT, [ROOT.as_bytes(), &text("file"), &text("new")].concat()),
        (
            fuse_opcode::FUSE_RENAME2,
            ROOT,
            [ROOT.as_bytes(), [2u32, 0].as_bytes(), &text("file"), &text("other")].concat(),
        ),
        (fuse_opcode::FUSE_LINK, ROOT, [file.as_bytes(), &text("new")].concat()),
        open(libc::O_WRONLY),
        open(libc::O_RDWR),
        open(libc::O_RDONLY | libc::O_TRUNC),
        (fuse_opcode::FUSE_CREATE, ROOT, [[flags, 0o644, 0, 0].as_bytes(), &text("new")].concat()),
        (fuse_opcode::FUSE_CREATE, ROOT, [[0u32, 0o644, 0, 0].as_bytes(), &text("file")].concat()),
        (fuse_opcode::FUSE_TMPFILE, ROOT, [[flags, 0o644, 0, 0].as_bytes(), &text("new")].concat()),
        (fuse_opcode::FUSE_WRITE, file, [data.as_bytes(), b"x"].concat()),
        (fuse_opcode::FUSE_FALLOCATE, file, space.as_bytes().to_vec()),
        (fuse_opcode::FUSE_COPY_FILE_RANGE, file, copy.as_bytes().to_vec()),
        (fuse_opcode::FUSE_SETXATTR, file, [[1u32, 0].as_bytes(), &text("user.x"), b"x"].concat()),
        (fuse_opcode::FUSE_REMOVEXATTR, file, text("user.x")),
        (fuse_opcode::FUSE_ACCESS, file, [2u32, 0].as_bytes().to_vec()),
    ]
}

#[test]
fn every_change_is_refused_and_counted() {
    let host = export();
    let before = snapshot(&host.export());
    let mut client = host.client(Options { read_only: true, xattrs: true, ..Options::default() });
    let file = client.walk("file").unwrap();
    let handle = client.open(file, libc::O_RDONLY).unwrap();
    let changes = changes(file, handle);
    let count = changes.len() as u64;
    for (opcode, node, body) in changes {
        assert_eq!(client.ask(opcode, node, &body), Err(libc::EROFS), "operation {}", opcode as u32);
    }
    assert_eq!(client.metric("read_only_refusals"), count);
    assert_eq!(client.read(file, handle, 0, 100).unwrap(), b"content");
    assert_eq!(snapshot(&host.export()), before);
}

/// The same requests do change something where that is allowed: the test above is about what would have happened.
#[test]
fn the_changes_that_are_refused_are_good_ones() {
    let mut checked = 0;
    for index in 0..changes(0, 0).len() {
        let host = export();
        let mut client = host.client(Options { xattrs: true, ..Options::default() });
        let file = client.walk("file").unwrap();
        let handle = client.open(file, libc::O_RDWR).unwrap();
        let (opcode, node, body) = changes(file, handle).swap_remove(index);
        match client.ask(opcode, node, &body) {
            // Not every file system has attributes, or files without names.
            Err(libc::EOPNOTSUPP | libc::ENODATA) => {}
            outcome => {
                outcome.unwrap_or_else(|error| panic!("operation {} failed: {error}", opcode as u32));
                checked += 1;
            }
        }
    }
    assert!(checked >= changes(0, 0).len() - 3);
}

/// Whatever an operation is called, now or in a later version of the protocol.
#[test]
fn no_operation_at_all_changes_anything() {
    let host = export();
    let before = snapshot(&host.export());
    let mut client = host.client(Options { read_only: true, xattrs: true, ..Options::default() });
    let file = client.walk("file").unwrap();
    let handle = client.open(file, libc::O_RDONLY).unwrap();
    let bodies: Vec<Vec<u8>> = changes(file, handle).into_iter().map(|(_, _, body)| body).collect();
    for opcode in 0..200 {
        for body in &bodies {
            for node in [ROOT, file] {
                let ended = client.send(opcode, node, body, 4096);
                assert!(!matches!(ended, Ok(Ended::Waiting(_))));
                revive(&mut client);
            }
        }
    }
    assert_eq!(snapshot(&host.export()), before);
}

/// Begins a new session if the last request ended it, so that the rest has one.
fn revive(client: &mut Client) {
    if client.lookup(ROOT, "file").is_err() {
        client.init();
        let file = client.walk("file").unwrap();
        client.open(file, libc::O_RDONLY).unwrap();
    }
}
