//! The jail of a monitor.

use std::path::PathBuf;

use jailer::cgroup::{Bounds, IoBound};
use serde::{Deserialize, Serialize};

use super::{FilesystemConfig, VmConfig};

/// What can be chosen of a monitor's jail; what is in it otherwise is described in `docs/decisions/0007-jail.md`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailConfig {
    /// A network namespace to be in instead of an empty one: a file like `/proc/PID/ns/net`.
    #[serde(default)]
    pub network_namespace: Option<PathBuf>,
    /// The folders of the cgroup to be born in, one for each hierarchy, which is there already. Without any, a process that is
    /// above the monitor makes one, and removes it.
    #[serde(default)]
    pub cgroups: Vec<PathBuf>,
    /// The most memory that the monitor and its guest take, in bytes: by default the guest's and a part more.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// The most CPU time in microseconds in each 100 ms: by default that of the vCPUs and of one CPU more.
    #[serde(default)]
    pub cpu_us: Option<u64>,
    /// The most threads: by default those of the vCPUs and 16 more, and 65 for each file system.
    #[serde(default)]
    pub threads: Option<u32>,
    /// Limits on disks: by default none.
    #[serde(default)]
    pub io: Vec<IoConfig>,
}

/// How much the monitor may read of and write to a disk in a second.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoConfig {
    /// The disk's major number.
    pub major: u32,
    /// The disk's minor number.
    pub minor: u32,
    /// Bytes read.
    #[serde(default)]
    pub read_bps: Option<u64>,
    /// Bytes written.
    #[serde(default)]
    pub write_bps: Option<u64>,
    /// Reads.
    #[serde(default)]
    pub read_iops: Option<u64>,
    /// Writes.
    #[serde(default)]
    pub write_iops: Option<u64>,
}

impl JailConfig {
    /// The limits of the cgroup of a machine's monitor.
    pub fn bounds(&self, vm: &VmConfig) -> Bounds {
        let inodes = vm.filesystems.iter().map(FilesystemConfig::inodes).sum();
        let usual = Bounds::new(vm.vcpus, vm.most_memory_mib()).serving(vm.device_threads(), inodes);
        let io = self.io.iter().map(|io| IoBound {
            device: format!("{}:{}", io.major, io.minor),
            read_bps: io.read_bps,
            write_bps: io.write_bps,
            read_iops: io.read_iops,
            write_iops: io.write_iops,
        });
        Bounds {
            memory: self.memory_bytes.or(usual.memory),
            cpu_us: self.cpu_us.or(usual.cpu_us),
            threads: self.threads.or(usual.threads),
            io: io.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ConfigError, FILESYSTEMS_MAX, LaunchConfig};

    #[test]
    fn limits_of_the_jail_follow_from_the_machine_unless_they_are_given() {
        let text = r#"{"vm":{"kernel":"/k","memory_mib":128},"jail":{"threads":9,"io":[{"major":8,"minor":1}]}}"#;
        let config = LaunchConfig::parse(text.as_bytes()).unwrap();
        let bounds = config.jail.bounds(&config.vm);
        assert_eq!((bounds.threads, bounds.cpu_us, &*bounds.io[0].device), (Some(9), Some(200_000), "8:1"));
        assert!(bounds.memory.is_some_and(|memory| memory > 128 << 20));
    }

    #[test]
    fn file_systems_count_as_devices_and_the_jail_has_room_for_them() {
        let config = |count: usize| {
            let list: Vec<_> = (0..count).map(|tag| format!(r#"{{"tag":"{tag}","path":"/"}}"#)).collect();
            let vm = format!(r#"{{"kernel":"/k","memory_mib":128,"filesystems":[{}]}}"#, list.join(","));
            LaunchConfig::parse(format!(r#"{{"vm":{vm}}}"#).as_bytes())
        };
        assert!(matches!(config(FILESYSTEMS_MAX + 1), Err(ConfigError::OutOfRange { .. })));
        let bounds = |count| {
            let config = config(count).unwrap();
            let Bounds { threads, memory, .. } = config.jail.bounds(&config.vm);
            (threads.unwrap(), memory.unwrap())
        };
        let ((threads, memory), (most_threads, most_memory)) = (bounds(0), bounds(FILESYSTEMS_MAX));
        assert_eq!((most_threads - threads, most_memory - memory), (16 * 65, 16 << (17 + 11)));
    }

    #[test]
    fn the_jail_has_room_for_the_thread_of_a_drive_that_can_be_written_to() {
        let threads = |drive: &str| {
            let vm = format!(r#"{{"kernel":"/k","memory_mib":128,"drives":[{drive}]}}"#);
            let config = LaunchConfig::parse(format!(r#"{{"vm":{vm}}}"#).as_bytes()).unwrap();
            config.jail.bounds(&config.vm).threads.unwrap()
        };
        let none = threads("");
        assert_eq!(threads(r#"{"file":{"descriptor":3}}"#), none + 1);
        assert_eq!(threads(r#"{"file":{"descriptor":3},"read_only":true}"#), none);
    }
}
