//! The end of an output stream that is inside the lab: standard input goes to a virtio-serial port.
//!
//! Linux 6.1's virtio_console loses the wake-up of a blocking write when the device consumes a full queue before the
//! driver has noted that it is full, which an emulated device often does. So the port is written without blocking, and
//! `poll`, which looks at the queue itself, waits.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;

/// The most that virtio_console takes in one write.
const PIECE: usize = 32 * 1024;

/// Copies standard input to `port` until its end and gives the number of bytes.
pub fn relay(port: &Path) -> Result<u64> {
    let mut to = open(port)?;
    let mut from = io::stdin().lock();
    let mut buffer = vec![0; PIECE];
    let mut total = 0;
    loop {
        let count = from.read(&mut buffer).context("cannot read the stream")?;
        if count == 0 {
            return Ok(total);
        }
        write(&mut to, &buffer[..count]).with_context(|| format!("cannot write to {}", port.display()))?;
        total += count as u64;
    }
}

/// Opens a port to be written to without blocking.
pub fn open(port: &Path) -> Result<File> {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).context("O_NONBLOCK does not fit")?;
    let mut options = File::options();
    options.write(true).custom_flags(flags).open(port).with_context(|| format!("cannot open {}", port.display()))
}

/// Writes all of `bytes` to what [`open`] gave.
pub fn write(to: &mut File, mut bytes: &[u8]) -> Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(0) => bail!("the port takes nothing"),
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(to, PollFlags::OUT)], None)?;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
