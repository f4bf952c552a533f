//! Containers set up by the real agent code on the kernel of this machine: the agent serves a Unix socket instead of a
//! vsock one, in a mount namespace of its own. Needs root, EROFS and overlayfs; limits are left to the tests in a guest,
//! since the cgroup2 hierarchy of a development machine often has no controllers.

mod calls;
mod copy;
mod exec;
mod health;
mod host;
mod hostile;
mod image;
mod life;
mod namespaces;
mod setup;

use std::env;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use host::{Host, Output};
use image::Image;

const SOCKETS: &str = "COFFERDAM_TEST_SOCKETS";

/// The agent's side: not a test, but started by each.
#[test]
#[ignore = "started by the other tests"]
fn agent_process() {
    let Some(sockets) = env::var_os(SOCKETS).map(PathBuf::from) else { return };
    for (kind, path) in [("tmpfs", "/run"), ("cgroup2", agent::container::CGROUP_MOUNT_POINT)] {
        assert!(Command::new("mount").args(["-t", kind, kind, path]).status().unwrap().success());
    }
    agent::container::make_mount_points().unwrap();
    let dial = |port: u32| -> io::Result<OwnedFd> {
        let stream = UnixStream::connect(sockets.join(port.to_string()))?;
        stream.set_nonblocking(true)?;
        Ok(stream.into())
    };
    agent::control::serve(dial(protocol::CONTROL_PORT).unwrap(), 1, dial).unwrap();
}

fn run(script: &str) -> Output {
    let image = Image::new();
    Host::new().run(&image.shell(script), b"")
}
