//! A place to run the command in: an image store with one small image, a run root, and a script in the monitor's place
//! that says on the control socket what a test wants said.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use api::control::{FRAME_MAX, Failure, FromMonitor, Timeline};
use protocol::{ExitStatus, frame};
use sha2::{Digest as _, Sha256};

/// The command under test.
pub const COFFERDAM: &str = env!("CARGO_BIN_EXE_cofferdam");

/// Where a test runs. Everything is in a temporary directory.
pub struct Bench {
    directory: tempfile::TempDir,
}

impl Bench {
    /// A bench whose monitor is a script: bash, with the functions `say FRAME` (write a frame made by the test),
    /// `hear BYTES FILE` (read so many bytes into a file) and `wait_for_end` (read until the front end has closed), and
    /// the variable `CONFIG`.
    pub fn new(script: &str) -> Self {
        let bench = Self { directory: tempfile::tempdir().unwrap() };
        for name in ["kernel", "initramfs"] {
            fs::write(bench.path(name), name).unwrap();
        }
        let monitor = format!(
            "#!/bin/bash\nset -eu\n[[ $1 == --config && $3 == --control-fd ]]\nCONFIG=$2 FD=$4 HERE={}\n\
             say() {{ cat \"$HERE/$1\" >&$FD; }}\nhear() {{ head -c \"$1\" <&$FD >\"$HERE/$2\"; }}\n\
             wait_for_end() {{ cat <&$FD >/dev/null; }}\n{script}\n",
            bench.directory.path().display()
        );
        fs::write(bench.path("monitor"), monitor).unwrap();
        fs::set_permissions(bench.path("monitor"), fs::Permissions::from_mode(0o755)).unwrap();
        let status = |code| ExitStatus { code, out_of_memory: false, executed_us: 77, agent_resident_kib: 800 };
        bench.frame("started", &FromMonitor::Started(Timeline { agent_ready: 5, ..Timeline::default() }));
        bench.frame("exited-0", &FromMonitor::Exited(status(0)));
        bench.frame("exited-7", &FromMonitor::Exited(status(7)));
        bench.frame("exited-143", &FromMonitor::Exited(status(143)));
        let oom = ExitStatus { out_of_memory: true, ..status(137) };
        bench.frame("out-of-memory", &FromMonitor::Exited(oom));
        let failure = Failure {
            exit_code: 127,
            message: "nothing is found: \x1b[2Jcleared".into(),
            console: Some("first line\n\nlast \x07line\n".into()),
        };
        bench.frame("failed-127", &FromMonitor::Failed(failure));
        bench.pull();
        bench
    }

    fn frame(&self, name: &str, message: &FromMonitor) {
        fs::write(self.path(name), frame::encode(message, FRAME_MAX).unwrap()).unwrap();
    }

    /// A path in the bench's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The command with the bench's surroundings.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(COFFERDAM);
        command.args(arguments).env("COFFERDAM_DATA", self.path("store")).env("COFFERDAM_RUN", self.path("run"));
        command.env("COFFERDAM_VMM", self.path("monitor")).env("COFFERDAM_KERNEL", self.path("kernel"));
        command.env("COFFERDAM_INITRAMFS", self.path("initramfs")).stdin(Stdio::null());
        command
    }

    /// Runs the command to its end.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Starts the command and waits for the line `ready` that the script writes.
    pub fn start(&self, mut command: Command) -> Child {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = [0; 6];
        child.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
        assert_eq!(&line, b"ready\n");
        child
    }

    /// The image's name.
    pub fn image(&self) -> String {
        format!("oci:{}", self.path("layout").display())
    }

    /// What is left in the run root.
    pub fn left(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path("run")) else { return Vec::new() };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|name| name != "names").collect();
        if let Ok(links) = fs::read_dir(self.path("run/names")) {
            names.extend(links.map(|link| link.unwrap().file_name().into_string().unwrap()));
        }
        names
    }

    fn pull(&self) {
        layout(&self.path("layout"));
        let output = self.run(&["pull", &self.image()]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Sends a signal to a process of ours.
pub fn kill(child: &Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// Standard error as text.
pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Writes an OCI image layout with one layer that holds one file.
fn layout(directory: &Path) {
    let mut layer = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(5);
    header.set_mode(0o644);
    layer.append_data(&mut header, "hello", &b"hello"[..]).unwrap();
    let layer = layer.into_inner().unwrap();
    let blobs = directory.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let store = |bytes: &[u8]| {
        let digest: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        fs::File::create(blobs.join(&digest)).unwrap().write_all(bytes).unwrap();
        (format!("sha256:{digest}"), bytes.len())
    };
    let (layer, layer_size) = store(&layer);
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"Cmd":["/hello"],"Env":["A=image"]}},"rootfs":{{"type":"layers","diff_ids":["{layer}"]}}}}"#
    );
    let (config, config_size) = store(config.as_bytes());
    let media = "application/vnd.oci.image";
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{media}.manifest.v1+json","config":{{"mediaType":"{media}.config.v1+json","digest":"{config}","size":{config_size}}},"layers":[{{"mediaType":"{media}.layer.v1.tar","digest":"{layer}","size":{layer_size}}}]}}"#
    );
    let (manifest, manifest_size) = store(manifest.as_bytes());
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{media}.manifest.v1+json","digest":"{manifest}","size":{manifest_size}}}]}}"#
    );
    fs::write(directory.join("index.json"), index).unwrap();
    fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}
