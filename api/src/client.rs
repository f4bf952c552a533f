//! The API of a VM from a front end's side: requests over its Unix socket, each on a connection of its own.

use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use crate::server::PROTOCOL;
use crate::server::problem::{Problem, ProblemKind};

/// The socket's name in a state directory.
pub const SOCKET: &str = "api.sock";
/// The longest answer that is no stream.
const ANSWER_MAX: usize = 16 << 20;
/// Pieces of a body that wait to be sent.
const QUEUE: usize = 4;

/// Why a request brought nothing.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody serves the socket.
    #[error("cannot connect to {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The connection broke off: the VM has ended.
    #[error("the VM has ended")]
    Gone(#[source] hyper::Error),
    /// The VM says what is wrong.
    #[error("{}", .0.detail)]
    Problem(Problem),
    /// The answer makes no sense.
    #[error("the VM's answer cannot be read: {0}")]
    Answer(String),
    /// The request cannot be made.
    #[error("cannot make the request")]
    Request(#[source] hyper::http::Error),
}

impl ClientError {
    /// The kind of problem that the VM told of.
    pub fn kind(&self) -> Option<ProblemKind> {
        match self {
            Self::Problem(problem) => Some(problem.kind),
            _ => None,
        }
    }
}

/// A body that is sent piece by piece.
pub type Pieces = mpsc::Sender<io::Result<Frame<Bytes>>>;

type Body = http_body_util::combinators::UnsyncBoxBody<Bytes, io::Error>;

/// A VM's API.
#[derive(Debug, Clone)]
pub struct Client {
    folder: PathBuf,
}

impl Client {
    /// The API of the VM whose state directory this is.
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// Reads a document.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        parse(self.send(Method::GET, path, empty(), false).await?).await
    }

    /// Asks for something that has no answer but that it was done.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn act(&self, method: Method, path: &str, body: Option<&impl Serialize>) -> Result<(), ClientError> {
        let response = self.send(method, path, json(body)?, false).await?;
        read(response).await.map(drop)
    }

    /// Asks for something and reads the document that it is answered with.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        parse(self.send(method, path, json(body)?, false).await?).await
    }

    /// Reads a stream; what comes is left to the caller.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn stream(&self, path: &str) -> Result<Response<Incoming>, ClientError> {
        self.send(Method::GET, path, empty(), false).await
    }

    /// Sends a body piece by piece, until the queue's sender is dropped or a piece is an error, and waits until all of it
    /// was taken.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn upload(
        &self,
        path: &str,
        pieces: mpsc::Receiver<io::Result<Frame<Bytes>>>,
    ) -> Result<(), ClientError> {
        let pieces = futures_util::stream::unfold(pieces, |mut pieces| async move {
            let piece = pieces.recv().await?;
            Some((piece, pieces))
        });
        let body = StreamBody::new(pieces).boxed_unsync();
        read(self.send(Method::PUT, path, body, false).await?).await.map(drop)
    }

    /// A queue for [`Client::upload`].
    pub fn pieces() -> (Pieces, mpsc::Receiver<io::Result<Frame<Bytes>>>) {
        mpsc::channel(QUEUE)
    }

    /// Asks for streams: the connection is theirs from then on. Gives the bytes that came already, and where the answer
    /// says the process is.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn upgrade(&self, path: &str, body: Option<&impl Serialize>) -> Result<Streams, ClientError> {
        let mut response = self.send(Method::POST, path, json(body)?, true).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(ClientError::Answer(format!("the connection was not upgraded ({})", response.status())));
        }
        let location = response.headers().get(hyper::header::LOCATION);
        let location = location.and_then(|value| value.to_str().ok()).map(str::to_owned);
        let upgraded = hyper::upgrade::on(&mut response).await.map_err(ClientError::Gone)?;
        let parts = upgraded.downcast::<TokioIo<UnixStream>>();
        let parts = parts.map_err(|_| ClientError::Answer("it is on another connection".to_owned()))?;
        Ok(Streams { connection: parts.io.into_inner(), early: parts.read_buf, location })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Body,
        upgrade: bool,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = self.connect().await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(ClientError::Gone)?;
        // Ends with the connection, and its errors are the sender's.
        tokio::spawn(async move { connection.with_upgrades().await });
        let mut request = Request::builder().method(method).uri(path).header(HOST, "cofferdam");
        request = request.header(CONTENT_TYPE, "application/json");
        if upgrade {
            request = request.header(CONNECTION, "upgrade").header(UPGRADE, PROTOCOL);
        }
        let request = request.body(body).map_err(ClientError::Request)?;
        let response = sender.send_request(request).await.map_err(ClientError::Gone)?;
        if response.status().is_success() || response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let status = response.status();
        let bytes = read(response).await?;
        match serde_json::from_slice(&bytes) {
            Ok(problem) => Err(ClientError::Problem(problem)),
            Err(_) => Err(ClientError::Answer(format!("status {status} without a problem document"))),
        }
    }

    /// Connects through the directory's descriptor: a socket's address has room for 107 bytes, a path may be longer.
    async fn connect(&self) -> Result<UnixStream, ClientError> {
        use rustix::fs::{Mode, OFlags, open};
        let failed = |source| ClientError::Connect { path: self.folder.join(SOCKET), source };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = open(&self.folder, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
        let address = format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd());
        UnixStream::connect(address).await.map_err(failed)
    }
}

/// An upgraded connection.
#[derive(Debug)]
pub struct Streams {
    /// The connection.
    pub connection: UnixStream,
    /// What came with the answer: the first bytes of the streams.
    pub early: Bytes,
    /// The path of the process that was executed.
    pub location: Option<String>,
}

fn empty() -> Body {
    Full::new(Bytes::new()).map_err(|never| match never {}).boxed_unsync()
}

fn json(body: Option<&impl Serialize>) -> Result<Body, ClientError> {
    let Some(body) = body else { return Ok(empty()) };
    let bytes = serde_json::to_vec(body).map_err(|error| ClientError::Answer(error.to_string()))?;
    Ok(Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed_unsync())
}

async fn read(response: Response<Incoming>) -> Result<Bytes, ClientError> {
    let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await;
    Ok(body.map_err(|error| ClientError::Answer(error.to_string()))?.to_bytes())
}

async fn parse<T: DeserializeOwned>(response: Response<Incoming>) -> Result<T, ClientError> {
    serde_json::from_slice(&read(response).await?).map_err(|error| ClientError::Answer(error.to_string()))
}
