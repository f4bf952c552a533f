//! Documents and messages as they are in order, for seeds and for targets that need some to begin with.

use api::config::{ContainerConfig, JailConfig, LaunchConfig};
use protocol::container::{ContainerSpec, Limits, Namespaces, ProcessSpec, Rootfs, Seccomp, Stdio};
use protocol::{Hello, MAGIC, VERSION};
use runtime::record::Record;
use runtime::spec;

/// A container's id.
pub const ID: &str = "0123456789abcdef0123456789abcdef";

/// An agent's first words.
pub fn hello() -> Hello {
    Hello { magic: MAGIC, version: VERSION, started_us: 1, ready_us: 2 }
}

/// A container.
pub fn container(id: &str) -> ContainerSpec {
    ContainerSpec {
        id: id.to_owned(),
        hostname: "web".to_owned(),
        rootfs: Rootfs { device: "/dev/vda".to_owned(), read_only: false },
        mounts: Vec::new(),
        files: Vec::new(),
        masked_paths: vec!["/proc/kcore".to_owned()],
        readonly_paths: Vec::new(),
        limits: Limits::default(),
        namespaces: Namespaces::default(),
        shm_bytes: 64 << 20,
        process: process(),
        health_check: None,
    }
}

/// A process.
pub fn process() -> ProcessSpec {
    ProcessSpec {
        args: vec!["sh".to_owned()],
        env: vec!["A=b".to_owned()],
        working_directory: "/".to_owned(),
        user: String::new(),
        additional_groups: Vec::new(),
        capabilities: 0,
        rlimits: Vec::new(),
        no_new_privileges: true,
        seccomp: Seccomp::Default,
        oom_score_adj: 0,
        terminal: None,
        stdio: Stdio::default(),
    }
}

/// What a monitor is started with.
pub fn launch_config() -> LaunchConfig {
    LaunchConfig {
        vm: spec::vm((2, 128), "/kernel".into(), "/initramfs".into(), 3),
        container: Some(container_config(ID)),
        folder: None,
        restart: None,
        jail: JailConfig::default(),
    }
}

/// A container and how it is run.
pub fn container_config(id: &str) -> ContainerConfig {
    ContainerConfig { spec: container(id), stdin: false, stdin_once: false, wait_for_attach: false }
}

/// What a container was made from.
pub fn record() -> Record {
    Record {
        id: ID.to_owned(),
        name: Some("web".to_owned()),
        image: "web:1".to_owned(),
        image_id: "sha256:00".to_owned(),
        created_ns: 1,
        auto_remove: false,
        stop_signal: 15,
        restart: None,
        labels: vec![("a".to_owned(), "b".to_owned())],
        vcpus: 1,
        memory_mib: 128,
        kernel: None,
        waits: false,
        container: container_config(ID),
        damage: None,
    }
}
