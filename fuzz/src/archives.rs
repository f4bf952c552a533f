//! Archives that go into and out of containers. What comes out is the guest's, and is unpacked on the host: by the
//! `cofferdam` command, which is a program and no library, so that its files are part of this crate too.

#[expect(dead_code, reason = "the command receives archives from a monitor, and passes some on as they are")]
#[path = "../../cli/src/containers/copy/archive.rs"]
mod archive;
#[path = "../../cli/src/containers/copy/unpack.rs"]
mod unpack;

use std::ffi::OsString;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;

use rustix::fs::{Mode, OFlags};
use tempfile::TempDir;

use crate::scratch;

/// What was left out of a copy, as in the command.
#[derive(Debug, Default)]
struct Skipped(usize);

impl Skipped {
    fn add(&mut self, _: &str) {
        self.0 += 1;
    }

    fn tell(&self) {}
}

thread_local! {
    static FOLDER: TempDir = scratch::folder();
}

/// What nothing may change.
const CANARY: &[u8] = b"as it was";

/// An archive of a container, unpacked here: into a directory beside which there is a file, and in which there are links
/// that lead there.
///
/// # Panics
/// Something outside of the directory has changed.
pub fn cli(bytes: &[u8]) {
    FOLDER.with(|folder| {
        let (inner, outside) = (folder.path().join("inner"), folder.path().join("outside"));
        let set_up = || {
            fs::create_dir_all(inner.join("a/there"))?;
            fs::create_dir_all(&outside)?;
            fs::write(outside.join("canary"), CANARY)?;
            symlink("../outside", inner.join("up"))?;
            symlink(&outside, inner.join("a/away"))
        };
        set_up().expect("files in memory can be made");
        for to in [Some(OsString::from("a")), None] {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let opened: OwnedFd = rustix::fs::open(&inner, flags, Mode::empty()).expect("a folder can be opened");
            let _ = unpack::unpack(bytes, opened, unpack::Names { from: "a".to_owned(), to });
        }
        let canary = fs::read(outside.join("canary")).expect("the file outside was removed");
        assert_eq!(canary, CANARY, "the file outside was changed");
        assert_eq!(fs::read_dir(&outside).expect("a folder can be read").count(), 1, "there is more outside");
        assert_eq!(fs::read_dir(folder.path()).expect("a folder can be read").count(), 2, "there is more beside");
        fs::remove_dir_all(&inner).expect("what was unpacked can be removed");
    });
}

/// An archive for a container, as its agent reads it.
pub fn agent(bytes: &[u8]) {
    let entries = agent::fuzzing::read_archive(bytes);
    assert!(entries <= bytes.len() / 512, "an archive has more entries than blocks");
}
