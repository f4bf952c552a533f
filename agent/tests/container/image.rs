//! Images for containers.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use protocol::container::{
    ContainerSpec, DEFAULT_CAPABILITIES, DEFAULT_MASKED_PATHS, DEFAULT_READONLY_PATHS, File, Limits, Namespaces,
    ProcessSpec, Rootfs, Seccomp, Stdio as Ports,
};
use tempfile::TempDir;

/// What busybox is called in the image.
const APPLETS: [&str; 33] = [
    "sh", "cat", "echo", "env", "id", "ls", "true", "sleep", "stty", "dd", "head", "wc", "mount", "grep", "kill", "ln",
    "mkdir", "touch", "seq", "stat", "readlink", "find", "chmod", "chown", "mkfifo", "rm", "mv", "setsid", "ifconfig",
    "ipcs", "hostname", "tr", "mknod",
];

/// An image with busybox and a few traps.
pub struct Image {
    _directory: TempDir,
    file: PathBuf,
}

impl Image {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&Path)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        for path in ["bin", "etc", "root", "home/app", "tmp"] {
            fs::create_dir_all(root.join(path)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        for name in APPLETS {
            symlink("busybox", root.join("bin").join(name)).unwrap();
        }
        let passwd = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n";
        fs::write(root.join("etc/passwd"), passwd).unwrap();
        fs::write(root.join("etc/group"), "root:x:0:\napp:x:1001:\naudio:x:29:app\n").unwrap();
        fs::write(root.join("bin/not-executable"), "x").unwrap();
        fs::write(root.join("bin/no-format"), "\0").unwrap();
        fs::write(root.join("bin/no-interpreter"), "#!/nope\n").unwrap();
        for name in ["no-format", "no-interpreter"] {
            fs::set_permissions(root.join("bin").join(name), PermissionsExt::from_mode(0o755)).unwrap();
        }
        change(&root);
        let file = directory.path().join("image.erofs");
        let made = Command::new("mkfs.erofs").args([&file, &root]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        assert!(made.unwrap().success());
        Self { _directory: directory, file }
    }

    pub fn spec(&self, id: &str, args: &[&str]) -> ContainerSpec {
        ContainerSpec {
            id: id.into(),
            hostname: "box".into(),
            rootfs: Rootfs { device: self.file.to_str().unwrap().into(), read_only: false },
            mounts: Vec::new(),
            files: vec![File { path: "/etc/hostname".into(), content: b"box\n".to_vec(), mode: 0o644 }],
            masked_paths: DEFAULT_MASKED_PATHS.map(Into::into).to_vec(),
            readonly_paths: DEFAULT_READONLY_PATHS.map(Into::into).to_vec(),
            limits: Limits::default(),
            shm_bytes: 64 << 20,
            namespaces: Namespaces::default(),
            process: process(args),
            health_check: None,
        }
    }

    pub fn shell(&self, script: &str) -> ContainerSpec {
        self.spec("c", &["sh", "-c", script])
    }
}

/// A process as docker would have it by default.
pub fn process(args: &[&str]) -> ProcessSpec {
    ProcessSpec {
        args: args.iter().map(|arg| (*arg).into()).collect(),
        env: vec!["PATH=/bin".into()],
        working_directory: "/".into(),
        user: String::new(),
        additional_groups: Vec::new(),
        capabilities: DEFAULT_CAPABILITIES,
        rlimits: Vec::new(),
        no_new_privileges: false,
        seccomp: Seccomp::Default,
        oom_score_adj: 0,
        terminal: None,
        stdio: Ports::default(),
    }
}

/// A process that interprets a script.
pub fn script(script: &str) -> ProcessSpec {
    process(&["sh", "-c", script])
}
