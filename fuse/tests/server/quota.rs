//! What a guest may add is bounded.

use std::fs;

use fuse::{Options, Quota};
use fuse_abi::linux::{self as abi, fuse_opcode};
use nix::libc;
use zerocopy::IntoBytes;

use crate::client::{Client, Host, ROOT, parse, text};

const MIB: u64 = 1 << 20;

fn limited(host: &Host, bytes: u64) -> Client {
    host.client(Options { quota: Quota { bytes: Some(bytes), inodes: None }, ..Options::default() })
}

/// Writes until nothing more is taken, and gives how much was.
fn fill(client: &mut Client, node: u64, handle: u64, mut offset: u64) -> u64 {
    let (data, begin) = (vec![7; 256 << 10], offset);
    loop {
        match client.write(node, handle, offset, &data) {
            Ok(written) => offset += u64::from(written),
            Err(error) => {
                assert_eq!(error, libc::ENOSPC);
                return offset - begin;
            }
        }
    }
}

/// What the files of an export take on the disk.
fn on_disk(host: &Host) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    fs::read_dir(host.export()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512).sum()
}

#[test]
fn no_more_is_written_than_may_be_added() {
    let host = Host::new();
    let mut client = limited(&host, 2 * MIB);
    let (entry, handle) = client.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    let written = fill(&mut client, entry.nodeid, handle, 0);
    assert!((MIB..=2 * MIB).contains(&written), "{written}");
    assert!(on_disk(&host) <= 2 * MIB);
    assert!(client.metric("quota_refusals") > 0);
    // What is there can be written again.
    assert_eq!(client.write(entry.nodeid, handle, 4096, &[8; 8192]).unwrap(), 8192);
    // Nor is there room in other ways.
    let space = abi::fuse_fallocate_in { fh: handle, offset: 4 * MIB, length: MIB, mode: 0, padding: 0 };
    assert_eq!(client.ask(fuse_opcode::FUSE_FALLOCATE, entry.nodeid, space.as_bytes()), Err(libc::ENOSPC));
    let behind = abi::fuse_fallocate_in { mode: 1, ..space };
    assert_eq!(client.ask(fuse_opcode::FUSE_FALLOCATE, entry.nodeid, behind.as_bytes()), Err(libc::EOPNOTSUPP));
    let copy = abi::fuse_copy_file_range_in {
        fh_in: handle,
        off_in: 0,
        nodeid_out: entry.nodeid,
        fh_out: handle,
        off_out: 4 * MIB,
        len: MIB,
        flags: 0,
    };
    assert_eq!(client.ask(fuse_opcode::FUSE_COPY_FILE_RANGE, entry.nodeid, copy.as_bytes()), Err(libc::ENOSPC));
    assert!(on_disk(&host) <= 2 * MIB);
}

#[test]
fn what_is_written_from_the_guests_cache_is_written_whole_or_is_an_error() {
    let host = Host::new();
    let mut client = limited(&host, MIB);
    let (entry, handle) = client.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    let data = vec![7; MIB as usize * 3 / 4];
    let mut write = |offset, flags| client.write_with(entry.nodeid, handle, offset, &data, flags, 0);
    assert_eq!(write(0, abi::FUSE_WRITE_CACHE), Ok(data.len() as u32));
    assert_eq!(write(data.len() as u64, abi::FUSE_WRITE_CACHE), Err(libc::ENOSPC));
    // Whoever waits for a write is told how much was written.
    let written = fs::metadata(host.path("file")).unwrap().len();
    assert!(matches!(write(written, 0), Ok(1..) | Err(libc::ENOSPC)));
    let counted = client.metric("added_bytes");
    assert!((on_disk(&host)..=MIB).contains(&counted), "{counted}");
}

#[test]
fn the_guest_sees_what_it_may_add_as_the_size_of_its_file_system() {
    let host = Host::new();
    let mut client = limited(&host, 8 * MIB);
    let free = |client: &mut Client| {
        let st = parse::<abi::fuse_statfs_out>(&client.ask(fuse_opcode::FUSE_STATFS, ROOT, &[]).unwrap()).st;
        assert!(st.blocks * u64::from(st.frsize) <= 8 * MIB);
        st.bavail * u64::from(st.frsize)
    };
    let before = free(&mut client);
    assert!(before <= 8 * MIB);
    let (entry, handle) = client.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    client.write(entry.nodeid, handle, 0, &vec![1; MIB as usize]).unwrap();
    let after = free(&mut client);
    assert!(before - after >= MIB && before - after <= 2 * MIB, "{before} {after}");
}

#[test]
fn what_is_cut_or_removed_is_credited_once_nobody_has_it_open() {
    let host = Host::new();
    let mut client = limited(&host, 2 * MIB);
    let (entry, handle) = client.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    let written = fill(&mut client, entry.nodeid, handle, 0);
    let mut cut = parse::<abi::fuse_setattr_in>(&[0; 88]);
    cut.valid = abi::FATTR_SIZE;
    client.ask(fuse_opcode::FUSE_SETATTR, entry.nodeid, cut.as_bytes()).unwrap();
    assert_eq!(fill(&mut client, entry.nodeid, handle, 0), written);
    // Removed, but open: it takes its space as before.
    client.unlink(ROOT, "file").unwrap();
    assert_eq!(client.create(ROOT, "other", libc::O_RDWR, 0o600).err().or(Some(libc::ENOSPC)), Some(libc::ENOSPC));
    client.forget(entry.nodeid, 1);
    assert!(client.metric("added_bytes") >= written);
    client.release(entry.nodeid, handle);
    let left = client.metric("added_bytes");
    assert!(left <= 8192, "{left}");
}

/// A file of 256 KiB, and how it is open.
fn filled(client: &mut Client, name: &str) -> (u64, u64) {
    let (entry, handle) = client.create(ROOT, name, libc::O_RDWR, 0o600).unwrap();
    client.write(entry.nodeid, handle, 0, &vec![7; MIB as usize / 4]).unwrap();
    (entry.nodeid, handle)
}

#[test]
fn what_is_open_takes_its_space_although_the_guest_knows_it_anew() {
    let host = Host::new();
    let mut client = limited(&host, 2 * MIB);
    let (node, handle) = filled(&mut client, "file");
    client.forget(node, 1);
    let again = client.walk("file").unwrap();
    client.unlink(ROOT, "file").unwrap();
    client.forget(again, 1);
    assert!(client.metric("added_bytes") >= MIB / 4);
    client.release(again, handle);
    assert_eq!(client.metric("added_bytes"), 0);
}

#[test]
fn an_inode_is_credited_once_however_many_times_it_was_known() {
    let host = Host::new();
    let mut client = limited(&host, 2 * MIB);
    filled(&mut client, "stays");
    let (node, handle) = filled(&mut client, "one");
    let link = [node.as_bytes(), &text("two")].concat();
    client.ask(fuse_opcode::FUSE_LINK, ROOT, &link).unwrap();
    client.unlink(ROOT, "one").unwrap();
    client.forget(node, 2);
    let again = client.walk("two").unwrap();
    client.unlink(ROOT, "two").unwrap();
    client.forget(again, 1);
    client.release(again, handle);
    let left = client.metric("added_bytes");
    assert!((MIB / 4..MIB / 2).contains(&left), "{left}");
}

#[test]
fn what_has_no_data_is_credited_as_it_was_counted() {
    let host = Host::new();
    let mut client = limited(&host, 2 * MIB);
    filled(&mut client, "file");
    let before = client.metric("added_bytes");
    for _ in 0..10 {
        let folder = client.mkdir(ROOT, "folder").unwrap().nodeid;
        let link = [text("link"), text(&"x".repeat(4000))].concat();
        client.ask(fuse_opcode::FUSE_SYMLINK, folder, &link).unwrap();
        let link = client.lookup(folder, "link").unwrap().nodeid;
        client.unlink(folder, "link").unwrap();
        client.ask(fuse_opcode::FUSE_RMDIR, ROOT, &text("folder")).unwrap();
        client.forget(link, 2);
        client.forget(folder, 1);
    }
    assert_eq!(client.metric("added_bytes"), before);
}

#[test]
fn removing_what_was_there_before_gives_no_room() {
    let host = Host::new();
    fs::write(host.path("before"), vec![1; 4 * MIB as usize]).unwrap();
    let mut client = limited(&host, MIB);
    let node = client.walk("before").unwrap();
    client.unlink(ROOT, "before").unwrap();
    client.forget(node, 1);
    let (entry, handle) = client.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    assert!(fill(&mut client, entry.nodeid, handle, 0) <= MIB);
}

#[test]
fn a_file_with_holes_is_counted_when_they_are_filled() {
    let host = Host::new();
    let sparse = fs::File::create(host.path("sparse")).unwrap();
    sparse.set_len(64 * MIB).unwrap();
    let mut client = limited(&host, MIB);
    let node = client.walk("sparse").unwrap();
    let handle = client.open(node, libc::O_RDWR).unwrap();
    assert!(fill(&mut client, node, handle, MIB) <= MIB);
    assert!(on_disk(&host) <= MIB);
}

#[test]
fn empty_files_count_too() {
    let host = Host::new();
    let mut client = limited(&host, 64 << 10);
    let made = (0..100).take_while(|index| client.mkdir(ROOT, &format!("folder{index}")).is_ok()).count();
    assert_eq!(made, 16);
    let quota = Quota { bytes: None, inodes: Some(3) };
    let mut client = host.client(Options { quota, ..Options::default() });
    let made = (0..10).take_while(|index| client.create(ROOT, &format!("file{index}"), libc::O_RDWR, 0o600).is_ok());
    assert_eq!(made.count(), 3);
    // One that was not made is not counted.
    client.unlink(ROOT, "file0").unwrap();
    assert_eq!(client.mkdir(ROOT, "folder1").err(), Some(libc::ENOSPC));
}

#[test]
fn an_inode_that_could_not_be_made_is_not_counted() {
    let host = Host::new();
    fs::create_dir(host.path("there")).unwrap();
    let mut client = host.client(Options { quota: Quota { bytes: None, inodes: Some(1) }, ..Options::default() });
    for _ in 0..3 {
        assert_eq!(client.mkdir(ROOT, "there").err(), Some(libc::EEXIST));
    }
    client.mkdir(ROOT, "new").unwrap();
}

#[test]
fn attributes_are_counted_as_long_as_they_are_there() {
    let host = Host::new();
    fs::write(host.path("file"), "").unwrap();
    let quota = Quota { bytes: Some(64 << 10), inodes: None };
    let mut client = host.client(Options { quota, xattrs: true, ..Options::default() });
    let node = client.walk("file").unwrap();
    let set = |client: &mut Client, length: usize, flags: u32| {
        let body = [[length as u32, flags].as_bytes(), &text("user.a"), &vec![7; length]].concat();
        client.ask(fuse_opcode::FUSE_SETXATTR, node, &body).map(|_| client.metric("added_bytes"))
    };
    match set(&mut client, 100, 0) {
        // Some file systems have none.
        Err(libc::EOPNOTSUPP) => return,
        counted => assert_eq!(counted, Ok(106)),
    }
    // Whatever took its place counts instead of it.
    assert_eq!([500, 500, 20].map(|length| set(&mut client, length, 0)), [Ok(506), Ok(506), Ok(26)]);
    // What was not set, because it is there already, does not count.
    assert_eq!(set(&mut client, 300, libc::XATTR_CREATE as u32), Err(libc::EEXIST));
    assert_eq!(client.metric("added_bytes"), 26);
    assert_eq!(set(&mut client, 64 << 10, 0), Err(libc::ENOSPC));
    client.ask(fuse_opcode::FUSE_REMOVEXATTR, node, &text("user.a")).unwrap();
    assert_eq!(client.metric("added_bytes"), 0);
}

/// What a directory of the host takes besides its first block.
fn grown(host: &Host, name: &str) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    (fs::metadata(host.path(name)).unwrap().blocks() * 512).saturating_sub(4096)
}

#[test]
fn directories_count_what_names_make_them_take() {
    let host = Host::new();
    let mut client = limited(&host, 4 * MIB);
    let (file, _) = filled(&mut client, "file");
    let [folder, other] = ["folder", "other"].map(|name| client.mkdir(ROOT, name).unwrap().nodeid);
    let before = client.metric("added_bytes");
    let names: Vec<String> = (0..200).map(|index| format!("{index:0200}")).collect();
    for name in &names {
        client.ask(fuse_opcode::FUSE_LINK, folder, &[file.as_bytes(), &text(name)].concat()).unwrap();
    }
    assert_eq!(client.metric("added_bytes") - before, grown(&host, "folder"));
    for name in &names {
        let body = [other.as_bytes(), &text(name), &text(name)].concat();
        client.ask(fuse_opcode::FUSE_RENAME, folder, &body).unwrap();
    }
    assert_eq!(client.metric("added_bytes") - before, grown(&host, "folder") + grown(&host, "other"));
    for name in &names {
        client.unlink(other, name).unwrap();
    }
    for (name, node) in [("folder", folder), ("other", other)] {
        client.ask(fuse_opcode::FUSE_RMDIR, ROOT, &text(name)).unwrap();
        client.forget(node, 1);
    }
    assert_eq!(client.metric("added_bytes"), before - 2 * 4096);
}

#[test]
fn a_name_needs_room_also_without_an_inode() {
    let host = Host::new();
    fs::write(host.path("there"), "").unwrap();
    // Less than a block is left once there is one inode.
    let mut client = limited(&host, 8191);
    let (entry, _) = client.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    let link = [entry.nodeid.as_bytes(), &text("link")].concat();
    assert_eq!(client.ask(fuse_opcode::FUSE_LINK, ROOT, &link), Err(libc::ENOSPC));
    let mut rename =
        |to| client.ask(fuse_opcode::FUSE_RENAME, ROOT, &[ROOT.as_bytes(), &text("file"), &text(to)].concat());
    assert_eq!(rename("moved"), Err(libc::ENOSPC));
    // A name that is there already takes no more.
    rename("there").unwrap();
}
