//! A file is exported without the directory that it is in.

use std::fs;

use fuse::{Export, ExportError, Options, Source, descriptors};
use fuse_abi::linux::{self as abi, fuse_opcode};
use nix::libc;
use zerocopy::IntoBytes;

use crate::client::{Client, Host, ROOT, open_path, parse, text};

fn client(host: &Host) -> Client {
    fs::write(host.path("config"), "content").unwrap();
    fs::write(host.path("beside"), "not for you").unwrap();
    let source = Source::File { file: open_path(&host.path("config")), name: c"hosts".into() };
    let options = Options { xattrs: true, ..Options::default() };
    Client::new(Export::new(source, options, descriptors().unwrap()).unwrap())
}

#[test]
fn the_file_is_the_only_thing_there_is() {
    let host = Host::new();
    let mut client = client(&host);
    for plus in [false, true] {
        for size in [200, 4096] {
            assert_eq!(client.list(ROOT, size, plus), [".", "..", "hosts"]);
        }
    }
    for name in ["config", "beside", "hostsx", "host"] {
        assert_eq!(client.lookup(ROOT, name).err(), Some(libc::ENOENT), "{name}");
    }
    for name in ["..", ".", "../export/beside", "/etc/hosts"] {
        assert_eq!(client.lookup(ROOT, name).err(), Some(libc::EINVAL), "{name}");
    }
    let root: abi::fuse_attr_out = parse(&client.ask(fuse_opcode::FUSE_GETATTR, ROOT, &[0; 16]).unwrap());
    assert_eq!(root.attr.mode, 0o040_555);
    client.ask(fuse_opcode::FUSE_STATFS, ROOT, &[]).unwrap();
}

#[test]
fn it_is_read_and_written_in_place() {
    let host = Host::new();
    let mut client = client(&host);
    let file = client.walk("hosts").unwrap();
    assert_eq!(client.walk("hosts"), Ok(file));
    let handle = client.open(file, libc::O_RDWR).unwrap();
    assert_eq!(client.read(file, handle, 0, 100).unwrap(), b"content");
    client.write(file, handle, 0, b"CON").unwrap();
    assert_eq!(fs::read(host.path("config")).unwrap(), b"CONtent");
}

#[test]
fn nothing_can_be_done_with_its_directory() {
    let host = Host::new();
    let mut client = client(&host);
    let file = client.walk("hosts").unwrap();
    let setattr = [0u8; 88];
    let requests: &[(fuse_opcode, Vec<u8>)] = &[
        (fuse_opcode::FUSE_UNLINK, text("hosts")),
        (fuse_opcode::FUSE_RMDIR, text("hosts")),
        (fuse_opcode::FUSE_RENAME, [ROOT.as_bytes(), &text("hosts"), &text("new")].concat()),
        (fuse_opcode::FUSE_RENAME2, [ROOT.as_bytes(), [0u32, 0].as_bytes(), &text("hosts"), &text("new")].concat()),
        (fuse_opcode::FUSE_LINK, [file.as_bytes(), &text("new")].concat()),
        (fuse_opcode::FUSE_SYMLINK, [text("new"), text("target")].concat()),
        (fuse_opcode::FUSE_MKDIR, [[0o755u32, 0].as_bytes(), &text("new")].concat()),
        (fuse_opcode::FUSE_MKNOD, [[0o100_644u32, 0, 0, 0].as_bytes(), &text("new")].concat()),
        (fuse_opcode::FUSE_CREATE, [[libc::O_RDWR as u32, 0o644, 0, 0].as_bytes(), &text("new")].concat()),
        (fuse_opcode::FUSE_TMPFILE, [[libc::O_RDWR as u32, 0o644, 0, 0].as_bytes(), &text("new")].concat()),
        (fuse_opcode::FUSE_SETATTR, setattr.to_vec()),
        (fuse_opcode::FUSE_OPEN, [0u32, 0].as_bytes().to_vec()),
    ];
    for (opcode, body) in requests {
        assert_eq!(client.ask(*opcode, ROOT, body), Err(libc::EPERM), "operation {}", *opcode as u32);
    }
    let mut names: Vec<_> = fs::read_dir(host.export()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["beside", "config"]);
}

#[test]
fn what_is_exported_must_be_what_it_is_said_to_be() {
    let host = Host::new();
    let file = |path: &std::path::Path, name: &std::ffi::CStr| {
        let source = Source::File { file: open_path(path), name: name.into() };
        Export::new(source, Options::default(), descriptors().unwrap())
    };
    assert!(matches!(file(&host.export(), c"name"), Err(ExportError::Type { .. })));
    fs::write(host.path("config"), "").unwrap();
    let secret = host.folder.path().join("secret");
    assert!(matches!(file(&secret, c"a/b"), Err(ExportError::Name { .. })));
    let source = Source::Directory(open_path(&secret));
    let directory = Export::new(source, Options::default(), descriptors().unwrap());
    assert!(matches!(directory, Err(ExportError::Type { .. })));
    let source = Source::File { file: open_path(&host.path("config")), name: c"hosts".into() };
    let elsewhere = Export::new(source, Options::default(), open_path(&host.export()));
    assert!(matches!(elsewhere, Err(ExportError::NotProcfs)));
}
