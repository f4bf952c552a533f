//! What a VM is made of that has a path or a number on the host: opened before the monitor enters its jail, in which no
//! path leads to any of it.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use api::config::{DriveConfig, DriveFile, VmConfig};
use devices::vsock::ports::HostPorts;
use kvm_ioctls::Kvm;
use thiserror::Error;

use crate::inherited;

/// What could not be opened.
#[derive(Debug, Error)]
pub enum ResourceError {
    /// KVM is not usable.
    #[error("cannot open /dev/kvm: {}", open_hint(.0))]
    OpenKvm(#[source] kvm_ioctls::Error),
    /// A file cannot be opened.
    #[error("cannot open {what} {}", path.display())]
    Open {
        /// What it is for.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// Nobody listens at a socket.
    #[error("cannot connect port {port} to {}", path.display())]
    Connect {
        /// The guest's port of the host.
        port: u32,
        /// The socket's path.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

fn open_hint(error: &kvm_ioctls::Error) -> &'static str {
    match error.errno() {
        libc::ENOENT => "this machine offers no hardware virtualization, or the kvm module is not loaded",
        libc::EACCES | libc::EPERM => "add yourself to the group that owns it (usually kvm)",
        _ => "it is there, but does not open",
    }
}

/// Everything that is open.
pub struct Resources {
    /// KVM.
    pub kvm: Kvm,
    /// The kernel.
    pub kernel: File,
    /// The initial RAM file system.
    pub initramfs: Option<File>,
    /// The files behind the block devices, in their order.
    pub drives: Vec<File>,
    /// The host's ports that the guest can connect to.
    pub ports: HostPorts,
}

impl Resources {
    /// Opens everything.
    ///
    /// # Errors
    /// [`ResourceError`] names what was to be opened.
    pub fn open(config: &VmConfig) -> Result<Self, ResourceError> {
        let ports = HostPorts::default();
        for port in &config.vsock {
            let stream = UnixStream::connect(&port.socket).map_err(|source| ResourceError::Connect {
                port: port.port,
                path: port.socket.clone(),
                source,
            })?;
            ports.offer(port.port, stream);
        }
        Ok(Self {
            kvm: Kvm::new().map_err(ResourceError::OpenKvm)?,
            kernel: open("the kernel", &config.kernel)?,
            initramfs: config.initramfs.as_deref().map(|path| open(INITRAMFS, path)).transpose()?,
            drives: config.drives.iter().map(open_drive).collect::<Result<_, _>>()?,
            ports,
        })
    }

    /// The length in bytes of the largest file that the guest may write to.
    ///
    /// # Errors
    /// [`ResourceError`] names the drive.
    pub fn largest_drive(&self, config: &VmConfig) -> Result<u64, ResourceError> {
        let mut written = config.drives.iter().zip(&self.drives).filter(|(drive, _)| !drive.read_only);
        written.try_fold(0, |largest, (drive, file)| {
            let path = match &drive.file {
                DriveFile::Path(path) => path.clone(),
                DriveFile::Descriptor(number) => inherited_path(*number),
            };
            let metadata = file.metadata();
            let length = metadata.map_err(|source| ResourceError::Open { what: "the drive", path, source })?.len();
            Ok(largest.max(length))
        })
    }
}

/// What the initial RAM file system is called.
pub(crate) const INITRAMFS: &str = "the initial RAM file system";

fn open(what: &'static str, path: &Path) -> Result<File, ResourceError> {
    File::open(path).map_err(|source| ResourceError::Open { what, path: path.to_owned(), source })
}

fn open_drive(drive: &DriveConfig) -> Result<File, ResourceError> {
    match &drive.file {
        DriveFile::Path(path) => {
            let opened = File::options().read(true).write(!drive.read_only).open(path);
            opened.map_err(|source| ResourceError::Open { what: "the drive", path: path.clone(), source })
        }
        DriveFile::Descriptor(number) => {
            let what = "the inherited drive";
            let taken = inherited::take(*number);
            Ok(taken.map_err(|source| ResourceError::Open { what, path: inherited_path(*number), source })?.into())
        }
    }
}

fn inherited_path(number: i32) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{number}"))
}
