//! From a request and an image to the document that a monitor is started with: every default is filled in here, and
//! everything the host can check is checked before anything is started.

use std::path::PathBuf;

use api::config::{ContainerConfig, DriveConfig, DriveFile, VmConfig};
use image::ImageConfig;
use protocol::container::{
    ContainerSpec, DEFAULT_MASKED_PATHS, DEFAULT_READONLY_PATHS, File, Limits, Namespaces, ProcessSpec, Rlimit, Rootfs,
    Seccomp, Stdio, WindowSize,
};
use rustix::rand::{GetRandomFlags, getrandom};
use thiserror::Error;

use crate::capability;
use crate::health;
use crate::merge::{self, MergeError};
use crate::request::{RunRequest, SecurityOption};
use crate::size::Sizes;

/// Tasks in a container when no limit is asked for: a fork bomb ends here, as under podman.
const DEFAULT_PIDS: u64 = 2048;

/// `/dev/shm` when no size is asked for, as docker and podman have it.
const DEFAULT_SHM: u64 = 64 << 20;

/// The open files a process may have: what the daemons of docker and podman hand down.
const DEFAULT_NOFILE: Rlimit = Rlimit { resource: 7, soft: 1 << 20, hard: 1 << 20 };

/// Processes of one user: the cgroup's limit is the one that counts.
const DEFAULT_NPROC: Rlimit = Rlimit { resource: 6, soft: u64::MAX, hard: u64::MAX };

/// The longest name that uname(2) holds.
const HOSTNAME_MAX: usize = 64;

/// How many characters of an id name a container where it is shown.
const SHORT_ID: usize = 12;

/// Why a request was refused.
#[derive(Debug, Error)]
pub enum SpecError {
    /// A hostname that is none.
    #[error(
        "the hostname {name:?} is not 1 to {HOSTNAME_MAX} letters, digits, dots and hyphens, beginning with a letter or digit"
    )]
    Hostname {
        /// What was given.
        name: String,
    },
    /// A name that is none.
    #[error("the name {name:?} is not 2 to 64 of [a-zA-Z0-9_.-], beginning with a letter or digit")]
    Name {
        /// What was given.
        name: String,
    },
}

/// A container's id: 32 hexadecimal digits, chosen at random.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerId(String);

impl ContainerId {
    /// The number of its digits.
    pub(crate) const LENGTH: usize = 32;

    /// A new one.
    ///
    /// # Errors
    /// The kernel's random numbers are not ready, early in boot.
    pub fn generate() -> std::io::Result<Self> {
        let mut bytes = [0u8; Self::LENGTH / 2];
        getrandom(&mut bytes, GetRandomFlags::empty())?;
        Ok(Self(format!("{:032x}", u128::from_ne_bytes(bytes))))
    }

    /// The whole id.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first [`SHORT_ID`] digits, as shown to people and used as the hostname.
    pub fn short(&self) -> &str {
        &self.0[..SHORT_ID]
    }
}

/// The VM of so many vCPUs and MiB of memory.
pub fn vm((vcpus, memory_mib): (u8, u32), kernel: PathBuf, initramfs: PathBuf, image: i32) -> VmConfig {
    VmConfig {
        kernel,
        initramfs: Some(initramfs),
        command_line: String::new(),
        vcpus,
        memory_mib,
        memory_max_mib: None,
        drives: vec![DriveConfig { file: DriveFile::Descriptor(image), read_only: true, limits: None }],
        networks: Vec::new(),
        pmem: Vec::new(),
        filesystems: Vec::new(),
        // Each device is probed while the guest boots, and a page that is given back faults when it is wanted again.
        balloon: false,
        // A guest finds its devices faster without the devicetree that this is in.
        generation_id: false,
        vsock: Vec::new(),
        vsock_socket: None,
        vsock_limits: None,
        entropy_limits: None,
        console_limits: None,
        serial: false,
    }
}

/// The container for a request. `lookup` is the caller's environment, `window` the first size of the container's
/// terminal, if it has one.
///
/// # Errors
/// Request and image together make no process.
pub fn container(
    id: &ContainerId,
    request: &RunRequest,
    image: &ImageConfig,
    sizes: Sizes,
    window: Option<WindowSize>,
    lookup: impl Fn(&str) -> Option<String>,
) -> Result<ContainerSpec, MergeError> {
    let hostname = request.hostname.clone().unwrap_or_else(|| id.short().to_owned());
    let process = merge::merge(request, image, &hostname, lookup)?;
    let process = ProcessSpec {
        args: process.args,
        env: process.env,
        working_directory: process.working_directory,
        user: process.user,
        additional_groups: request.groups.clone(),
        capabilities: capability::resolve(&request.capabilities_added, &request.capabilities_dropped),
        rlimits: rlimits(request),
        no_new_privileges: no_new_privileges(request),
        seccomp: seccomp(request),
        oom_score_adj: 0,
        terminal: window,
        stdio: Stdio::default(),
    };
    Ok(ContainerSpec {
        id: id.as_str().to_owned(),
        rootfs: Rootfs { device: "/dev/vda".to_owned(), read_only: request.read_only },
        mounts: request.tmpfs.iter().map(|tmpfs| tmpfs.0.clone()).collect(),
        files: files(&hostname),
        hostname,
        masked_paths: DEFAULT_MASKED_PATHS.map(str::to_owned).to_vec(),
        readonly_paths: DEFAULT_READONLY_PATHS.map(str::to_owned).to_vec(),
        limits: Limits {
            memory_bytes: Some(sizes.memory_limit),
            pids: request.pids.map_or(Some(DEFAULT_PIDS), |limit| limit.0),
            cpu_quota_us: sizes.cpu_quota_us,
        },
        namespaces: Namespaces::default(),
        shm_bytes: request.shm_bytes.unwrap_or(DEFAULT_SHM),
        process,
        health_check: health::check(request, image)?,
    })
}

/// A container that nothing is known of but its id.
pub(crate) fn nothing(id: &str) -> ContainerConfig {
    let process = ProcessSpec {
        args: Vec::new(),
        env: Vec::new(),
        working_directory: String::new(),
        user: String::new(),
        additional_groups: Vec::new(),
        capabilities: 0,
        rlimits: Vec::new(),
        no_new_privileges: true,
        seccomp: Seccomp::Default,
        oom_score_adj: 0,
        terminal: None,
        stdio: Stdio::default(),
    };
    let spec = ContainerSpec {
        id: id.to_owned(),
        hostname: String::new(),
        rootfs: Rootfs { device: String::new(), read_only: true },
        mounts: Vec::new(),
        files: Vec::new(),
        masked_paths: Vec::new(),
        readonly_paths: Vec::new(),
        limits: Limits::default(),
        namespaces: Namespaces::default(),
        shm_bytes: 0,
        process,
        health_check: None,
    };
    ContainerConfig { spec, stdin: false, stdin_once: false, wait_for_attach: false }
}

/// Checks a `--name`.
///
/// # Errors
/// [`SpecError::Name`].
pub fn check_name(name: &str) -> Result<(), SpecError> {
    let legal = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if (2..=64).contains(&name.len()) && legal && name.as_bytes()[0].is_ascii_alphanumeric() {
        return Ok(());
    }
    Err(SpecError::Name { name: name.to_owned() })
}

/// Checks a `--hostname`.
///
/// # Errors
/// [`SpecError::Hostname`].
pub fn check_hostname(name: &str) -> Result<(), SpecError> {
    let legal = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte));
    if (1..=HOSTNAME_MAX).contains(&name.len()) && legal && name.as_bytes()[0].is_ascii_alphanumeric() {
        return Ok(());
    }
    Err(SpecError::Hostname { name: name.to_owned() })
}

fn rlimits(request: &RunRequest) -> Vec<Rlimit> {
    let mut limits = vec![DEFAULT_NOFILE, DEFAULT_NPROC];
    for asked in request.ulimits.iter().map(|ulimit| ulimit.0) {
        limits.retain(|limit| limit.resource != asked.resource);
        limits.push(asked);
    }
    limits
}

fn no_new_privileges(request: &RunRequest) -> bool {
    let asked = request.security.iter().rev().find_map(|option| match option {
        SecurityOption::NoNewPrivileges(on) => Some(*on),
        _ => None,
    });
    asked.unwrap_or(false)
}

fn seccomp(request: &RunRequest) -> Seccomp {
    let asked = request.security.iter().rev().find_map(|option| match option {
        SecurityOption::Seccomp(profile) => Some(*profile),
        _ => None,
    });
    asked.unwrap_or(Seccomp::Default)
}

/// The files that name the container. There is no network but the loopback interface, so the resolver is told of no
/// server: it then fails at once instead of waiting for one.
fn files(hostname: &str) -> Vec<File> {
    let hosts = format!(
        "127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::\tip6-localnet\n\
         ff00::\tip6-mcastprefix\n\
         ff02::1\tip6-allnodes\n\
         ff02::2\tip6-allrouters\n\
         127.0.1.1\t{hostname}\n"
    );
    let file = |path: &str, content: String| File { path: path.to_owned(), content: content.into_bytes(), mode: 0o644 };
    vec![
        file("/etc/hosts", hosts),
        file("/etc/hostname", format!("{hostname}\n")),
        file("/etc/resolv.conf", "# this container has no network\n".to_owned()),
    ]
}

#[cfg(test)]
mod tests {
    use api::config::{JailConfig, LaunchConfig};

    use super::*;
    use crate::size::{Host, MIB};

    const HOST: Host = Host { cpus: 4, memory: 4 << 30 };
    const WINDOW: WindowSize = WindowSize { rows: 24, columns: 80 };

    fn sizes(request: &RunRequest) -> Sizes {
        Sizes::new(request.cpus, request.memory, HOST).unwrap()
    }

    fn spec_of(request: &RunRequest) -> ContainerSpec {
        let image = ImageConfig { cmd: vec!["sh".into()], ..ImageConfig::default() };
        let id = ContainerId::generate().unwrap();
        container(&id, request, &image, sizes(request), request.terminal.then_some(WINDOW), |_| None).unwrap()
    }

    #[test]
    fn ids_are_new_each_time_and_name_the_host() {
        let (one, other) = (ContainerId::generate().unwrap(), ContainerId::generate().unwrap());
        assert_ne!(one, other);
        assert_eq!((one.as_str().len(), one.short().len()), (32, 12));
        let spec = spec_of(&RunRequest::default());
        assert_eq!(spec.hostname, spec.id[..12]);
        assert!(spec.process.env.contains(&format!("HOSTNAME={}", spec.hostname)));
    }

    #[test]
    fn the_defaults_are_those_of_docker() {
        let spec = spec_of(&RunRequest::default());
        assert_eq!(spec.limits, Limits { memory_bytes: Some(440 * MIB), pids: Some(2048), cpu_quota_us: None });
        assert_eq!(spec.shm_bytes, 64 << 20);
        // The monitor chooses the streams' ports.
        assert_eq!(spec.process.stdio, Stdio::default());
        assert!(spec.process.terminal.is_none() && !spec.process.no_new_privileges && !spec.rootfs.read_only);
        assert_eq!(spec.process.rlimits[0], DEFAULT_NOFILE);
    }

    #[test]
    fn a_terminal_begins_with_the_size_of_the_callers() {
        let spec = spec_of(&RunRequest { terminal: true, interactive: true, ..RunRequest::default() });
        assert_eq!(spec.process.terminal, Some(WindowSize { rows: 24, columns: 80 }));
    }

    #[test]
    fn what_is_asked_replaces_the_default() {
        let request = RunRequest {
            ulimits: vec!["nofile=10".parse().unwrap(), "nofile=20:30".parse().unwrap()],
            security: vec!["no-new-privileges".parse().unwrap(), "seccomp=unconfined".parse().unwrap()],
            pids: Some("-1".parse().unwrap()),
            hostname: Some("box.example".into()),
            ..RunRequest::default()
        };
        let spec = spec_of(&request);
        let nofile: Vec<_> = spec.process.rlimits.iter().filter(|limit| limit.resource == 7).collect();
        assert_eq!(nofile, [&Rlimit { resource: 7, soft: 20, hard: 30 }]);
        assert!(spec.process.no_new_privileges);
        assert_eq!((spec.process.seccomp, spec.limits.pids), (Seccomp::Unconfined, None));
        assert_eq!(spec.files[1].content, b"box.example\n");
    }

    #[test]
    fn the_document_is_one_that_a_monitor_takes() {
        let request = RunRequest { cpus: Some("1.5".parse().unwrap()), ..RunRequest::default() };
        let sizes = sizes(&request);
        let vm = vm((sizes.vcpus, sizes.memory_mib), "/k".into(), "/i".into(), 9);
        assert_eq!((vm.vcpus, vm.memory_mib, vm.drives[0].read_only), (2, 512, true));
        let container =
            ContainerConfig { spec: spec_of(&request), stdin: false, stdin_once: false, wait_for_attach: false };
        let config =
            LaunchConfig { vm, container: Some(container), folder: None, restart: None, jail: JailConfig::default() };
        let json = serde_json::to_vec(&config).unwrap();
        assert_eq!(LaunchConfig::parse(&json).unwrap(), config);
    }

    #[test]
    fn names_and_hostnames_are_checked() {
        for name in ["", "a", "-ab", ".ab", "a/b", "../x", "a b", "\u{e4}b", &"x".repeat(65)] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        assert!(check_name("web-1.a_b").is_ok() && check_hostname("box.example").is_ok());
        for name in ["", "-x", "a b", "a\nb", &"h".repeat(65)] {
            assert!(check_hostname(name).is_err(), "{name:?}");
        }
    }
}
