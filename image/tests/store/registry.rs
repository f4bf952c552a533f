//! Pulls from a real registry: Debian's `docker-registry`, started here on a free port of the loopback interface.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use image::{Digest, Phase, Progress, PullOptions, Reference, Silent, Step};
use oci_client::client::{Client, ClientConfig, ClientProtocol};
use oci_client::secrets::RegistryAuth;
use serde_json::json;

use crate::images::{Compression, Layer, TestImage};
use crate::{Fixture, chain, entries, snapshot};

/// A running registry with its storage in a temporary directory.
pub(crate) struct Registry {
    child: Child,
    pub(crate) address: String,
    directory: tempfile::TempDir,
    /// What pushes use.
    login: RegistryAuth,
}

impl Registry {
    pub(crate) fn start() -> Registry {
        Registry::start_with("", "")
    }

    /// A registry with more lines in its configuration: settings of `http`, and whole sections.
    pub(crate) fn start_with(http: &str, sections: &str) -> Registry {
        let storage = tempfile::tempdir().unwrap();
        let mut registry = Registry::start_in(storage.path(), http, sections);
        registry.directory = storage;
        registry
    }

    /// A registry with its storage in a directory of someone else's.
    fn start_in(storage: &Path, http: &str, sections: &str) -> Registry {
        let directory = tempfile::tempdir().unwrap();
        let storage = storage.join("storage");
        let config = directory.path().join("config.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: info, formatter: json}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: '127.0.0.1:0'{http}}}\n{sections}",
            storage.display()
        );
        std::fs::write(&config, text).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        let mut child = child.expect("docker-registry is missing: install the Debian package docker-registry");
        // It tells its port in its log; the rest of the log is read so that it never blocks.
        let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = log.by_ref().find_map(|line| {
            let line = line.unwrap();
            let rest = line.split_once("listening on ")?.1;
            Some(rest.split(['"', ',', ' ']).next()?.to_owned())
        });
        std::thread::spawn(move || log.for_each(drop));
        Registry {
            child,
            address: address.expect("the registry did not start"),
            directory,
            login: RegistryAuth::Anonymous,
        }
    }

    pub(crate) fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// Pushes an image's blobs and its manifest.
    pub(crate) fn push(&self, name: &str, image: &TestImage) {
        let blobs: Vec<_> = image.blobs.iter().filter(|(digest, _)| **digest != image.manifest).collect();
        self.push_parts(name, &blobs, &image.blobs[&image.manifest], crate::images::MANIFEST_TYPE);
    }

    fn push_parts(&self, name: &str, blobs: &[(&Digest, &Vec<u8>)], manifest: &[u8], media_type: &str) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        drop(rustls::crypto::ring::default_provider().install_default());
        let client = Client::new(ClientConfig { protocol: ClientProtocol::Http, ..ClientConfig::default() });
        let reference: oci_client::Reference = self.reference(name).parse().unwrap();
        runtime.block_on(async {
            client.store_auth_if_needed(reference.resolve_registry(), &self.login).await;
            for (digest, bytes) in blobs {
                client.push_blob(&reference, (*bytes).clone(), &digest.to_string()).await.unwrap();
            }
            let media_type = media_type.parse().unwrap();
            client.push_manifest_raw(&reference, manifest.to_vec(), media_type).await.unwrap();
        });
    }

    /// Where the registry keeps a blob.
    pub(crate) fn blob(&self, digest: Digest) -> PathBuf {
        let hex = digest.hex();
        let blobs = self.directory.path().join("storage/docker/registry/v2/blobs/sha256");
        blobs.join(&hex[..2]).join(hex).join("data")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Bytes that don't compress, different for each seed.
pub(crate) fn noise(seed: u32, bytes: usize) -> Vec<u8> {
    let mut state = u64::from(seed) | 1 << 40;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    std::iter::repeat_with(|| next().to_le_bytes()).flatten().take(bytes).collect()
}

pub(crate) fn five_layers() -> TestImage {
    let layers: Vec<_> = (0..5)
        .map(|n| {
            let layer =
                Layer::new().directory("d").file(&format!("d/{n}"), &noise(n, 200_000)).file("last", &noise(n, 10));
            (layer.finish(), if n % 2 == 0 { Compression::Gzip } else { Compression::Zstd })
        })
        .collect();
    TestImage::new(&layers, "amd64")
}

/// Remembers what was told.
#[derive(Default)]
pub(crate) struct Recorder {
    pub(crate) events: Mutex<Vec<String>>,
    pub(crate) downloaded: Mutex<u64>,
}

impl Progress for Recorder {
    fn step(&self, step: Step) {
        self.events.lock().unwrap().push(format!("{step:?}"));
    }
    fn begin(&self, layer: usize, phase: Phase, _: &str, total: u64) {
        self.events.lock().unwrap().push(format!("begin {layer} {phase:?} {total}"));
    }
    fn advance(&self, _: usize, phase: Phase, bytes: u64) {
        if phase == Phase::Download {
            *self.downloaded.lock().unwrap() += bytes;
        }
    }
    fn done(&self, layer: usize, phase: Phase) {
        self.events.lock().unwrap().push(format!("done {layer} {phase:?}"));
    }
    fn message(&self, text: &str) {
        self.events.lock().unwrap().push(text.to_owned());
    }
}

fn assert_has_five_layers(rootfs: &Path) {
    snapshot::fsck(rootfs);
    let tree = snapshot::read_by_crate(rootfs);
    let names: Vec<_> = tree.keys().map(|path| path.display().to_string()).collect();
    assert_eq!(names, ["", "d", "d/0", "d/1", "d/2", "d/3", "d/4", "last"]);
    let last = snapshot::Content::Data(10, Digest::of(&noise(4, 10)));
    assert!(tree[Path::new("last")].content == last);
}

#[test]
fn an_image_is_pulled_and_found_again() {
    let registry = Registry::start();
    let image = five_layers();
    registry.push("some/tool:1.0", &image);
    let fixture = Fixture::new();
    let name = registry.reference("some/tool:1.0");
    let reference: Reference = name.parse().unwrap();
    assert!(fixture.store.find(&reference).unwrap().is_none());
    let recorder = Recorder::default();
    let pulled = fixture.store.pull(&reference, &PullOptions::default(), &recorder).unwrap();
    assert_eq!((&pulled.id, &pulled.manifest_digest), (&image.config.to_string(), &image.manifest.to_string()));
    assert_eq!((pulled.config.user.as_str(), pulled.config.cmd.as_slice()), ("1:2", &["/bin/sh".to_owned()][..]));
    assert_has_five_layers(&pulled.rootfs);
    assert_eq!(fixture.leftovers(), Vec::<PathBuf>::new());
    let total: usize = image.layers.iter().map(|layer| image.blobs[layer].len()).sum();
    assert_eq!(*recorder.downloaded.lock().unwrap(), total as u64);
    let events = recorder.events.lock().unwrap().clone();
    let steps: Vec<_> = events.iter().filter(|event| !event.contains(' ')).collect();
    assert_eq!(steps, ["Resolving", "Unpacking", "Sealing", "Publishing", "Recording", "Tagging"]);
    assert_eq!(events.iter().filter(|event| event.starts_with("done")).count(), 10);
    // Everything is local now: the registry may go.
    drop(registry);
    let found = fixture.store.find(&reference).unwrap().unwrap();
    assert_eq!((found.id, found.config, found.rootfs), (pulled.id, pulled.config, pulled.rootfs));
}

#[test]
fn what_is_in_the_store_is_not_fetched_again() {
    let registry = Registry::start();
    let image = five_layers();
    registry.push("a:1", &image);
    registry.push("b:2", &image);
    let fixture = Fixture::new();
    fixture.pull(&registry.reference("a:1")).unwrap();
    let by_digest = registry.reference(&format!("b@{}", image.manifest));
    for name in ["a:1", "b:2"].map(|name| registry.reference(name)).into_iter().chain([by_digest]) {
        let recorder = Recorder::default();
        fixture.store.pull(&name.parse().unwrap(), &PullOptions::default(), &recorder).unwrap();
        assert_eq!(*recorder.downloaded.lock().unwrap(), 0, "{name}");
    }
    assert_eq!(fixture.store.list().unwrap().len(), 3);
    assert_eq!(entries(&fixture.path("store/images")).len(), 2, "one image file, one record");
}

#[test]
fn the_platform_is_chosen_from_an_index() {
    let registry = Registry::start();
    let ours = five_layers();
    let other = TestImage::new(&[(Layer::new().file("arm", b"").finish(), Compression::Gzip)], "arm64");
    registry.push("multi:ours", &ours);
    registry.push("multi:other", &other);
    let entry = |image: &TestImage, platform: serde_json::Value| {
        let size = image.blobs[&image.manifest].len();
        json!({"mediaType": crate::images::MANIFEST_TYPE, "digest": image.manifest, "size": size, "platform": platform})
    };
    let index_type = "application/vnd.oci.image.index.v1+json";
    let index = |entries: &[serde_json::Value]| {
        serde_json::to_vec(&json!({"schemaVersion": 2, "mediaType": index_type, "manifests": entries})).unwrap()
    };
    let arm = entry(&other, json!({"os": "linux", "architecture": "arm64", "variant": "v8"}));
    let amd = entry(&ours, json!({"os": "linux", "architecture": "amd64"}));
    registry.push_parts("multi:all", &[], &index(&[arm.clone(), amd]), index_type);
    registry.push_parts("multi:arm", &[], &index(&[arm]), index_type);
    let fixture = Fixture::new();
    let pulled = fixture.pull(&registry.reference("multi:all")).unwrap();
    assert_eq!(pulled.manifest_digest, ours.manifest.to_string());
    for tag in ["multi:arm", "multi:other"] {
        let text = chain(&fixture.pull(&registry.reference(tag)).unwrap_err());
        assert!(text.ends_with("is for linux/arm64, this host runs linux/amd64"), "{text}");
    }
}

#[test]
fn what_the_registry_does_not_have_is_named() {
    let registry = Registry::start();
    registry.push("here:1", &five_layers());
    let fixture = Fixture::new();
    let absent = format!("here@{}", Digest::of(b"absent"));
    for name in ["here:2", "nowhere:1", absent.as_str()] {
        let text = chain(&fixture.pull(&registry.reference(name)).unwrap_err());
        assert!(text.starts_with("no such image `") && text.contains(&registry.address), "{text}");
    }
    assert_eq!(fixture.leftovers(), Vec::<PathBuf>::new());
}

#[test]
fn a_registry_that_does_not_answer_is_an_error_soon() {
    let fixture = Fixture::new();
    let mut options = PullOptions::default();
    options.registry.connect_timeout = Duration::from_secs(2);
    options.registry.stall_timeout = Duration::from_secs(2);
    let pull = |address: String| {
        let start = Instant::now();
        let reference: Reference = format!("{address}/a:1").parse().unwrap();
        let error = fixture.store.pull(&reference, &options, &Silent).unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
        let text = chain(&error);
        assert!(text.starts_with(&format!("the registry {address} cannot be reached")), "{text}");
    };
    // Nobody listens; somebody listens but never answers.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    pull(listener.local_addr().unwrap().to_string());
    drop(listener);
    pull("127.0.0.1:9".to_owned());
    pull("localhost:9".to_owned());
    assert_eq!(fixture.leftovers(), Vec::<PathBuf>::new());
}

#[test]
fn content_that_the_registry_lost_or_changed_is_refused() {
    let registry = Registry::start();
    let image = five_layers();
    registry.push("a:1", &image);
    let path = registry.blob(image.layers[3]);
    let good = std::fs::read(&path).unwrap();
    let fixture = Fixture::new();
    let pull = |bytes: Option<Vec<u8>>| {
        match bytes {
            Some(bytes) => std::fs::write(&path, bytes).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        let error = fixture.pull(&registry.reference("a:1")).unwrap_err();
        assert_eq!(fixture.leftovers(), Vec::<PathBuf>::new());
        chain(&error)
    };
    let layer = format!("layer {}", image.layers[3]);
    let mut flipped = good.clone();
    flipped[1000] ^= 1;
    let text = pull(Some(flipped));
    assert!(text.starts_with(&format!("{layer} has the wrong digest")), "{text}");
    for bytes in [good[..good.len() - 1].to_vec(), [&good[..], b"x"].concat(), Vec::new()] {
        let length = bytes.len();
        let text = pull(Some(bytes));
        assert!(text.starts_with(&format!("{layer} is {length} bytes where {} were announced", good.len())), "{text}");
    }
    let text = pull(None);
    assert!(text.contains(&layer), "{text}");
    std::fs::write(&path, &good).unwrap();
    assert_has_five_layers(&fixture.pull(&registry.reference("a:1")).unwrap().rootfs);
}

#[test]
fn a_registry_with_a_login_is_asked_with_it() {
    let passwords = tempfile::tempdir().unwrap();
    let file = passwords.path().join("htpasswd");
    // user / secret
    std::fs::write(&file, "user:$2b$04$1IVC4MyUuwCpleVYcQXD3uj1u31OlbhH95FkAPu00FGuoyyBscscq\n").unwrap();
    let section = format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", file.display());
    let mut registry = Registry::start_with("", &section);
    registry.login = RegistryAuth::Basic("user".to_owned(), "secret".to_owned());
    registry.push("private/a:1", &five_layers());
    let fixture = Fixture::new();
    let login = fixture.path("config.json");
    let mut options = PullOptions::default();
    options.registry.login_file = Some(login.clone());
    let reference: Reference = registry.reference("private/a:1").parse().unwrap();
    let text = chain(&fixture.store.pull(&reference, &options, &Silent).unwrap_err());
    assert!(text.starts_with(&format!("the registry {} refuses access to `private/a`", registry.address)), "{text}");
    for (auth, good) in [("dXNlcjp3cm9uZw==", false), ("dXNlcjpzZWNyZXQ=", true)] {
        std::fs::write(&login, json!({"auths": {&registry.address: {"auth": auth}}}).to_string()).unwrap();
        assert_eq!(fixture.store.pull(&reference, &options, &Silent).is_ok(), good);
    }
}

fn make_certificate(key: &Path, certificate: &Path, more: &[&str]) {
    let output = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
        .args(more)
        .arg("-keyout")
        .arg(key)
        .arg("-out")
        .arg(certificate)
        .output();
    let output = output.expect("openssl is missing: install the Debian package openssl");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn other_hosts_are_spoken_to_with_tls_and_only_if_their_certificate_is_trusted() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name);
    let (authority, key, certificate) = (file("ca.pem"), file("key.pem"), file("cert.pem"));
    make_certificate(&file("ca.key"), &authority, &["-subj", "/CN=test authority"]);
    let signed =
        ["-CA", authority.to_str().unwrap(), "-CAkey", &file("ca.key").display().to_string()].map(str::to_owned);
    let name =
        ["-subj", "/CN=registry.localhost", "-addext", "subjectAltName=DNS:registry.localhost"].map(str::to_owned);
    let leaf = ["-addext", "basicConstraints=critical,CA:FALSE"].map(str::to_owned);
    let all: Vec<_> = signed.iter().chain(&name).chain(&leaf).map(String::as_str).collect();
    make_certificate(&key, &certificate, &all);
    let plain = Registry::start();
    plain.push("a:1", &five_layers());
    // The same storage, served with TLS under a name that is not plainly the loopback interface.
    let tls = format!(", tls: {{certificate: {}, key: {}}}", certificate.display(), key.display());
    let secure = Registry::start_in(plain.directory.path(), &tls, "");
    let port = secure.address.rsplit(':').next().unwrap();
    let name = format!("registry.localhost:{port}/a:1");
    let fixture = Fixture::new();
    let store = fixture.path("store");
    let output = crate::interrupted::pull_in_child(&store, &name, "never", &authority);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_has_five_layers(&fixture.store.find(&name.parse().unwrap()).unwrap().unwrap().rootfs);
    // Without trust there is no pull, and the cause is named.
    let fixture = Fixture::new();
    let text = chain(&fixture.pull(&name).unwrap_err());
    assert!(text.starts_with(&format!("the registry registry.localhost:{port} cannot be reached")), "{text}");
    assert!(text.contains("certificate"), "{text}");
    // Nor without TLS.
    let port = plain.address.rsplit(':').next().unwrap();
    let text = chain(&fixture.pull(&format!("registry.localhost:{port}/a:1")).unwrap_err());
    assert!(text.contains("cannot be reached"), "{text}");
}
