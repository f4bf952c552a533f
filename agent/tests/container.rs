//! Containers set up by the real agent code on the kernel of this machine: the agent serves a Unix socket instead of a
//! vsock one, in a mount namespace of its own. Needs root, EROFS and overlayfs; limits are left to the tests in a guest,
//! since the cgroup2 hierarchy of a development machine often has no controllers.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use protocol::container::{
    ContainerSpec, DEFAULT_CAPABILITIES, DEFAULT_MASKED_PATHS, DEFAULT_READONLY_PATHS, File, Limits, Mount,
    MountSource, ProcessSpec, Rlimit, Rootfs, Seccomp, Stdio as Ports, WindowSize,
};
use protocol::{Call, ExitStatus, Failure, FailureKind, FromAgent, Request, frame};
use tempfile::TempDir;

const SOCKETS: &str = "COFFERDAM_TEST_SOCKETS";

/// The agent's side: not a test, but started by each.
#[test]
#[ignore = "started by the other tests"]
fn agent_process() {
    let Some(sockets) = env::var_os(SOCKETS).map(PathBuf::from) else { return };
    for (kind, path) in [("tmpfs", "/run"), ("cgroup2", agent::container::CGROUP_MOUNT_POINT)] {
        assert!(Command::new("mount").args(["-t", kind, kind, path]).status().unwrap().success());
    }
    agent::container::make_mount_points().unwrap();
    let dial = |port: u32| -> io::Result<OwnedFd> {
        let stream = UnixStream::connect(sockets.join(port.to_string()))?;
        stream.set_nonblocking(true)?;
        Ok(stream.into())
    };
    agent::control::serve(dial(protocol::CONTROL_PORT).unwrap(), 1, dial).unwrap();
}

/// The host's side.
struct Host {
    sockets: TempDir,
    control: UnixStream,
    agent: Child,
    next_request: u32,
    /// Messages that came while another was waited for.
    early: Vec<FromAgent>,
}

impl Host {
    fn new() -> Self {
        let sockets = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(sockets.path().join(protocol::CONTROL_PORT.to_string())).unwrap();
        let agent = Command::new("unshare")
            .args(["--mount", "--propagation", "private"])
            .arg(env::current_exe().unwrap())
            .args(["--exact", "agent_process", "--ignored", "--nocapture", "--test-threads=1"])
            .env(SOCKETS, sockets.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let (control, _) = listener.accept().unwrap();
        control.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut host = Self { sockets, control, agent, next_request: 0, early: Vec::new() };
        assert!(matches!(host.receive(), FromAgent::Hello(hello) if hello.magic == protocol::MAGIC));
        host
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.sockets.path().join(port.to_string())).unwrap()
    }

    fn send(&mut self, call: Call) -> u32 {
        self.next_request += 1;
        let request = Request { id: self.next_request, call };
        frame::write(&mut self.control, &request, frame::MAX_FROM_HOST).unwrap();
        self.next_request
    }

    fn receive(&mut self) -> FromAgent {
        frame::read(&mut self.control, frame::MAX_FROM_AGENT).unwrap()
    }

    fn call(&mut self, call: Call) -> Result<(), Failure> {
        let sent = self.send(call);
        loop {
            match self.receive() {
                FromAgent::Reply { id, result } if id == sent => return result,
                other => self.early.push(other),
            }
        }
    }

    fn exited(&mut self, id: &str) -> ExitStatus {
        let mut early = std::mem::take(&mut self.early);
        loop {
            let message = if early.is_empty() { self.receive() } else { early.remove(0) };
            match message {
                FromAgent::Exited { container, status } if container == id => {
                    self.early = early;
                    return status;
                }
                other => panic!("unexpected message {other:?}"),
            }
        }
    }

    fn start(&mut self, id: &str) -> Result<(), Failure> {
        self.call(Call::Start { container: id.into() })
    }

    fn signal(&mut self, id: &str, signal: u8, all: bool) -> Result<(), Failure> {
        self.call(Call::Signal { container: id.into(), signal, all })
    }

    /// Creates and starts a container with all three streams, and hands over their host ends.
    fn launch(&mut self, spec: &ContainerSpec) -> Result<Streams, Failure> {
        let base = 2000 + self.next_request * 10;
        let listeners = [0, 1, 2].map(|i| self.listen(base + i));
        let mut spec = spec.clone();
        spec.process.stdio = Ports { stdin: Some(base), stdout: Some(base + 1), stderr: Some(base + 2) };
        self.call(Call::Create(Box::new(spec.clone())))?;
        let [stdin, stdout, stderr] = listeners.map(|listener| listener.accept().unwrap().0);
        self.start(&spec.id)?;
        Ok(Streams { stdin, stdout, stderr })
    }

    /// Runs a container to its end.
    fn run(&mut self, spec: &ContainerSpec, input: &[u8]) -> Output {
        let mut streams = self.launch(spec).unwrap();
        streams.stdin.write_all(input).unwrap();
        streams.stdin.shutdown(Shutdown::Write).unwrap();
        let stderr = thread::spawn(move || read_all(&mut streams.stderr));
        let stdout = read_all(&mut streams.stdout);
        let status = self.exited(&spec.id);
        assert!(status.executed_us > 0);
        Output { stdout, stderr: stderr.join().unwrap(), code: status.code }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.control.shutdown(Shutdown::Both).unwrap();
        let status = self.agent.wait().unwrap();
        if !thread::panicking() {
            assert!(status.success(), "the agent failed");
        }
    }
}

struct Streams {
    stdin: UnixStream,
    stdout: UnixStream,
    stderr: UnixStream,
}

#[derive(Debug, PartialEq)]
struct Output {
    stdout: String,
    stderr: String,
    code: u8,
}

fn read_all(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

/// An image with busybox and a few traps.
struct Image {
    _directory: TempDir,
    file: PathBuf,
}

impl Image {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&Path)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        for path in ["bin", "etc", "root", "home/app", "tmp"] {
            fs::create_dir_all(root.join(path)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        for name in
            ["sh", "cat", "echo", "env", "id", "ls", "true", "sleep", "stty", "dd", "head", "wc", "mount", "grep"]
        {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
        }
        let passwd = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n";
        fs::write(root.join("etc/passwd"), passwd).unwrap();
        fs::write(root.join("etc/group"), "root:x:0:\napp:x:1001:\naudio:x:29:app\n").unwrap();
        fs::write(root.join("bin/not-executable"), "x").unwrap();
        fs::write(root.join("bin/no-format"), "\0").unwrap();
        fs::write(root.join("bin/no-interpreter"), "#!/nope\n").unwrap();
        for name in ["no-format", "no-interpreter"] {
            fs::set_permissions(root.join("bin").join(name), std::os::unix::fs::PermissionsExt::from_mode(0o755))
                .unwrap();
        }
        change(&root);
        let file = directory.path().join("image.erofs");
        let made = Command::new("mkfs.erofs").args([&file, &root]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        assert!(made.unwrap().success());
        Self { _directory: directory, file }
    }

    fn spec(&self, id: &str, args: &[&str]) -> ContainerSpec {
        ContainerSpec {
            id: id.into(),
            hostname: "box".into(),
            rootfs: Rootfs { device: self.file.to_str().unwrap().into(), read_only: false },
            mounts: Vec::new(),
            files: vec![File { path: "/etc/hostname".into(), content: b"box\n".to_vec(), mode: 0o644 }],
            masked_paths: DEFAULT_MASKED_PATHS.map(Into::into).to_vec(),
            readonly_paths: DEFAULT_READONLY_PATHS.map(Into::into).to_vec(),
            limits: Limits::default(),
            shm_bytes: 64 << 20,
            process: ProcessSpec {
                args: args.iter().map(|arg| (*arg).into()).collect(),
                env: vec!["PATH=/bin".into()],
                working_directory: "/".into(),
                user: String::new(),
                additional_groups: Vec::new(),
                capabilities: DEFAULT_CAPABILITIES,
                rlimits: Vec::new(),
                no_new_privileges: false,
                seccomp: Seccomp::Default,
                oom_score_adj: 0,
                terminal: None,
                stdio: Ports::default(),
            },
        }
    }

    fn shell(&self, script: &str) -> ContainerSpec {
        self.spec("c", &["sh", "-c", script])
    }
}

fn run(script: &str) -> Output {
    let image = Image::new();
    Host::new().run(&image.shell(script), b"")
}

#[test]
fn streams_are_kept_apart_and_the_code_comes_back() {
    let output = run("echo out; echo err >&2; exit 3");
    assert_eq!(output, Output { stdout: "out\n".into(), stderr: "err\n".into(), code: 3 });
}
