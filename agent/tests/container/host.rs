//! The host's side of the conversation with an agent.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use protocol::container::{ContainerSpec, ProcessSpec, Stdio as Ports, WindowSize};
use protocol::{Answer, Call, ExitStatus, Failure, FromAgent, Request, Target, frame};
use tempfile::TempDir;

use crate::SOCKETS;

/// How long anything may take, on a machine that is busy with other things.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Where this machine has its cgroup2 hierarchy.
fn cgroup2() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields.find(|fields| fields[2] == "cgroup2").expect("a mounted cgroup2 hierarchy")[1].into()
}

/// The host's side.
pub struct Host {
    sockets: TempDir,
    pub cgroup: PathBuf,
    pub control: UnixStream,
    agent: Child,
    next_request: u32,
    next_port: u32,
    /// Messages that came while another was waited for.
    early: Vec<FromAgent>,
}

impl Host {
    pub fn new() -> Self {
        let sockets = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(sockets.path().join(protocol::CONTROL_PORT.to_string())).unwrap();
        // A cgroup of its own, which it sees as the root, so that tests don't meet. The test framework's own thread must
        // not take the signal that the agent waits for.
        let cgroup = cgroup2().join(format!("cofferdam-test-{}", std::process::id()));
        fs::create_dir(&cgroup).unwrap();
        let agent = Command::new("sh")
            .args(["-c", "echo $$ > \"$1/cgroup.procs\" && shift && exec env --block-signal=CHLD unshare --mount --cgroup --propagation private \"$@\"", "sh"])
            .arg(&cgroup)
            .arg(env::current_exe().unwrap())
            .args(["--exact", "agent_process", "--ignored", "--nocapture", "--test-threads=1"])
            .env(SOCKETS, sockets.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let (control, _) = listener.accept().unwrap();
        control.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut host = Self { sockets, cgroup, control, agent, next_request: 0, next_port: 2000, early: Vec::new() };
        assert!(matches!(host.receive(), FromAgent::Hello(hello) if hello.magic == protocol::MAGIC));
        host
    }

    /// The agent's process id.
    pub fn agent(&self) -> u32 {
        self.agent.id()
    }

    /// The agent's children, zombies included.
    pub fn children_ids(&self) -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.agent())).unwrap();
        let lists = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("children")).unwrap());
        lists.flat_map(|list| list.split_whitespace().map(str::to_owned).collect::<Vec<_>>()).collect()
    }

    /// How many children the agent has, zombies included.
    pub fn children(&self) -> usize {
        self.children_ids().len()
    }

    /// Waits until the agent has no more children than this.
    pub fn wait_for_children(&self, count: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.children() > count {
            assert!(Instant::now() < deadline, "{} children are left", self.children());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// A port that nobody listens on yet.
    pub fn port(&mut self) -> u32 {
        self.next_port += 1;
        self.next_port
    }

    pub fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.sockets.path().join(port.to_string())).unwrap()
    }

    pub fn send(&mut self, call: Call) -> u32 {
        self.next_request += 1;
        let request = Request { id: self.next_request, call };
        frame::write(&mut self.control, &request, frame::MAX_FROM_HOST).unwrap();
        self.next_request
    }

    pub fn receive(&mut self) -> FromAgent {
        frame::read(&mut self.control, frame::MAX_FROM_AGENT).unwrap()
    }

    /// The next message that was not looked at yet.
    pub fn next(&mut self) -> FromAgent {
        if self.early.is_empty() { self.receive() } else { self.early.remove(0) }
    }

    /// Forgets the messages that came while another was waited for.
    pub fn forget_early(&mut self) {
        self.early.clear();
    }

    pub fn call(&mut self, call: Call) -> Result<Answer, Failure> {
        let sent = self.send(call);
        self.reply(sent)
    }

    /// The reply to a request; what comes before it is kept for later.
    pub fn reply(&mut self, sent: u32) -> Result<Answer, Failure> {
        let is_it = |message: &FromAgent| matches!(message, FromAgent::Reply { id, .. } if *id == sent);
        let message = match self.early.iter().position(is_it) {
            Some(index) => self.early.remove(index),
            None => loop {
                match self.receive() {
                    message if is_it(&message) => break message,
                    other => self.early.push(other),
                }
            },
        };
        match message {
            FromAgent::Reply { result, .. } => result,
            other => panic!("unexpected message {other:?}"),
        }
    }

    pub fn exited(&mut self, id: &str) -> ExitStatus {
        match self.next() {
            FromAgent::Exited { container, status } if container == id => status,
            other => panic!("unexpected message {other:?}"),
        }
    }

    /// The code of the further process that ends next, which must be this one.
    pub fn process_exited(&mut self, id: &str, name: &str) -> u8 {
        match self.next() {
            FromAgent::ProcessExited { container, process, code } if container == id && process == name => code,
            other => panic!("unexpected message {other:?}"),
        }
    }

    pub fn create(&mut self, spec: &ContainerSpec) -> Result<Answer, Failure> {
        self.call(Call::Create(Box::new(spec.clone())))
    }

    pub fn start(&mut self, id: &str) -> Result<Answer, Failure> {
        self.call(Call::Start { container: id.into() })
    }

    pub fn signal(&mut self, id: &str, signal: u8, all: bool) -> Result<Answer, Failure> {
        self.call(Call::Signal { target: first(id), signal, all })
    }

    pub fn resize(&mut self, target: Target, rows: u16, columns: u16) -> Result<Answer, Failure> {
        self.call(Call::Resize { target, size: WindowSize { rows, columns } })
    }

    /// Kills a container and waits for its end.
    pub fn kill(&mut self, id: &str) {
        self.signal(id, 9, true).unwrap();
        assert_eq!(self.exited(id).code, 137);
    }

    /// Gives a process ports for all three streams; what listens on them.
    fn streams(&mut self, process: &mut ProcessSpec) -> [UnixListener; 3] {
        let ports = [self.port(), self.port(), self.port()];
        process.stdio = Ports { stdin: Some(ports[0]), stdout: Some(ports[1]), stderr: Some(ports[2]) };
        ports.map(|port| self.listen(port))
    }

    /// Creates and starts a container with all three streams, and hands over their host ends.
    pub fn launch(&mut self, spec: &ContainerSpec) -> Result<Streams, Failure> {
        let mut spec = spec.clone();
        let listeners = self.streams(&mut spec.process);
        self.create(&spec)?;
        let streams = Streams::accept(listeners);
        self.start(&spec.id)?;
        Ok(streams)
    }

    /// Begins to execute a further process with all three streams: the request, and what listens.
    pub fn begin_exec(&mut self, id: &str, name: &str, spec: &ProcessSpec) -> (u32, [UnixListener; 3]) {
        let mut spec = spec.clone();
        let listeners = self.streams(&mut spec);
        let exec = Call::Exec { container: id.into(), process: name.into(), spec: Box::new(spec) };
        (self.send(exec), listeners)
    }

    /// Executes a further process with all three streams, and hands over their host ends.
    pub fn exec(&mut self, id: &str, name: &str, spec: &ProcessSpec) -> Result<Streams, Failure> {
        let (request, listeners) = self.begin_exec(id, name, spec);
        self.reply(request)?;
        Ok(Streams::accept(listeners))
    }

    /// Runs a further process to its end, without input.
    pub fn run_further(&mut self, id: &str, name: &str, spec: &ProcessSpec) -> Output {
        let (stdout, stderr) = self.exec(id, name, spec).unwrap().read();
        Output { stdout, stderr, code: self.process_exited(id, name) }
    }

    /// Runs a container to its end.
    pub fn run(&mut self, spec: &ContainerSpec, input: &[u8]) -> Output {
        let mut streams = self.launch(spec).unwrap();
        streams.stdin.write_all(input).unwrap();
        let (stdout, stderr) = streams.read();
        let status = self.exited(&spec.id);
        assert!(status.executed_us > 0);
        Output { stdout, stderr, code: status.code }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.control.shutdown(Shutdown::Both);
        let status = self.agent.wait().unwrap();
        let removed = remove_cgroup(&self.cgroup);
        if !thread::panicking() {
            assert!(status.success(), "the agent failed");
            removed.unwrap();
        }
    }
}

/// Removes the agent's cgroup, whose containers were killed but may take a moment to be gone.
fn remove_cgroup(path: &PathBuf) -> std::io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        for entry in fs::read_dir(path)?.flatten().filter(|entry| entry.path().is_dir()) {
            let _ = fs::remove_dir(entry.path());
        }
        match fs::remove_dir(path) {
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
            result => return result,
        }
    }
}

/// The host's ends of a process's streams.
pub struct Streams {
    pub stdin: UnixStream,
    pub stdout: UnixStream,
    pub stderr: UnixStream,
}

impl Streams {
    fn accept(listeners: [UnixListener; 3]) -> Self {
        let [stdin, stdout, stderr] = listeners.map(|listener| listener.accept().unwrap().0);
        for stream in [&stdin, &stdout, &stderr] {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
        }
        Self { stdin, stdout, stderr }
    }

    /// Ends the input and reads both outputs to their ends.
    pub fn read(mut self) -> (String, String) {
        let _ = self.stdin.shutdown(Shutdown::Write);
        let stderr = thread::spawn(move || read_all(&mut self.stderr));
        (read_all(&mut self.stdout), stderr.join().unwrap())
    }

    /// The next line on standard output, without its end.
    pub fn line(&mut self) -> String {
        let (mut line, mut byte) = (String::new(), [0]);
        loop {
            self.stdout.read_exact(&mut byte).unwrap();
            if byte == *b"\n" {
                return line;
            }
            line.push(byte[0].into());
        }
    }

    /// Reads what must come next on standard output.
    pub fn expect(&mut self, text: &str) {
        let mut bytes = vec![0; text.len()];
        self.stdout.read_exact(&mut bytes).unwrap();
        assert_eq!(String::from_utf8_lossy(&bytes), text);
    }
}

#[derive(Debug, PartialEq)]
pub struct Output {
    pub stdout: String,
    pub stderr: String,
    pub code: u8,
}

/// What a stream says up to a text and with it, and nothing that comes behind.
pub fn read_until(stream: &mut UnixStream, text: &str) -> String {
    let (mut output, mut byte) = (String::new(), [0]);
    while !output.contains(text) {
        stream.read_exact(&mut byte).unwrap();
        output.push(byte[0].into());
    }
    output
}

pub fn read_all(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

/// The first process of a container.
pub fn first(container: &str) -> Target {
    Target { container: container.into(), process: None }
}

/// A further process of a container.
pub fn further(container: &str, process: &str) -> Target {
    Target { container: container.into(), process: Some(process.into()) }
}
