//! What a VM is made of that has a path or a number on the host: opened before the monitor enters its jail, in which no
//! path leads to any of it. What file systems show is taken over as the jail is entered ([`jailer::files`]), since it depends on
//! who the monitor is in there.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use api::config::{DriveFile, NetworkConfig, TapConfig, VmConfig};
use devices::net::tap::{Tap, TapError};
use devices::vsock::ports::HostPorts;
use kvm_ioctls::Kvm;
use thiserror::Error;

use crate::{attach, inherited, sockets};

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
    /// A tap cannot be used.
    #[error("cannot make the network device")]
    Tap(#[from] TapError),
    /// Nobody can be listened to at the VM's socket.
    #[error("cannot listen at {}", path.display())]
    Listen {
        /// The socket's path.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// Nobody listens at a socket, or it is none.
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
    /// The files that are memory of the guest, in their order.
    pub pmem: Vec<File>,
    /// The queues of the taps behind the network devices, in their order.
    pub taps: Vec<Vec<Tap>>,
    /// The host's ports that the guest can connect to.
    pub ports: HostPorts,
    /// Where the host can ask for connections to the guest.
    pub socket: Option<UnixListener>,
}

impl Resources {
    /// Opens everything.
    ///
    /// # Errors
    /// [`ResourceError`] names what was to be opened.
    pub fn open(config: &VmConfig) -> Result<Self, ResourceError> {
        let ports = HostPorts::default();
        for port in &config.vsock {
            ports.offer(port.port, sockets::host_end(port)?);
        }
        Ok(Self {
            kvm: Kvm::new().map_err(ResourceError::OpenKvm)?,
            kernel: open("the kernel", &config.kernel)?,
            initramfs: config.initramfs.as_deref().map(|path| open(INITRAMFS, path)).transpose()?,
            drives: files("the drive", config.drives.iter().map(|drive| (&drive.file, drive.read_only)))?,
            pmem: files("the persistent memory", config.pmem.iter().map(|pmem| (&pmem.file, pmem.read_only)))?,
            taps: config.networks.iter().map(open_taps).collect::<Result<_, _>>()?,
            ports,
            socket: config.vsock_socket.as_ref().map(sockets::listener).transpose()?,
        })
    }

    /// How much of the guest's memory is mapped at most, in MiB: RAM, what can be plugged, and persistent memory.
    ///
    /// # Errors
    /// [`ResourceError`] names a file.
    pub fn mapped_mib(&self, config: &VmConfig) -> Result<u32, ResourceError> {
        let lengths = config
            .pmem
            .iter()
            .zip(&self.pmem)
            .map(|(pmem, file)| attach::memory::length(file).map_err(|source| unknown_length(&pmem.file, source)));
        let bytes = lengths.sum::<Result<u64, _>>()?;
        let mib = u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX);
        Ok(config.most_memory_mib().saturating_add(mib))
    }

    /// The length in bytes of the largest file that the guest may write to.
    ///
    /// # Errors
    /// [`ResourceError`] names the drive.
    pub fn largest_drive(&self, config: &VmConfig) -> Result<u64, ResourceError> {
        let drives = config.drives.iter().map(|drive| (&drive.file, drive.read_only)).zip(&self.drives);
        let pmem = config.pmem.iter().map(|pmem| (&pmem.file, pmem.read_only)).zip(&self.pmem);
        let mut written = drives.chain(pmem).filter(|((_, read_only), _)| !read_only);
        written.try_fold(0, |largest, ((backing, _), file)| {
            Ok(largest.max(file.metadata().map_err(|source| unknown_length(backing, source))?.len()))
        })
    }
}

fn unknown_length(backing: &DriveFile, source: io::Error) -> ResourceError {
    let path = match backing {
        DriveFile::Path(path) => path.clone(),
        DriveFile::Descriptor(number) => inherited_path(*number),
    };
    ResourceError::Open { what: "the file", path, source }
}

/// What the initial RAM file system is called.
pub(crate) const INITRAMFS: &str = "the initial RAM file system";

fn open(what: &'static str, path: &Path) -> Result<File, ResourceError> {
    File::open(path).map_err(|source| ResourceError::Open { what, path: path.to_owned(), source })
}

/// Opens what is behind devices of a kind, each to be written to unless it is read-only.
fn files<'a>(
    what: &'static str,
    backings: impl Iterator<Item = (&'a DriveFile, bool)>,
) -> Result<Vec<File>, ResourceError> {
    let open = |(backing, read_only): (&DriveFile, bool)| match backing {
        DriveFile::Path(path) => {
            let opened = File::options().read(true).write(!read_only).open(path);
            opened.map_err(|source| ResourceError::Open { what, path: path.clone(), source })
        }
        DriveFile::Descriptor(number) => Ok(take(what, *number)?.into()),
    };
    backings.map(open).collect()
}

fn open_taps(network: &NetworkConfig) -> Result<Vec<Tap>, ResourceError> {
    Ok(match &network.tap {
        TapConfig::Name(name) => Tap::open(name, network.queue_pairs.into())?,
        TapConfig::Descriptors(numbers) => {
            let queues = numbers.iter().map(|number| take("the tap", *number));
            Tap::from_descriptors(queues.collect::<Result<Vec<_>, _>>()?)?
        }
    })
}

pub(crate) fn take(what: &'static str, number: i32) -> Result<OwnedFd, ResourceError> {
    inherited::take(number).map_err(|source| ResourceError::Open { what, path: inherited_path(number), source })
}

pub(crate) fn inherited_path(number: i32) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{number}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_that_were_not_inherited_or_are_no_taps_are_named() {
        let network = |number: i32| NetworkConfig {
            tap: TapConfig::Descriptors(vec![number]),
            mac: None,
            pin_mac: true,
            mtu: None,
            queue_pairs: 1,
            rx_limits: None,
            tx_limits: None,
        };
        let error = open_taps(&network(9999)).unwrap_err();
        assert!(error.to_string().contains("/proc/self/fd/9999"), "{error}");
        let file = rustix::io::dup(File::open("/dev/null").unwrap()).unwrap();
        let number = std::os::fd::IntoRawFd::into_raw_fd(file);
        let error = open_taps(&network(number)).unwrap_err();
        let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        assert!(cause.contains(&format!("descriptor {number} is not a tap")), "{error}: {cause}");
    }
}
