//! Everything that a server does is within what its thread may do: another system call would end this process.

use std::fs;

use fuse::{Options, Ownership, Quota};
use fuse_abi::linux::{self as abi, fuse_opcode as op};
use nix::libc;
use rustix::event::{PollFd, PollFlags, poll};
use zerocopy::{FromZeros as _, IntoBytes};

use crate::client::{Client, Ended, Host, ROOT, text};

/// One request of each kind; whether it succeeds is the business of other tests.
fn one_of_each(client: &mut Client) {
    let folder = client.mkdir(ROOT, "folder").unwrap().nodeid;
    let (entry, fh) = client.create(folder, "file", libc::O_RDWR, 0o644).unwrap();
    let node = entry.nodeid;
    client.write(node, fh, 0, &[7; 9000]).unwrap();
    client.write_with(node, fh, 0, b"appended", 0, libc::O_APPEND as u32).unwrap();
    client.read(node, fh, 0, 9000).unwrap();
    client.list(ROOT, 4096, false);
    client.list(ROOT, 4096, true);
    client.open(node, libc::O_WRONLY | libc::O_TRUNC).unwrap();
    let mut attributes = abi::fuse_setattr_in::new_zeroed();
    attributes.valid = abi::FATTR_MODE | abi::FATTR_UID | abi::FATTR_GID | abi::FATTR_SIZE | abi::FATTR_MTIME;
    (attributes.mode, attributes.size) = (0o600, 100);
    let copy = abi::fuse_copy_file_range_in {
        fh_in: fh,
        off_in: 0,
        nodeid_out: node,
        fh_out: fh,
        off_out: 4096,
        len: 10,
        flags: 0,
    };
    let space = abi::fuse_fallocate_in { fh, offset: 0, length: 8192, mode: 0, padding: 0 };
    let seek = abi::fuse_lseek_in { fh, offset: 0, whence: libc::SEEK_HOLE as u32, padding: 0 };
    let sync = abi::fuse_fsync_in { fh, fsync_flags: 0, padding: 0 };
    let data = abi::fuse_fsync_in { fsync_flags: 1, ..sync };
    let fifo = [[libc::S_IFIFO | 0o644, 0, 0, 0].as_bytes(), &text("fifo")].concat();
    let unnamed = [[libc::O_RDWR as u32, 0o600, 0, 0].as_bytes(), &text("unnamed")].concat();
    let exchange = [folder.as_bytes(), [2u32, 0].as_bytes(), &text("hard"), &text("file")].concat();
    let lk = abi::fuse_file_lock { start: 0, end: 9, type_: libc::F_WRLCK as u32, pid: 0 };
    let lock = abi::fuse_lk_in { fh, owner: 1, lk, lk_flags: 0, padding: 0 };
    let requests: &[(op, u64, Vec<u8>)] = &[
        (op::FUSE_SETATTR, node, attributes.as_bytes().to_vec()),
        (op::FUSE_GETATTR, node, vec![0; 16]),
        (op::FUSE_ACCESS, node, vec![0; 8]),
        (op::FUSE_COPY_FILE_RANGE, node, copy.as_bytes().to_vec()),
        (op::FUSE_FALLOCATE, node, space.as_bytes().to_vec()),
        (op::FUSE_LSEEK, node, seek.as_bytes().to_vec()),
        (op::FUSE_FSYNC, node, sync.as_bytes().to_vec()),
        (op::FUSE_FSYNC, node, data.as_bytes().to_vec()),
        (op::FUSE_SYNCFS, ROOT, vec![0; 8]),
        (op::FUSE_STATFS, ROOT, vec![]),
        (op::FUSE_MKNOD, folder, fifo),
        (op::FUSE_TMPFILE, folder, unnamed),
        (op::FUSE_SYMLINK, folder, [text("link"), text("target")].concat()),
        (op::FUSE_LINK, folder, [node.as_bytes(), &text("hard")].concat()),
        (op::FUSE_RENAME2, folder, exchange),
        (op::FUSE_RENAME, folder, [folder.as_bytes(), &text("hard"), &text("moved")].concat()),
        (op::FUSE_SETXATTR, node, [[1u32, 0].as_bytes(), &text("user.a"), b"x"].concat()),
        (op::FUSE_GETXATTR, node, [[9u32, 0].as_bytes(), &text("user.a")].concat()),
        (op::FUSE_LISTXATTR, node, [99u32, 0].as_bytes().to_vec()),
        (op::FUSE_REMOVEXATTR, node, text("user.a")),
        (op::FUSE_GETLK, node, lock.as_bytes().to_vec()),
        (op::FUSE_SETLK, node, lock.as_bytes().to_vec()),
        (op::FUSE_UNLINK, folder, text("moved")),
        (op::FUSE_RMDIR, ROOT, text("folder")),
    ];
    for (opcode, node, body) in requests {
        let _ = client.ask(*opcode, *node, body);
    }
    let link = client.lookup(folder, "link").unwrap().nodeid;
    client.ask(op::FUSE_READLINK, link, &[]).unwrap();
    client.release(node, fh);
    client.forget(node, 10);
}

/// Saves a session with a file in it and goes on with that.
fn save_and_restore(client: &mut Client) {
    let node = client.walk("locked").unwrap();
    let fh = client.open(node, libc::O_RDWR).unwrap();
    client.ask(op::FUSE_OPENDIR, ROOT, [0u32, 0].as_bytes()).unwrap();
    let session = client.server.save().unwrap();
    client.server.reset();
    client.server.let_go();
    // The reset is told like the end of a wait.
    assert!(client.server.over().is_empty());
    client.server.restore(session).unwrap();
    assert_eq!((client.read(node, fh, 0, 10).unwrap(), client.metric("handles")), (vec![], 2));
}

/// Waits for a lock that somebody else has, in a thread that inherits the confinement.
fn wait_for_a_lock(client: &mut Client) {
    let node = client.walk("locked").unwrap();
    let fh = client.open(node, libc::O_RDWR).unwrap();
    let lk = abi::fuse_file_lock { start: 0, end: i64::MAX as u64, type_: libc::F_WRLCK as u32, pid: 0 };
    for lk_flags in [abi::FUSE_LK_FLOCK, 0] {
        let lock = abi::fuse_lk_in { fh, owner: 1, lk, lk_flags, padding: 0 };
        match client.send(op::FUSE_SETLKW as u32, node, lock.as_bytes(), 4096) {
            Ok(Ended::Waiting(_)) => {}
            ended => assert_eq!(ended, Ok(Ended::Reply(Vec::new()))),
        }
    }
}

#[test]
fn a_server_does_what_its_thread_may_do_and_nothing_else() {
    let host = Host::new();
    let file = fs::File::create(host.path("locked")).unwrap();
    file.lock().unwrap();
    let root = nix::unistd::geteuid().is_root();
    let ownership = if root { Ownership::Mapped } else { Ownership::Squash { uid: 0, gid: 0 } };
    let quota = Quota { bytes: Some(1 << 30), inodes: None };
    let mut client = host.client(Options { ownership, quota, xattrs: true, ..Options::default() });
    let served = std::thread::scope(|scope| {
        let server = scope.spawn(move || {
            fuse::prepare_thread(ownership, None).unwrap();
            jailer::thread(jailer::Thread::Fs).unwrap();
            client.caller = if root { (1000, 1000) } else { (0, 0) };
            save_and_restore(&mut client);
            one_of_each(&mut client);
            client.caller = (0, 0);
            wait_for_a_lock(&mut client);
            client
        });
        server.join().unwrap()
    });
    file.unlock().unwrap();
    let mut client = served;
    poll(&mut [PollFd::from_borrowed_fd(client.server.event(), PollFlags::IN)], None).unwrap();
    assert_eq!(client.server.over().len(), 1);
}
