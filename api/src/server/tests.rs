//! What clients can take up of a server, and for how long.

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::{self, JoinHandle};

use super::*;

/// As long as nobody waits.
const LONG: Duration = Duration::from_secs(600);
/// So long that a test is sure that nothing comes.
const SHORT: Duration = Duration::from_millis(200);

/// A monitor around nothing.
struct Nothing;

impl Machine for Nothing {
    fn pid(&self) -> u32 {
        1
    }
    fn resident_bytes(&self) -> u64 {
        0
    }
    fn pause(&self) {}
    fn resume(&self) {}
    fn console(&self) -> Vec<u8> {
        Vec::new()
    }
    fn devices(&self) -> Vec<Device> {
        Vec::new()
    }
    fn figures(&self) -> Vec<DeviceFigures> {
        Vec::new()
    }
    fn offer(&self, _: u32, _: UnixStream) {}
    fn withdraw(&self, _: u32) {}
    fn plugged(&self) -> Plugged {
        Plugged::default()
    }
    fn plug(&self, _: u32) {}
    fn balloon(&self) -> Option<Balloon> {
        None
    }
    fn set_balloon(&self, _: u32) {}
    fn ask_statistics(&self, _: Box<dyn FnOnce() + Send>) {}
    fn generation(&self) -> Option<Generation> {
        None
    }
    fn renew_generation(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A server that ends with this value.
struct Server {
    folder: tempfile::TempDir,
    agent: Option<UnixStream>,
    thread: Option<JoinHandle<io::Result<Outcome>>>,
}

impl Server {
    fn new(bounds: Bounds) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (agent, theirs) = UnixStream::pair().unwrap();
        let setup = Setup {
            config: serde_json::from_str(r#"{"vcpus": 1, "memory_mib": 128, "kernel": "/k", "initramfs": "/i"}"#)
                .unwrap(),
            container: None,
            listener: Some(UnixListener::bind(folder.path().join("api.sock")).unwrap()),
            folder: None,
            machine: Arc::new(Nothing),
            agent,
            boot: VmBoot::default(),
            guest_ended: guest_end().1,
        };
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            setup.unblock()?;
            runtime.block_on(serve(setup, || None, bounds))
        });
        Self { folder, agent: Some(theirs), thread: Some(thread) }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("api.sock")
    }

    fn client(&self) -> Client {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        Client(stream)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.agent.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap().unwrap();
        }
    }
}

struct Client(UnixStream);

impl Client {
    fn send(mut self, text: &str) -> Self {
        self.0.write_all(text.as_bytes()).unwrap();
        self
    }

    /// A request with a body, of which so much is sent.
    fn post(self, path: &str, length: usize, sent: usize) -> Self {
        let head = "Host: h\r\nConnection: close\r\nContent-Type: application/json\r\n";
        let body = " ".repeat(sent);
        self.send(&format!("POST {path} HTTP/1.1\r\n{head}Content-Length: {length}\r\n\r\n{body}"))
    }

    /// Everything up to the connection's end.
    fn answer(mut self) -> String {
        let mut text = String::new();
        self.0.read_to_string(&mut text).unwrap();
        text
    }

    fn hears_something(&mut self) -> bool {
        self.0.set_read_timeout(Some(SHORT)).unwrap();
        let heard = self.0.read(&mut [0; 1024]).is_ok();
        self.0.set_read_timeout(Some(LONG)).unwrap();
        heard
    }
}

const GET: &str = "GET /v1/vm HTTP/1.1\r\nHost: h\r\n\r\n";

#[test]
fn a_body_that_is_too_long_is_refused_as_that() {
    let server = Server::new(BOUNDS);
    let most = routes::BODY_MAX;
    // Read by an extractor, and by a handler that needs the rest of the request.
    for path in ["/v1/containers", "/v1/containers/c/processes"] {
        let answer = server.client().post(path, most + 1, most + 1).answer();
        assert!(answer.starts_with("HTTP/1.1 413 ") && answer.contains("body-too-long"), "{path}: {answer}");
        let answer = server.client().post(path, most, most).answer();
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("invalid-request"), "{path}: {answer}");
    }
}

#[test]
fn a_body_that_does_not_come_is_not_waited_for() {
    let server = Server::new(Bounds { body: SHORT, ..BOUNDS });
    for path in ["/v1/containers", "/v1/containers/c/processes"] {
        let answer = server.client().post(path, 100, 10).answer();
        assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("body-too-slow"), "{path}: {answer}");
    }
}

#[test]
fn a_client_that_asks_nothing_is_sent_away() {
    let server = Server::new(Bounds { head: SHORT, ..BOUNDS });
    for text in ["", "GET /v1/vm HT"] {
        assert!(!server.client().send(text).answer().contains("200 OK"), "{text:?}");
    }
    // As is one that asks no more.
    assert!(server.client().send(GET).answer().starts_with("HTTP/1.1 200 OK"));
}

#[test]
fn more_clients_than_there_may_be_wait_until_one_goes() {
    let server = Server::new(Bounds { connections: 2, head: LONG, ..BOUNDS });
    let (first, mut second) = (server.client(), server.client().send(GET));
    assert!(second.hears_something());
    let mut third = server.client().send(GET);
    assert!(!third.hears_something());
    drop(first);
    third.0.read_exact(&mut [0; 1]).unwrap();
}

#[test]
fn those_who_ask_nothing_lock_nobody_out_for_ever() {
    let server = Server::new(Bounds { connections: 2, head: SHORT, ..BOUNDS });
    let _idle = [server.client(), server.client()];
    assert!(server.client().send(GET).answer().starts_with("HTTP/1.1 200 OK"));
}
