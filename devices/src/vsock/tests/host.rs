//! Connections that the host asks for, and ends that it hands over.

use std::io::{self, ErrorKind, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tempfile::TempDir;

use super::*;

/// The host's side: a VM's socket.
struct Host(TempDir);

impl Host {
    /// A guest, and the socket at which the host asks for connections to it.
    fn with_guest() -> (Self, Guest) {
        let (host, listener) = Self::new();
        (host, Guest::of(Some(listener)))
    }

    fn new() -> (Self, UnixListener) {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
        (Self(folder), listener)
    }

    /// Comes to the socket and says nothing.
    fn call(&self) -> UnixStream {
        UnixStream::connect(self.0.path().join("socket")).unwrap()
    }

    /// Comes to the socket and says something, with these descriptors.
    fn say(&self, words: &str, descriptors: &[BorrowedFd<'_>]) -> UnixStream {
        let caller = self.call();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        let words = [IoSlice::new(words.as_bytes())];
        rustix::net::sendmsg(&caller, &words, &mut control, SendFlags::empty()).unwrap();
        caller
    }
}

/// The line that a caller was told; empty when it was hung up on.
fn told(caller: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while caller.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
        line.extend(byte);
    }
    String::from_utf8(line).unwrap()
}

impl Guest {
    /// Agrees to a connection, as somebody who listens does.
    fn accept(&mut self) {
        assert_eq!(self.receive().unwrap().op, REQUEST);
        self.send(&packet(RESPONSE));
    }
}

#[test]
fn a_caller_is_connected_to_who_listens_in_the_guest_and_nothing_it_says_is_lost() {
    let (host, mut guest) = Host::with_guest();
    let mut caller = host.say("CONNECT 77\nearly", &[]);
    guest.accept();
    assert_eq!(told(&mut caller), format!("OK {}", guest.port));
    assert!((1 << 30..1 << 31).contains(&guest.port));
    assert_eq!(guest.receive().unwrap().data, b"early");
    guest.send(&Packet { data: b"answer".to_vec(), ..packet(DATA) });
    let mut bytes = [0; 6];
    caller.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"answer");
    assert_eq!(guest.driver.metric("host_connections_opened"), 1);
}

#[test]
fn a_line_may_come_in_pieces_and_in_any_case() {
    let (host, mut guest) = Host::with_guest();
    let mut caller = host.say("conn", &[]);
    assert_eq!(guest.receive(), None);
    caller.write_all(b"ect 77\r\n").unwrap();
    guest.accept();
    assert_eq!(told(&mut caller), format!("OK {}", guest.port));
}

#[test]
fn a_port_that_nobody_in_the_guest_listens_at_hangs_up() {
    let (host, mut guest) = Host::with_guest();
    let mut caller = host.say("CONNECT 77\n", &[]);
    assert_eq!(guest.receive().unwrap().op, REQUEST);
    guest.send(&packet(RESET));
    assert_eq!(guest.receive(), None);
    assert_eq!((told(&mut caller).as_str(), guest.driver.metric("host_calls_refused")), ("", 1));
}

#[test]
fn a_caller_that_gives_up_is_not_connected() {
    let (host, mut guest) = Host::with_guest();
    let caller = host.say("CONNECT 77\n", &[]);
    assert_eq!(guest.receive().unwrap().op, REQUEST);
    drop(caller);
    assert_eq!(guest.receive().unwrap().op, RESET);
    guest.send(&packet(RESPONSE));
    assert_eq!(guest.receive().unwrap().op, RESET);
    assert_eq!(guest.driver.metric("host_connections_opened"), 0);
}

#[test]
fn a_guest_that_answers_with_anything_else_or_was_not_asked_is_reset() {
    for op in [DATA, SHUTDOWN, CREDIT_REQUEST, 99] {
        let (host, mut guest) = Host::with_guest();
        let mut caller = host.say("CONNECT 77\n", &[]);
        assert_eq!(guest.receive().unwrap().op, REQUEST);
        guest.send(&packet(op));
        assert_eq!((guest.receive().unwrap().op, told(&mut caller).as_str()), (RESET, ""), "{op}");
    }
    let (mut guest, _host) = Guest::connected();
    guest.send(&packet(RESPONSE));
    assert_eq!(guest.receive().unwrap().op, RESET);
}

#[test]
fn a_stream_that_is_handed_over_is_the_end_of_the_connection() {
    let (host, mut guest) = Host::with_guest();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut caller = host.say("CONNECT 77\n", &[theirs.as_fd()]);
    drop(theirs);
    guest.accept();
    assert_eq!((told(&mut caller), told(&mut caller)), (format!("OK {}", guest.port), String::new()));
    ours.write_all(b"hello").unwrap();
    assert_eq!(guest.receive().unwrap().data, b"hello");
    guest.send(&Packet { data: b"there".to_vec(), ..packet(DATA) });
    guest.send(&Packet { flags: 2, ..packet(SHUTDOWN) });
    let mut bytes = Vec::new();
    ours.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"there");
}

#[test]
fn pipes_that_are_handed_over_go_one_way() {
    let (host, mut guest) = Host::with_guest();
    let (reader, mut writer) = io::pipe().unwrap();
    let _caller = host.say("CONNECT 77\n", &[reader.as_fd()]);
    drop(reader);
    guest.accept();
    let only = guest.receive().unwrap();
    assert_eq!((only.op, only.flags), (SHUTDOWN, 1));
    writer.write_all(b"from a pipe").unwrap();
    assert_eq!(guest.receive().unwrap().data, b"from a pipe");
    drop(writer);
    let end = guest.receive().unwrap();
    assert_eq!((end.op, end.flags), (SHUTDOWN, 3));

    let (mut reader, writer) = io::pipe().unwrap();
    let _caller = host.say("CONNECT 77\n", &[writer.as_fd()]);
    drop(writer);
    guest.accept();
    let only = guest.receive().unwrap();
    assert_eq!((only.op, only.flags), (SHUTDOWN, 2));
    guest.send(&Packet { data: b"into a pipe".to_vec(), ..packet(DATA) });
    guest.send(&Packet { flags: 2, ..packet(SHUTDOWN) });
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "into a pipe");
}

#[test]
fn a_pipe_that_nobody_reads_any_more_is_told_to_an_idle_guest() {
    let (host, mut guest) = Host::with_guest();
    let (reader, writer) = io::pipe().unwrap();
    let _caller = host.say("CONNECT 77\n", &[writer.as_fd()]);
    drop(writer);
    guest.accept();
    assert_eq!(guest.receive().unwrap().flags, 2);
    drop(reader);
    let end = guest.receive().unwrap();
    assert_eq!((end.op, end.flags), (SHUTDOWN, 1));
}

#[test]
fn an_end_that_somebody_else_has_too_is_not_heard_of_once_its_connection_is_over() {
    let (host, mut guest) = Host::with_guest();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let _caller = host.say("CONNECT 77\n", &[theirs.as_fd()]);
    guest.accept();
    guest.send(&Packet { flags: 3, ..packet(SHUTDOWN) });
    assert_eq!(guest.receive().unwrap().op, RESET);
    // What is left from when it was open.
    while guest.driver.is_woken() {}
    // The other descriptor of the same end keeps it open.
    theirs.set_nonblocking(false).unwrap();
    drop((&ours).write_all(b"anybody?"));
    ours.shutdown(Shutdown::Write).unwrap();
    assert!(!guest.driver.is_woken());
}

#[test]
fn an_offer_is_for_the_next_connection_and_can_be_replaced() {
    let (host, mut guest) = Host::with_guest();
    let (mut replaced, first) = UnixStream::pair().unwrap();
    let (mut ours, second) = UnixStream::pair().unwrap();
    for end in [first, second] {
        let mut caller = host.say("OFFER 1024\n", &[end.as_fd()]);
        assert_eq!(guest.receive(), None);
        assert_eq!(told(&mut caller), "OK 1024");
    }
    assert_eq!(replaced.read(&mut [0]).unwrap(), 0);
    guest.send(&packet(REQUEST));
    assert_eq!(guest.receive().unwrap().op, RESPONSE);
    ours.write_all(b"hello").unwrap();
    assert_eq!(guest.receive().unwrap().data, b"hello");
    assert_eq!(guest.driver.metric("host_offers"), 2);
}

#[test]
fn offers_are_bounded_and_leave_the_ports_of_the_monitor_alone() {
    let (host, mut guest) = Host::with_guest();
    let (_own, offered) = UnixStream::pair().unwrap();
    guest.ports.offer(PORT, offered);
    let mut offer = |port: u32| {
        let (_ours, theirs) = UnixStream::pair().unwrap();
        let mut caller = host.say(&format!("OFFER {port}\n"), &[theirs.as_fd()]);
        assert_eq!(guest.receive(), None);
        told(&mut caller)
    };
    assert_eq!((offer(PORT).as_str(), offer(u32::MAX).as_str()), ("", ""));
    for port in 2000..2256 {
        assert_eq!(offer(port), format!("OK {port}"));
    }
    assert_eq!((offer(2256).as_str(), offer(2255).as_str()), ("", "OK 2255"));
}

#[test]
fn who_talks_nonsense_is_hung_up_on() {
    let (host, mut guest) = Host::with_guest();
    let (one, two) = UnixStream::pair().unwrap();
    let datagrams = UnixDatagram::unbound().unwrap();
    let both_ways = std::fs::File::options().read(true).write(true).open("/dev/null").unwrap();
    let words = [
        "HELLO 77\n",
        "CONNECT\n",
        "CONNECT 4294967296\n",
        "CONNECT -1\n",
        "\n",
        "CONNECT 000000000000000000000000000000000000000077\n",
        "OFFER 77\n",
    ];
    let mut callers: Vec<_> = words.iter().map(|words| host.say(words, &[])).collect();
    callers.push(host.say("CONNECT 77\n", &[one.as_fd(), two.as_fd()]));
    callers.push(host.say("CONNECT 77\n", &[datagrams.as_fd()]));
    callers.push(host.say("CONNECT 77\n", &[both_ways.as_fd()]));
    assert_eq!(guest.receive(), None);
    for caller in &mut callers {
        // With what it said unread, it hears of a reset.
        match caller.read(&mut [0]) {
            Ok(count) => assert_eq!(count, 0),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
    }
    assert_eq!(guest.driver.metric("host_calls_refused"), callers.len() as u64);
}

#[test]
fn who_says_nothing_makes_room_for_others() {
    let (host, mut guest) = Host::with_guest();
    let mut silent = Vec::new();
    // More than are let in at once, and more than may be silent.
    for _ in 0..100 {
        silent.push(host.call());
    }
    let mut caller = host.say("CONNECT 77\n", &[]);
    let request = loop {
        match guest.receive() {
            Some(packet) => break packet,
            None => guest.driver.device.dispatch(Event::Queue(RECEIVE as u16)),
        }
    };
    assert_eq!(request.op, REQUEST);
    guest.send(&packet(RESPONSE));
    assert_eq!(told(&mut caller), format!("OK {}", guest.port));
    assert_eq!(told(&mut silent[0]), "");
    let last = silent.last_mut().unwrap();
    last.set_nonblocking(true).unwrap();
    assert_eq!(last.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[test]
fn who_comes_before_there_is_a_driver_or_while_it_starts_anew_is_served_then() {
    let (host, listener) = Host::new();
    let mut callers = vec![host.say("CONNECT 77\n", &[])];
    let mut guest = Guest::of(Some(listener));
    guest.driver.write(0x70, 0);
    callers.push(host.say("CONNECT 77\n", &[]));
    // Nobody is there who could hear of it.
    guest.driver.turn();
    guest.driver = guest.driver.start();
    for caller in &mut callers {
        // The driver's start is a notification of each queue.
        let request = guest.receive_at(Event::Queue(RECEIVE as u16)).unwrap();
        assert_eq!(request.op, REQUEST);
        guest.send(&packet(RESPONSE));
        assert_eq!(told(caller), format!("OK {}", guest.port));
    }
}

/// A guest with as many connections as there can be, and their ends.
fn full() -> (Host, Guest, Vec<UnixStream>) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let most = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most }).unwrap();
    let (host, mut guest) = Host::with_guest();
    let mut ends = Vec::new();
    for _ in 0..2048 {
        ends.push(host.say("CONNECT 77\n", &[]));
        guest.accept();
    }
    (host, guest, ends)
}

#[test]
fn there_are_as_many_connections_as_the_limit_says_and_both_sides_are_refused_more() {
    let (host, mut guest, mut ends) = full();
    let mut more = host.say("CONNECT 77\n", &[]);
    assert_eq!((guest.receive(), told(&mut more).as_str()), (None, ""));
    let (_host, offered) = UnixStream::pair().unwrap();
    guest.ports.offer(PORT, offered);
    guest.port = PORT;
    guest.send(&packet(REQUEST));
    assert_eq!(guest.receive().unwrap().op, RESET);
    // One that ends makes room for another. It left unread what it was told, which is why it is a reset.
    ends.pop();
    assert_eq!(guest.receive().unwrap().op, RESET);
    let _again = host.say("CONNECT 77\n", &[]);
    guest.accept();
}

#[test]
fn more_is_heard_of_than_is_looked_at_at_once() {
    let (host, mut guest, mut ends) = full();
    let mut callers: Vec<_> = (0..64).map(|_| host.call()).collect();
    // As many as are let in at once: only then is it found that there are no more.
    assert_eq!((guest.receive(), guest.receive()), (None, None));
    // Every connection, every caller, and last of all somebody new.
    ends.iter_mut().for_each(|end| end.write_all(b"x").unwrap());
    callers.iter_mut().for_each(|caller| caller.write_all(b"C").unwrap());
    let mut last = host.say("nonsense\n", &[]);
    // What is left from before is heard of in the same turn.
    guest.driver.turn();
    guest.driver.heed();
    guest.driver.heed();
    last.set_nonblocking(true).unwrap();
    assert_eq!(last.read(&mut [0]).unwrap(), 0, "nobody heard of the last one");
}
