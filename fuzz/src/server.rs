//! A monitor's API as a whole: clients that send anything, an agent that answers anything, streams that carry anything, in
//! any order. Time is not waited for: it goes on when nothing else does, so that every deadline is part of an input.

use std::collections::BTreeMap;
use std::io;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::folder::Folder;
use api::model::{Balloon, Device, Generation, VmBoot};
use api::server::{DeviceFigures, Machine, Plugged, Setup, guest_end, run_here};
use protocol::frame::{Decoder, MAX_FROM_AGENT, MAX_FROM_HOST, encode};
use protocol::{Answer, Call, FromAgent, Request};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

use crate::input::Input;
use crate::{samples, scratch};

/// The most steps of one input.
const STEPS_MAX: usize = 60;
/// How long a server may take to end, in its own time, once all others have gone away.
const END_MAX: Duration = Duration::from_secs(3600);
/// The container that there is from the beginning, of every other input.
const MAIN: &str = "c";
/// Containers that are asked for, the last of which is never there,
const CONTAINERS: &[&str] = &[MAIN, "d", "none"];
/// and processes.
const PROCESSES: &[&str] = &["p", "1", "none"];

/// The rest of a monitor.
#[derive(Debug, Default)]
struct Monitor(Mutex<Host>);

#[derive(Debug, Default)]
struct Host {
    offers: BTreeMap<u32, UnixStream>,
    balloon_mib: u32,
    plugged: Plugged,
    generation: u32,
}

impl Monitor {
    fn host(&self) -> MutexGuard<'_, Host> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Machine for Monitor {
    fn pid(&self) -> u32 {
        1
    }

    fn resident_bytes(&self) -> u64 {
        0
    }

    fn pause(&self) {}

    fn resume(&self) {}

    fn console(&self) -> Vec<u8> {
        b"panic: \x1b[31m\xff\n".to_vec()
    }

    fn devices(&self) -> Vec<Device> {
        vec![Device { kind: "vsock".to_owned(), status: "ready".to_owned() }]
    }

    fn figures(&self) -> Vec<DeviceFigures> {
        vec![DeviceFigures { kind: "vsock", index: 0, figures: vec![("events", 1)] }]
    }

    fn offer(&self, port: u32, stream: UnixStream) {
        self.host().offers.insert(port, stream);
    }

    fn withdraw(&self, port: u32) {
        self.host().offers.remove(&port);
    }

    fn plugged(&self) -> Plugged {
        self.host().plugged
    }

    fn plug(&self, mib: u32) {
        self.host().plugged = Plugged { requested_mib: mib, plugged_mib: mib };
    }

    fn balloon(&self) -> Option<Balloon> {
        let mib = self.host().balloon_mib;
        serde_json::from_value(json!({"target_mib": mib, "actual_mib": mib})).ok()
    }

    fn set_balloon(&self, target_mib: u32) {
        self.host().balloon_mib = target_mib;
    }

    fn ask_statistics(&self, heard: Box<dyn FnOnce() + Send>) {
        heard();
    }

    fn generation(&self) -> Option<Generation> {
        Some(Generation { id: format!("{:032x}", self.host().generation) })
    }

    fn renew_generation(&self) -> io::Result<()> {
        self.host().generation += 1;
        Ok(())
    }
}

thread_local! {
    static FOLDER: TempDir = scratch::folder();
}

/// A VM's life, as far as its API's thread sees it.
///
/// # Panics
/// The server does not end when all others have gone away.
pub fn session(bytes: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    let runtime = runtime.expect("a runtime can be made");
    FOLDER.with(|folder| runtime.block_on(live(Input::new(bytes), folder)));
}

async fn live(mut input: Input<'_>, folder: &TempDir) {
    let shape = input.u8();
    let monitor = Arc::new(Monitor::default());
    let (ours, theirs) = UnixStream::pair().expect("there are descriptors");
    let (runs, guest_ended) = guest_end();
    let (listener, address) = listen();
    let folder = (shape & 2 != 0).then(|| {
        for entry in folder.path().read_dir().into_iter().flatten().flatten() {
            let _ = std::fs::remove_file(entry.path());
        }
        Folder::open(folder.path()).expect("a folder can be opened")
    });
    let mut container = samples::container_config(MAIN);
    (container.stdin, container.wait_for_attach) = (shape & 4 != 0, shape & 8 != 0);
    let setup = Setup {
        config: samples::launch_config().vm,
        container: (shape & 1 != 0).then_some(container),
        listener: Some(listener),
        folder,
        machine: Arc::clone(&monitor) as Arc<dyn Machine>,
        agent: ours,
        boot: VmBoot::default(),
        guest_ended,
    };
    theirs.set_nonblocking(true).expect("a socket need not block");
    let mut others = Others {
        monitor,
        address,
        agent: theirs,
        asked: Decoder::new(MAX_FROM_HOST),
        waiting: Vec::new(),
        ports: Vec::new(),
        clients: BTreeMap::new(),
        streams: BTreeMap::new(),
    };
    let server = run_here(setup, || None);
    tokio::pin!(server);
    let script = async {
        if shape & 16 == 0 {
            others.say(&FromAgent::Hello(samples::hello()));
        }
        for _ in 0..STEPS_MAX {
            if input.is_empty() {
                break;
            }
            others.step(&mut input).await;
            others.settle().await;
        }
    };
    let over = tokio::select! {
        ended = &mut server => { ended.expect("the system is out of nothing"); true }
        () = script => false,
    };
    drop((others, runs));
    if !over {
        let ended = timeout(END_MAX, server).await.expect("the server does not end");
        ended.expect("the system is out of nothing");
    }
}

/// A socket without a name in the file system.
fn listen() -> (UnixListener, SocketAddr) {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let name = format!("cofferdam-fuzz-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    let address = SocketAddr::from_abstract_name(name).expect("the name is short");
    (UnixListener::bind_addr(&address).expect("nobody else has the name"), address)
}

/// Everybody who talks with the server.
struct Others {
    monitor: Arc<Monitor>,
    address: SocketAddr,
    agent: UnixStream,
    asked: Decoder,
    /// Calls that were not answered.
    waiting: Vec<u32>,
    /// Ports that the agent was told of.
    ports: Vec<u32>,
    clients: BTreeMap<u8, UnixStream>,
    streams: BTreeMap<u32, UnixStream>,
}

impl Others {
    /// Lets everybody do what they have to do.
    async fn settle(&mut self) {
        for _ in 0..3 {
            sleep(Duration::from_millis(1)).await;
        }
        let mut piece = [0; 16 << 10];
        while let Ok(count @ 1..) = self.agent.read(&mut piece) {
            self.asked.push(&piece[..count]);
        }
        while let Some(Request { id, call }) = self.asked.take().expect("the host sends what it should") {
            self.waiting.push(id);
            match call {
                Call::Create(spec) => self.heard(&spec.process.stdio),
                Call::Exec { spec, .. } => self.heard(&spec.stdio),
                Call::CopyIn { port, .. } | Call::CopyOut { port, .. } => self.ports.push(port),
                _ => {}
            }
        }
    }

    fn heard(&mut self, stdio: &protocol::container::Stdio) {
        self.ports.extend([stdio.stdin, stdio.stdout, stdio.stderr].into_iter().flatten());
    }

    fn say(&mut self, message: &FromAgent) {
        if let Ok(frame) = encode(message, MAX_FROM_AGENT) {
            let _ = self.agent.write(&frame);
        }
    }

    async fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % 16 {
            0..=3 => self.request(input),
            4 => {
                let (client, bytes) = (input.u8() % 4, input.chunk());
                self.send(client, bytes);
            }
            5 => {
                // What a client does not read, it does not hold up.
                let client = input.u8();
                if let (Some(mut stream), true) = (self.clients.get(&(client % 4)), client & 0x80 == 0) {
                    while matches!(stream.read(&mut [0; 4096]), Ok(1..)) {}
                } else {
                    self.clients.remove(&(client % 4));
                }
            }
            6..=8 => {
                if !self.waiting.is_empty() {
                    let id = self.waiting.remove(usize::from(input.u8()) % self.waiting.len());
                    self.say(&FromAgent::Reply { id, result: Ok(Answer::Done) });
                }
            }
            9 => {
                // Any message at all, in a frame of its length.
                let body = input.chunk();
                let length = (body.len() as u32).to_le_bytes();
                let _ = self.agent.write(&[&length[..], body].concat());
            }
            10 => drop(self.agent.write(input.chunk())),
            11 => self.report(input),
            12 | 13 => self.stream(input),
            14 => sleep(Duration::from_secs(input.u16().into())).await,
            _ => drop(self.agent.shutdown(Shutdown::Write)),
        }
    }

    fn send(&mut self, client: u8, bytes: &[u8]) {
        if !self.clients.contains_key(&client) {
            // One that has too many clients waiting does not take more.
            let Ok(stream) = UnixStream::connect_addr(&self.address) else { return };
            stream.set_nonblocking(true).expect("a socket need not block");
            self.clients.insert(client, stream);
        }
        if let Some(mut stream) = self.clients.get(&client) {
            let _ = stream.write(bytes);
        }
    }

    /// A request that is in order, but for what it says.
    fn request(&mut self, input: &mut Input<'_>) {
        let (client, shape) = (input.u8() % 4, input.u8());
        let (method, path) = *input.one_of(REQUESTS);
        let (container, process) = (*input.one_of(CONTAINERS), *input.one_of(PROCESSES));
        let path = path.replace("{id}", container).replace("{process}", process);
        let body = match shape % 4 {
            0 => input.chunk().to_vec(),
            _ => body(input).to_string().into_bytes(),
        };
        let upgrade = if shape & 0x80 == 0 { "" } else { "Connection: upgrade\r\nUpgrade: cofferdam-stream\r\n" };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: h\r\n{upgrade}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        self.send(client, &[head.as_bytes(), &body].concat());
    }

    fn report(&mut self, input: &mut Input<'_>) {
        let container = (*input.one_of(CONTAINERS)).to_owned();
        let message = match input.u8() % 3 {
            0 => FromAgent::OutOfMemory { container },
            1 => FromAgent::ProcessExited { container, process: "p".to_owned(), code: input.u8() },
            _ => {
                let code = input.u8();
                let status =
                    protocol::ExitStatus { code, out_of_memory: false, executed_us: 3, agent_resident_kib: 900 };
                FromAgent::Exited { container, status }
            }
        };
        self.say(&message);
    }

    /// What an agent does with the ports that it was told of.
    fn stream(&mut self, input: &mut Input<'_>) {
        if self.ports.is_empty() {
            return;
        }
        let what = input.u8();
        let port = self.ports[usize::from(what >> 2) % self.ports.len()];
        match what % 4 {
            0 => {
                if let Some(stream) = self.monitor.host().offers.remove(&port) {
                    stream.set_nonblocking(true).expect("a socket need not block");
                    self.streams.insert(port, stream);
                }
            }
            1 => drop(self.streams.remove(&port)),
            2 => {
                if let Some(mut stream) = self.streams.get(&port) {
                    while matches!(stream.read(&mut [0; 4096]), Ok(1..)) {}
                }
            }
            _ => {
                let bytes = input.chunk();
                if let Some(mut stream) = self.streams.get(&port) {
                    let _ = stream.write(bytes);
                }
            }
        }
    }
}

/// The paths of the API.
const REQUESTS: &[(&str, &str)] = &[
    ("POST", "/v1/containers"),
    ("POST", "/v1/containers/{id}/start"),
    ("POST", "/v1/containers/{id}/attach"),
    ("POST", "/v1/containers/{id}/kill"),
    ("POST", "/v1/containers/{id}/processes"),
    ("POST", "/v1/containers/{id}/pause"),
    ("POST", "/v1/containers/{id}/resume"),
    ("POST", "/v1/containers/{id}/resize"),
    ("GET", "/v1/containers"),
    ("GET", "/v1/containers/{id}"),
    ("GET", "/v1/containers/{id}/wait"),
    ("GET", "/v1/containers/{id}/stats"),
    ("GET", "/v1/containers/{id}/top"),
    ("GET", "/v1/containers/{id}/logs?follow=true&tail=2"),
    ("GET", "/v1/containers/{id}/files?path=%2Fetc"),
    ("PUT", "/v1/containers/{id}/files?path=%2Fetc"),
    ("PATCH", "/v1/containers/{id}/limits"),
    ("DELETE", "/v1/containers/{id}"),
    ("GET", "/v1/containers/{id}/processes"),
    ("GET", "/v1/containers/{id}/processes/{process}"),
    ("GET", "/v1/containers/{id}/processes/{process}/wait"),
    ("POST", "/v1/containers/{id}/processes/{process}/kill"),
    ("POST", "/v1/containers/{id}/processes/{process}/resize"),
    ("GET", "/v1/vm"),
    ("PATCH", "/v1/vm"),
    ("GET", "/v1/vm/config"),
    ("GET", "/v1/vm/console"),
    ("GET", "/v1/vm/balloon"),
    ("PATCH", "/v1/vm/balloon"),
    ("GET", "/v1/vm/generation"),
    ("POST", "/v1/vm/generation"),
    ("POST", "/v1/vm/pause"),
    ("POST", "/v1/vm/resume"),
    ("POST", "/v1/vm/shutdown"),
    ("GET", "/v1/events?follow=true"),
    ("GET", "/v1/metrics"),
    ("GET", "/openapi.json"),
];

/// A document that some request takes.
fn body(input: &mut Input<'_>) -> Value {
    match input.u8() % 8 {
        0 | 1 => json!({"spec": samples::container("d"), "stdin": input.u8() & 1 != 0}),
        2 => json!({"args": ["sh"], "id": "p", "stdin": true}),
        3 => json!({"args": ["sh"], "id": "p", "terminal": {"rows": input.u16(), "columns": 80}}),
        4 => json!({"signal": input.u8(), "all": input.u8() & 1 != 0}),
        5 => json!({"rows": input.u16(), "columns": input.u16()}),
        6 => json!({"memory_mib": input.u32()}),
        _ => json!({"vcpus": input.u8()}),
    }
}
