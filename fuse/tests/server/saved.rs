//! Sessions that are saved and go on in another server.

use std::fs;

use fuse::{Limits, Options, Quota, Session, SessionError};
use fuse_abi::linux::{self as abi, fuse_opcode};
use nix::libc;
use rustix::io::Errno;
use serde_json::Value;
use zerocopy::IntoBytes;

use crate::client::{Client, Ended, Host, ROOT, read_in};

const STALE: i32 = Errno::STALE.raw_os_error();
const BADF: i32 = Errno::BADF.raw_os_error();

/// Another server of the same export, to which the session goes.
fn restored(host: &Host, session: Session, options: Options) -> Result<Client, SessionError> {
    let mut client = host.client(options);
    client.server.reset();
    client.server.let_go();
    client.server.restore(session)?;
    Ok(client)
}

fn moved(host: &Host, client: Client, options: Options) -> Client {
    restored(host, client.server.save().unwrap(), options).unwrap()
}

/// A session with some words of its written form replaced.
fn changed(session: &Session, change: impl FnOnce(&mut Value)) -> Session {
    let mut value = serde_json::to_value(session).unwrap();
    change(&mut value);
    serde_json::from_value(value).unwrap()
}

#[test]
fn what_a_guest_knows_and_has_open_stays() {
    let host = Host::new();
    fs::create_dir_all(host.path("one/two")).unwrap();
    for name in ["a", "b", "c"] {
        fs::write(host.path("one/two").join(name), "content").unwrap();
    }
    let mut client = host.client(Options::default());
    let node = client.walk("one/two/a").unwrap();
    let folder = client.walk("one/two").unwrap();
    let fh = client.open(node, libc::O_RDWR).unwrap();
    let listing = |client: &mut Client, handle, offset| {
        client.ask(fuse_opcode::FUSE_READDIR, folder, &read_in(handle, offset, 64)).unwrap()
    };
    let opened = client.ask(fuse_opcode::FUSE_OPENDIR, folder, [0u32, 0].as_bytes()).unwrap();
    let directory = u64::from_le_bytes(*opened.first_chunk().unwrap());
    let first = listing(&mut client, directory, 0);
    let offset = u64::from_le_bytes(*first[8..].first_chunk().unwrap());
    let second = listing(&mut client, directory, offset);

    let mut client = moved(&host, client, Options::default());
    assert_eq!((client.metric("inodes"), client.metric("handles")), (3, 2));
    assert_eq!(client.read(node, fh, 0, 100).unwrap(), b"content");
    client.write(node, fh, 0, b"CON").unwrap();
    assert_eq!(fs::read(host.path("one/two/a")).unwrap(), b"CONtent");
    assert_eq!(listing(&mut client, directory, offset), second);
    // The same inode is the same number, and no number is given out twice.
    assert_eq!(client.walk("one/two/a").unwrap(), node);
    assert!(client.lookup(folder, "b").unwrap().nodeid > node.max(folder));
    assert!(client.open(node, libc::O_RDONLY).unwrap() > fh.max(directory));
    // It was told of that one once before, and once now.
    client.forget(node, 1);
    assert!(client.open(node, libc::O_RDONLY).is_ok());
    client.forget(node, 1);
    assert_eq!(client.open(node, libc::O_RDONLY), Err(STALE));
    client.release(node, fh);
    assert_eq!(client.read(node, fh, 0, 100), Err(BADF));
}

#[test]
fn what_moved_is_found_where_it_was_when_it_was_saved() {
    let host = Host::new();
    fs::create_dir(host.path("folder")).unwrap();
    fs::write(host.path("file"), "content").unwrap();
    let mut client = host.client(Options::default());
    let node = client.walk("file").unwrap();
    fs::rename(host.path("file"), host.path("folder/other")).unwrap();
    let mut client = moved(&host, client, Options::default());
    let fh = client.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(client.read(node, fh, 0, 100).unwrap(), b"content");
}

#[test]
fn what_is_gone_or_another_one_is_not_known_any_more() {
    let host = Host::new();
    for name in ["removed", "replaced", "stays"] {
        fs::write(host.path(name), name).unwrap();
    }
    let mut client = host.client(Options::default());
    let [removed, replaced, stays] = ["removed", "replaced", "stays"].map(|name| client.walk(name).unwrap());
    let handles = [removed, replaced, stays].map(|node| client.open(node, libc::O_RDONLY).unwrap());
    let session = client.server.save().unwrap();
    fs::remove_file(host.path("removed")).unwrap();
    fs::write(host.path("new"), "new").unwrap();
    fs::rename(host.path("new"), host.path("replaced")).unwrap();
    let mut client = restored(&host, session, Options::default()).unwrap();
    for (node, fh) in [(removed, handles[0]), (replaced, handles[1])] {
        assert_eq!(client.open(node, libc::O_RDONLY), Err(STALE));
        assert_eq!(client.read(node, fh, 0, 100), Err(BADF));
    }
    assert_eq!(client.read(stays, handles[2], 0, 100).unwrap(), b"stays");
}

#[test]
fn nothing_is_found_through_a_link_that_took_a_directorys_place() {
    let host = Host::new();
    fs::create_dir(host.path("folder")).unwrap();
    fs::write(host.path("folder/secret"), "").unwrap();
    let mut client = host.client(Options::default());
    let node = client.walk("folder/secret").unwrap();
    let session = client.server.save().unwrap();
    // Even where it leads to the very inode.
    fs::rename(host.path("folder"), host.folder.path().join("moved")).unwrap();
    std::os::unix::fs::symlink("../moved", host.path("folder")).unwrap();
    let mut client = restored(&host, session, Options::default()).unwrap();
    assert_eq!(client.open(node, libc::O_RDONLY), Err(STALE));
}

#[test]
fn a_single_file_is_found_without_its_name() {
    let host = Host::new();
    fs::write(host.path("file"), "content").unwrap();
    let make = || {
        let file = crate::client::open_path(&host.path("file"));
        let source = fuse::Source::File { file, name: c"shown".into() };
        Client::new(fuse::Export::new(source, Options::default(), fuse::descriptors().unwrap()).unwrap())
    };
    let mut client = make();
    let node = client.walk("shown").unwrap();
    let fh = client.open(node, libc::O_RDONLY).unwrap();
    client.ask(fuse_opcode::FUSE_OPENDIR, ROOT, [0u32, 0].as_bytes()).unwrap();
    let session = client.server.save().unwrap();
    let mut other = make();
    other.server.reset();
    other.server.restore(session.clone()).unwrap();
    assert_eq!(other.read(node, fh, 0, 100).unwrap(), b"content");
    assert_eq!(other.metric("handles"), 2);
    // A directory has no such thing.
    assert!(matches!(restored(&host, session, Options::default()), Err(SessionError::Impossible { .. })));
}

fn lock(fh: u64, kind: i32, lk_flags: u32) -> Vec<u8> {
    let lk = abi::fuse_file_lock { start: 0, end: i64::MAX as u64, type_: kind as u32, pid: 0 };
    abi::fuse_lk_in { fh, owner: 1, lk, lk_flags, padding: 0 }.as_bytes().to_vec()
}

#[test]
fn who_holds_a_lock_or_waits_for_one_is_not_saved() {
    let host = Host::new();
    fs::write(host.path("file"), "content").unwrap();
    let mut client = host.client(Options::default());
    let node = client.walk("file").unwrap();
    let fh = client.open(node, libc::O_RDWR).unwrap();
    for flags in [abi::FUSE_LK_FLOCK, 0] {
        client.ask(fuse_opcode::FUSE_SETLK, node, &lock(fh, libc::F_WRLCK, flags)).unwrap();
        assert_eq!(client.server.save(), Err(SessionError::Locked(1)));
        client.ask(fuse_opcode::FUSE_SETLK, node, &lock(fh, libc::F_UNLCK, flags)).unwrap();
        assert!(client.server.save().is_ok());
    }

    let held = fs::File::open(host.path("file")).unwrap();
    held.lock().unwrap();
    let wait = lock(fh, libc::F_WRLCK, abi::FUSE_LK_FLOCK);
    let sent = client.send(fuse_opcode::FUSE_SETLKW as u32, node, &wait, 16).unwrap();
    assert!(matches!(sent, Ended::Waiting(_)));
    assert_eq!(client.server.save(), Err(SessionError::Waiting(1)));
    held.unlock().unwrap();
}

#[test]
fn what_is_open_without_a_name_is_not_saved() {
    let host = Host::new();
    let mut client = host.client(Options::default());
    let (entry, fh) = client.create(ROOT, "file", libc::O_RDWR, 0o644).unwrap();
    // A name that the guest does not know of is none that leads back.
    fs::hard_link(host.path("file"), host.folder.path().join("elsewhere")).unwrap();
    client.unlink(ROOT, "file").unwrap();
    assert_eq!(client.server.save(), Err(SessionError::Nameless(1)));
    client.release(entry.nodeid, fh);
    fs::remove_file(host.folder.path().join("elsewhere")).unwrap();
    let mut client = moved(&host, client, Options::default());
    assert_eq!(client.open(entry.nodeid, libc::O_RDONLY), Err(STALE));
}

#[test]
fn what_was_added_stays_added() {
    let host = Host::new();
    let options = || Options { quota: Quota { bytes: Some(1 << 20), inodes: Some(2) }, ..Options::default() };
    let mut client = host.client(options());
    let (entry, fh) = client.create(ROOT, "file", libc::O_RDWR, 0o644).unwrap();
    client.write(entry.nodeid, fh, 0, &[7; 100_000]).unwrap();
    let before = client.metric("added_bytes");
    let mut client = moved(&host, client, options());
    assert!(before > 100_000 && client.metric("added_bytes") == before);
    client.mkdir(ROOT, "second").unwrap();
    assert_eq!(client.mkdir(ROOT, "third").err(), Some(Errno::NOSPC.raw_os_error()));
}

#[test]
fn what_was_removed_and_is_only_known_is_credited_elsewhere_too() {
    let host = Host::new();
    let options = || Options { quota: Quota { bytes: Some(1 << 20), inodes: Some(1) }, ..Options::default() };
    let mut client = host.client(options());
    let (entry, fh) = client.create(ROOT, "file", libc::O_RDWR, 0o644).unwrap();
    client.write(entry.nodeid, fh, 0, &[7; 100_000]).unwrap();
    client.release(entry.nodeid, fh);
    client.unlink(ROOT, "file").unwrap();
    let mut client = moved(&host, client, options());
    assert_eq!(client.metric("added_bytes"), 0);
    client.mkdir(ROOT, "folder").unwrap();
}

#[test]
fn what_is_open_and_not_known_goes_on_as_the_one_that_it_was() {
    let host = Host::new();
    let options = || Options { quota: Quota { bytes: Some(1 << 20), inodes: None }, ..Options::default() };
    let mut client = host.client(options());
    let (entry, fh) = client.create(ROOT, "file", libc::O_RDWR, 0o644).unwrap();
    client.write(entry.nodeid, fh, 0, &[7; 100_000]).unwrap();
    client.forget(entry.nodeid, 1);
    let mut client = moved(&host, client, options());
    let node = client.walk("file").unwrap();
    client.unlink(ROOT, "file").unwrap();
    client.forget(node, 1);
    assert!(client.metric("added_bytes") > 100_000);
    client.release(node, fh);
    assert_eq!(client.metric("added_bytes"), 0);
}

#[test]
fn more_entries_than_can_be_saved_are_not_even_read() {
    let read = |count: usize| {
        let entry = r#"{"number":1,"what":"Shown"}"#;
        let text = format!(
            r#"{{"begun":true,"next_node":2,"next_handle":1,"nodes":[],"handles":[{}],"added_bytes":0,"added_inodes":0}}"#,
            vec![entry; count].join(",")
        );
        serde_json::from_str::<Session>(&text)
    };
    assert!(read(1000).is_ok());
    assert!(read((15 << 20) / 40 + 1).is_err());
}

#[test]
fn a_session_that_no_guest_could_have_is_refused() {
    let host = Host::new();
    fs::write(host.path("a"), "content").unwrap();
    fs::write(host.path("b"), "content").unwrap();
    let mut client = host.client(Options::default());
    let [a, b] = ["a", "b"].map(|name| client.walk(name).unwrap());
    client.open(a, libc::O_RDWR).unwrap();
    let session = client.server.save().unwrap();
    let refused = |change: &dyn Fn(&mut Value), options: Options| {
        let outcome = restored(&host, changed(&session, change), options);
        matches!(outcome, Err(SessionError::Impossible { .. }))
    };
    let usual = Options::default;
    assert!(!refused(&|_| {}, usual()));
    assert!(refused(&|session| session["begun"] = false.into(), usual()));
    assert!(refused(&|session| session["next_node"] = 1.into(), usual()));
    assert!(refused(&|session| session["next_node"] = b.into(), usual()), "a number that comes again");
    assert!(refused(&|session| session["next_handle"] = 1.into(), usual()));
    assert!(refused(&|session| session["added_bytes"] = u64::MAX.into(), usual()));
    assert!(refused(&|session| session["nodes"][0]["number"] = 1.into(), usual()), "the root's number");
    assert!(refused(&|session| session["nodes"][0]["number"] = b.into(), usual()), "a number twice");
    assert!(refused(&|session| session["nodes"][0]["lookups"] = 0.into(), usual()));
    assert!(refused(&|session| session["nodes"][1] = session["nodes"][0].clone(), usual()), "an inode twice");
    for path in ["../secret", "/etc/passwd", "a/", "a//b", "./a", "a\0b", &"a/".repeat(4096)] {
        assert!(refused(&|session| session["nodes"][0]["place"]["path"] = path.as_bytes().into(), usual()), "{path}");
    }
    let flags = |flags: i32| move |session: &mut Value| session["handles"][0]["what"]["File"]["flags"] = flags.into();
    for wrong in [3, libc::O_TRUNC | libc::O_RDWR, libc::O_PATH, libc::O_CREAT, i32::MAX] {
        assert!(refused(&flags(wrong), usual()), "{wrong:#x}");
    }
    assert!(refused(&|_| {}, Options { read_only: true, ..usual() }), "open for writing");
    let limits = Limits { inodes: 1, ..Limits::default() };
    assert!(refused(&|_| {}, Options { limits, ..usual() }), "more than there may be");
    assert!(host.is_intact());
    assert_eq!(fs::read(host.path("a")).unwrap(), b"content");
}
