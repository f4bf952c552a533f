//! A device for tests of all devices.

use fuse::{Export, Options, Server, Source};

use super::Fs;
use crate::device::VirtioDevice;

/// A device that shows an empty directory, which is not there any more.
pub fn device() -> Box<dyn VirtioDevice> {
    let folder = tempfile::tempdir().unwrap();
    let source = Source::Directory(std::fs::File::open(folder.path()).unwrap().into());
    let export = Export::new(source, Options::default(), fuse::descriptors().unwrap()).unwrap();
    Box::new(Fs::new(Server::new(export).unwrap(), "tag", 2, None).unwrap())
}
