//! A device for tests of all devices, and messages for it.

use fuse::{Export, Options, Server, Source};
use fuse_abi::linux::{self as abi, fuse_opcode};
use tempfile::TempDir;
use zerocopy::{FromZeros as _, IntoBytes as _};

use super::Fs;
use crate::device::VirtioDevice;

/// A device that shows an empty directory, which is not there any more.
pub fn device() -> Box<dyn VirtioDevice> {
    device_of(&tempfile::tempdir().unwrap(), 2)
}

/// A device that shows a directory.
pub fn device_of(folder: &TempDir, request_queues: usize) -> Box<Fs> {
    let source = Source::Directory(std::fs::File::open(folder.path()).unwrap().into());
    let export = Export::new(source, Options::default(), fuse::descriptors().unwrap()).unwrap();
    Box::new(Fs::new(Server::new(export).unwrap(), "tag", request_queues, None).unwrap())
}

/// A request's bytes.
pub fn message(opcode: fuse_opcode, nodeid: u64, body: &[u8]) -> Vec<u8> {
    let mut header = abi::fuse_in_header::new_zeroed();
    (header.len, header.opcode, header.unique, header.nodeid) = (40 + body.len() as u32, opcode as u32, 7, nodeid);
    [header.as_bytes(), body].concat()
}

/// The body of a request that begins a session.
pub fn init() -> Vec<u8> {
    let mut init = abi::fuse_init_in::new_zeroed();
    (init.major, init.minor, init.flags) = (7, 40, u32::MAX);
    init.as_bytes().to_vec()
}
