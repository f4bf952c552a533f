//! File system devices.

use std::collections::HashSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, LimitsConfig, within};

/// The most file system devices a VM can have.
pub const FILESYSTEMS_MAX: usize = 16;
/// How many programs of a guest can wait for locks of a file system, each in a thread of the monitor's.
pub const LOCK_WAITERS: u32 = 64;
/// How many open files hold POSIX locks of a file system: one for each program and file.
pub const LOCK_OWNERS: u64 = 1 << 12;
/// The inodes of a file system that a guest may hold, if the configuration does not say.
const INODES: u64 = 1 << 17;
/// The files and directories that it may have open.
const HANDLES: u64 = 1 << 14;
/// The most of either: more descriptors than Linux gives a process, if nobody has told it to (`fs.nr_open`).
const HELD_MAX: u64 = 1 << 20;
/// The longest tag, in bytes.
const TAG_MAX: u64 = 36;
/// The longest name of a file (`NAME_MAX`).
const NAME_MAX: usize = 255;

/// A directory or a file of the host that the guest can mount, by its tag, as a file system of type `virtiofs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilesystemConfig {
    /// What the guest mounts: 1 to 36 printable ASCII characters, each file system's its own.
    pub tag: String,
    /// What is exported: a directory with everything below it on the same mount, or one file in a directory of its own.
    pub path: PathBuf,
    /// The name under which a file is seen; that of its path if it is not given.
    #[serde(default)]
    pub name: Option<String>,
    /// Whether whatever changes something is refused; enforced by the monitor and the host's kernel, whatever the guest does.
    #[serde(default)]
    pub read_only: bool,
    /// Whether no file can be executed. The monitor shows and grants no execute permission; a guest whose kernel does not
    /// heed that can execute what it can read.
    #[serde(default)]
    pub noexec: bool,
    /// What the guest may keep of what it has seen.
    #[serde(default)]
    pub cache: CachePolicy,
    /// Whom the guest's locks concern.
    #[serde(default)]
    pub locks: LockScope,
    /// Whether there are extended attributes: those of `user.`.
    #[serde(default)]
    pub xattrs: bool,
    /// Whose files they are.
    #[serde(default)]
    pub ownership: OwnershipConfig,
    /// How much may be added while the monitor runs.
    #[serde(default)]
    pub quota: QuotaConfig,
    /// The most inodes that the guest may hold at a time, known of, open or locked, 1 to 2^20, each a descriptor of the monitor:
    /// by default 2^17, and less where the monitor may not have as many descriptors.
    #[serde(default)]
    pub max_inodes: Option<u64>,
    /// The most files and directories that the guest may have open, each a descriptor as well: by default 2^14.
    #[serde(default)]
    pub max_handles: Option<u64>,
    /// How much may be moved: requests and their data. What is over it waits in the guest.
    #[serde(default)]
    pub limits: Option<LimitsConfig>,
}

impl FilesystemConfig {
    /// How many inodes the guest may hold.
    #[must_use]
    pub fn inodes(&self) -> u64 {
        self.max_inodes.unwrap_or(INODES)
    }

    /// How many files and directories it may have open.
    #[must_use]
    pub fn handles(&self) -> u64 {
        self.max_handles.unwrap_or(HANDLES)
    }

    /// How many descriptors the monitor needs for it: what the guest holds, and the files by which waits for locks go on that a
    /// reset has called off.
    #[must_use]
    pub fn descriptors(&self) -> u64 {
        self.inodes() + self.handles() + LOCK_OWNERS + u64::from(LOCK_WAITERS)
    }

    /// How many threads the monitor has for it.
    #[must_use]
    pub fn threads() -> u32 {
        1 + LOCK_WAITERS
    }
}

/// What a guest may keep of what it has seen, when others can change it meanwhile.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CachePolicy {
    /// Nothing: every access goes to the host.
    Never,
    /// Names and attributes for a second; data until the file is opened again or seen to have changed.
    #[default]
    Auto,
    /// Everything: for exports that nobody else changes.
    Always,
}

/// Whom a guest's locks concern.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LockScope {
    /// Everybody who uses the files: other VMs, programs of the host.
    #[default]
    Shared,
    /// The guest's own programs.
    Local,
}

/// How owners on the host and in the guest go together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OwnershipConfig {
    /// The monitor acts as the owner of what is exported, if root started it, else as its caller: what is created belongs to
    /// that user. The guest sees everything as belonging to this user of its own.
    Squash {
        /// The user's number in the guest.
        uid: u32,
        /// Its group's.
        gid: u32,
    },
    /// The guest's numbers are the host's, below 251,658,240, and its root can do to the files what the host's can. Only where root
    /// started the monitor.
    Mapped,
}

impl Default for OwnershipConfig {
    fn default() -> Self {
        Self::Squash { uid: 0, gid: 0 }
    }
}

/// How much a guest may add. What is not given is not limited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuotaConfig {
    /// Bytes on the disk; each inode counts 4096 besides its data.
    #[serde(default)]
    pub bytes: Option<u64>,
    /// Files, directories and others.
    #[serde(default)]
    pub inodes: Option<u64>,
}

/// Checks the file systems of a VM.
pub(super) fn check(filesystems: &[FilesystemConfig]) -> Result<(), ConfigError> {
    within("the number of filesystems", filesystems.len() as u64, 0, FILESYSTEMS_MAX as u64)?;
    let mut tags = HashSet::new();
    for FilesystemConfig { tag, name, max_inodes, max_handles, limits, .. } in filesystems {
        within("the length of a file system's tag", tag.len() as u64, 1, TAG_MAX)?;
        if !tag.bytes().all(|byte| (b'!'..=b'~').contains(&byte)) {
            return Err(ConfigError::NotPrintable { field: "tag", value: tag.clone() });
        }
        if !tags.insert(tag) {
            return Err(ConfigError::Tag { tag: tag.clone() });
        }
        if let Some(name) = name
            && (name.is_empty()
                || name.len() > NAME_MAX
                || [".", ".."].contains(&&**name)
                || name.contains(['/', '\0']))
        {
            return Err(ConfigError::FileName { name: name.clone() });
        }
        for (field, value) in [("max_inodes", max_inodes), ("max_handles", max_handles)] {
            within(field, value.unwrap_or(1), 1, HELD_MAX)?;
        }
        limits.unwrap_or_default().check("file system")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(filesystems: &str) -> Result<Vec<FilesystemConfig>, ConfigError> {
        let filesystems: Vec<FilesystemConfig> = serde_json::from_str(filesystems).map_err(ConfigError::Syntax)?;
        check(&filesystems).map(|()| filesystems)
    }

    #[test]
    fn a_tag_and_a_path_are_enough_and_the_rest_is_careful() {
        let parsed = parse(r#"[{"tag":"data","path":"/srv"}]"#).unwrap();
        let squash = OwnershipConfig::Squash { uid: 0, gid: 0 };
        assert_eq!(
            (parsed[0].cache, parsed[0].locks, parsed[0].ownership),
            (CachePolicy::Auto, LockScope::Shared, squash)
        );
    }

    #[test]
    fn everything_can_be_said() {
        parse(
            r#"[{"tag":"data","path":"/etc/hosts","name":"hosts","read_only":true,"noexec":true,"cache":"never",
                "locks":"local","xattrs":true,"ownership":"mapped","quota":{"bytes":1,"inodes":2},"max_inodes":10,
                "max_handles":20,"limits":{"bytes":{"size":1,"refill_ms":1}}}]"#,
        )
        .unwrap();
        parse(r#"[{"tag":"t","path":"/","ownership":{"squash":{"uid":5,"gid":6}},"cache":"always"}]"#).unwrap();
    }

    #[test]
    fn tags_that_the_guest_could_not_name_or_tell_apart_are_refused() {
        for tag in ["", "has space", "a\\n", &"t".repeat(37)] {
            assert!(parse(&format!(r#"[{{"tag":"{tag}","path":"/"}}]"#)).is_err(), "{tag}");
        }
        let twice = r#"[{"tag":"a","path":"/a"},{"tag":"a","path":"/b"}]"#;
        assert!(matches!(parse(twice), Err(ConfigError::Tag { .. })));
    }

    #[test]
    fn names_that_are_paths_and_bounds_of_nothing_are_refused() {
        for field in [
            r#""name":"../x""#,
            r#""name":"""#,
            r#""name":"..""#,
            r#""max_inodes":0"#,
            r#""max_handles":9999999999"#,
            r#""limits":{"bytes":{"size":0,"refill_ms":1}}"#,
        ] {
            assert!(parse(&format!(r#"[{{"tag":"t","path":"/",{field}}}]"#)).is_err(), "{field}");
        }
    }
}
