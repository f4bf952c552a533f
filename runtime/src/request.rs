//! What a user asks for in `run`, read from the command line word by word but not yet against an image or a host.

use std::path::PathBuf;
use std::str::FromStr;

use api::config::RestartPolicy;
use protocol::container::{Mount, MountSource, Rlimit, Seccomp};
use thiserror::Error;

use crate::capability::Capability;
use crate::health::HealthRequest;
use crate::size::{Bytes, Cpus, SizeError};

/// One container to run. The fields are docker's flags of the same names.
#[derive(Debug, Clone, Default)]
pub struct RunRequest {
    /// `--name`.
    pub name: Option<String>,
    /// `--hostname`.
    pub hostname: Option<String>,
    /// The words after the image.
    pub command: Vec<String>,
    /// `--entrypoint`; empty for none at all.
    pub entrypoint: Option<String>,
    /// `--env-file` and `--env`, in the order in which later ones win.
    pub environment: Vec<EnvEntry>,
    /// `--workdir`.
    pub working_directory: Option<String>,
    /// `--user`.
    pub user: Option<String>,
    /// `--group-add`.
    pub groups: Vec<String>,
    /// `--interactive`: whether standard input reaches the container.
    pub interactive: bool,
    /// `--tty`.
    pub terminal: bool,
    /// `--read-only`.
    pub read_only: bool,
    /// `--tmpfs`.
    pub tmpfs: Vec<Tmpfs>,
    /// `--cpus`.
    pub cpus: Option<Cpus>,
    /// `--memory`, in bytes.
    pub memory: Option<u64>,
    /// `--shm-size`, in bytes.
    pub shm_bytes: Option<u64>,
    /// `--pids-limit`.
    pub pids: Option<PidsLimit>,
    /// `--ulimit`.
    pub ulimits: Vec<Ulimit>,
    /// `--cap-add`.
    pub capabilities_added: Vec<Capability>,
    /// `--cap-drop`.
    pub capabilities_dropped: Vec<Capability>,
    /// `--security-opt`.
    pub security: Vec<SecurityOption>,
    /// `--kernel`.
    pub kernel: Option<PathBuf>,
    /// Which verb asks for it.
    pub way: Way,
    /// Whether it goes when it ends.
    pub remove: bool,
    /// Whether it is started again when it has ended.
    pub restart: Restart,
    /// The signal that asks its program to end.
    pub stop_signal: Option<SignalName>,
    /// Labels.
    pub labels: Vec<(String, String)>,
    /// Whether the image's health check is left out.
    pub no_healthcheck: bool,
    /// `--health-cmd` and its like.
    pub health: HealthRequest,
}

/// The ways in which a container is asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Way {
    /// `run`: the command is its front end.
    #[default]
    Foreground,
    /// `run -d`: it is started and left alone.
    Detached,
    /// `create`: it is started later.
    Created,
}

/// Why a word of the request was refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RequestError {
    /// An environment entry without a name.
    #[error("{text:?} is not an environment variable: give NAME=value or NAME")]
    Environment {
        /// What was given.
        text: String,
    },
    /// A tmpfs that is not mounted at an absolute path.
    #[error("the tmpfs path {path:?} is not an absolute path below /: give for example /tmp")]
    TmpfsPath {
        /// What was given.
        path: String,
    },
    /// An option of a tmpfs that is unknown.
    #[error(
        "the tmpfs option {option:?} is not known: give any of rw, ro, exec, noexec, suid, nosuid, dev, nodev, size=BYTES, mode=OCTAL"
    )]
    TmpfsOption {
        /// What was given.
        option: String,
    },
    /// A limit that is unknown.
    #[error("{name:?} is not a resource limit: give one of {}", Ulimit::names())]
    UlimitName {
        /// What was given.
        name: String,
    },
    /// A limit whose value is not one.
    #[error("the limit {text:?} is not NAME=SOFT[:HARD] with numbers, -1 for unlimited, and SOFT at most HARD")]
    UlimitValue {
        /// What was given.
        text: String,
    },
    /// Not a number of processes.
    #[error("{text:?} is not a number of processes: give a positive number, or -1 for no limit")]
    PidsLimit {
        /// What was given.
        text: String,
    },
    /// A security option that is unknown.
    #[error("the security option {text:?} is not known: give seccomp=unconfined or no-new-privileges")]
    SecurityOption {
        /// What was given.
        text: String,
    },
    /// A size that is none.
    #[error("{text:?} is not a signal: give a name like TERM, or a number from 1 to 64")]
    Signal {
        /// What was given.
        text: String,
    },
    /// A restart policy that is unknown.
    #[error("{text:?} is not a restart policy: give no, always, unless-stopped or on-failure[:NUMBER]")]
    Restart {
        /// What was given.
        text: String,
    },
    /// Not a time for a health check.
    #[error("{text:?} is not a time of a health check: give 0 for the default, or at least 1ms, like 30s or 1m30s")]
    Period {
        /// What was given.
        text: String,
    },
    /// An amount.
    #[error(transparent)]
    Size(#[from] SizeError),
}

/// A change of the environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EnvEntry {
    /// `NAME=value`.
    Set(String, String),
    /// `NAME`: the value it has for whoever runs the command. Without one there, the variable is removed.
    Inherit(String),
}

impl FromStr for EnvEntry {
    type Err = RequestError;

    fn from_str(text: &str) -> Result<Self, RequestError> {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (text, None),
        };
        if name.is_empty() || text.contains('\0') {
            return Err(RequestError::Environment { text: text.to_owned() });
        }
        Ok(match value {
            Some(value) => Self::Set(name.to_owned(), value.to_owned()),
            None => Self::Inherit(name.to_owned()),
        })
    }
}

/// `PATH[:OPTION,…]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tmpfs(pub Mount);

impl FromStr for Tmpfs {
    type Err = RequestError;

    fn from_str(text: &str) -> Result<Self, RequestError> {
        let (path, options) = text.split_once(':').unwrap_or((text, ""));
        let refused = || RequestError::TmpfsPath { path: path.to_owned() };
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
        if !path.starts_with('/') || parts.is_empty() || parts.contains(&"..") || path.contains('\0') {
            return Err(refused());
        }
        // Docker's defaults: a scratch directory like /tmp that runs nothing.
        let (mut read_only, mut size_bytes, mut mode, mut exec, mut dev, mut suid) =
            (false, None, 0o1777, false, false, false);
        for option in options.split(',').filter(|option| !option.is_empty()) {
            let unknown = || RequestError::TmpfsOption { option: option.to_owned() };
            match option.split_once('=') {
                None => match option {
                    "rw" => read_only = false,
                    "ro" => read_only = true,
                    "exec" => exec = true,
                    "noexec" => exec = false,
                    "suid" => suid = true,
                    "nosuid" => suid = false,
                    "dev" => dev = true,
                    "nodev" => dev = false,
                    _ => return Err(unknown()),
                },
                Some(("size", size)) => size_bytes = Some(size.parse::<Bytes>()?.0),
                Some(("mode", octal)) => {
                    mode = u32::from_str_radix(octal, 8).ok().filter(|mode| *mode <= 0o7777).ok_or_else(unknown)?;
                }
                Some(_) => return Err(unknown()),
            }
        }
        let source = MountSource::Tmpfs { size_bytes, mode, exec, dev, suid };
        Ok(Self(Mount { destination: format!("/{}", parts.join("/")), source, read_only }))
    }
}

/// `NAME=SOFT[:HARD]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ulimit(pub Rlimit);

/// docker's names, and the resources' numbers on Linux x86-64.
const ULIMITS: [(&str, u8); 15] = [
    ("core", 4),
    ("cpu", 0),
    ("data", 2),
    ("fsize", 1),
    ("locks", 10),
    ("memlock", 8),
    ("msgqueue", 12),
    ("nice", 13),
    ("nofile", 7),
    ("nproc", 6),
    ("rss", 5),
    ("rtprio", 14),
    ("rttime", 15),
    ("sigpending", 11),
    ("stack", 3),
];

impl Ulimit {
    fn names() -> String {
        ULIMITS.map(|(name, _)| name).join(", ")
    }
}

impl FromStr for Ulimit {
    type Err = RequestError;

    fn from_str(text: &str) -> Result<Self, RequestError> {
        let refused = || RequestError::UlimitValue { text: text.to_owned() };
        let (name, values) = text.split_once('=').ok_or_else(refused)?;
        let resource = ULIMITS.iter().find(|(known, _)| *known == name).map(|(_, resource)| *resource);
        let resource = resource.ok_or_else(|| RequestError::UlimitName { name: name.to_owned() })?;
        let value = |text: &str| match text {
            "-1" | "unlimited" => Ok(u64::MAX),
            _ => text.parse::<u64>().map_err(|_| refused()),
        };
        let (soft, hard) = match values.split_once(':') {
            Some((soft, hard)) => (value(soft)?, value(hard)?),
            None => (value(values)?, value(values)?),
        };
        if soft > hard {
            return Err(refused());
        }
        Ok(Self(Rlimit { resource, soft, hard }))
    }
}

/// A number of processes; zero and -1 are no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PidsLimit(pub Option<u64>);

impl FromStr for PidsLimit {
    type Err = RequestError;

    fn from_str(text: &str) -> Result<Self, RequestError> {
        match text.parse::<i64>() {
            Ok(-1 | 0) => Ok(Self(None)),
            Ok(limit) if limit > 0 => Ok(Self(Some(limit.unsigned_abs()))),
            _ => Err(RequestError::PidsLimit { text: text.to_owned() }),
        }
    }
}

/// One `--security-opt`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecurityOption {
    /// `seccomp=…`.
    Seccomp(Seccomp),
    /// `no-new-privileges`.
    NoNewPrivileges(bool),
    /// `apparmor=unconfined` or `label=disable`: asks that something be off which is not there.
    Nothing,
}

impl FromStr for SecurityOption {
    type Err = RequestError;

    fn from_str(text: &str) -> Result<Self, RequestError> {
        // docker takes a colon too, as it once did alone.
        match text.replacen(':', "=", 1).as_str() {
            "seccomp=unconfined" => Ok(Self::Seccomp(Seccomp::Unconfined)),
            "seccomp=default" | "seccomp=builtin" => Ok(Self::Seccomp(Seccomp::Default)),
            "no-new-privileges" | "no-new-privileges=true" => Ok(Self::NoNewPrivileges(true)),
            "no-new-privileges=false" => Ok(Self::NoNewPrivileges(false)),
            "apparmor=unconfined" | "label=disable" => Ok(Self::Nothing),
            _ => Err(RequestError::SecurityOption { text: text.to_owned() }),
        }
    }
}

/// One `--restart`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Restart(pub Option<RestartPolicy>);

impl FromStr for Restart {
    type Err = RequestError;

    fn from_str(text: &str) -> Result<Self, RequestError> {
        let policy = match text.split_once(':') {
            None => match text {
                "no" => None,
                // They differ in what a daemon does when it begins, and there is none.
                "always" | "unless-stopped" => Some(RestartPolicy::Always),
                "on-failure" => Some(RestartPolicy::OnFailure { most: None }),
                _ => return Err(RequestError::Restart { text: text.to_owned() }),
            },
            Some(("on-failure", most)) => {
                let most = most.parse().map_err(|_| RequestError::Restart { text: text.to_owned() })?;
                Some(RestartPolicy::OnFailure { most: Some(most) })
            }
            Some(_) => return Err(RequestError::Restart { text: text.to_owned() }),
        };
        Ok(Self(policy))
    }
}

/// A signal by its number on Linux x86-64, written as a name with or without `SIG`, or as the number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SignalName(pub u8);

impl FromStr for SignalName {
    type Err = RequestError;

    fn from_str(text: &str) -> Result<Self, RequestError> {
        let refused = || RequestError::Signal { text: text.to_owned() };
        if let Ok(number) = text.parse::<u8>() {
            return if (1..=64).contains(&number) { Ok(Self(number)) } else { Err(refused()) };
        }
        let name = text.to_ascii_uppercase();
        let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
        if let Some(number) = real_time(&name) {
            return Ok(Self(number));
        }
        let signal = nix::sys::signal::Signal::from_str(&name).map_err(|_| refused())?;
        u8::try_from(signal as i32).map(Self).map_err(|_| refused())
    }
}

/// `SIGRTMIN+N` and `SIGRTMAX-N` (signal(7)): 34 to 64.
fn real_time(name: &str) -> Option<u8> {
    let (base, rest) = if let Some(rest) = name.strip_prefix("SIGRTMIN") {
        (34i32, rest)
    } else {
        (64, name.strip_prefix("SIGRTMAX")?)
    };
    let offset = if rest.is_empty() { 0 } else { rest.parse::<i32>().ok()? };
    u8::try_from(base + offset).ok().filter(|number| (34..=64).contains(number))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::health::Period;

    proptest! {
        #[test]
        fn words_are_read_or_refused_and_never_a_panic(text in "\\PC{0,40}", number in "[0-9.:=,/-]{0,40}") {
            for text in [text, number] {
                _ = text.parse::<EnvEntry>();
                _ = text.parse::<PidsLimit>();
                _ = text.parse::<SecurityOption>();
                _ = text.parse::<Bytes>();
                _ = text.parse::<Period>();
                _ = text.parse::<Cpus>();
                _ = text.parse::<Capability>();
                _ = format!("nofile={text}").parse::<Ulimit>();
                if let Ok(Tmpfs(mount)) = format!("/{text}").parse() {
                    prop_assert!(mount.destination.len() > 1 && !mount.destination.split('/').any(|part| part == ".."));
                }
            }
        }
    }

    #[test]
    fn environment_entries_need_a_name() {
        assert_eq!("A=b=c".parse(), Ok(EnvEntry::Set("A".into(), "b=c".into())));
        assert_eq!("A=".parse(), Ok(EnvEntry::Set("A".into(), String::new())));
        assert_eq!("A".parse(), Ok(EnvEntry::Inherit("A".into())));
        for text in ["", "=x", "A=\0"] {
            assert!(text.parse::<EnvEntry>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_tmpfs_has_the_defaults_of_docker() {
        let plain = Mount {
            destination: "/run/app".into(),
            source: MountSource::Tmpfs { size_bytes: None, mode: 0o1777, exec: false, dev: false, suid: false },
            read_only: false,
        };
        assert_eq!("/run//app/".parse(), Ok(Tmpfs(plain.clone())));
        let source =
            MountSource::Tmpfs { size_bytes: Some(64 << 20), mode: 0o755, exec: true, dev: false, suid: false };
        assert_eq!("/run/app:rw,size=64m,exec,mode=755".parse(), Ok(Tmpfs(Mount { source, ..plain })));
    }

    #[test]
    fn a_tmpfs_is_refused_by_the_word_that_is_wrong() {
        for (text, word) in [
            ("tmp", "tmp"),
            ("/", "\"/\""),
            ("/a/../b", ".."),
            ("/a:uid=3", "uid=3"),
            ("/a:mode=9", "mode=9"),
            ("/a:size=x", "\"x\""),
        ] {
            let error = text.parse::<Tmpfs>().unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn limits_have_the_numbers_of_linux() {
        assert_eq!("nofile=1024:4096".parse(), Ok(Ulimit(Rlimit { resource: 7, soft: 1024, hard: 4096 })));
        assert_eq!("core=-1".parse(), Ok(Ulimit(Rlimit { resource: 4, soft: u64::MAX, hard: u64::MAX })));
        for text in ["nofile", "nofile=", "nofile=2:1", "files=1", "nofile=1:2:3"] {
            assert!(text.parse::<Ulimit>().is_err(), "{text}");
        }
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [("TERM", 15), ("sigkill", 9), ("10", 10), ("RTMIN+3", 37), ("SIGRTMAX", 64)] {
            assert_eq!(text.parse(), Ok(SignalName(number)), "{text}");
        }
        for text in ["", "0", "65", "SIGNONE", "RTMIN+99", "SIG"] {
            assert!(text.parse::<SignalName>().is_err(), "{text}");
        }
    }

    #[test]
    fn restart_policies_are_those_of_docker() {
        assert_eq!("no".parse(), Ok(Restart(None)));
        assert_eq!("unless-stopped".parse(), Ok(Restart(Some(RestartPolicy::Always))));
        assert_eq!("on-failure:3".parse(), Ok(Restart(Some(RestartPolicy::OnFailure { most: Some(3) }))));
        for text in ["", "on-failure:", "on-failure:-1", "always:1", "sometimes"] {
            assert!(text.parse::<Restart>().is_err(), "{text}");
        }
    }

    #[test]
    fn process_limits_and_security_options() {
        assert_eq!("-1".parse(), Ok(PidsLimit(None)));
        assert_eq!("0".parse(), Ok(PidsLimit(None)));
        assert_eq!("100".parse(), Ok(PidsLimit(Some(100))));
        assert!("-2".parse::<PidsLimit>().is_err());
        assert_eq!("no-new-privileges:true".parse(), Ok(SecurityOption::NoNewPrivileges(true)));
        assert!("seccomp=/etc/profile.json".parse::<SecurityOption>().is_err());
    }
}
