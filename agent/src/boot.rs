//! From the kernel's hand-over to a machine that containers can live on, and back to nothing.
//!
//! The kernel starts the agent in an initramfs that holds nothing but the agent. No mount can be moved into the place
//! of an initramfs (pivot_root(2)), so the agent first puts a tmpfs on top of it, and containers leave that one behind.

use std::io;

use rustix::fs::{self, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MountFlags, mount, mount_remount};
use rustix::process::{Resource, Rlimit, chroot, fchdir, setrlimit};
use rustix::system::{RebootCommand, reboot};
use thiserror::Error;

use crate::container::{self, filesystem};
use crate::{network, sys};

const CLOSED: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC).union(MountFlags::NODEV);

/// The directories of the agent's root.
const DIRECTORIES: [&str; 4] = ["dev", "proc", "run", "sys"];

/// What is mounted below the agent's root: path, type, flags.
const MOUNTS: [(&str, &str, MountFlags); 4] = [
    ("/dev", "devtmpfs", MountFlags::NOSUID.union(MountFlags::NOEXEC)),
    ("/proc", "proc", CLOSED),
    ("/sys", "sysfs", CLOSED),
    (container::CGROUP_MOUNT_POINT, "cgroup2", CLOSED),
];

/// The most files that the agent may have open: the kernel's own limit (`fs.nr_open`).
const FILES_MAX: u64 = 1 << 20;

/// The step of the preparation that the kernel refused.
#[derive(Debug, Error)]
#[error("cannot {step}")]
pub struct BootError {
    step: &'static str,
    #[source]
    source: io::Error,
}

trait Step<T> {
    fn step(self, step: &'static str) -> Result<T, BootError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &'static str) -> Result<T, BootError> {
        self.map_err(|error| BootError { step, source: error.into() })
    }
}

/// Prepares the machine. Once, before anything else.
///
/// # Errors
/// The step that the kernel refused.
pub fn prepare() -> Result<(), BootError> {
    let options = [("mode", "755"), ("size", "1m")];
    let root =
        filesystem::create("tmpfs", "tmpfs", &options, MountAttrFlags::empty()).step("create the agent's root")?;
    for name in DIRECTORIES {
        fs::mkdirat(&root, name, Mode::from_raw_mode(0o755)).step("make a directory in the agent's root")?;
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let initramfs = fs::open("/", flags, Mode::empty()).step("open the initramfs")?;
    // The agent's own program is there, and what is executed in a container can name it (`/proc/self/exe`).
    // By mount(2): mount_setattr(2) takes the root of all mounts since Linux 6.8 alone.
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY, "").step("close the initramfs for writing")?;
    filesystem::attach(&root, &initramfs).step("mount the agent's root")?;
    fchdir(&root).step("enter the agent's root")?;
    chroot(".").step("change to the agent's root")?;
    for (path, kind, flags) in MOUNTS {
        // One of the four: the step that fails says which in the kernel's own log.
        mount(kind, path, kind, flags, None).step("mount devtmpfs, proc, sysfs and cgroup2")?;
    }
    open_standard_streams().step("open the standard streams")?;
    // Each process takes a few. Containers have a limit of their own in their definition.
    let files = Rlimit { current: Some(FILES_MAX), maximum: Some(FILES_MAX) };
    setrlimit(Resource::Nofile, files).step("allow more open files")?;
    container::make_mount_points().step("make the mount points of containers")?;
    container::enable_controllers().step("enable the controllers of cgroup2")?;
    network::set_defaults().step("set the defaults of the network")?;
    sys::bring_loopback_up().step("bring the loopback interface up")
}

/// The kernel opens /dev/console as the first three descriptors, but not when the machine has no console. Other files
/// must not end up there, and errors still have the kernel's log to go to.
fn open_standard_streams() -> Result<(), Errno> {
    loop {
        let file = fs::open("/dev/kmsg", OFlags::RDWR, Mode::empty())?;
        if sys::leave_open_if_standard(file) {
            continue;
        }
        return Ok(());
    }
}

/// Ends the machine. The kernel's command line makes a restart a triple fault, which the monitor takes as the end.
pub fn power_off() -> ! {
    fs::sync();
    let error = reboot(RebootCommand::Restart);
    // Refused only without the privilege that the first process of a machine has. Leaving instead makes the kernel
    // panic, which ends the machine as well.
    eprintln!("cofferdam-agent: cannot restart the machine: {error:?}");
    sys::exit(1)
}
