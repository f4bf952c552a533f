//! Registries (OCI Distribution Specification, "Pull"). The network runs on one thread, with an asynchronous
//! runtime that exists only while something is pulled; layers are unpacked on the caller's thread meanwhile.
//!
//! Everything is requested here, not by the crate oci-client, because that reads manifests, tokens and the text of errors into
//! memory whatever their size.

mod download;
mod login;

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::path::PathBuf;
use std::sync::{Once, mpsc};
use std::time::Duration;

use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderValue, RANGE};
use reqwest::{Response, StatusCode, Url};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

use self::download::{Downloads, PARALLEL};
use super::credentials::{self, Login};
use super::{Apply, LayerRef, Resolved, Source};
use crate::config::ParsedConfig;
use crate::digest::Digest;
use crate::error::Error;
use crate::flatten::check_size_and_digest;
use crate::limits::DOCUMENT_BYTES_MAX;
use crate::manifest::{ACCEPTED, Blob, Document, INDEX_DEPTH_MAX, Manifest, choose};
use crate::progress::Progress;
use crate::reference::RegistryReference;
use crate::store::{Paths, PullOptions};

const USER_AGENT: &str = concat!("cofferdam/", env!("CARGO_PKG_VERSION"));

/// How to talk to registries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistryOptions {
    /// How long a connection may take to come up.
    pub connect_timeout: Duration,
    /// How long a registry may send nothing in the middle of an answer.
    pub stall_timeout: Duration,
    /// Docker's login file; `None` for the one docker would use.
    pub login_file: Option<PathBuf>,
}

impl Default for RegistryOptions {
    fn default() -> RegistryOptions {
        RegistryOptions {
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            login_file: None,
        }
    }
}

/// An image in a registry.
struct RegistrySource {
    /// Only absent while this is dropped.
    runtime: Option<Runtime>,
    connection: Connection,
    layers: Vec<Blob>,
    paths: Paths,
}

/// One registry and one repository of it.
pub(super) struct Connection {
    http: reqwest::Client,
    reference: RegistryReference,
    login: Option<Login>,
    /// What the registry accepted last.
    authorization: tokio::sync::Mutex<Option<HeaderValue>>,
}

/// Finds an image in its registry.
///
/// # Errors
/// The registry can't be reached, has no such image or none for this platform, or what it sends is malformed.
pub(crate) fn resolve(
    reference: &RegistryReference,
    options: &PullOptions,
    paths: &Paths,
) -> Result<(Box<dyn Source>, Resolved), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Runtime)?;
    // Made inside the runtime: name resolution may want to start tasks.
    let connection = {
        let _guard = runtime.enter();
        Connection::new(reference, &options.registry)?
    };
    let (manifest, manifest_digest) = runtime.block_on(connection.manifest())?;
    let config = runtime.block_on(connection.config(&manifest))?;
    let layers = manifest.layers.iter().map(|blob| LayerRef { digest: Some(blob.digest), bytes: blob.bytes }).collect();
    let resolved = Resolved { id: manifest.config.digest, manifest_digest, config, layers };
    let source = RegistrySource { runtime: Some(runtime), connection, layers: manifest.layers, paths: paths.clone() };
    Ok((Box::new(source), resolved))
}

impl Connection {
    fn new(reference: &RegistryReference, options: &RegistryOptions) -> Result<Connection, Error> {
        static PROVIDER: Once = Once::new();
        // The caller may have installed one already; any will do.
        PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
        let registry = reference.registry().to_owned();
        let failed = |source: Box<dyn StdError + Send + Sync>| Error::Transfer {
            registry: registry.clone(),
            what: "anything".to_owned(),
            source,
        };
        let mut http = reqwest::Client::builder()
            .connect_timeout(options.connect_timeout)
            .read_timeout(options.stall_timeout)
            .user_agent(USER_AGENT);
        if reference.is_loopback() {
            // What a proxy calls localhost is another machine.
            http = http.no_proxy();
        }
        let http = http.build();
        let login = match options.login_file.clone().or_else(credentials::default_file) {
            Some(file) => credentials::load(&file, reference.registry())?,
            None => None,
        };
        Ok(Connection {
            http: http.map_err(|error| failed(error.into()))?,
            reference: reference.clone(),
            login,
            authorization: tokio::sync::Mutex::new(None),
        })
    }

    /// The manifest for this platform and its digest.
    async fn manifest(&self) -> Result<(Manifest, Digest), Error> {
        let mut wanted = self.reference.digest();
        let mut bytes_wanted = None;
        for _ in 0..INDEX_DEPTH_MAX {
            let what = wanted.map_or_else(|| format!("manifest {}", self.reference), |d| format!("manifest {d}"));
            let choice = wanted.map(|digest| digest.to_string()).or_else(|| self.reference.tag().map(str::to_owned));
            let response = self.get(&format!("manifests/{}", choice.unwrap_or_default()), 0, &what).await?;
            if response.status() == StatusCode::NOT_FOUND {
                let detail = format!("the registry {} does not have it", self.reference.registry());
                return Err(Error::NoSuchImage { reference: self.reference.to_string(), detail });
            }
            let bytes = self.document(response, DOCUMENT_BYTES_MAX, &what).await?;
            let actual = Blob { digest: Digest::of(&bytes), bytes: bytes.len() as u64 };
            let expected =
                Blob { digest: wanted.unwrap_or(actual.digest), bytes: bytes_wanted.unwrap_or(actual.bytes) };
            check_size_and_digest(&what, expected, actual)?;
            match Document::parse(&bytes, &what)? {
                Document::Manifest(manifest) => return Ok((manifest, actual.digest)),
                Document::Index(index) => {
                    let entry = choose(index.manifests(), &self.reference.to_string())?;
                    let blob = Blob::from_descriptor(entry, &what)?;
                    (wanted, bytes_wanted) = (Some(blob.digest), Some(blob.bytes));
                }
            }
        }
        Err(Error::Malformed { what: self.reference.to_string(), reason: "indexes are nested too deeply".to_owned() })
    }

    async fn config(&self, manifest: &Manifest) -> Result<ParsedConfig, Error> {
        let what = format!("image configuration {}", manifest.config.digest);
        let response = self.get(&format!("blobs/{}", manifest.config.digest), 0, &what).await?;
        let bytes = self.document(response, manifest.config.bytes, &what).await?;
        let actual = Blob { digest: Digest::of(&bytes), bytes: bytes.len() as u64 };
        check_size_and_digest(&what, manifest.config, actual)?;
        ParsedConfig::parse(&bytes, manifest.layers.len(), &what)
    }

    /// The body of an answer, at most `limit` bytes of it.
    async fn document(&self, mut response: Response, limit: u64, what: &str) -> Result<Vec<u8>, Error> {
        self.check_status(response.status(), what)?;
        let mut bytes = Vec::new();
        while let Some(chunk) =
            response.chunk().await.map_err(|error| self.transfer(what, error.without_url().into()))?
        {
            let total = bytes.len() as u64 + chunk.len() as u64;
            if total > limit {
                return Err(Error::TooLarge { what: what.to_owned(), bytes: total, limit });
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    /// Asks for something of the repository, from byte `offset` on. Logs in if the registry wants that, also when a
    /// token ran out in the middle of a pull. The body is not read yet.
    async fn get(&self, path: &str, offset: u64, what: &str) -> Result<Response, Error> {
        let scheme = if self.reference.is_loopback() { "http" } else { "https" };
        // The one registry whose images have another name than its host.
        let host = if self.reference.registry() == "docker.io" { "index.docker.io" } else { self.reference.registry() };
        let repository = self.reference.repository();
        let url = format!("{scheme}://{host}/v2/{repository}/{path}");
        let sent = self.authorization.lock().await.clone();
        let response = self.request(&url, offset, sent.clone(), what).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        // Whoever it redirects to does not say where the login goes.
        if !Url::parse(&url).is_ok_and(|asked| asked.origin() == response.url().origin()) {
            return Err(self.denied());
        }
        let renewed = {
            let mut authorization = self.authorization.lock().await;
            // Of several downloads that are refused at once, one logs in; the others use what it got.
            if *authorization == sent {
                *authorization = Some(self.log_in(response.headers()).await?);
            }
            authorization.clone()
        };
        self.request(&url, offset, renewed, what).await
    }

    async fn request(
        &self,
        url: &str,
        offset: u64,
        authorization: Option<HeaderValue>,
        what: &str,
    ) -> Result<Response, Error> {
        let mut request = self.http.get(url).header(ACCEPT, ACCEPTED);
        if offset > 0 {
            request = request.header(RANGE, format!("bytes={offset}-"));
        }
        if let Some(header) = authorization {
            request = request.header(AUTHORIZATION, header);
        }
        request.send().await.map_err(|error| self.request_error(what, error))
    }

    fn check_status(&self, status: StatusCode, what: &str) -> Result<(), Error> {
        match status {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(()),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(self.denied()),
            status => Err(Error::RegistryStatus {
                registry: self.reference.registry().to_owned(),
                status: status.as_u16(),
                what: what.to_owned(),
            }),
        }
    }

    fn denied(&self) -> Error {
        let (registry, repository) = (self.reference.registry().to_owned(), self.reference.repository().to_owned());
        Error::Denied { registry, repository }
    }

    /// A request that got no answer at all.
    fn request_error(&self, what: &str, error: reqwest::Error) -> Error {
        if error.is_connect() || error.is_timeout() {
            let registry = self.reference.registry().to_owned();
            return Error::Unreachable { registry, source: error.without_url().into() };
        }
        self.transfer(what, error.without_url().into())
    }

    fn transfer(&self, what: &str, source: Box<dyn StdError + Send + Sync>) -> Error {
        Error::Transfer { registry: self.reference.registry().to_owned(), what: what.to_owned(), source }
    }
}

impl Drop for RegistrySource {
    fn drop(&mut self) {
        // A thread that waits for another pull's lock must not hold up a pull that failed.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Source for RegistrySource {
    fn each_layer(&mut self, progress: &dyn Progress, apply: &mut Apply<'_>) -> Result<(), Error> {
        let downloads = Downloads { connection: &self.connection, layers: &self.layers, paths: &self.paths, progress };
        let Some(runtime) = &self.runtime else { return Ok(()) };
        let (sender, receiver) = mpsc::channel();
        let (cancel, cancelled) = oneshot::channel::<()>();
        std::thread::scope(|scope| {
            let network = std::thread::Builder::new().name("image-download".to_owned());
            let spawned = network.spawn_scoped(scope, move || {
                runtime.block_on(async {
                    tokio::select! {
                        // Also when the sender is dropped: nobody waits for layers any more.
                        _ = cancelled => {}
                        () = downloads.run(PARALLEL, &sender) => {}
                    }
                });
            });
            spawned.map_err(Error::Runtime)?;
            let mut early = BTreeMap::new();
            for index in 0..self.layers.len() {
                while !early.contains_key(&index) {
                    // The sender lives until all layers are sent, or one failed, which comes first.
                    let Ok((number, result)) = receiver.recv() else {
                        return Err(Error::Runtime(std::io::ErrorKind::BrokenPipe.into()));
                    };
                    early.insert(number, result?);
                }
                if let Some(mut file) = early.remove(&index) {
                    apply(index, &mut file)?;
                }
            }
            drop(cancel);
            Ok(())
        })
    }

    fn discard(&mut self) {
        for layer in &self.layers {
            download::discard(&self.paths, layer.digest);
        }
    }
}
