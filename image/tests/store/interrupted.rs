//! Pulls that are killed, that break, and that run at the same time.
//!
//! The process that is killed is this test program: started again with a marker in its environment, it pulls and
//! kills itself (SIGKILL, nothing is cleaned up) at the moment it was told, which [`Progress`] lets it know.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};

use image::{Phase, Progress, PullOptions, Reference, Step, Store};

use crate::images::{Compression, Layer, TestImage};
use crate::registry::{Recorder, Registry, five_layers, noise};
use crate::{Fixture, chain, entries, snapshot};

/// Tells the program to be the victim: `STORE|REFERENCE|MOMENT`.
const VICTIM: &str = "IMAGE_TEST_VICTIM";

/// Kills its own process at a moment: a step by name, or `Download:BYTES` or `Unpack:BYTES`.
struct Suicide {
    moment: String,
    downloaded: AtomicU64,
    unpacked: AtomicU64,
}

impl Suicide {
    fn reached(&self, moment: &str) {
        if moment == self.moment {
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
        }
    }
}

impl Progress for Suicide {
    fn step(&self, step: Step) {
        self.reached(&format!("{step:?}"));
    }

    fn advance(&self, _: usize, phase: Phase, bytes: u64) {
        let (name, sum) = match phase {
            Phase::Download => ("Download", &self.downloaded),
            Phase::Unpack => ("Unpack", &self.unpacked),
        };
        let after = sum.fetch_add(bytes, Ordering::SeqCst) + bytes;
        if let Some(wanted) = self.moment.strip_prefix(&format!("{name}:")).and_then(|n| n.parse::<u64>().ok())
            && after >= wanted
        {
            self.reached(&self.moment);
        }
    }
}

/// Not a test by itself: what the victim does.
#[test]
fn victim() {
    let Ok(orders) = std::env::var(VICTIM) else { return };
    let [store, reference, moment] = orders.split('|').collect::<Vec<_>>()[..] else { panic!("{orders}") };
    let progress = Suicide { moment: moment.to_owned(), downloaded: AtomicU64::new(0), unpacked: AtomicU64::new(0) };
    let reference: Reference = reference.parse().unwrap();
    Store::open(Path::new(store)).unwrap().pull(&reference, &PullOptions::default(), &progress).unwrap();
}

/// Runs the victim; true if it was killed, false if it got through.
fn killed(store: &Path, reference: &str, moment: &str) -> bool {
    let output = pull_in_child(store, reference, moment, Path::new(""));
    let status = output.status;
    assert!(status.success() || status.signal() == Some(9), "the victim failed: {status}");
    !status.success()
}

/// Pulls in a process of its own, which trusts only the certificates in a file, if one is given.
pub(crate) fn pull_in_child(store: &Path, reference: &str, moment: &str, certificates: &Path) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "interrupted::victim", "--nocapture"]);
    command.env(VICTIM, format!("{}|{reference}|{moment}", store.display()));
    if !certificates.as_os_str().is_empty() {
        command.env("SSL_CERT_FILE", certificates);
    }
    command.output().unwrap()
}

/// Every image file of a store is whole.
fn assert_whole(fixture: &Fixture) {
    for path in entries(&fixture.path("store/images")) {
        if path.extension().is_some_and(|extension| extension == "erofs") {
            snapshot::fsck(&path);
            snapshot::read_by_crate(&path);
        }
    }
}

#[test]
fn a_pull_that_is_killed_anywhere_leaves_nothing_half_done() {
    let registry = Registry::start();
    let image = five_layers();
    registry.push("a:1", &image);
    let name = registry.reference("a:1");
    let reference: Reference = name.parse().unwrap();
    let expected = {
        let fixture = Fixture::new();
        std::fs::read(fixture.pull(&name).unwrap().rootfs).unwrap()
    };
    let steps = ["Resolving", "Unpacking", "Sealing", "Publishing", "Recording", "Tagging"].map(str::to_owned);
    let bytes = ["Download:1", "Download:300000", "Download:900000", "Unpack:1", "Unpack:500000", "Unpack:999000"];
    for moment in steps.into_iter().chain(bytes.map(str::to_owned)) {
        let fixture = Fixture::new();
        assert!(killed(&fixture.path("store"), &name, &moment), "{moment} was never reached");
        assert!(fixture.store.find(&reference).unwrap().is_none(), "{moment}");
        assert_whole(&fixture);
        // Whatever was left, the next pull gives the right image, and nothing remains.
        let pulled = fixture.pull(&name).unwrap();
        assert!(std::fs::read(&pulled.rootfs).unwrap() == expected, "{moment}");
        assert_eq!(fixture.leftovers(), Vec::<PathBuf>::new(), "{moment}");
        // Or pruning clears it away.
        let fixture = Fixture::new();
        assert!(killed(&fixture.path("store"), &name, &moment));
        fixture.store.prune().unwrap();
        assert_eq!(fixture.leftovers(), Vec::<PathBuf>::new(), "{moment}");
        assert_eq!(entries(&fixture.path("store/images")), Vec::<PathBuf>::new(), "{moment}");
    }
}

#[test]
fn an_interrupted_download_goes_on_where_it_was() {
    let registry = Registry::start();
    let layer = Layer::new().file("f", &noise(7, 8 << 20)).finish();
    let image = TestImage::new(&[(layer, Compression::Gzip)], "amd64");
    registry.push("a:1", &image);
    let name = registry.reference("a:1");
    let fixture = Fixture::new();
    let total = image.blobs[&image.layers[0]].len() as u64;
    assert!(killed(&fixture.path("store"), &name, "Download:5000000"));
    let [partial] = &fixture
        .leftovers()
        .into_iter()
        .filter(|path| path.ends_with(format!("{}.partial", image.layers[0].hex())))
        .collect::<Vec<_>>()[..]
    else {
        panic!("{:?}", fixture.leftovers())
    };
    let kept = std::fs::metadata(partial).unwrap().len();
    assert!((4_000_000..total).contains(&kept), "{kept}");
    // The registry now loses the beginning: only who asks for the rest can succeed.
    let path = registry.blob(image.layers[0]);
    let mut blob = std::fs::read(&path).unwrap();
    blob[..4_000_000].fill(0);
    std::fs::write(&path, &blob).unwrap();
    let recorder = Recorder::default();
    let pulled = fixture.store.pull(&name.parse().unwrap(), &PullOptions::default(), &recorder).unwrap();
    snapshot::fsck(&pulled.rootfs);
    assert_eq!(*recorder.downloaded.lock().unwrap(), total);
    assert_eq!(fixture.leftovers(), Vec::<PathBuf>::new());
}

#[test]
fn a_damaged_partial_download_is_fetched_again() {
    let registry = Registry::start();
    let image = TestImage::new(&[(Layer::new().file("f", &noise(7, 1 << 20)).finish(), Compression::Gzip)], "amd64");
    registry.push("a:1", &image);
    let size = image.blobs[&image.layers[0]].len();
    for damage in [vec![0; 5000], vec![0; size], vec![0; size + 1]] {
        let fixture = Fixture::new();
        let partial = fixture.path("store/blobs/sha256").join(format!("{}.partial", image.layers[0].hex()));
        std::fs::write(&partial, damage).unwrap();
        fixture.pull(&registry.reference("a:1")).unwrap();
        assert_eq!(fixture.leftovers(), Vec::<PathBuf>::new());
    }
}

/// Forwards connections to a registry, and cuts each after some bytes of the answer.
fn cutting_proxy(target: String, cut_after: usize) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (Ok(client), Ok(server)) = (client, TcpStream::connect(&target)) else { return };
            let (mut from_client, mut to_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from_client, &mut to_server);
                let _ = to_server.shutdown(std::net::Shutdown::Write);
            });
            let (mut from_server, mut to_client) = (server, client);
            std::thread::spawn(move || {
                let mut left = cut_after;
                let mut buffer = [0; 16384];
                while let Ok(count) = from_server.read(&mut buffer) {
                    if count == 0 || count > left || to_client.write_all(&buffer[..count]).is_err() {
                        break;
                    }
                    left -= count;
                }
                let _ = to_client.shutdown(std::net::Shutdown::Both);
                let _ = from_server.shutdown(std::net::Shutdown::Both);
            });
        }
    });
    address
}

#[test]
fn a_connection_that_breaks_is_taken_up_again() {
    let registry = Registry::start();
    let image = TestImage::new(&[(Layer::new().file("f", &noise(3, 4 << 20)).finish(), Compression::Gzip)], "amd64");
    registry.push("a:1", &image);
    let fixture = Fixture::new();
    // Each connection carries at most 1.5 MB, so the layer takes at least three.
    let address = cutting_proxy(registry.address.clone(), 1_500_000);
    let recorder = Recorder::default();
    let reference: Reference = format!("{address}/a:1").parse().unwrap();
    let pulled = fixture.store.pull(&reference, &PullOptions::default(), &recorder).unwrap();
    snapshot::fsck(&pulled.rootfs);
    let events = recorder.events.lock().unwrap();
    assert!(events.iter().filter(|event| event.contains("trying again at byte")).count() >= 2, "{events:?}");
    assert_eq!(*recorder.downloaded.lock().unwrap(), image.blobs[&image.layers[0]].len() as u64);
    // A connection too short for any progress ends in an error.
    let address = cutting_proxy(registry.address.clone(), 300);
    let text = chain(&fixture.pull(&format!("{address}/b:1")).unwrap_err());
    assert!(text.contains(&address), "{text}");
}

#[test]
fn pulls_of_the_same_image_do_the_work_once() {
    let registry = Registry::start();
    let image = five_layers();
    registry.push("a:1", &image);
    let fixture = Fixture::new();
    let name = registry.reference("a:1");
    let barrier = Barrier::new(4);
    let results: Vec<_> = std::thread::scope(|scope| {
        let pull = || {
            let recorder = Recorder::default();
            let store = Store::open(&fixture.path("store")).unwrap();
            barrier.wait();
            let image = store.pull(&name.parse().unwrap(), &PullOptions::default(), &recorder).unwrap();
            (image.rootfs, recorder)
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(pull)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(results.iter().all(|(rootfs, _)| *rootfs == results[0].0));
    let worked =
        |(_, recorder): &&(PathBuf, Recorder)| recorder.events.lock().unwrap().iter().any(|e| e == "Unpacking");
    assert_eq!(results.iter().filter(worked).count(), 1);
    let total: usize = image.layers.iter().map(|layer| image.blobs[layer].len()).sum();
    let downloaded: u64 = results.iter().map(|(_, recorder)| *recorder.downloaded.lock().unwrap()).sum();
    assert_eq!(downloaded, total as u64);
    assert_eq!(fixture.leftovers(), Vec::<PathBuf>::new());
}

#[test]
fn images_that_share_layers_can_be_pulled_at_once() {
    let registry = Registry::start();
    let base: Vec<_> =
        (0..4).map(|n| (Layer::new().file(&n.to_string(), &noise(n, 300_000)).finish(), Compression::Gzip)).collect();
    let names: Vec<_> = (0..3)
        .map(|n| {
            let mut layers = base.clone();
            layers.push((Layer::new().file(&format!("own{n}"), &noise(10 + n, 100_000)).finish(), Compression::Gzip));
            registry.push(&format!("i{n}:1"), &TestImage::new(&layers, "amd64"));
            registry.reference(&format!("i{n}:1"))
        })
        .collect();
    let fixture = Fixture::new();
    std::thread::scope(|scope| {
        for name in &names {
            scope.spawn(|| {
                let image = fixture.pull(name).unwrap();
                assert_eq!(snapshot::read_by_crate(&image.rootfs).len(), 6);
            });
        }
    });
    assert_eq!(fixture.leftovers(), Vec::<PathBuf>::new());
    assert_eq!(fixture.store.list().unwrap().len(), 3);
}
