//! Streams between a guest and its host: AF_VSOCK and TCP.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::{AsRawFd as _, OwnedFd};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};

use crate::{Work, link};

/// The context identifier of the host (VIRTIO 1.2 §5.10.4).
const HOST: u32 = 2;
/// Where the host is in the network of the guest's interface.
const HOST_ADDRESS: ([u8; 4], u16) = ([172, 30, 0, 1], 1026);
/// How much is moved by one call.
const PIECE: usize = 64 << 10;

/// The streams to the host, each there from its first use on.
#[derive(Default)]
pub struct Streams {
    vsock: Option<File>,
    net: Option<File>,
}

/// A connection to a port of the host.
pub fn vsock(port: u32) -> Result<File> {
    let socket =
        socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).context("there is no vsock")?;
    connect(socket.as_raw_fd(), &VsockAddr::new(HOST, port))
        .with_context(|| format!("cannot connect to port {port}"))?;
    Ok(File::from(socket))
}

impl Streams {
    /// With one that is there already.
    pub fn with_vsock(vsock: File) -> Self {
        Self { vsock: Some(vsock), net: None }
    }

    /// Prepares to send or receive so many bytes, or to send so many back one by one.
    pub fn prepare(&mut self, kind: &str, direction: &str, count: usize) -> Result<Work> {
        let stream = match kind {
            "vsock" => self.vsock.as_ref().context("there is no vsock here")?,
            "net" => match &mut self.net {
                Some(stream) => stream,
                none => none.insert(tcp()?),
            },
            _ => bail!("unknown kind of stream {kind:?}"),
        };
        let mut stream = stream.try_clone().context("cannot use a stream twice")?;
        let mut buffer = vec![0x5a; PIECE];
        Ok(match direction {
            "send" => Box::new(move || {
                let mut left = count;
                while left > 0 {
                    let now = left.min(PIECE);
                    stream.write_all(&buffer[..now]).context("cannot send")?;
                    left -= now;
                }
                Ok(())
            }),
            "receive" => Box::new(move || {
                let mut left = count;
                while left > 0 {
                    match stream.read(&mut buffer[..left.min(PIECE)]).context("cannot receive")? {
                        0 => bail!("the host ended the stream"),
                        count => left -= count,
                    }
                }
                Ok(())
            }),
            "echo" => Box::new(move || {
                for _ in 0..count {
                    stream.read_exact(&mut buffer[..1]).context("cannot receive")?;
                    stream.write_all(&buffer[..1]).context("cannot send")?;
                }
                Ok(())
            }),
            _ => bail!("unknown direction {direction:?}"),
        })
    }
}

fn tcp() -> Result<File> {
    link::bring_up().context("cannot set the network up")?;
    let stream = TcpStream::connect(std::net::SocketAddr::from(HOST_ADDRESS)).context("cannot reach the host")?;
    stream.set_nodelay(true).context("cannot send small packets at once")?;
    Ok(File::from(OwnedFd::from(stream)))
}
