//! What a guest does all day.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

use fuse::{Cache, Options, Ownership};
use fuse_abi::linux::{self as abi, fuse_opcode};
use nix::libc;
use zerocopy::{FromZeros as _, IntoBytes};

use crate::client::{Client, Host, ROOT, parse, text};

#[test]
fn a_file_is_found_opened_and_read() {
    let host = Host::new();
    fs::create_dir(host.path("folder")).unwrap();
    fs::write(host.path("folder/file"), "0123456789").unwrap();
    let mut client = host.client(Options { read_only: true, ..Options::default() });
    let node = client.walk("folder/file").unwrap();
    let handle = client.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(client.read(node, handle, 2, 100).unwrap(), b"23456789");
    assert_eq!(client.read(node, handle, 4, 3).unwrap(), b"456");
    assert_eq!(client.read(node, handle, 10, 3).unwrap(), b"");
    assert_eq!(client.metric("read_bytes"), 11);
    assert_eq!(client.lookup(ROOT, "missing").err(), Some(libc::ENOENT));
    assert_eq!((client.metric("requests"), client.metric("errors")), (8, 0));
}

#[test]
fn what_is_written_is_in_the_file_of_the_host() {
    let host = Host::new();
    let mut client = host.client(Options::default());
    let (entry, handle) = client.create(ROOT, "new", libc::O_RDWR | libc::O_EXCL, 0o640).unwrap();
    assert_eq!(client.write(entry.nodeid, handle, 3, b"data").unwrap(), 4);
    assert_eq!(fs::read(host.path("new")).unwrap(), b"\0\0\0data");
    assert_eq!(fs::metadata(host.path("new")).unwrap().mode() & 0o777, 0o640);
    assert_eq!(client.create(ROOT, "new", libc::O_RDWR | libc::O_EXCL, 0o640).err(), Some(libc::EEXIST));
    // Without O_EXCL, one that is there is opened, and cut if that is asked for.
    let (again, _) = client.create(ROOT, "new", libc::O_RDWR | libc::O_TRUNC, 0o640).unwrap();
    assert_eq!((again.nodeid, again.attr.size), (entry.nodeid, 7));
    assert_eq!(fs::metadata(host.path("new")).unwrap().len(), 0);
    assert_eq!(client.metric("written_bytes"), 4);
}

#[test]
fn appending_goes_to_the_end_whatever_the_guest_thinks_it_is() {
    let host = Host::new();
    fs::write(host.path("log"), "one").unwrap();
    let mut client = host.client(Options::default());
    let node = client.walk("log").unwrap();
    let handle = client.open(node, libc::O_WRONLY | libc::O_APPEND).unwrap();
    fs::write(host.path("log"), "one two").unwrap();
    client.write_with(node, handle, 3, b" three", 0, libc::O_APPEND as u32).unwrap();
    assert_eq!(fs::read(host.path("log")).unwrap(), b"one two three");
    // A page of a mapping goes where it belongs, although the file was opened to append.
    client.write_with(node, handle, 0, b"ONE", abi::FUSE_WRITE_CACHE, libc::O_APPEND as u32).unwrap();
    assert_eq!(fs::read(host.path("log")).unwrap(), b"ONE two three");
}

#[test]
fn a_write_waits_for_the_disk_where_it_is_to() {
    use rustix::io::ReadWriteFlags as Flags;

    let host = Host::new();
    let mut client = host.client(Options::default());
    let (entry, handle) = client.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    for (flags, expected) in [
        (0, Flags::empty()),
        (libc::O_DSYNC, Flags::DSYNC),
        (libc::O_SYNC, Flags::SYNC | Flags::DSYNC),
        (libc::O_DSYNC | libc::O_APPEND, Flags::DSYNC | Flags::APPEND),
    ] {
        client.write_with(entry.nodeid, handle, 0, b"data", 0, flags as u32).unwrap();
        assert_eq!(client.written, expected, "{flags:#x}");
    }
}

#[test]
fn directories_are_read_in_pieces_of_any_size() {
    let host = Host::new();
    let mut expected: Vec<String> =
        (0..300).map(|index| format!("file-{index:03}-{}", "x".repeat(index % 90))).collect();
    for name in &expected {
        fs::write(host.path(name), "").unwrap();
    }
    expected.extend([".".into(), "..".into()]);
    expected.sort();
    let mut client = host.client(Options::default());
    for size in [400, 1000, 4096, 1 << 20] {
        assert_eq!(client.list(ROOT, size, false), expected, "{size}");
        assert_eq!(client.list(ROOT, size, true), expected, "{size}, with attributes");
    }
    // Listing with attributes is looking up.
    assert_eq!(client.metric("inodes"), 300);
}

#[test]
fn names_are_made_moved_and_removed() {
    let host = Host::new();
    let mut client = host.client(Options::default());
    let folder = client.mkdir(ROOT, "folder").unwrap().nodeid;
    let link = [text("link"), text("../secret")].concat();
    client.ask(fuse_opcode::FUSE_SYMLINK, folder, &link).unwrap();
    let link = client.lookup(folder, "link").unwrap().nodeid;
    assert_eq!(client.ask(fuse_opcode::FUSE_READLINK, link, &[]).unwrap(), b"../secret");
    let (file, _) = client.create(folder, "one", libc::O_RDWR, 0o600).unwrap();
    let hard = [file.nodeid.as_bytes(), &text("two")].concat();
    let linked: abi::fuse_entry_out = parse(&client.ask(fuse_opcode::FUSE_LINK, folder, &hard).unwrap());
    assert_eq!((linked.nodeid, linked.attr.nlink), (file.nodeid, 2));
    let moved = [ROOT.as_bytes(), &text("one"), &text("moved")].concat();
    client.ask(fuse_opcode::FUSE_RENAME, folder, &moved).unwrap();
    assert_eq!(client.list(folder, 4096, false), [".", "..", "link", "two"]);
    let whiteout = [ROOT.as_bytes(), [4u32, 0].as_bytes(), &text("two"), &text("gone")].concat();
    assert_eq!(client.ask(fuse_opcode::FUSE_RENAME2, folder, &whiteout), Err(libc::EINVAL));
    client.unlink(folder, "two").unwrap();
    client.unlink(folder, "link").unwrap();
    assert_eq!(client.unlink(ROOT, "folder"), Err(libc::EISDIR));
    client.ask(fuse_opcode::FUSE_RMDIR, ROOT, &text("folder")).unwrap();
    assert_eq!(client.list(ROOT, 4096, false), [".", "..", "moved"]);
}

#[test]
fn attributes_are_set() {
    let host = Host::new();
    fs::write(host.path("file"), "0123456789").unwrap();
    let mut client = host.client(Options::default());
    let node = client.walk("file").unwrap();
    let mut request = abi::fuse_setattr_in::new_zeroed();
    request.valid = abi::FATTR_MODE | abi::FATTR_SIZE | abi::FATTR_MTIME | abi::FATTR_UID;
    (request.mode, request.size, request.mtime, request.mtimensec) = (0o4751, 4, 1_000_000, 5);
    let reply = client.ask(fuse_opcode::FUSE_SETATTR, node, request.as_bytes()).unwrap();
    let attr = parse::<abi::fuse_attr_out>(&reply).attr;
    assert_eq!((attr.size, attr.mtime, attr.mtimensec), (4, 1_000_000, 5));
    // Nobody on the host shall become its owner by executing it.
    assert_eq!(fs::metadata(host.path("file")).unwrap().mode() & 0o7777, 0o751);
    // Everything seems to belong to one user, so that it cannot be given to another one.
    request.valid = abi::FATTR_UID;
    request.uid = 1000;
    assert_eq!(client.ask(fuse_opcode::FUSE_SETATTR, node, request.as_bytes()), Err(libc::EPERM));
}

#[test]
fn owners_are_squashed_to_the_user_asked_for() {
    let host = Host::new();
    let mut client = host.client(Options { ownership: Ownership::Squash { uid: 7, gid: 8 }, ..Options::default() });
    let (entry, _) = client.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    assert_eq!((entry.attr.uid, entry.attr.gid), (7, 8));
    assert_eq!(fs::metadata(host.path("file")).unwrap().uid(), nix::unistd::geteuid().as_raw());
}

#[test]
fn what_runs_as_its_owner_on_the_host_does_not_run_as_the_one_user_of_the_guest() {
    let host = Host::new();
    fs::write(host.path("program"), "").unwrap();
    fs::create_dir(host.path("folder")).unwrap();
    for (name, mode) in [("program", 0o6755), ("folder", 0o2775)] {
        fs::set_permissions(host.path(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    let mut client = host.client(Options::default());
    let shown = |client: &mut Client, name: &str| client.lookup(ROOT, name).unwrap().attr.mode & 0o7777;
    assert_eq!((shown(&mut client, "program"), shown(&mut client, "folder")), (0o755, 0o2775));
    let mut client = host.client(Options { ownership: Ownership::Mapped, ..Options::default() });
    assert_eq!(shown(&mut client, "program"), 0o6755);
}

#[test]
fn owners_are_mapped_by_who_may() {
    let host = Host::new();
    let options = Options { ownership: Ownership::Mapped, ..Options::default() };
    if !nix::unistd::geteuid().is_root() {
        let mut client = host.client(options);
        client.caller = (1234, 5678);
        let body = [[0o755u32, 0].as_bytes(), &text("theirs")].concat();
        assert_eq!(client.ask(fuse_opcode::FUSE_MKDIR, ROOT, &body), Err(libc::EPERM));
        return;
    }
    fs::set_permissions(host.export(), fs::Permissions::from_mode(0o700)).unwrap();
    let mut client = host.client(options);
    client.caller = (1234, 5678);
    client.mkdir(ROOT, "theirs").unwrap();
    let made = fs::metadata(host.path("theirs")).unwrap();
    assert_eq!((made.uid(), made.gid()), (1234, 5678));
    // The thread is itself again.
    client.caller = (0, 0);
    client.mkdir(ROOT, "own").unwrap();
    assert_eq!(fs::metadata(host.path("own")).unwrap().uid(), 0);
}

#[test]
fn a_directory_hands_its_group_on_where_the_guest_says_so() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let host = Host::new();
    fs::create_dir(host.path("folder")).unwrap();
    fs::write(host.path("program"), "").unwrap();
    for name in ["folder", "program"] {
        std::os::unix::fs::chown(host.path(name), Some(1234), Some(5678)).unwrap();
    }
    let mut client = host.client(Options { ownership: Ownership::Mapped, ..Options::default() });
    let serve = || {
        fuse::prepare_thread(Ownership::Mapped, None).unwrap();
        for name in ["folder", "program"] {
            let node = client.walk(name).unwrap();
            let mut request = abi::fuse_setattr_in::new_zeroed();
            (request.valid, request.mode) = (abi::FATTR_MODE, 0o2775);
            client.ask(fuse_opcode::FUSE_SETATTR, node, request.as_bytes()).unwrap();
        }
        // The thread is itself again.
        client.mkdir(ROOT, "own").unwrap();
    };
    std::thread::scope(|scope| scope.spawn(serve).join().unwrap());
    let mode = |name: &str| fs::metadata(host.path(name)).unwrap().mode() & 0o7777;
    assert_eq!((mode("folder"), mode("program")), (0o2775, 0o775));
    assert_eq!(fs::metadata(host.path("own")).unwrap().gid(), 0);
}

#[test]
fn the_cache_policy_is_what_the_guest_is_told() {
    let host = Host::new();
    fs::write(host.path("file"), "").unwrap();
    let told = |cache| {
        let mut client = host.client(Options { cache, ..Options::default() });
        let flags = client.init().flags;
        for kept in [abi::FUSE_DO_READDIRPLUS, abi::FUSE_CACHE_SYMLINKS] {
            assert_eq!(flags & kept != 0, cache != Cache::Never);
        }
        let entry = client.lookup(ROOT, "file").unwrap();
        let reply = client.ask(fuse_opcode::FUSE_OPEN, entry.nodeid, [0u32, 0].as_bytes()).unwrap();
        assert_eq!(flags & abi::FUSE_WRITEBACK_CACHE, 0);
        let kept = abi::FOPEN_KEEP_CACHE | abi::FOPEN_DIRECT_IO;
        (entry.attr_valid, entry.entry_valid, parse::<abi::fuse_open_out>(&reply).open_flags & kept)
    };
    assert_eq!(told(Cache::Never), (0, 0, abi::FOPEN_DIRECT_IO));
    assert_eq!(told(Cache::Auto), (1, 1, 0));
    assert_eq!(told(Cache::Always), (86_400, 86_400, abi::FOPEN_KEEP_CACHE));
}

#[test]
fn what_is_known_is_found_as_what_it_is_now() {
    let host = Host::new();
    fs::write(host.path("file"), "old").unwrap();
    fs::write(host.path("other"), "other").unwrap();
    symlink("file", host.path("link")).unwrap();
    let mut client = host.client(Options::default());
    let [file, link] = ["file", "link"].map(|name| client.lookup(ROOT, name).unwrap().nodeid);
    assert_ne!(file, link);
    fs::write(host.path("file"), "changed").unwrap();
    let again = client.lookup(ROOT, "file").unwrap();
    assert_eq!((again.nodeid, again.attr.size), (file, 7));
    // A link is found, not what it leads to.
    assert_eq!(client.lookup(ROOT, "link").unwrap().nodeid, link);
    // Another name of the same inode, and another inode of the same name.
    fs::hard_link(host.path("file"), host.path("second")).unwrap();
    assert_eq!(client.lookup(ROOT, "second").unwrap().nodeid, file);
    fs::rename(host.path("other"), host.path("file")).unwrap();
    let other = client.lookup(ROOT, "file").unwrap();
    assert!(other.nodeid != file && other.attr.size == 5);
    // Each answer counts.
    client.forget(file, 2);
    client.open(file, libc::O_RDONLY).unwrap();
    client.forget(file, 1);
    assert_eq!(client.open(file, libc::O_RDONLY), Err(libc::ESTALE));
}

#[test]
fn that_there_is_nothing_is_kept_where_something_may_be() {
    let host = Host::new();
    symlink("loop", host.path("loop")).unwrap();
    let missing = |cache| {
        let mut client = host.client(Options { cache, ..Options::default() });
        // What is refused is not what is missing.
        assert_eq!(client.ask(fuse_opcode::FUSE_LOOKUP, ROOT, &text("..")), Err(libc::EINVAL));
        assert_eq!(client.ask(fuse_opcode::FUSE_LOOKUP, ROOT, &text(&"x".repeat(256))), Err(libc::ENAMETOOLONG));
        assert_eq!(client.ask(fuse_opcode::FUSE_LOOKUP, 12345, &text("x")), Err(libc::ESTALE));
        client.lookup(ROOT, "loop").unwrap();
        let reply = client.ask(fuse_opcode::FUSE_LOOKUP, ROOT, &text("missing"))?;
        let entry: abi::fuse_entry_out = parse(&reply);
        assert_eq!((entry.nodeid, entry.attr.mode, client.metric("inodes")), (0, 0, 1));
        Ok(entry.entry_valid)
    };
    assert_eq!(missing(Cache::Never), Err(libc::ENOENT));
    assert_eq!(missing(Cache::Auto), Ok(1));
    assert_eq!(missing(Cache::Always), Ok(86_400));
}

#[test]
fn attributes_of_users_are_kept_and_others_are_not_the_guests() {
    let host = Host::new();
    fs::write(host.path("file"), "").unwrap();
    let set = |client: &mut Client, name: &str| {
        let node = client.walk("file").unwrap();
        let body = [[5u32, 0].as_bytes(), &text(name), b"value"].concat();
        client.ask(fuse_opcode::FUSE_SETXATTR, node, &body)
    };
    assert_eq!(set(&mut host.client(Options::default()), "user.a"), Err(libc::ENOSYS));
    let mut client = host.client(Options { xattrs: true, ..Options::default() });
    for name in ["security.capability", "trusted.overlay.opaque", "system.posix_acl_access", "security.selinux"] {
        assert_eq!(set(&mut client, name), Err(libc::EOPNOTSUPP), "{name}");
    }
    let node = client.walk("file").unwrap();
    match set(&mut client, "user.a") {
        // Some file systems have none.
        Err(libc::EOPNOTSUPP) => return,
        set => set.unwrap(),
    };
    let get = |size: u32| [[size, 0].as_bytes(), &text("user.a")].concat();
    assert_eq!(client.ask(fuse_opcode::FUSE_GETXATTR, node, &get(100)).unwrap(), b"value");
    assert_eq!(client.ask(fuse_opcode::FUSE_GETXATTR, node, &get(4)), Err(libc::ERANGE));
    assert_eq!(parse::<u32>(&client.ask(fuse_opcode::FUSE_GETXATTR, node, &get(0)).unwrap()), 5);
    assert_eq!(client.ask(fuse_opcode::FUSE_LISTXATTR, node, [100u32, 0].as_bytes()).unwrap(), b"user.a\0");
    client.ask(fuse_opcode::FUSE_REMOVEXATTR, node, &text("user.a")).unwrap();
    assert_eq!(client.ask(fuse_opcode::FUSE_GETXATTR, node, &get(100)), Err(libc::ENODATA));
}

#[test]
fn nothing_is_executed_where_that_is_forbidden() {
    let host = Host::new();
    fs::write(host.path("program"), "#!/bin/sh").unwrap();
    fs::set_permissions(host.path("program"), fs::Permissions::from_mode(0o755)).unwrap();
    let mut client = host.client(Options { noexec: true, ..Options::default() });
    let entry = client.lookup(ROOT, "program").unwrap();
    assert_eq!(entry.attr.mode & 0o777, 0o644);
    // As Linux opens a file to execute it.
    assert_eq!(client.open(entry.nodeid, libc::O_RDONLY | 0x20), Err(libc::EACCES));
    assert_eq!(client.ask(fuse_opcode::FUSE_ACCESS, entry.nodeid, [1u32, 0].as_bytes()), Err(libc::EACCES));
    assert_eq!(client.metric("noexec_refusals"), 2);
    client.open(entry.nodeid, libc::O_RDONLY).unwrap();
    client.create(ROOT, "made", libc::O_RDWR, 0o755).unwrap();
    assert_eq!(fs::metadata(host.path("made")).unwrap().mode() & 0o111, 0);
}

#[test]
fn a_file_without_a_name_can_be_given_one() {
    let host = Host::new();
    let mut client = host.client(Options::default());
    let body = [[libc::O_RDWR as u32, 0o600, 0, 0].as_bytes(), &text("ignored")].concat();
    let reply = match client.ask(fuse_opcode::FUSE_TMPFILE, ROOT, &body) {
        Err(libc::EOPNOTSUPP) => return,
        reply => reply.unwrap(),
    };
    let entry: abi::fuse_entry_out = parse(&reply);
    let handle = parse::<abi::fuse_open_out>(&reply[size_of::<abi::fuse_entry_out>()..]).fh;
    client.write(entry.nodeid, handle, 0, b"data").unwrap();
    assert_eq!(client.list(ROOT, 4096, false), [".", ".."]);
    client.ask(fuse_opcode::FUSE_LINK, ROOT, &[entry.nodeid.as_bytes(), &text("named")].concat()).unwrap();
    assert_eq!(fs::read(host.path("named")).unwrap(), b"data");
}

#[test]
fn a_new_session_begins_with_nothing_and_nothing_is_served_before_one() {
    let host = Host::new();
    fs::write(host.path("file"), "").unwrap();
    let mut client = host.client(Options::default());
    let node = client.walk("file").unwrap();
    let handle = client.open(node, libc::O_RDONLY).unwrap();
    client.ask(fuse_opcode::FUSE_DESTROY, 0, &[]).unwrap();
    assert_eq!((client.metric("inodes"), client.metric("handles")), (0, 0));
    assert_eq!(client.lookup(ROOT, "file").err(), Some(libc::EIO));
    client.init();
    assert_eq!(client.read(node, handle, 0, 1), Err(libc::EBADF));
    assert_eq!(client.open(node, libc::O_RDONLY), Err(libc::ESTALE));
    client.walk("file").unwrap();
}
