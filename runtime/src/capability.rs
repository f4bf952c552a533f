//! Capabilities by name (capabilities(7)): what `--cap-add` and `--cap-drop` make of the default set.

use std::str::FromStr;

use protocol::container::DEFAULT_CAPABILITIES;
use thiserror::Error;

/// The names without `CAP_`, in the order of their numbers on Linux.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Every capability, as a mask.
const ALL: u64 = (1 << NAMES.len()) - 1;

/// A name that is no capability.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{name:?} is not a capability: give a name of capabilities(7), for example NET_ADMIN, or ALL")]
pub struct UnknownCapability {
    /// What was given.
    name: String,
}

/// One capability, or all of them: `NET_ADMIN`, `cap_net_admin`, `ALL`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// Every capability.
    All,
    /// The one of this number, as a mask.
    One(u64),
}

impl FromStr for Capability {
    type Err = UnknownCapability;

    fn from_str(text: &str) -> Result<Self, UnknownCapability> {
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("CAP_").unwrap_or(&upper);
        if name == "ALL" {
            return Ok(Self::All);
        }
        let number = NAMES.iter().position(|known| *known == name);
        number.map(|number| Self::One(1 << number)).ok_or_else(|| UnknownCapability { name: text.to_owned() })
    }
}

/// The set that is left after additions and removals, as docker resolves them: a named addition wins over `drop ALL`,
/// a named removal over `add ALL`.
pub fn resolve(added: &[Capability], dropped: &[Capability]) -> u64 {
    let mask = |list: &[Capability]| {
        list.iter().fold(0, |mask, one| if let Capability::One(bit) = one { mask | bit } else { mask })
    };
    if added.contains(&Capability::All) {
        return ALL & !mask(dropped);
    }
    if dropped.contains(&Capability::All) {
        return mask(added);
    }
    (DEFAULT_CAPABILITIES & !mask(dropped)) | mask(added)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(names: &[&str]) -> Vec<Capability> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    #[test]
    fn names_have_their_numbers() {
        for (name, number) in [("chown", 0), ("CAP_KILL", 5), ("cap_sys_admin", 21), ("CHECKPOINT_RESTORE", 40)] {
            assert_eq!(name.parse(), Ok(Capability::One(1 << number)), "{name}");
        }
        assert_eq!("all".parse(), Ok(Capability::All));
        assert!("CAP_FLY".parse::<Capability>().unwrap_err().to_string().contains("CAP_FLY"));
    }

    #[test]
    fn additions_and_removals_resolve_as_in_docker() {
        let net_admin = 1 << 12;
        let chown = 1;
        assert_eq!(resolve(&[], &[]), DEFAULT_CAPABILITIES);
        assert_eq!(resolve(&parse(&["net_admin"]), &parse(&["chown"])), (DEFAULT_CAPABILITIES & !chown) | net_admin);
        assert_eq!(resolve(&parse(&["net_admin"]), &parse(&["all"])), net_admin);
        assert_eq!(resolve(&parse(&["all"]), &parse(&["chown"])), ALL & !chown);
        assert_eq!(resolve(&parse(&["all"]), &parse(&["all"])), ALL);
    }
}
