//! Containers set up by the real agent code on the kernel of this machine: the agent serves a Unix socket instead of a
//! vsock one, in a mount namespace of its own. Needs root, EROFS and overlayfs; limits are left to the tests in a guest,
//! since the cgroup2 hierarchy of a development machine often has no controllers.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
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

/// Where this machine has its cgroup2 hierarchy.
fn cgroup2() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields.find(|fields| fields[2] == "cgroup2").expect("a mounted cgroup2 hierarchy")[1].into()
}

/// The host's side.
struct Host {
    sockets: TempDir,
    cgroup: PathBuf,
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
        control.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut host = Self { sockets, cgroup, control, agent, next_request: 0, early: Vec::new() };
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
        let message = if self.early.is_empty() { self.receive() } else { self.early.remove(0) };
        match message {
            FromAgent::Exited { container, status } if container == id => status,
            other => panic!("unexpected message {other:?}"),
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
        fs::remove_dir(&self.cgroup).unwrap();
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

#[test]
fn input_is_passed_on_until_its_end() {
    let image = Image::new();
    let output = Host::new().run(&image.spec("c", &["wc", "-c"]), &vec![b'x'; 300_000]);
    assert_eq!((output.stdout.trim(), output.code), ("300000", 0));
}

#[test]
fn a_signal_is_told_as_128_and_its_number() {
    assert_eq!(run("kill -TERM $$; kill -9 $$; sleep 1; exit 5").code, 5, "pid 1 is safe from its own signals");
    let image = Image::new();
    let mut host = Host::new();
    let mut streams =
        host.launch(&image.shell("trap 'exit 42' TERM; echo ready; while :; do sleep 0.01; done")).unwrap();
    let mut line = [0; 6];
    streams.stdout.read_exact(&mut line).unwrap();
    host.signal("c", 15, false).unwrap();
    assert_eq!(host.exited("c").code, 42);
    host.launch(&image.spec("d", &["sleep", "1000"])).unwrap();
    host.signal("d", 9, true).unwrap();
    assert_eq!(host.exited("d").code, 137);
    assert_eq!(host.signal("d", 9, true).unwrap_err().kind, FailureKind::NoSuchContainer);
}

#[test]
fn a_signal_to_all_reaches_the_children() {
    let image = Image::new();
    let mut host = Host::new();
    let script = "sleep 1000 & (trap '' TERM; trap 'echo child; exit' USR1; echo x; while :; do sleep 0.01; done) & wait; wait; exec sleep 1000";
    let mut streams = host.launch(&image.shell(&format!("trap : USR1; {script}"))).unwrap();
    let mut ready = [0; 2];
    streams.stdout.read_exact(&mut ready).unwrap();
    host.signal("c", 10, true).unwrap();
    let mut line = [0; 6];
    streams.stdout.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"child\n");
    host.signal("c", 9, true).unwrap();
    assert_eq!(host.exited("c").code, 137);
}

#[test]
fn what_the_first_process_leaves_behind_ends_with_it() {
    let output = run("(sleep 1000; echo never) & (sh -c 'sleep 1000 &') & sleep 0.1; echo done");
    assert_eq!((output.stdout.as_str(), output.code), ("done\n", 0));
}

#[test]
fn the_container_has_namespaces_of_its_own() {
    let output = run(
        "echo $$; cat /proc/sys/kernel/hostname /etc/hostname /proc/self/cgroup; ls /proc | grep -c '^[0-9]'; ls /run 2>&1",
    );
    assert!(output.stdout.starts_with("1\nbox\nbox\n"), "{output:?}");
    assert!(output.stdout.contains("0::/\n"), "{output:?}");
    // The shell, ls and grep.
    assert!(output.stdout.lines().any(|line| line == "3"), "{output:?}");
}

#[test]
fn devices_and_file_systems_are_what_docker_gives() {
    let output = run(
        "echo x > /dev/null; head -c 4 /dev/zero | wc -c; head -c 4 /dev/urandom | wc -c; echo a > /dev/stdout; echo b > /dev/stderr; \
                      ls -l /dev/ptmx /dev/fd /dev/core | wc -l; echo shm > /dev/shm/x && cat /dev/shm/x; mount",
    );
    assert!(output.stdout.starts_with("4\n4\na\n3\nshm\n"), "{output:?}");
    assert_eq!(output.stderr, "b\n");
    for line in [
        "proc on /proc type proc (rw,nosuid,nodev,noexec",
        "tmpfs on /dev type tmpfs (rw,nosuid",
        "devpts on /dev/pts type devpts (rw,nosuid,noexec",
        "shm on /dev/shm type tmpfs (rw,nosuid,nodev,noexec",
        "mqueue on /dev/mqueue type mqueue (rw,nosuid,nodev,noexec",
        "sysfs on /sys type sysfs (ro,nosuid,nodev,noexec",
        "cgroup on /sys/fs/cgroup type cgroup2 (ro,nosuid,nodev,noexec",
        "proc on /proc/sys type proc (ro,",
        "tmpfs on /etc/hostname type tmpfs (rw",
        "overlay on / type overlay (rw",
    ] {
        assert!(output.stdout.contains(line), "{line} is missing: {}", output.stdout);
    }
    // Nothing of the agent's own file systems is left.
    assert!(!output.stdout.contains(" on /run"), "{}", output.stdout);
    assert!(!output.stdout.contains("erofs on"), "{}", output.stdout);
}

#[test]
fn masked_paths_are_empty_and_read_only_paths_refuse() {
    let output = run("cat /proc/kcore /proc/keys /proc/timer_list | wc -c; ls /sys/firmware | wc -l; \
                      echo 1 > /proc/sys/kernel/panic; echo x > /etc/new && cat /etc/new");
    assert!(output.stdout.starts_with("0\n0\nx\n"), "{output:?}");
    assert!(output.stderr.contains("can't create /proc/sys/kernel/panic: Read-only file system"), "{output:?}");
}

#[test]
fn no_descriptor_of_the_agent_is_left() {
    let output = run("ls /proc/self/fd | grep -v '^[012]$'; cat /proc/self/status | grep -E 'Sig(Blk|Ign)'");
    // The one that ls reads the directory with.
    assert_eq!(output.stdout.lines().next(), Some("3"), "{output:?}");
    let mask = |name: &str| {
        let line = output.stdout.lines().find_map(|line| line.strip_prefix(name)).expect(name);
        u64::from_str_radix(line.trim(), 16).unwrap()
    };
    assert_eq!((mask("SigBlk:"), mask("SigIgn:") & 1 << 12), (0, 0), "{output:?}");
}

#[test]
fn privileges_are_dockers_defaults() {
    let status = "cat /proc/self/status | grep -E '^(Cap|NoNewPrivs|Seccomp:|Groups)'";
    let output = run(status);
    for line in [
        "CapInh:\t0000000000000000",
        "CapPrm:\t00000000a80425fb",
        "CapEff:\t00000000a80425fb",
        "CapBnd:\t00000000a80425fb",
        "CapAmb:\t0000000000000000",
        "NoNewPrivs:\t0",
        "Seccomp:\t2",
    ] {
        assert!(output.stdout.contains(line), "{line} is missing: {}", output.stdout);
    }
    let image = Image::new();
    let mut spec =
        image.shell(&format!("id; echo $HOME; {status}; echo ok > /dev/stdout; mount -t tmpfs x /tmp; cat /root/x"));
    spec.process.user = "app".into();
    spec.process.no_new_privileges = true;
    let output = Host::new().run(&spec, b"");
    for line in [
        "uid=1000(app) gid=1001(app) groups=29(audio),1001(app)",
        "/home/app",
        "CapPrm:\t0000000000000000",
        "CapEff:\t0000000000000000",
        "CapBnd:\t00000000a80425fb",
        "NoNewPrivs:\t1",
        "ok",
    ] {
        assert!(output.stdout.contains(line), "{line} is missing: {output:?}");
    }
    assert!(
        output.stderr.contains("Operation not permitted") || output.stderr.contains("permission denied"),
        "{output:?}"
    );
}

#[test]
fn limits_and_scores_are_set() {
    let image = Image::new();
    let mut spec = image.shell("ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj; umask");
    spec.process.rlimits =
        vec![Rlimit { resource: 7, soft: 77, hard: 88 }, Rlimit { resource: 4, soft: 0, hard: u64::MAX }];
    spec.process.oom_score_adj = 321;
    let mut host = Host::new();
    assert_eq!(host.run(&spec, b"").stdout, "77\n88\n321\n0022\n");
    spec.process.rlimits = vec![Rlimit { resource: 16, soft: 0, hard: 0 }];
    let failure = host.call(Call::Create(Box::new(spec))).unwrap_err();
    assert_eq!(
        (failure.kind, failure.message.as_str()),
        (FailureKind::InvalidRequest, "resource limit 16 does not exist")
    );
}

#[test]
fn a_root_can_be_read_only_and_mounts_be_added() {
    let image = Image::new();
    let mut spec = image
        .shell("echo x > /x; echo y > /scratch/deep/y && cat /scratch/deep/y; cat /etc/hostname; mount | grep scratch");
    spec.rootfs.read_only = true;
    let source = MountSource::Tmpfs { size_bytes: Some(1 << 20), mode: 0o1777, exec: false, dev: false, suid: false };
    spec.mounts = vec![Mount { destination: "/scratch/deep".into(), source, read_only: false }];
    let output = Host::new().run(&spec, b"");
    assert!(output.stderr.contains("can't create /x: Read-only file system"), "{output:?}");
    assert!(output.stdout.starts_with("y\nbox\n"), "{output:?}");
    assert!(output.stdout.contains("tmpfs on /scratch/deep type tmpfs (rw,nosuid,nodev,noexec"), "{output:?}");
    assert!(output.stdout.contains("size=1024k"), "{output:?}");
}

#[test]
fn the_working_directory_is_made_and_the_environment_passed() {
    let image = Image::new();
    let mut spec = image.shell("pwd; env");
    spec.process.working_directory = "/srv/new/place".into();
    spec.process.env = vec!["PATH=/none:/bin".into(), "A=b c".into(), "EMPTY=".into()];
    let output = Host::new().run(&spec, b"");
    assert!(output.stdout.starts_with("/srv/new/place\n"), "{output:?}");
    for variable in ["PATH=/none:/bin", "A=b c", "EMPTY=", "HOME=/root"] {
        assert!(output.stdout.lines().any(|line| line == variable), "{variable} is missing: {output:?}");
    }
}

#[test]
fn what_cannot_be_executed_is_told_as_docker_tells_it() {
    let image = Image::new();
    let mut host = Host::new();
    let cases: [(&str, FailureKind, &str); 7] = [
        ("nope", FailureKind::CommandNotFound, "exec: \"nope\": executable file not found in $PATH"),
        ("/nope", FailureKind::CommandNotFound, "exec: \"/nope\": stat /nope: no such file or directory"),
        (
            "not-executable",
            FailureKind::CommandNotFound,
            "exec: \"not-executable\": executable file not found in $PATH",
        ),
        ("/bin/not-executable", FailureKind::CommandNotExecutable, "exec: \"/bin/not-executable\": permission denied"),
        ("/etc", FailureKind::CommandNotExecutable, "exec: \"/etc\": is a directory"),
        ("no-format", FailureKind::CommandNotExecutable, "exec /bin/no-format: exec format error"),
        ("no-interpreter", FailureKind::CommandNotFound, "exec /bin/no-interpreter: no such file or directory"),
    ];
    for (program, kind, message) in cases {
        let spec = image.spec("c", &[program]);
        let failure = match host.call(Call::Create(Box::new(spec))) {
            Ok(()) => host.start("c").unwrap_err(),
            Err(failure) => failure,
        };
        assert_eq!((failure.kind, failure.message.as_str()), (kind, message));
    }
    let mut spec = image.spec("c", &["true"]);
    spec.process.user = "nobody".into();
    let failure = host.call(Call::Create(Box::new(spec))).unwrap_err();
    assert_eq!(failure.message, "unable to find user nobody: no matching entries in passwd file");
    let mut spec = image.spec("c", &["true"]);
    spec.rootfs.device = "/dev/null".into();
    let failure = host.call(Call::Create(Box::new(spec))).unwrap_err();
    assert!(failure.message.starts_with("cannot mount the image on /dev/null: "), "{failure:?}");
    assert_eq!(host.run(&image.shell("echo fine"), b"").stdout, "fine\n");
}

#[test]
fn calls_out_of_turn_are_refused() {
    let image = Image::new();
    let mut host = Host::new();
    assert_eq!(host.start("c").unwrap_err().kind, FailureKind::NoSuchContainer);
    host.call(Call::Create(Box::new(image.spec("c", &["sleep", "1000"])))).unwrap();
    let again = host.call(Call::Create(Box::new(image.spec("c", &["true"])))).unwrap_err();
    assert_eq!((again.kind, again.message.as_str()), (FailureKind::WrongState, "container c exists already"));
    let size = WindowSize { rows: 1, columns: 1 };
    assert_eq!(host.call(Call::Resize { container: "c".into(), size }).unwrap_err().kind, FailureKind::WrongState);
    assert_eq!(host.signal("c", 65, false).unwrap_err().kind, FailureKind::InvalidRequest);
    host.start("c").unwrap();
    assert_eq!(host.start("c").unwrap_err().kind, FailureKind::WrongState);
    host.signal("c", 9, false).unwrap();
    assert_eq!(host.exited("c").code, 137);
    // One that was never started ends, too.
    host.call(Call::Create(Box::new(image.spec("c", &["true"])))).unwrap();
    host.signal("c", 9, false).unwrap();
    let status = host.exited("c");
    assert_eq!((status.code, status.executed_us), (137, 0));
}

#[test]
fn a_start_need_not_wait_for_the_creation() {
    let image = Image::new();
    let mut host = Host::new();
    for (program, results) in [("true", [true, true]), ("nope", [false, false])] {
        let create = host.send(Call::Create(Box::new(image.spec("c", &[program]))));
        let start = host.send(Call::Start { container: "c".into() });
        for (request, succeeds) in [create, start].into_iter().zip(results) {
            match host.receive() {
                FromAgent::Reply { id, result } => assert_eq!((id, result.is_ok()), (request, succeeds)),
                other => panic!("unexpected message {other:?}"),
            }
        }
        if results[1] {
            assert_eq!(host.exited("c").code, 0);
        }
    }
}

#[test]
fn a_terminal_is_the_controlling_one_and_can_be_resized() {
    let image = Image::new();
    let mut host = Host::new();
    let listener = host.listen(3000);
    let mut spec = image.shell("trap 'stty size; exit 7' WINCH; stty size; ls -l /proc/self/fd/0; echo $TERM > /dev/tty; echo c > /dev/console; \
                                read line; echo got $line; while :; do sleep 0.01; done");
    spec.process.terminal = Some(WindowSize { rows: 24, columns: 80 });
    spec.process.stdio.stdin = Some(3000);
    spec.process.user = "app".into();
    host.call(Call::Create(Box::new(spec))).unwrap();
    let (mut terminal, _) = listener.accept().unwrap();
    host.start("c").unwrap();
    terminal.write_all(b"hello\n").unwrap();
    let mut output = String::new();
    let mut byte = [0];
    while !output.contains("got hello\r\n") {
        terminal.read_exact(&mut byte).unwrap();
        output.push(byte[0].into());
    }
    for text in ["24 80\r\n", "/dev/pts/0\r\n", "xterm\r\n"] {
        assert!(output.contains(text), "{text:?} is missing: {output:?}");
    }
    host.call(Call::Resize { container: "c".into(), size: WindowSize { rows: 30, columns: 100 } }).unwrap();
    assert_eq!(read_all(&mut terminal), "30 100\r\n");
    assert_eq!(host.exited("c").code, 7);
}

#[test]
fn a_slow_reader_slows_the_writer_down() {
    let image = Image::new();
    let mut host = Host::new();
    let mut streams = host.launch(&image.spec("c", &["dd", "if=/dev/zero", "bs=65536", "count=2048"])).unwrap();
    let (mut received, mut buffer) = (0, vec![0; 1 << 16]);
    // The agent's whole memory, while 128 MiB want to pass.
    let memory = || {
        let status = fs::read_to_string(format!("/proc/{}/status", host.agent.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let before = memory();
    loop {
        match streams.stdout.read(&mut buffer).unwrap() {
            0 => break,
            length => received += length,
        }
        assert!(memory() < before + 256, "{before} KiB became {}", memory());
    }
    assert_eq!(received, 128 << 20);
    assert_eq!(host.exited("c").code, 0);
}

#[test]
fn a_closed_reader_ends_the_writer_and_not_the_agent() {
    let image = Image::new();
    let mut host = Host::new();
    let streams = host.launch(&image.shell("sh -c 'while :; do echo yes; done'; exit $?")).unwrap();
    drop(streams.stdout);
    assert_eq!(host.exited("c").code, 141);
}

#[test]
fn the_image_cannot_lead_out_of_its_root() {
    let image = Image::with(|root| {
        use std::os::unix::fs::symlink;
        fs::remove_dir_all(root.join("etc")).unwrap();
        symlink("../../../../elsewhere/etc", root.join("etc")).unwrap();
        symlink("/loose/dev", root.join("dev")).unwrap();
        symlink("/../../sys-here", root.join("sys")).unwrap();
        symlink("/proc/1/root/run", root.join("run")).unwrap();
    });
    let mut host = Host::new();
    let output =
        host.run(&image.shell("cat /elsewhere/etc/hostname; ls /loose/dev/null /sys-here/fs/cgroup/cgroup.procs"), b"");
    assert_eq!(
        (output.stdout.as_str(), output.code),
        ("box\n/loose/dev/null\n/sys-here/fs/cgroup/cgroup.procs\n", 0),
        "{output:?}"
    );
    let mut spec = image.shell("true");
    let source = MountSource::Tmpfs { size_bytes: None, mode: 0o755, exec: true, dev: true, suid: true };
    spec.mounts = vec![Mount { destination: "/run/x".into(), source, read_only: false }];
    let failure = host.call(Call::Create(Box::new(spec))).unwrap_err();
    assert_eq!(
        (failure.kind, failure.message.as_str()),
        (FailureKind::InvalidRequest, "cannot make /run/x in the container: too many levels of symbolic links")
    );
    assert!(!Path::new("/elsewhere").exists() && !Path::new("/loose").exists() && !Path::new("/sys-here").exists());
}

#[test]
fn files_of_the_image_that_are_no_files_are_refused() {
    let image = Image::with(|root| {
        fs::remove_file(root.join("etc/passwd")).unwrap();
        assert!(Command::new("mkfifo").arg(root.join("etc/passwd")).status().unwrap().success());
    });
    let failure = Host::new().call(Call::Create(Box::new(image.shell("true")))).unwrap_err();
    assert_eq!(failure.message, "/etc/passwd of the image is not a regular file of at most 1048576 bytes");
    let image = Image::with(|root| fs::write(root.join("etc/group"), vec![b'x'; (1 << 20) + 1]).unwrap());
    let failure = Host::new().call(Call::Create(Box::new(image.shell("true")))).unwrap_err();
    assert_eq!(failure.message, "/etc/group of the image is not a regular file of at most 1048576 bytes");
}

#[test]
fn containers_live_side_by_side() {
    let image = Image::new();
    let mut host = Host::new();
    let mut first = host.launch(&image.spec("first", &["cat"])).unwrap();
    let mut second = host.launch(&image.spec("second", &["cat"])).unwrap();
    // A third that is only created must not hold the others' streams open.
    host.call(Call::Create(Box::new(image.spec("third", &["true"])))).unwrap();
    for (name, streams) in [("first", &mut first), ("second", &mut second)] {
        streams.stdin.write_all(name.as_bytes()).unwrap();
        streams.stdin.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_all(&mut streams.stdout), name);
        assert_eq!(host.exited(name).code, 0);
    }
    host.start("third").unwrap();
    assert_eq!(host.exited("third").code, 0);
}

#[test]
fn system_calls_outside_the_profile_fail() {
    let output = run("mount -t tmpfs none /tmp; echo $?");
    assert!(output.stdout.ends_with("1\n") || output.stdout.ends_with("255\n"), "{output:?}");
    let image = Image::new();
    let mut spec = image.shell("cat /proc/self/status | grep Seccomp:");
    spec.process.seccomp = Seccomp::Unconfined;
    assert_eq!(Host::new().run(&spec, b"").stdout, "Seccomp:\t0\n");
}
