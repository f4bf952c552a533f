//! Debian's `docker-registry`, on a loopback port of its own.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// How long the registry may take to listen. Emulated machines are slow to load a program of its size.
const START_LIMIT: Duration = Duration::from_secs(60);

/// How much of what the registry says before it listens is kept, in bytes.
const SAID_MAX: usize = 4096;

/// A running registry. Dropping it ends it.
pub struct Registry {
    process: Child,
    address: String,
    /// Reads what it says, and gives the paths that were asked for.
    log: Option<JoinHandle<Vec<String>>>,
}

impl Registry {
    /// Starts a registry that keeps its images in `storage`.
    ///
    /// # Errors
    /// Debian's `docker-registry` is missing or does not come up.
    pub fn start(storage: &Path) -> Result<Self> {
        // Read when the registry starts, and of no use when it listens.
        let mut settings = tempfile::NamedTempFile::new().context("cannot create a temporary file")?;
        let quoted = Value::from(storage.to_str().context("the path of the storage is not UTF-8")?);
        write!(
            settings,
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {quoted}}}}}\n\
             http: {{addr: '127.0.0.1:0'}}\n"
        )?;
        let mut process = Command::new("docker-registry")
            .arg("serve")
            .arg(settings.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start docker-registry: install Debian's package of this name")?;
        let stderr = process.stderr.take().context("docker-registry has no standard error")?;
        let (sender, address) = mpsc::channel();
        let log = thread::spawn(move || follow(stderr, &sender));
        let mut registry = Self { process, address: String::new(), log: Some(log) };
        match address.recv_timeout(START_LIMIT) {
            Ok(Ok(address)) => registry.address = address,
            Ok(Err(said)) => bail!("docker-registry ended: {said}"),
            Err(_) => bail!("docker-registry does not listen after {START_LIMIT:?}"),
        }
        Ok(registry)
    }

    /// `127.0.0.1:PORT`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Ends the registry, and gives the path of every request that it has answered, in order.
    ///
    /// # Panics
    /// The thread that reads its log has panicked.
    #[must_use]
    pub fn end(mut self) -> Vec<String> {
        let log = self.log.take();
        drop(self);
        log.map(|log| log.join().expect("the log was read")).unwrap_or_default()
    }

    /// Copies the image that a layout has under the tag `image` to the repository `name`, under the tag `tag`.
    ///
    /// # Errors
    /// The layout has no such image, or the registry refuses something.
    pub fn push(&self, layout: &Path, image: &str, name: &str, tag: &str) -> Result<()> {
        let blob = |digest: &str| layout.join("blobs/sha256").join(digest.trim_start_matches("sha256:"));
        let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json"))?)?;
        let manifest = index["manifests"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|manifest| manifest["annotations"]["org.opencontainers.image.ref.name"] == image)
            .with_context(|| format!("the layout {} has no image {image}", layout.display()))?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let path = blob(&text(&manifest["digest"]));
        let content: Value = serde_json::from_slice(&fs::read(&path)?)?;
        for descriptor in content["layers"].as_array().into_iter().flatten().chain([&content["config"]]) {
            let digest = text(&descriptor["digest"]);
            self.push_blob(name, &digest, &blob(&digest))?;
        }
        let url = format!("http://{}/v2/{name}/manifests/{tag}", self.address);
        let media_type = format!("Content-Type: {}", text(&manifest["mediaType"]));
        curl(Command::new("curl").args(["--header", &media_type, "--upload-file"]).arg(&path).arg(url))?;
        Ok(())
    }

    /// Uploads a blob in one piece (spec.md of the OCI distribution specification, "Pushing a blob monolithically").
    fn push_blob(&self, name: &str, digest: &str, file: &Path) -> Result<()> {
        let url = format!("http://{}/v2/{name}/blobs/uploads/", self.address);
        let headers = curl(Command::new("curl").args(["--request", "POST", "--dump-header", "-", &url]))?;
        let place = headers
            .lines()
            .find_map(|line| line.split_once(':').filter(|(key, _)| key.eq_ignore_ascii_case("location")))
            .map(|(_, value)| value.trim().to_owned())
            .context("docker-registry names no place for an upload")?;
        let separator = if place.contains('?') { '&' } else { '?' };
        let url = format!("{place}{separator}digest={digest}");
        curl(
            Command::new("curl")
                .args(["--header", "Content-Type: application/octet-stream", "--upload-file"])
                .arg(file)
                .arg(url),
        )?;
        Ok(())
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to do.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Reads what the registry says to its end: first the address, or what it says instead of one.
fn follow(stderr: impl Read, address: &mpsc::Sender<Result<String, String>>) -> Vec<String> {
    let (mut said, mut requests) = (String::new(), Vec::new());
    for line in BufReader::new(stderr).lines() {
        let Ok(line) = line else { break };
        if let Some(listening) = listening(&line) {
            // Nobody listens after the time for a start is over.
            let _ = address.send(Ok(listening));
        } else if let Some(path) = request(&line) {
            requests.push(path);
        } else if said.len() < SAID_MAX {
            said.push_str(&line);
            said.push('\n');
        }
    }
    let _ = address.send(Err(said));
    requests
}

/// The path in the line that says that a request was answered.
fn request(line: &str) -> Option<String> {
    let rest = line.split_once("response completed")?.1.split_once("http.request.uri=")?.1;
    Some(rest.split(' ').next().unwrap_or(rest).trim_matches('"').to_owned())
}

/// The address in the line that says where the registry listens.
fn listening(line: &str) -> Option<String> {
    let (_, rest) = line.split_once("listening on ")?;
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.' && c != ':').unwrap_or(rest.len());
    Some(rest[..end].to_owned())
}

/// Runs curl, for which an answer that is no success is an error, and gives what it writes.
fn curl(command: &mut Command) -> Result<String> {
    let mut process = command
        .args(["--silent", "--show-error", "--fail", "--noproxy", "*"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start curl")?;
    let mut text = String::new();
    process.stdout.take().context("curl has no standard output")?.read_to_string(&mut text)?;
    let status = process.wait()?;
    if !status.success() {
        bail!("curl: {status}: {command:?}");
    }
    Ok(text)
}
