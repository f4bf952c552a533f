//! What docker sets in a container's network namespace: programs that are not root's may listen on any port and ping.

use rustix::fs::{self, Mode, OFlags};
use rustix::io::Errno;

/// Settings and their values (Linux `networking/ip-sysctl`).
const SETTINGS: [(&str, &[u8]); 2] =
    [("/proc/sys/net/ipv4/ip_unprivileged_port_start", b"0"), ("/proc/sys/net/ipv4/ping_group_range", b"0 2147483647")];

/// Sets the defaults of the caller's network namespace.
///
/// # Errors
/// What the setting's file says.
pub fn set_defaults() -> Result<(), Errno> {
    SETTINGS.into_iter().try_for_each(|(path, value)| set(path, value))
}

fn set(path: &str, value: &[u8]) -> Result<(), Errno> {
    match fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(file) => rustix::io::write(file, value).map(drop),
        // A kernel without the setting has nothing to be set.
        Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error),
    }
}
