//! Booting a VM: from the monitor's `fork`, and from its first entry into the guest, to the agent's first word.
//!
//! Both monitors get the same kernel, initramfs, amount of memory and drive, one vCPU, a vsock device and a source of
//! entropy. The agent dials the host's port 1024, which both monitors turn into a connection to a Unix socket: the
//! measuring process itself accepts it.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use protocol::{CONTROL_PORT, FromAgent, frame};
use serde_json::{Value, json};

use super::entry::Entry;
use super::measure::Place;
use super::process::{self, now};
use super::report::Boot;

/// The VM's memory in MiB: what `cofferdam run` gives by default.
const MEMORY_MIB: u32 = 512;

/// The words of our monitor's command line that are not about devices which only it has.
const COMMAND_LINE: &str =
    "reboot=t panic=-1 quiet tsc=reliable noreplace-smp 8250.nr_uarts=0 random.trust_cpu=on swiotlb=noforce";

/// Who boots a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Monitor {
    /// `cofferdam-vmm`.
    Cofferdam,
    /// `cofferdam-vmm` with a serial port, to which the kernel prints everything.
    CofferdamSerial,
    /// `firecracker`.
    Firecracker,
}

impl Monitor {
    /// What it is called in the report.
    pub fn name(self) -> String {
        match self {
            Self::Cofferdam => "cofferdam-vmm".to_owned(),
            Self::CofferdamSerial => "cofferdam-vmm, serial port".to_owned(),
            Self::Firecracker => "firecracker".to_owned(),
        }
    }

    /// Boots a VM once.
    pub fn run(self, place: &Place, entry: Option<&Entry>) -> Result<Boot> {
        let socket = place.run.join("vsock");
        let config = place.run.join("vm.json");
        fs::write(&config, serde_json::to_vec(&self.config(place)?)?).context("cannot write a configuration")?;
        let port = PathBuf::from(format!("{}_{CONTROL_PORT}", socket.display()));
        for path in [&socket, &port] {
            let _ = fs::remove_file(path);
        }
        let listener = UnixListener::bind(&port).with_context(|| format!("cannot listen at {}", port.display()))?;
        let mut command = match self {
            Self::Cofferdam | Self::CofferdamSerial => {
                let mut command = Command::new(place.bench.join("cofferdam-vmm"));
                command.arg("--config").arg(&config);
                command
            }
            Self::Firecracker => {
                let mut command = Command::new(place.bench.join("firecracker"));
                command.arg("--no-api").arg("--config-file").arg(&config);
                command
            }
        };
        command.stdin(Stdio::null()).stdout(Stdio::null());
        // The monitor copies every byte of the port there: a slow reader would be measured.
        if self == Self::CofferdamSerial {
            command.stderr(Stdio::null());
        }
        entry.map_or(Ok(()), Entry::arm)?;
        let mut running = process::spawn(&mut command)?;
        let began = running.began;
        running.wait_readable(&listener, "have its guest call")?;
        let (mut connection, _) = listener.accept().context("cannot accept the agent's connection")?;
        running.wait_readable(&connection, "pass the guest's first word on")?;
        let message = frame::read(&mut connection, frame::MAX_FROM_AGENT).context("the agent said no hello")?;
        let ready = now();
        let FromAgent::Hello(hello) = message else { bail!("the agent's first word was no hello") };
        // The agent serves nobody any more, and ends the machine.
        drop(connection);
        let ended = running.end()?;
        let since = |at: u64| at.saturating_sub(began) as f64 / 1000.0;
        Ok(Boot {
            entry_us: entry.map(Entry::first).transpose()?.map(since),
            ready_us: since(ready),
            end_us: since(ended.at),
            cpu_us: ended.cpu_us,
            guest_agent_started_us: hello.started_us,
            guest_agent_ready_us: hello.ready_us,
        })
    }

    fn config(self, place: &Place) -> Result<Value> {
        let (kernel, initramfs) = (place.bench.join("vmlinux"), place.bench.join("initramfs.cpio"));
        let (drive, socket) = (place.rootfs()?, place.run.join("vsock"));
        Ok(match self {
            Self::Cofferdam | Self::CofferdamSerial => json!({ "vm": {
                "kernel": kernel,
                "initramfs": initramfs,
                "memory_mib": MEMORY_MIB,
                "drives": [{ "file": { "path": drive }, "read_only": true }],
                "vsock": [{ "port": CONTROL_PORT, "socket": { "path": format!("{}_{CONTROL_PORT}", socket.display()) } }],
                "serial": self == Self::CofferdamSerial,
            } }),
            Self::Firecracker => json!({
                "boot-source": {
                    "kernel_image_path": kernel,
                    "initrd_path": initramfs,
                    "boot_args": COMMAND_LINE,
                },
                "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
                "drives": [{
                    "drive_id": "image",
                    "path_on_host": drive,
                    "is_root_device": false,
                    "is_read_only": true,
                }],
                "vsock": { "guest_cid": 3, "uds_path": socket },
                "entropy": {},
            }),
        })
    }
}
