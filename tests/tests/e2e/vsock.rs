//! Connections that the host opens to a guest, at the VM's socket, and ends of them that it hands over.

use std::io::{IoSlice, PipeReader, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use tests::process::{Invocation, Running};
use tests::sandbox::Sandbox;

use crate::memory::changing;

/// What each connection carries, in bytes: more than its buffers hold.
const LENGTH: usize = 1 << 20;

/// Listens at port 5000 of the guest, and gives everybody back what they sent, at its end. At port 6000 it says who it is to
/// the first who comes, and ends when they do; and it says so to port 9 of the host once it is told to.
const GUEST: &str = r#"
import socket, sys, threading

def listener(port):
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    listener.bind((socket.VMADDR_CID_ANY, port))
    listener.listen(64)
    return listener

def echo(peer):
    data = b"".join(iter(lambda: peer.recv(65536), b""))
    peer.sendall(data)
    peer.close()

def serve(listener):
    while True:
        threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()

threading.Thread(target=serve, args=(listener(5000),), daemon=True).start()
last = listener(6000)
try:
    socket.socket(socket.AF_VSOCK, socket.SOCK_SEQPACKET).connect((2, 9))
except OSError as error:
    print("no packets", flush=True)
print("ready", flush=True)
peer = last.accept()[0]
peer.sendall(b"a guest")
while peer.recv(1):
    pass
host = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
host.connect((2, 9))
host.sendall(b"a guest that calls")
host.close()
"#;

struct Guest {
    running: Running,
    socket: PathBuf,
}

/// Somebody in a guest who listens, and the VM's socket.
fn guest(sandbox: &Sandbox) -> Guest {
    let socket = sandbox.files().join("vsock");
    let path = format!("\\1{{\"path\":\"{}\"}}", socket.display());
    let monitor = changing(sandbox, "(\"vsock_socket\": *)null", &path);
    // Containers have no such sockets by default.
    let flags = ["--security-opt", "seccomp=unconfined", "-m", "256m"];
    let invocation: Invocation = sandbox.run(&flags, "debian", &["python3", "-c", GUEST]);
    let running = invocation.env("COFFERDAM_VMM", monitor).start();
    running.wait_for("no packets\nready\n");
    Guest { running, socket }
}

/// Says something at a VM's socket, with these descriptors, and gives the answer with what leads there.
fn say(socket: &PathBuf, words: &str, descriptors: &[RawFd]) -> (String, UnixStream) {
    let mut caller = UnixStream::connect(socket).unwrap();
    let rights = [ControlMessage::ScmRights(descriptors)];
    let rights = if descriptors.is_empty() { &[][..] } else { &rights };
    sendmsg::<()>(caller.as_raw_fd(), &[IoSlice::new(words.as_bytes())], rights, MsgFlags::empty(), None).unwrap();
    let (mut line, mut byte) = (Vec::new(), [0]);
    while caller.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
        line.extend(byte);
    }
    (String::from_utf8(line).unwrap(), caller)
}

fn text_of(mut reader: PipeReader) -> String {
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn the_host_connects_to_a_guest_as_often_as_it_likes_and_hands_its_ends_over() {
    let sandbox = Sandbox::new();
    let Guest { running, socket } = guest(&sandbox);
    let echoes: Vec<_> = (0..16u8)
        .map(|number| {
            let socket = socket.clone();
            thread::spawn(move || {
                let (answer, mut stream) = say(&socket, "CONNECT 5000\n", &[]);
                assert!(answer.starts_with("OK "), "{answer}");
                let data: Vec<u8> = (0..LENGTH).map(|at| (at % 251) as u8 ^ number).collect();
                stream.write_all(&data).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
                let mut back = Vec::new();
                stream.read_to_end(&mut back).unwrap();
                assert!(back == data, "{} bytes came back", back.len());
            })
        })
        .collect();
    echoes.into_iter().for_each(|echo| echo.join().unwrap());

    assert_eq!(say(&socket, "CONNECT 5001\n", &[]).0, "", "nobody listens there");

    let (offered, writer) = std::io::pipe().unwrap();
    assert_eq!(say(&socket, "OFFER 9\n", &[writer.as_raw_fd()]).0, "OK 9");
    drop(writer);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (answer, mut caller) = say(&socket, "CONNECT 6000\n", &[theirs.as_raw_fd()]);
    drop(theirs);
    assert!(answer.starts_with("OK ") && caller.read(&mut [0]).unwrap() == 0, "{answer}");
    let mut name = [0; 7];
    (&ours).read_exact(&mut name).unwrap();
    assert_eq!(&name, b"a guest");
    ours.shutdown(Shutdown::Write).unwrap();
    assert_eq!(text_of(offered), "a guest that calls");
    assert_eq!(running.end().code(), 0);
}
