//! Copies between a running container and the host: tar archives on a connection of their own. Everything but the
//! beginning runs in a helper that has joined the container's mount namespace, so that a path means there what it means
//! to the container's programs, and may wait for the host or for a file system as long as it takes.

mod archive;
mod error;
mod into;
mod out;

#[cfg(feature = "fuzzing")]
pub use archive::read_archive;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use protocol::{Answer, Failure};
use rustix::fs::{self, OFlags};
use rustix::io::Errno;
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use super::Container;
use super::error::SetupError;
use super::helper::{Helper, Outlet};
use super::root::Root;
use super::streams::Connection;
use crate::pids::Home;
use error::{CopyError, InStep};

/// How much of a file is held at once.
const BUFFER: usize = 64 << 10;

impl Container {
    /// Begins to write what is at `path` to a port; the outcome is the answer to the request `request`, in time.
    ///
    /// # Errors
    /// What can be said at once.
    pub fn copy_out(
        &mut self,
        request: u32,
        path: &str,
        port: u32,
        home: &Home,
        dial: &mut impl FnMut(u32) -> io::Result<OwnedFd>,
    ) -> Result<(), Failure> {
        self.copy(request, port, home, dial, |root, connection, outlet| {
            let source = out::Source::find(root, path)?;
            outlet.say(&Ok(Answer::Path(source.info())));
            // The host sees by the archive's end whether it is whole.
            source.write(connection)
        })
    }

    /// Begins to unpack what a port sends into the directory at `path`; the outcome is the answer to the request
    /// `request`, in time.
    ///
    /// # Errors
    /// What can be said at once.
    pub fn copy_in(
        &mut self,
        request: u32,
        path: &str,
        port: u32,
        home: &Home,
        dial: &mut impl FnMut(u32) -> io::Result<OwnedFd>,
    ) -> Result<(), Failure> {
        self.copy(request, port, home, dial, |root, mut connection, outlet| {
            into::unpack(root, path, &mut connection)?;
            outlet.say(&Ok(Answer::Done));
            // Padding behind the archive's end: who sends it should not meet a closed connection.
            io::copy(&mut connection, &mut io::sink()).in_step("read what follows the archive").map(drop)
        })
    }

    fn copy(
        &mut self,
        request: u32,
        port: u32,
        home: &Home,
        dial: &mut impl FnMut(u32) -> io::Result<OwnedFd>,
        work: impl FnOnce(&Root, File, &Outlet) -> Result<(), CopyError>,
    ) -> Result<(), Failure> {
        self.check_running()?;
        let connection = Connection::begin(port, dial).map_err(|error| error.failure())?;
        let kept = [connection.as_fd(), self.first_process.as_fd()];
        let helper = Helper::fork((request, "the copy"), home, &kept, |kept, outlet| {
            let copied = enter(kept, port).and_then(|(root, connection)| work(&root, connection, outlet));
            copied.map(|()| Answer::Done).map_err(|error| error.failure())
        });
        self.helpers.push(helper.map_err(|error| error.failure())?);
        Ok(())
    }
}

/// Joins the container's mount namespace and waits for the connection.
fn enter(kept: Vec<OwnedFd>, port: u32) -> Result<(Root, File), CopyError> {
    let [connection, first] =
        <[OwnedFd; 2]>::try_from(kept).map_err(|_| Errno::BADF).in_step("take the copy's descriptors over")?;
    move_into_thread_name_spaces(first.as_fd(), ThreadNameSpaceType::MOUNT)
        .in_step("join the container's mount namespace")?;
    let root = Root::of_process().in_step("open the container's root directory")?;
    crate::sys::wait_connected(connection.as_fd()).map_err(|source| SetupError::Dial { port, source })?;
    let step = "make the connection blocking";
    let flags = fs::fcntl_getfl(&connection).in_step(step)?;
    fs::fcntl_setfl(&connection, flags - OFlags::NONBLOCK).in_step(step)?;
    Ok((root, connection.into()))
}
