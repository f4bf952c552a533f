//! The document a monitor is started with (`cofferdam-vmm --config FILE`): JSON, unknown fields refused.
//!
//! [`LaunchConfig::parse`] is the only way in: what it returns is within every bound stated here.

mod drive;
mod error;
mod filesystem;
mod jail;
mod limits;
mod network;
mod pmem;
mod vsock;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use protocol::container::ContainerSpec;
use serde::{Deserialize, Serialize};

pub use self::drive::{DRIVES_MAX, DriveConfig, DriveFile};
pub use self::error::ConfigError;
pub use self::filesystem::{
    CachePolicy, FILESYSTEMS_MAX, FilesystemConfig, LOCK_OWNERS, LOCK_WAITERS, LockScope, OwnershipConfig, QuotaConfig,
};
pub use self::jail::{IoConfig, JailConfig};
pub use self::limits::{LimitsConfig, RateConfig};
pub use self::network::{MacAddress, NETWORKS_MAX, NetworkConfig, QUEUE_PAIRS_MAX, TapConfig};
pub use self::pmem::{PMEM_MAX, PmemConfig};
pub use self::vsock::{PORTS_MAX, PortConfig, SocketConfig};

/// The most vCPUs a VM can have: what its CPU table has room for, and what Firecracker allows.
pub const VCPUS_MAX: u8 = 32;
/// The least memory in which the guest kernel and the agent come up with room for a small container.
pub const MEMORY_MIB_MIN: u32 = 48;
/// The most memory a VM can have: 1 TiB, far below the guest-physical limit of every CPU with hardware virtualization.
pub const MEMORY_MIB_MAX: u32 = 1 << 20;
/// In what steps of MiB memory can be added to a VM: Linux takes it in, on x86-64, in blocks of as much.
pub const PLUGGABLE_MIB: u32 = 128;
/// The most devices a VM can have: each has an interrupt of its own.
pub const DEVICES_MAX: usize = 19;
/// The longest document read: a container specification holds its program's arguments and environment, 2 MiB at most.
const DOCUMENT_MAX: u64 = 8 << 20;
/// The longest addition to the kernel command line; x86 Linux takes 2,048 bytes in all.
const COMMAND_LINE_MAX: usize = 1024;

/// Everything a monitor needs to know to boot, and what to run then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchConfig {
    /// The machine.
    pub vm: VmConfig,
    /// The container that it is for: created and started at once, and the VM ends with it. Without one the VM runs until
    /// its guest powers off or it is told to end.
    #[serde(default)]
    pub container: Option<ContainerConfig>,
    /// The folder for the container's log and the record of its end: all that the monitor can reach. It is given to the
    /// monitor's user where the monitor is not its caller's.
    #[serde(default)]
    pub folder: Option<PathBuf>,
    /// Whether the container is started again when it has ended; needs a state directory.
    #[serde(default)]
    pub restart: Option<RestartPolicy>,
    /// The jail that the monitor is in, as far as there is a choice.
    #[serde(default)]
    pub jail: JailConfig,
}

/// When a container that has ended is started again, unless somebody wanted it to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestartPolicy {
    /// Whatever its exit code.
    Always,
    /// When it failed.
    OnFailure {
        /// The most restarts in a row; `null` for any number.
        most: Option<u32>,
    },
}

/// The container that a VM is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContainerConfig {
    /// The container, as the agent sets it up. Its stdio ports are chosen by the monitor.
    pub spec: ContainerSpec,
    /// Whether its program reads what is attached to it; otherwise `/dev/null`.
    #[serde(default)]
    pub stdin: bool,
    /// Whether its standard input ends with that of the first client that is attached.
    #[serde(default)]
    pub stdin_once: bool,
    /// Whether to wait for somebody to be attached before any output is read, so that they miss none.
    #[serde(default)]
    pub wait_for_attach: bool,
}

/// A machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// The guest kernel: an uncompressed x86-64 ELF image (`vmlinux`).
    pub kernel: PathBuf,
    /// The initial RAM file system: an uncompressed newc archive.
    #[serde(default)]
    pub initramfs: Option<PathBuf>,
    /// Words added at the end of the kernel command line.
    #[serde(default)]
    pub command_line: String,
    /// The number of vCPUs, 1 to [`VCPUS_MAX`].
    #[serde(default = "one")]
    pub vcpus: u8,
    /// Guest memory in MiB, [`MEMORY_MIB_MIN`] to [`MEMORY_MIB_MAX`].
    pub memory_mib: u32,
    /// What guest memory can grow to while the VM runs, in MiB: [`MEMORY_MIB_MAX`] at most, and more than `memory_mib` by a
    /// multiple of [`PLUGGABLE_MIB`]. A guest that breaks the rules can use all of it without being asked to.
    #[serde(default)]
    pub memory_max_mib: Option<u32>,
    /// Block devices, in the order in which the guest names them: `/dev/vda`, `/dev/vdb`, ….
    #[serde(default)]
    pub drives: Vec<DriveConfig>,
    /// Network devices, in the order in which the guest names them: `eth0`, `eth1`, ….
    #[serde(default)]
    pub networks: Vec<NetworkConfig>,
    /// Files that are memory of the guest, in the order in which it names them: `/dev/pmem0`, `/dev/pmem1`, ….
    #[serde(default)]
    pub pmem: Vec<PmemConfig>,
    /// Directories and files of the host that the guest can mount.
    #[serde(default)]
    pub filesystems: Vec<FilesystemConfig>,
    /// Whether the guest can give memory up, and reports memory that it does not use for now: both are the host's then.
    #[serde(default)]
    pub balloon: bool,
    /// Whether the guest is told which VM it is, by a VM generation ID, and hears when it is another one (`/v1/vm/generation`).
    /// It then finds all of its devices in a devicetree: the kernel needs `CONFIG_OF`.
    #[serde(default)]
    pub generation_id: bool,
    /// Ports of the host that the guest can connect to, besides those of the container's own session.
    #[serde(default)]
    pub vsock: Vec<PortConfig>,
    /// A Unix stream socket at which the host can ask for connections to ports of the guest, and hand over its end of some
    /// (`docs/decisions/0011-vsock-host-connections.md`). At a path it is made when the monitor starts, and stays there when
    /// that has ended; one that nobody listens at any more is replaced. A descriptor is that of a socket that listens.
    #[serde(default)]
    pub vsock_socket: Option<SocketConfig>,
    /// How much the guest may send through the socket device: packets and their data. Not what is sent to it, which waits
    /// for the guest anyway.
    #[serde(default)]
    pub vsock_limits: Option<LimitsConfig>,
    /// How much entropy the guest may take from the host.
    #[serde(default)]
    pub entropy_limits: Option<LimitsConfig>,
    /// How much the guest may print on its console.
    #[serde(default)]
    pub console_limits: Option<LimitsConfig>,
    /// Whether the guest gets an early serial console, for finding out why a kernel dies before its console is up.
    #[serde(default)]
    pub serial: bool,
}

fn one() -> u8 {
    1
}

impl LaunchConfig {
    /// Reads and checks a document.
    ///
    /// # Errors
    /// [`ConfigError`] names the field, its value and what is allowed.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let failed = |source| ConfigError::Read { path: path.to_owned(), source };
        let mut bytes = Vec::new();
        File::open(path).and_then(|file| file.take(DOCUMENT_MAX + 1).read_to_end(&mut bytes)).map_err(failed)?;
        Self::parse(&bytes)
    }

    /// Checks a document.
    ///
    /// # Errors
    /// As [`LaunchConfig::read`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        if bytes.len() as u64 > DOCUMENT_MAX {
            return Err(ConfigError::TooLong);
        }
        let config: Self = serde_json::from_slice(bytes).map_err(ConfigError::Syntax)?;
        config.vm.check()?;
        Ok(config)
    }
}

impl VmConfig {
    fn check(&self) -> Result<(), ConfigError> {
        within("vcpus", self.vcpus.into(), 1, VCPUS_MAX.into())?;
        within("memory_mib", self.memory_mib.into(), MEMORY_MIB_MIN.into(), MEMORY_MIB_MAX.into())?;
        if let Some(most) = self.memory_max_mib {
            within("memory_max_mib", most.into(), self.memory_mib.into(), MEMORY_MIB_MAX.into())?;
            let now = self.memory_mib;
            let next = now + (most - now).max(1).next_multiple_of(PLUGGABLE_MIB);
            if most != next {
                return Err(ConfigError::MemoryMax { most, now, next });
            }
        }
        within("the number of drives", self.drives.len() as u64, 0, DRIVES_MAX as u64)?;
        within("the number of networks", self.networks.len() as u64, 0, NETWORKS_MAX as u64)?;
        self.networks.iter().try_for_each(NetworkConfig::check)?;
        let drives = self.drives.iter().map(|drive| ("block", drive.limits));
        let pmem = self.pmem.iter().map(|pmem| ("pmem", pmem.limits));
        let others = [("vsock", self.vsock_limits), ("entropy", self.entropy_limits), ("console", self.console_limits)];
        for (device, limits) in drives.chain(pmem).chain(others) {
            limits.unwrap_or_default().check(device)?;
        }
        within("the number of pmem devices", self.pmem.len() as u64, 0, PMEM_MAX as u64)?;
        filesystem::check(&self.filesystems)?;
        within("the number of devices", self.devices() as u64, 0, DEVICES_MAX as u64)?;
        within("the number of vsock ports", self.vsock.len() as u64, 0, PORTS_MAX as u64)?;
        for PortConfig { port, .. } in &self.vsock {
            within("a vsock port", u64::from(*port), 0, u64::from(vsock::NO_PORT) - 1)?;
        }
        within("the length of command_line", self.command_line.len() as u64, 0, COMMAND_LINE_MAX as u64)?;
        if !self.command_line.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
            return Err(ConfigError::NotPrintable { field: "command_line", value: self.command_line.clone() });
        }
        Ok(())
    }

    /// The most memory that it can have, in MiB.
    pub fn most_memory_mib(&self) -> u32 {
        self.memory_max_mib.unwrap_or(self.memory_mib)
    }

    /// The numbers of the descriptors that it is started with.
    pub fn descriptors(&self) -> Vec<i32> {
        let file = |file: &DriveFile| match file {
            DriveFile::Descriptor(number) => Some(*number),
            DriveFile::Path(_) => None,
        };
        let files = self.drives.iter().map(|drive| &drive.file).chain(self.pmem.iter().map(|pmem| &pmem.file));
        let taps = self.networks.iter().flat_map(|network| match &network.tap {
            TapConfig::Descriptors(numbers) => numbers.clone(),
            TapConfig::Name(_) => Vec::new(),
        });
        let sockets = self.vsock.iter().map(|port| &port.socket).chain(&self.vsock_socket);
        let socket = |socket: &SocketConfig| match socket {
            SocketConfig::Descriptor(number) => Some(*number),
            SocketConfig::Path(_) => None,
        };
        files.filter_map(file).chain(taps).chain(sockets.filter_map(socket)).collect()
    }

    /// How many threads its devices have for themselves: one for each file that can be written to, as a drive or as memory, and
    /// those that serve files or wait for locks of files.
    pub fn device_threads(&self) -> u32 {
        let drives = self.drives.iter().filter(|drive| !drive.read_only).count();
        let disks = drives + self.pmem.iter().filter(|pmem| !pmem.read_only).count();
        let files = self.filesystems.len().saturating_mul(FilesystemConfig::threads() as usize);
        u32::try_from(disks.saturating_add(files)).unwrap_or(u32::MAX)
    }

    /// How many devices it has: socket, entropy and console besides those that it names.
    fn devices(&self) -> usize {
        let asked = [self.balloon, self.memory_max_mib.is_some(), self.generation_id];
        let asked = asked.into_iter().filter(|asked| *asked).count();
        3 + self.drives.len() + self.networks.len() + self.pmem.len() + self.filesystems.len() + asked
    }
}

fn within(field: &'static str, value: u64, least: u64, most: u64) -> Result<(), ConfigError> {
    if (least..=most).contains(&value) { Ok(()) } else { Err(ConfigError::OutOfRange { field, value, least, most }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(vm: &str) -> Result<LaunchConfig, ConfigError> {
        LaunchConfig::parse(format!(r#"{{"vm":{vm}}}"#).as_bytes())
    }

    #[test]
    fn the_least_document_is_enough() {
        let config = parse(r#"{"kernel":"/k","memory_mib":128}"#).unwrap();
        assert_eq!((config.vm.vcpus, config.vm.drives.len(), config.container), (1, 0, None));
    }

    #[test]
    fn an_unknown_field_is_refused_by_name() {
        let error = parse(r#"{"kernel":"/k","memory_mib":128,"memroy":1}"#).unwrap_err();
        let ConfigError::Syntax(source) = error else { panic!("{error}") };
        assert!(source.to_string().contains("memroy"), "{source}");
    }

    #[test]
    fn numbers_out_of_range_are_refused_with_the_range() {
        for vm in [r#"{"kernel":"/k","memory_mib":1}"#, r#"{"kernel":"/k","memory_mib":128,"vcpus":0}"#] {
            assert!(matches!(parse(vm), Err(ConfigError::OutOfRange { .. })), "{vm}");
        }
    }

    #[test]
    fn limits_are_checked_wherever_they_can_be_given() {
        let limits = r#"{"operations":{"size":0,"refill_ms":1}}"#;
        let of_file = |list| format!(r#""{list}":[{{"file":{{"descriptor":3}},"limits":{limits}}}]"#);
        let files = [of_file("drives"), of_file("pmem")];
        let others = ["vsock", "entropy", "console"].map(|device| format!(r#""{device}_limits":{limits}"#));
        let devices = ["block", "pmem", "vsock", "entropy", "console"];
        for (device, field) in devices.iter().zip(files.into_iter().chain(others)) {
            let error = parse(&format!(r#"{{"kernel":"/k","memory_mib":128,{field}}}"#)).unwrap_err();
            assert!(matches!(error, ConfigError::Limit { device: named, .. } if named == *device), "{error}");
        }
    }

    #[test]
    fn memory_grows_in_steps() {
        let parse = |most: u32| parse(&format!(r#"{{"kernel":"/k","memory_mib":100,"memory_max_mib":{most}}}"#));
        assert_eq!(parse(356).unwrap().vm.memory_max_mib, Some(356));
        for (most, suggested) in [(100, 228), (227, 228), (229, 356)] {
            let error = parse(most).unwrap_err();
            assert!(matches!(error, ConfigError::MemoryMax { next, .. } if next == suggested), "{error}");
        }
        for most in [99, MEMORY_MIB_MAX + 1, u32::MAX] {
            assert!(matches!(parse(most), Err(ConfigError::OutOfRange { field: "memory_max_mib", .. })), "{most}");
        }
    }

    #[test]
    fn networks_are_bounded_and_checked() {
        let networks = |count: usize, tap: &str| {
            let list = vec![format!(r#"{{"tap":{{"name":"{tap}"}}}}"#); count].join(",");
            parse(&format!(r#"{{"kernel":"/k","memory_mib":128,"networks":[{list}]}}"#))
        };
        assert_eq!(networks(NETWORKS_MAX, "tap0").unwrap().vm.networks.len(), NETWORKS_MAX);
        assert!(matches!(networks(NETWORKS_MAX + 1, "tap0"), Err(ConfigError::OutOfRange { .. })));
        assert!(matches!(networks(1, "a tap"), Err(ConfigError::InterfaceName { .. })));
    }

    #[test]
    fn there_are_as_many_devices_as_interrupts() {
        let parse = |drives: usize, pmem: usize, balloon: bool| {
            let list = |count| vec![r#"{"file":{"path":"/f"}}"#; count].join(",");
            let (drives, pmem) = (list(drives), list(pmem));
            parse(&format!(
                r#"{{"kernel":"/k","memory_mib":100,"drives":[{drives}],"pmem":[{pmem}],"balloon":{balloon}}}"#
            ))
        };
        assert!(parse(DRIVES_MAX, 0, false).is_ok() && parse(11, PMEM_MAX, true).is_ok());
        for (drives, pmem, balloon) in [(DRIVES_MAX, 0, true), (12, PMEM_MAX, true), (0, PMEM_MAX + 1, false)] {
            assert!(matches!(parse(drives, pmem, balloon), Err(ConfigError::OutOfRange { .. })), "{drives} {pmem}");
        }
    }

    #[test]
    fn sockets_have_a_path_or_a_number_and_ports_are_in_their_range() {
        let parse = |port: u32| {
            parse(&format!(
                r#"{{"kernel":"/k","memory_mib":100,"vsock_socket":{{"descriptor":7}},
                "vsock":[{{"port":1,"socket":{{"path":"/s"}}}},{{"port":{port},"socket":{{"descriptor":9}}}}]}}"#
            ))
        };
        assert_eq!(parse(u32::MAX - 1).unwrap().vm.descriptors(), [9, 7]);
        assert!(matches!(parse(u32::MAX), Err(ConfigError::OutOfRange { field: "a vsock port", .. })));
    }

    #[test]
    fn a_command_line_cannot_smuggle_a_newline() {
        let error = parse(r#"{"kernel":"/k","memory_mib":128,"command_line":"a\nb"}"#).unwrap_err();
        assert!(matches!(error, ConfigError::NotPrintable { .. }));
    }
}
