//! Nothing leads out of an export.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};

use fuse::{Export, Options, Source};
use fuse_abi::linux::{self as abi, fuse_opcode};
use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sched::CloneFlags;
use rustix::fd::OwnedFd;
use rustix::mount::{OpenTreeFlags, open_tree};
use zerocopy::IntoBytes;

use crate::client::{Client, Host, ROOT, parse, text};

/// CVE-2026-47243: a raw request whose name is a path was honoured outside of the shared directory.
#[test]
fn a_name_that_is_a_path_is_refused_by_every_operation_that_takes_one() {
    let host = Host::new();
    fs::create_dir(host.path("folder")).unwrap();
    fs::write(host.path("file"), "").unwrap();
    let mut client = host.client(Options { xattrs: true, ..Options::default() });
    let (folder, file) = (client.walk("folder").unwrap(), client.walk("file").unwrap());
    let outside = host.folder.path().join("made").display().to_string();
    for name in [&outside, "..", "../made", "../../made", ".", "", "/", "./x", "x/../../made", "../secret"] {
        let name = text(name);
        let good = text("good");
        let requests: &[(fuse_opcode, u64, Vec<u8>)] = &[
            (fuse_opcode::FUSE_LOOKUP, ROOT, name.clone()),
            (fuse_opcode::FUSE_SYMLINK, ROOT, [&name[..], &text("/etc")].concat()),
            (fuse_opcode::FUSE_MKNOD, ROOT, [[0o100_644u32, 0, 0, 0].as_bytes(), &name].concat()),
            (fuse_opcode::FUSE_MKDIR, ROOT, [[0o755u32, 0].as_bytes(), &name].concat()),
            (fuse_opcode::FUSE_CREATE, ROOT, [[libc::O_RDWR as u32, 0o644, 0, 0].as_bytes(), &name].concat()),
            (fuse_opcode::FUSE_LINK, ROOT, [file.as_bytes(), &name].concat()),
            (fuse_opcode::FUSE_UNLINK, ROOT, name.clone()),
            (fuse_opcode::FUSE_RMDIR, ROOT, name.clone()),
            (fuse_opcode::FUSE_RENAME, ROOT, [folder.as_bytes(), &name, &good].concat()),
            (fuse_opcode::FUSE_RENAME, ROOT, [folder.as_bytes(), &text("file"), &name].concat()),
            (fuse_opcode::FUSE_RENAME2, ROOT, [folder.as_bytes(), [0u32, 0].as_bytes(), &text("file"), &name].concat()),
        ];
        for (opcode, node, body) in requests {
            assert_eq!(client.ask(*opcode, *node, body), Err(libc::EINVAL), "{} {name:?}", *opcode as u32);
        }
    }
    assert!(host.is_intact());
}

#[test]
fn a_symbolic_link_is_text_and_nothing_is_done_through_it() {
    let host = Host::new();
    symlink(host.folder.path(), host.path("folder")).unwrap();
    symlink("../secret", host.path("file")).unwrap();
    symlink("/proc/self/root", host.path("magic")).unwrap();
    let mut client = host.client(Options { xattrs: true, ..Options::default() });
    for (name, target) in [("file", "../secret"), ("magic", "/proc/self/root")] {
        let link = client.lookup(ROOT, name).unwrap();
        assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(client.ask(fuse_opcode::FUSE_READLINK, link.nodeid, &[]).unwrap(), target.as_bytes());
        assert_eq!(client.open(link.nodeid, libc::O_RDONLY), Err(libc::ENXIO));
        assert_eq!(client.open(link.nodeid, libc::O_WRONLY | libc::O_TRUNC), Err(libc::ENXIO));
        assert_eq!(client.lookup(link.nodeid, "secret").err(), Some(libc::ENOTDIR));
        assert_eq!(client.ask(fuse_opcode::FUSE_OPENDIR, link.nodeid, [0u32, 0].as_bytes()), Err(libc::ENOTDIR));
        let get = [[0u32, 0].as_bytes(), &text("user.x")].concat();
        assert_eq!(client.ask(fuse_opcode::FUSE_GETXATTR, link.nodeid, &get), Err(libc::EOPNOTSUPP));
        let mut size = parse::<abi::fuse_setattr_in>(&[0; 88]);
        size.valid = abi::FATTR_SIZE;
        assert_eq!(client.ask(fuse_opcode::FUSE_SETATTR, link.nodeid, size.as_bytes()), Err(libc::EINVAL));
        // Creating where a link is does not create where it leads.
        assert_eq!(client.create(ROOT, name, libc::O_RDWR, 0o644).err(), Some(libc::ENXIO));
        // A time or a mode of the link is not one of what it leads to.
        let mut request = parse::<abi::fuse_setattr_in>(&[0; 88]);
        (request.valid, request.mtime) = (abi::FATTR_MTIME, 1);
        client.ask(fuse_opcode::FUSE_SETATTR, link.nodeid, request.as_bytes()).unwrap();
        request.valid = abi::FATTR_MODE;
        assert_eq!(client.ask(fuse_opcode::FUSE_SETATTR, link.nodeid, request.as_bytes()), Err(libc::EOPNOTSUPP));
    }
    let secret = fs::metadata(host.folder.path().join("secret")).unwrap();
    assert!(secret.modified().unwrap().elapsed().unwrap().as_secs() < 3600);
    let folder = client.walk("folder").unwrap();
    for opcode in [fuse_opcode::FUSE_LOOKUP, fuse_opcode::FUSE_UNLINK] {
        assert_eq!(client.ask(opcode, folder, &text("secret")), Err(libc::ENOTDIR));
    }
    assert!(host.is_intact());
}

#[test]
fn a_directory_swapped_with_a_link_while_it_is_walked_never_shows_the_outside() {
    let host = Host::new();
    let outside = host.folder.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "outside").unwrap();
    fs::create_dir(host.path("swapped")).unwrap();
    fs::write(host.path("swapped/file"), "inside").unwrap();
    symlink(&outside, host.path("link")).unwrap();
    let over = AtomicBool::new(false);
    let (mut inside, mut other) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let folder = crate::client::open_path(&host.export());
            while !over.load(Ordering::Relaxed) {
                let exchange = rustix::fs::RenameFlags::EXCHANGE;
                rustix::fs::renameat_with(&folder, "swapped", &folder, "link", exchange).unwrap();
            }
        });
        let mut client = host.client(Options::default());
        for round in 0..4000 {
            match client.walk("swapped/file") {
                Ok(node) => {
                    let handle = client.open(node, libc::O_RDONLY).unwrap();
                    assert_eq!(client.read(node, handle, 0, 100).unwrap(), b"inside");
                    client.release(node, handle);
                    inside += 1;
                }
                Err(error) => {
                    assert_eq!(error, libc::ENOTDIR);
                    other += 1;
                }
            }
            // What is made by name is made inside as well.
            if let Ok(parent) = client.lookup(ROOT, "swapped") {
                let made = client.create(parent.nodeid, &format!("made{round}"), libc::O_RDWR, 0o600);
                assert!(matches!(made, Ok(_) | Err(libc::ENOTDIR)), "{made:?}");
                if let Ok((entry, handle)) = made {
                    client.release(entry.nodeid, handle);
                }
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    assert!(inside > 0 && other > 0, "{inside} and {other}: there was no race");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
}

#[test]
fn what_is_neither_file_nor_directory_is_not_opened() {
    let host = Host::new();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        host.path("fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(host.path("socket")).unwrap();
    let mut client = host.client(Options::default());
    for name in ["fifo", "socket"] {
        let node = client.walk(name).unwrap();
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR | libc::O_TRUNC] {
            // A FIFO that was opened to write would wait here for ever.
            assert_eq!(client.open(node, flags), Err(libc::ENXIO));
        }
        assert_eq!(client.create(ROOT, name, libc::O_RDWR, 0o600).err(), Some(libc::ENXIO));
    }
}

#[test]
fn no_device_node_is_made() {
    let host = Host::new();
    let mut client = host.client(Options::default());
    for kind in [libc::S_IFBLK, libc::S_IFCHR] {
        let body = [[kind | 0o666, 0x0801, 0, 0].as_bytes(), &text("device")].concat();
        assert_eq!(client.ask(fuse_opcode::FUSE_MKNOD, ROOT, &body), Err(libc::EPERM));
    }
    let fifo = [[libc::S_IFIFO | 0o666, 0, 0, 0].as_bytes(), &text("fifo")].concat();
    client.ask(fuse_opcode::FUSE_MKNOD, ROOT, &fifo).unwrap();
}

#[test]
fn a_mount_below_an_export_is_not_part_of_it() {
    // The host's root has procfs mounted below it.
    let mut client = Client::of("/".as_ref(), Options { read_only: true, ..Options::default() });
    assert_eq!(client.lookup(ROOT, "proc").err(), Some(libc::EXDEV));
    assert!(client.lookup(ROOT, "etc").is_ok());
}

/// The export as a monitor has it, a tree that belongs to no mount namespace, with a directory and a file that something is
/// mounted on; nothing where that takes rights that this process has not.
fn tree_with_mounts(host: &Host) -> Option<OwnedFd> {
    let build = || {
        nix::sched::unshare(CloneFlags::CLONE_NEWNS).ok()?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).ok()?;
        mount(Some("tmpfs"), &host.path("mounted"), Some("tmpfs"), MsFlags::empty(), none).ok()?;
        let secret = host.folder.path().join("secret");
        mount(Some(&secret), &host.path("covered"), none, MsFlags::MS_BIND, none).ok()?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
        open_tree(rustix::fs::CWD, host.export(), flags).ok()
    };
    std::thread::scope(|scope| scope.spawn(build).join().unwrap())
}

#[test]
fn a_name_that_something_is_mounted_on_stays() {
    let host = Host::new();
    for folder in ["mounted", "plain"] {
        fs::create_dir(host.path(folder)).unwrap();
    }
    fs::write(host.path("covered"), "").unwrap();
    fs::hard_link(host.folder.path().join("secret"), host.path("shown")).unwrap();
    let Some(tree) = tree_with_mounts(&host) else { return };
    let export = Export::new(Source::Directory(tree), Options::default(), fuse::descriptors().unwrap()).unwrap();
    let mut client = Client::new(export);
    client.walk("shown").unwrap();
    let rename = |from: &str, to: &str| [ROOT.as_bytes(), &text(from), &text(to)].concat();
    let exchange = |from: &str, to: &str| [ROOT.as_bytes(), [2u32, 0].as_bytes(), &text(from), &text(to)].concat();
    for (opcode, body) in [
        (fuse_opcode::FUSE_RMDIR, text("mounted")),
        (fuse_opcode::FUSE_UNLINK, text("covered")),
        (fuse_opcode::FUSE_RENAME, rename("mounted", "moved")),
        (fuse_opcode::FUSE_RENAME, rename("plain", "mounted")),
        (fuse_opcode::FUSE_RENAME2, exchange("mounted", "plain")),
        (fuse_opcode::FUSE_RENAME2, exchange("plain", "mounted")),
    ] {
        assert_eq!(client.ask(opcode, ROOT, &body), Err(libc::EBUSY), "{}", opcode as u32);
    }
    // Nor is it found although the inode is held that is mounted there.
    for name in ["mounted", "covered"] {
        assert_eq!(client.lookup(ROOT, name).err(), Some(libc::EXDEV), "{name}");
    }
    client.ask(fuse_opcode::FUSE_RENAME, ROOT, &rename("plain", "moved")).unwrap();
    client.ask(fuse_opcode::FUSE_RMDIR, ROOT, &text("moved")).unwrap();
}
