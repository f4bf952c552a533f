//! Locks hold between two guests on one directory.

use std::fs;

use fuse::Options;
use fuse_abi::linux::{self as abi, fuse_opcode};
use nix::libc;
use rustix::event::{PollFd, PollFlags, poll};
use zerocopy::IntoBytes;

use crate::client::{Client, Ended, Host, parse};

const READ: i32 = libc::F_RDLCK;
const WRITE: i32 = libc::F_WRLCK;
const UNLOCK: i32 = libc::F_UNLCK;
const END: u64 = i64::MAX as u64;

/// A guest with the file open.
struct Guest {
    client: Client,
    node: u64,
    handle: u64,
}

impl Guest {
    fn new(host: &Host, options: Options) -> Self {
        fs::File::options().create(true).append(true).open(host.path("file")).unwrap();
        let mut client = host.client(options);
        let node = client.walk("file").unwrap();
        let flags = if options.read_only { libc::O_RDONLY } else { libc::O_RDWR };
        let handle = client.open(node, flags).unwrap();
        Self { client, node, handle }
    }

    fn request(&self, owner: u64, kind: i32, (start, end): (u64, u64), flock: bool) -> Vec<u8> {
        let lk = abi::fuse_file_lock { start, end, type_: kind as u32, pid: 1 };
        let lk_flags = if flock { abi::FUSE_LK_FLOCK } else { 0 };
        abi::fuse_lk_in { fh: self.handle, owner, lk, lk_flags, padding: 0 }.as_bytes().to_vec()
    }

    fn lock(&mut self, owner: u64, kind: i32, range: (u64, u64)) -> Result<(), i32> {
        let body = self.request(owner, kind, range, false);
        self.client.ask(fuse_opcode::FUSE_SETLK, self.node, &body).map(drop)
    }

    fn flock(&mut self, kind: i32) -> Result<(), i32> {
        let body = self.request(0, kind, (0, END), true);
        self.client.ask(fuse_opcode::FUSE_SETLK, self.node, &body).map(drop)
    }

    fn wait(&mut self, owner: u64, kind: i32, flock: bool) -> Result<Ended, i32> {
        let body = self.request(owner, kind, (0, END), flock);
        self.client.send(fuse_opcode::FUSE_SETLKW as u32, self.node, &body, 4096)
    }

    fn flush(&mut self, owner: u64) {
        let body = abi::fuse_flush_in { fh: self.handle, unused: 0, padding: 0, lock_owner: owner };
        self.client.ask(fuse_opcode::FUSE_FLUSH, self.node, body.as_bytes()).unwrap();
    }

    /// What a wait ended with, once it has.
    fn over(&mut self) -> Vec<(u64, i32)> {
        poll(&mut [PollFd::from_borrowed_fd(self.client.server.event(), PollFlags::IN)], None).unwrap();
        let over = self.client.server.over();
        over.iter().map(|(ticket, reply)| (*ticket, parse::<abi::fuse_out_header>(reply).error)).collect()
    }
}

fn two() -> (Host, Guest, Guest) {
    let host = Host::new();
    let (one, other) = (Guest::new(&host, Options::default()), Guest::new(&host, Options::default()));
    (host, one, other)
}

#[test]
fn posix_locks_exclude_each_other_between_guests_and_between_processes_of_one() {
    let (_host, mut one, mut other) = two();
    one.lock(1, WRITE, (0, 9)).unwrap();
    assert_eq!(other.lock(1, WRITE, (9, 20)), Err(libc::EAGAIN));
    assert_eq!(other.lock(1, READ, (0, 0)), Err(libc::EAGAIN));
    assert_eq!(one.lock(2, WRITE, (5, 5)), Err(libc::EAGAIN));
    other.lock(1, WRITE, (10, END)).unwrap();
    one.lock(1, UNLOCK, (0, 4)).unwrap();
    other.lock(1, READ, (0, 4)).unwrap();
    one.lock(2, READ, (0, 4)).unwrap();
    assert_eq!(one.lock(1, WRITE, (0, 4)), Err(libc::EAGAIN));
}

#[test]
fn who_is_in_the_way_is_told() {
    let (_host, mut one, mut other) = two();
    one.lock(1, WRITE, (10, 19)).unwrap();
    let ask = |guest: &mut Guest, kind, range| {
        let body = guest.request(7, kind, range, false);
        let reply = guest.client.ask(fuse_opcode::FUSE_GETLK, guest.node, &body).unwrap();
        let lk = parse::<abi::fuse_lk_out>(&reply).lk;
        (lk.type_ as i32, lk.start, lk.end)
    };
    assert_eq!(ask(&mut other, READ, (0, END)), (WRITE, 10, 19));
    assert_eq!(ask(&mut other, READ, (0, 9)).0, UNLOCK);
}

#[test]
fn closing_a_file_releases_the_locks_of_its_process_only() {
    let (_host, mut one, mut other) = two();
    one.lock(1, WRITE, (0, 9)).unwrap();
    one.lock(2, WRITE, (10, 19)).unwrap();
    one.flush(1);
    other.lock(1, WRITE, (0, 9)).unwrap();
    assert_eq!(other.lock(1, WRITE, (10, 19)), Err(libc::EAGAIN));
    one.client.server.reset();
    one.client.server.let_go();
    other.lock(1, WRITE, (10, 19)).unwrap();
}

#[test]
fn locks_of_an_open_file_end_when_it_is_closed() {
    let (_host, mut one, mut other) = two();
    let (node, first) = (one.node, one.handle);
    // As a guest's kernel has it: the owner is the open file, and is told to nobody when that is closed.
    one.lock(100, WRITE, (0, 9)).unwrap();
    one.handle = one.client.open(node, libc::O_RDWR).unwrap();
    one.lock(200, WRITE, (20, 29)).unwrap();
    // A process, that has used both.
    one.lock(1, WRITE, (10, 19)).unwrap();
    let second = std::mem::replace(&mut one.handle, first);
    one.lock(1, WRITE, (10, 12)).unwrap();
    one.handle = second;
    one.flush(7);
    assert_eq!(other.lock(1, READ, (0, 9)), Err(libc::EAGAIN));
    one.client.release(node, first);
    other.lock(1, READ, (0, 9)).unwrap();
    assert_eq!(other.lock(1, READ, (10, 10)), Err(libc::EAGAIN));
    assert_eq!(other.lock(1, READ, (20, 20)), Err(libc::EAGAIN));
    one.client.release(node, second);
    other.lock(1, READ, (20, 20)).unwrap();
    assert_eq!(other.lock(1, READ, (10, 10)), Err(libc::EAGAIN));
    one.flush(1);
    other.lock(1, WRITE, (0, END)).unwrap();
    assert!(one.client.server.save().is_ok());
}

#[test]
fn whoever_has_no_lock_any_more_or_never_got_one_keeps_nothing() {
    let host = Host::new();
    let limits = fuse::Limits { lock_owners: 1, lock_waiters: 0, ..fuse::Limits::default() };
    let mut one = Guest::new(&host, Options { limits, ..Options::default() });
    let mut other = Guest::new(&host, Options::default());
    for owner in 1..4 {
        one.lock(owner, WRITE, (5, 9)).unwrap();
        one.lock(owner, UNLOCK, (0, END)).unwrap();
        assert!(one.client.server.save().is_ok());
    }
    other.lock(1, WRITE, (0, END)).unwrap();
    for owner in 4..8 {
        assert_eq!(one.lock(owner, WRITE, (5, 9)), Err(libc::EAGAIN));
        assert_eq!(one.wait(owner, WRITE, false), Err(libc::ENOLCK));
        assert!(one.client.server.save().is_ok());
    }
    // One that has another lock keeps that.
    other.lock(1, UNLOCK, (0, 9)).unwrap();
    one.lock(1, WRITE, (0, 9)).unwrap();
    assert_eq!(one.lock(1, WRITE, (5, 20)), Err(libc::EAGAIN));
    assert_eq!(other.lock(1, READ, (0, 9)), Err(libc::EAGAIN));
    assert!(one.client.server.save().is_err());
}

#[test]
fn flock_excludes_between_guests_and_with_programs_of_the_host() {
    let (host, mut one, mut other) = two();
    one.flock(WRITE).unwrap();
    assert_eq!(other.flock(READ), Err(libc::EAGAIN));
    let file = fs::File::open(host.path("file")).unwrap();
    assert!(file.try_lock_shared().is_err());
    one.flock(UNLOCK).unwrap();
    file.lock_shared().unwrap();
    other.flock(READ).unwrap();
    assert_eq!(one.flock(WRITE), Err(libc::EAGAIN));
    drop(file);
    let (node, handle) = (other.node, other.handle);
    other.client.release(node, handle);
    one.flock(WRITE).unwrap();
}

#[test]
fn a_wait_ends_when_the_other_guest_lets_go() {
    for flock in [false, true] {
        let (_host, mut one, mut other) = two();
        let set = |guest: &mut Guest, kind| {
            if flock { guest.flock(kind) } else { guest.lock(1, kind, (0, END)) }
        };
        set(&mut one, WRITE).unwrap();
        let Ok(Ended::Waiting(ticket)) = other.wait(1, WRITE, flock) else { panic!("it does not wait") };
        assert_eq!(other.client.server.over(), []);
        // Meanwhile it is served.
        other.client.walk("file").unwrap();
        set(&mut one, UNLOCK).unwrap();
        assert_eq!(other.over(), [(ticket, 0)]);
        assert_eq!(set(&mut one, READ), Err(libc::EAGAIN));
        assert_eq!(other.client.metric("lock_waits"), 1);
    }
}

#[test]
fn a_lock_that_is_free_is_not_waited_for() {
    let (_host, mut one, _) = two();
    assert_eq!(one.wait(1, WRITE, false), Ok(Ended::Reply(Vec::new())));
    assert_eq!(one.client.metric("lock_waits"), 0);
}

#[test]
fn a_wait_that_a_reset_called_off_leaves_no_lock_behind() {
    let (_host, mut one, mut other) = two();
    one.flock(WRITE).unwrap();
    assert!(matches!(other.wait(1, WRITE, true), Ok(Ended::Waiting(_))));
    other.client.server.reset();
    // That there is something to let go of.
    assert_eq!(other.over(), []);
    other.client.server.let_go();
    one.flock(UNLOCK).unwrap();
    // It is told, but to nobody.
    assert_eq!(other.over(), []);
    one.flock(WRITE).unwrap();
    assert_eq!(other.client.metric("lock_waiters"), 0);
}

#[test]
fn a_process_that_waits_and_closes_still_gets_its_lock() {
    let (_host, mut one, mut other) = two();
    other.lock(1, READ, (0, 9)).unwrap();
    one.lock(1, READ, (0, END)).unwrap();
    let Ok(Ended::Waiting(ticket)) = other.wait(1, WRITE, false) else { panic!("it does not wait") };
    other.flush(1);
    one.lock(1, UNLOCK, (0, END)).unwrap();
    assert_eq!(other.over(), [(ticket, 0)]);
    assert_eq!(one.lock(1, READ, (0, 0)), Err(libc::EAGAIN));
    other.flush(1);
    one.lock(1, READ, (0, 0)).unwrap();
}

#[test]
fn only_so_many_wait_and_only_so_many_hold() {
    let host = Host::new();
    let limits = fuse::Limits { lock_waiters: 2, lock_owners: 4, ..fuse::Limits::default() };
    let options = Options { limits, ..Options::default() };
    let (mut one, mut other) = (Guest::new(&host, options), Guest::new(&host, options));
    one.lock(1, WRITE, (0, END)).unwrap();
    for owner in 1..=2 {
        assert!(matches!(other.wait(owner, WRITE, false), Ok(Ended::Waiting(_))));
    }
    assert_eq!(other.wait(3, WRITE, false), Err(libc::ENOLCK));
    one.lock(1, UNLOCK, (0, END)).unwrap();
    // The one that has it keeps the other one waiting.
    let first = other.over();
    assert_eq!(first.len(), 1);
    let first = if first[0].0 == 0 { 1 } else { 2 };
    other.flush(first);
    other.over();
    other.flush(3 - first);
    for owner in 10..14 {
        one.lock(owner, READ, (100, 100)).unwrap();
    }
    assert_eq!(one.lock(14, READ, (100, 100)), Err(libc::ENOLCK));
    assert!(one.client.metric("limit_refusals") > 0);
}

#[test]
fn only_so_many_ranges_are_locked() {
    let host = Host::new();
    let limits = fuse::Limits { lock_ranges: 4, lock_waiters: 1, ..fuse::Limits::default() };
    let options = Options { limits, ..Options::default() };
    let (mut one, mut other) = (Guest::new(&host, options), Guest::new(&host, options));
    let fill = |guest: &mut Guest| {
        for start in 0..4 {
            guest.lock(start % 2, READ, (10 * start, 10 * start + 4)).unwrap();
        }
        assert_eq!(guest.client.metric("lock_ranges"), 4);
        assert_eq!(guest.lock(1, READ, (100, 100)), Err(libc::ENOLCK));
        assert_eq!(guest.lock(0, UNLOCK, (2, 2)), Err(libc::ENOLCK), "it would be two");
    };
    fill(&mut one);
    one.lock(0, UNLOCK, (0, 4)).unwrap();
    one.lock(1, READ, (100, 100)).unwrap();
    // Those of a process go with its file, and those of a guest with its session.
    one.flush(0);
    one.flush(1);
    fill(&mut one);
    one.client.server.reset();
    one.client.server.let_go();
    assert_eq!(one.client.metric("lock_ranges"), 0);
    // What was waited for counts from when it is granted.
    other.lock(7, WRITE, (0, END)).unwrap();
    let mut one = Guest::new(&host, options);
    assert!(matches!(one.wait(1, READ, false), Ok(Ended::Waiting(_))));
    assert_eq!(one.client.metric("lock_ranges"), 0);
    other.lock(7, UNLOCK, (0, END)).unwrap();
    assert_eq!(one.over().len(), 1);
    assert_eq!(one.client.metric("lock_ranges"), 1);
}

#[test]
fn what_is_let_go_of_while_a_lock_is_granted_counts() {
    let (_host, mut one, mut other) = two();
    for turn in 0..20 {
        one.lock(1, WRITE, (0, 2000)).unwrap();
        let Ok(Ended::Waiting(ticket)) = other.wait(2, READ, false) else { panic!("it is locked") };
        // From here on it may be granted, which is not known before it is asked for.
        one.lock(1, UNLOCK, (0, END)).unwrap();
        for byte in 0..100 {
            other.lock(2, UNLOCK, (2 * byte + 1, 2 * byte + 1)).unwrap();
        }
        assert_eq!(other.over(), [(ticket, 0)], "{turn}");
        assert_eq!(other.client.metric("lock_ranges"), 1);
        assert_eq!(one.lock(1, WRITE, (1, 1)), Err(libc::EAGAIN), "all of it is locked");
        other.lock(2, UNLOCK, (0, END)).unwrap();
        one.lock(1, WRITE, (0, END)).unwrap();
        one.lock(1, UNLOCK, (0, END)).unwrap();
    }
}

#[test]
fn a_request_that_waits_is_returned_also_in_another_session() {
    let (_host, mut one, mut other) = two();
    other.flock(WRITE).unwrap();
    let Ok(Ended::Waiting(ticket)) = one.wait(0, WRITE, true) else { panic!("it is locked") };
    one.client.init();
    other.flock(UNLOCK).unwrap();
    assert_eq!(one.over(), [(ticket, 0)]);
    // The file that it was for was closed with the session.
    other.flock(WRITE).unwrap();
}

#[test]
fn a_read_only_export_can_be_locked_for_reading_and_with_flock() {
    let host = Host::new();
    let mut guest = Guest::new(&host, Options::default());
    let mut reader = Guest::new(&host, Options { read_only: true, ..Options::default() });
    reader.lock(1, READ, (0, 9)).unwrap();
    assert_eq!(guest.lock(1, WRITE, (0, 9)), Err(libc::EAGAIN));
    assert_eq!(reader.lock(1, WRITE, (20, 30)), Err(libc::EBADF));
    reader.flock(READ).unwrap();
}

#[test]
fn locks_of_a_mount_of_its_own_are_the_guests_affair() {
    let host = Host::new();
    let mut guest = Guest::new(&host, Options { shared_locks: false, ..Options::default() });
    assert_eq!(guest.client.init().flags & (abi::FUSE_POSIX_LOCKS | abi::FUSE_FLOCK_LOCKS), 0);
    assert_eq!(guest.lock(1, WRITE, (0, 9)), Err(libc::ENOSYS));
    // Nor is there anything to do when a file is closed, more than once.
    let flush = abi::fuse_flush_in { fh: guest.handle, unused: 0, padding: 0, lock_owner: 1 };
    assert_eq!(guest.client.ask(fuse_opcode::FUSE_FLUSH, guest.node, flush.as_bytes()), Err(libc::ENOSYS));
}

#[test]
fn ranges_that_are_none_are_refused() {
    let (_host, mut one, _) = two();
    for range in [(5, 4), (u64::MAX, u64::MAX), (0, u64::MAX), (u64::MAX, 0)] {
        assert_eq!(one.lock(1, WRITE, range), Err(libc::EINVAL), "{range:?}");
    }
    assert_eq!(one.lock(1, 77, (0, 9)), Err(libc::EINVAL));
    one.lock(1, WRITE, (END - 1, END)).unwrap();
}
