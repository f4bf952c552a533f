//! A guest with the load in it, or the load as a program of the host.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::stage::LOAD;
use super::tasks::{Part, Task};
use crate::bench::process::{self, Running, now};

/// The VM's memory in MiB.
const MEMORY_MIB: u32 = 256;
/// The ports that a guest connects to: for tasks, and for the data of streams.
const PORTS: [u32; 2] = [1024, 1025];
/// The host's address on the tap that `enter.sh` makes.
const ADDRESS: ([u8; 4], u16) = ([172, 30, 0, 1], 1026);
const TAP: &str = "tap0";
const MAC: &str = "02:00:00:00:00:01";
/// The words of our monitor's command line that are not about devices which only it has.
const COMMAND_LINE: &str =
    "reboot=t panic=-1 quiet tsc=reliable noreplace-smp 8250.nr_uarts=0 random.trust_cpu=on swiotlb=noforce";
/// How long the load may take for a step.
const PATIENCE: Duration = Duration::from_secs(120);
/// The largest piece of a stream that is moved by one call.
const PIECE: usize = 64 << 10;
/// Where a guest has the directory of the host's, and the tag by which it mounts it.
const MOUNT_POINT: &str = "/mnt";
const TAG: &str = "bench";

/// Where everything is.
pub struct Place {
    /// What the host's half has prepared.
    pub bench: PathBuf,
    /// Sockets and configurations.
    pub run: PathBuf,
    /// The file system that is measured on.
    pub disk: PathBuf,
}

impl Place {
    /// The file behind the block device.
    pub fn drive(&self) -> PathBuf {
        self.disk.join("drive")
    }

    /// The directory for files of one contender.
    pub fn files(&self) -> PathBuf {
        self.disk.join("files")
    }
}

/// Where the load runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contender {
    /// In a guest of `cofferdam-vmm`.
    Cofferdam,
    /// In a guest of `firecracker`.
    Firecracker,
    /// On the host.
    Host,
}

impl Contender {
    /// What it is called in the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cofferdam => "cofferdam-vmm",
            Self::Firecracker => "firecracker",
            Self::Host => "host",
        }
    }

    /// Whether it has what a task is about.
    pub fn does(self, task: &Task) -> bool {
        match task.part {
            Part::Block | Part::Stream { .. } => self != Self::Host,
            Part::Files => self != Self::Firecracker,
        }
    }
}

/// A load that waits for tasks.
pub struct Load {
    contender: Contender,
    files: PathBuf,
    running: Running,
    tasks: UnixStream,
    answers: BufReader<UnixStream>,
    data: Option<UnixStream>,
    listener: TcpListener,
    net: Option<TcpStream>,
}

impl Load {
    /// Starts one.
    pub fn start(contender: Contender, place: &Place) -> Result<Self> {
        let listener = TcpListener::bind(std::net::SocketAddr::from(ADDRESS)).context("cannot listen at the tap")?;
        let files = if contender == Contender::Host { place.files() } else { PathBuf::from(MOUNT_POINT) };
        let (running, tasks, data) =
            if contender == Contender::Host { program(place)? } else { guest(contender, place)? };
        tasks.set_read_timeout(Some(PATIENCE))?;
        let answers = BufReader::new(tasks.try_clone().context("cannot use a socket twice")?);
        let mut load = Self { contender, files, running, tasks, answers, data, listener, net: None };
        if contender == Contender::Cofferdam {
            load.converse(&format!("mount {TAG} {MOUNT_POINT}"), "ready")?;
            load.converse("go", "done")?;
        }
        Ok(load)
    }

    /// Does a task, and says how long it took in nanoseconds.
    pub fn perform(&mut self, task: &Task) -> Result<u64> {
        let at = match task.part {
            Part::Files => self.files.to_string_lossy(),
            Part::Block | Part::Stream { .. } => "/dev/vda".into(),
        };
        let line = task.line.replace('@', &at);
        if task.cold {
            rustix::fs::sync();
            fs::write("/proc/sys/vm/drop_caches", "3").context("cannot empty the host's caches")?;
        }
        self.converse(&line, "ready")?;
        if let Part::Stream { kind: "net", .. } = task.part
            && self.net.is_none()
        {
            self.running.wait_readable(&self.listener, "have its guest call")?;
            let (stream, _) = self.listener.accept().context("cannot accept the guest's connection")?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            self.net = Some(stream);
        }
        let mut buffer = vec![0x5a; PIECE];
        let began = now();
        self.tell("go")?;
        if let Part::Stream { kind, direction } = task.part {
            let count = task.amount.count();
            match (kind, &mut self.data, &mut self.net) {
                ("vsock", Some(data), _) => take_part(data, direction, count, &mut buffer),
                ("net", _, Some(net)) => take_part(net, direction, count, &mut buffer),
                _ => bail!("there is no stream {kind}"),
            }?;
        }
        self.hear("done")?;
        Ok(now() - began)
    }

    /// Lets it end.
    pub fn end(self) -> Result<()> {
        let Self { contender, running, tasks, answers, data, net, .. } = self;
        // It has no more tasks then.
        drop((tasks, answers, data, net));
        match running.end() {
            // A guest that restarts ends it, at times with an error.
            Err(_) if contender == Contender::Firecracker => Ok(()),
            ended => ended.map(drop),
        }
    }

    fn converse(&mut self, line: &str, expected: &str) -> Result<()> {
        self.tell(line)?;
        self.hear(expected).with_context(|| format!("cannot do {line:?}"))
    }

    fn tell(&mut self, line: &str) -> Result<()> {
        self.tasks.write_all(format!("{line}\n").as_bytes()).context("cannot tell the load what to do")
    }

    fn hear(&mut self, expected: &str) -> Result<()> {
        let mut answer = String::new();
        self.answers.read_line(&mut answer).context("the load does not answer")?;
        let name = self.contender.name();
        ensure!(answer.trim_end() == expected, "{name} says {:?} instead of {expected:?}", answer.trim_end());
        Ok(())
    }
}

/// The host's part in a stream.
fn take_part(
    stream: &mut (impl std::io::Read + std::io::Write),
    guest: &str,
    count: u64,
    buffer: &mut [u8],
) -> Result<()> {
    let mut left = usize::try_from(count)?;
    match guest {
        "send" => {
            while left > 0 {
                let most = left.min(buffer.len());
                match stream.read(&mut buffer[..most]).context("cannot receive")? {
                    0 => bail!("the guest ended the stream"),
                    count => left -= count,
                }
            }
        }
        "receive" => {
            while left > 0 {
                let now = left.min(buffer.len());
                stream.write_all(&buffer[..now]).context("cannot send")?;
                left -= now;
            }
        }
        _ => {
            for _ in 0..left {
                stream.write_all(&buffer[..1]).context("cannot send")?;
                stream.read_exact(&mut buffer[..1]).context("cannot receive")?;
            }
        }
    }
    Ok(())
}

/// What is known of a load: its process, the connections for tasks and for data.
type Started = (Running, UnixStream, Option<UnixStream>);

/// Starts the load as a program.
fn program(place: &Place) -> Result<Started> {
    let (ours, its) = UnixStream::pair().context("cannot make sockets")?;
    let output = its.try_clone().context("cannot use a socket twice")?;
    let mut command = Command::new(place.bench.join(LOAD));
    command.stdin(OwnedFd::from(its)).stdout(OwnedFd::from(output));
    Ok((process::spawn(&mut command)?, ours, None))
}

/// Boots a guest.
fn guest(monitor: Contender, place: &Place) -> Result<Started> {
    let socket = place.run.join("vsock");
    let _ = fs::remove_file(&socket);
    let listeners = PORTS.map(|port| {
        let path = format!("{}_{port}", socket.display());
        let _ = fs::remove_file(&path);
        UnixListener::bind(&path).with_context(|| format!("cannot listen at {path}"))
    });
    let config = place.run.join("vm.json");
    fs::write(&config, serde_json::to_vec(&configuration(monitor, place))?).context("cannot write a configuration")?;
    let program = place.bench.join(monitor.name());
    let mut command = if monitor == Contender::Firecracker {
        let group = cgroup().context("cannot make a cgroup")?;
        let mut command = Command::new(place.bench.join("busybox"));
        command.args(["sh", "-c", "echo 0 >\"$0\" && exec \"$@\""]).arg(group.join("cgroup.procs")).arg(program);
        command.args(["--no-api", "--config-file"]);
        command
    } else {
        let mut command = Command::new(program);
        command.arg("--config");
        command
    };
    command.arg(&config);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let mut running = process::spawn(&mut command)?;
    let mut connections = Vec::new();
    for listener in listeners {
        let listener = listener?;
        running.wait_readable(&listener, "have its guest call")?;
        connections.push(listener.accept().context("cannot accept the guest's connection")?.0);
    }
    let data = connections.pop();
    if let Some(data) = &data {
        data.set_read_timeout(Some(PATIENCE))?;
        data.set_write_timeout(Some(PATIENCE))?;
    }
    Ok((running, connections.pop().context("the guest did not call")?, data))
}

/// A cgroup for Firecracker, which makes none by itself, with the limits that our monitor has in the one that it makes: a change
/// from one task to another costs the kernel more in there.
fn cgroup() -> Result<PathBuf> {
    let parent = PathBuf::from("/sys/fs/cgroup/bench");
    let group = parent.join("firecracker");
    for folder in [&parent, &group] {
        if !folder.exists() {
            fs::create_dir(folder)?;
        }
        if *folder == parent {
            fs::write(folder.join("cgroup.subtree_control"), "+cpu +memory +pids +io")?;
        }
    }
    let memory = (u64::from(2 * MEMORY_MIB) << 20).to_string();
    for (file, limit) in [("memory.max", &*memory), ("cpu.max", "200000 100000"), ("pids.max", "100")] {
        fs::write(group.join(file), limit)?;
    }
    Ok(group)
}

fn configuration(monitor: Contender, place: &Place) -> Value {
    let (kernel, initramfs) = (place.bench.join("vmlinux"), place.bench.join("initramfs.cpio"));
    let socket = place.run.join("vsock");
    if monitor == Contender::Firecracker {
        return json!({
            "boot-source": { "kernel_image_path": kernel, "initrd_path": initramfs, "boot_args": COMMAND_LINE },
            "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
            "drives": [{
                "drive_id": "drive",
                "path_on_host": place.drive(),
                "is_root_device": false,
                "is_read_only": false,
                // A flush of the guest's is one of the host's, as our monitor has it.
                "cache_type": "Writeback",
            }],
            "network-interfaces": [{ "iface_id": "eth0", "host_dev_name": TAP, "guest_mac": MAC }],
            "vsock": { "guest_cid": 3, "uds_path": socket },
            "entropy": {},
        });
    }
    let port = |port: u32| json!({ "port": port, "socket": { "path": format!("{}_{port}", socket.display()) } });
    json!({
        "vm": {
            "kernel": kernel,
            "initramfs": initramfs,
            "memory_mib": MEMORY_MIB,
            "drives": [{ "file": { "path": place.drive() } }],
            "networks": [{ "tap": { "name": TAP }, "mac": MAC }],
            "vsock": PORTS.map(port),
            "filesystems": [{ "tag": TAG, "path": place.files() }],
        },
        "jail": { "network_namespace": format!("/proc/{}/ns/net", std::process::id()) },
    })
}
