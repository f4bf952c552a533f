//! Threads that serve files of the host. Each serves one file system, in an event loop of its own, since it may wait for the
//! host as long as that likes, and may do what no other thread may.
//!
//! They begin when the jail has been entered, before anything else does: they keep the capabilities that it takes to act as the
//! owners of files, which the thread that starts them drops then. Their devices come later.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use api::config::FilesystemConfig;
use devices::mmio::MmioDevice;
use fuse::{Export, ExportError, Ownership};
use rustix::io::Errno;
use thiserror::Error;

use crate::attach::filesystem;
use crate::confinement::Confinement;
use crate::own_loop;

/// Why files cannot be served.
#[derive(Debug, Error)]
pub enum FilesError {
    /// What is to be shown cannot be.
    #[error("cannot export the file system {tag:?}")]
    Export {
        /// Its tag.
        tag: String,
        /// What is wrong with it.
        #[source]
        source: ExportError,
    },
    /// The guest's users cannot be the host's.
    #[error("owners of the file system {tag:?} cannot be mapped: let root start the monitor, or squash them")]
    NotRoot {
        /// Its tag.
        tag: String,
    },
    /// The system refused a step.
    #[error("cannot {step} for the file system {tag:?}")]
    System {
        /// Its tag.
        tag: String,
        /// What was tried.
        step: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// What was taken into the jail for file systems.
#[derive(Debug)]
pub struct Taken {
    /// What leads to what they show, in their order.
    pub trees: Vec<OwnedFd>,
    /// What leads to this process's own descriptors, if there are any.
    pub descriptors: Option<OwnedFd>,
    /// Whether the owners of the files are users here, and the calling thread may act as any.
    pub owners: bool,
}

/// A file system that can be served.
#[derive(Debug)]
pub struct Served {
    /// What is shown.
    pub export: Export,
    /// Its thread.
    pub thread: FileThread,
}

/// A thread that serves files, or will when it has its device.
#[derive(Debug)]
pub struct FileThread(Sender<Work>);

/// What a thread serves, and whom it tells that it is confined.
type Work = (Arc<Mutex<MmioDevice>>, Confinement);

/// Starts a thread for each file system.
///
/// # Errors
/// [`FilesError`] names the file system.
pub fn start(filesystems: &[FilesystemConfig], taken: Taken) -> Result<Vec<Served>, FilesError> {
    let Taken { trees, descriptors, owners } = taken;
    let (Some(descriptors), all) = (descriptors, filesystems.iter().zip(trees).enumerate()) else {
        return Ok(Vec::new());
    };
    let limits = filesystem::limits(filesystems);
    let start = |(index, (config, tree)): (usize, (&FilesystemConfig, OwnedFd))| {
        let system = |step| {
            let tag = config.tag.clone();
            move |source: io::Error| FilesError::System { tag, step, source }
        };
        let stat = rustix::fs::fstat(&tree).map_err(|errno| system("look at the files")(errno.into()))?;
        let descriptors = descriptors.try_clone().map_err(system("duplicate a descriptor"))?;
        let options = filesystem::options(config, limits[index]);
        if options.ownership == Ownership::Mapped && !owners {
            return Err(FilesError::NotRoot { tag: config.tag.clone() });
        }
        let export = Export::new(filesystem::source(config, tree, &stat), options, descriptors);
        let export = export.map_err(|source| FilesError::Export { tag: config.tag.clone(), source })?;
        let thread = FileThread::start(index, options.ownership, owners.then_some((stat.st_uid, stat.st_gid)));
        Ok(Served { export, thread: thread.map_err(system("start a thread"))? })
    };
    all.map(start).collect()
}

impl FileThread {
    /// Starts a thread that acts as `owner`, or for whoever asks, and waits until it does.
    fn start(index: usize, ownership: Ownership, owner: Option<(u32, u32)>) -> io::Result<Self> {
        let (sender, works) = channel();
        let (ready, begun) = channel();
        let serve = move || {
            let prepared = fuse::prepare_thread(ownership, owner);
            let failed = prepared.is_err();
            // Somebody waits for it.
            let _ = ready.send(prepared);
            if !failed {
                run(&works);
            }
        };
        thread::Builder::new().name(format!("files {index}")).spawn(serve)?;
        let prepared: Result<Result<(), Errno>, _> = begun.recv();
        prepared.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))??;
        Ok(Self(sender))
    }

    /// Has it serve what its device's guest asks for, from now on.
    pub fn serve(self, device: Arc<Mutex<MmioDevice>>, confinement: Confinement) {
        // Fails when the thread is over, and then the process is.
        let _ = self.0.send((device, confinement));
    }
}

/// The thread of a file system device, until the process is over.
fn run(works: &Receiver<Work>) {
    // There is none when the VM was not built.
    if let Ok((device, confinement)) = works.recv() {
        own_loop::run(device, jailer::Thread::Fs, &confinement);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::path::Path;

    use rustix::fs::{CWD, Mode, OFlags, openat};

    use super::*;

    fn start_on(path: &Path, more: &str, owners: bool) -> Result<Vec<Served>, FilesError> {
        let config = format!(
            r#"{{"vm":{{"kernel":"/k","memory_mib":128,"filesystems":[{{"tag":"t","path":{path:?}{more}}}]}}}}"#
        );
        let config = api::config::LaunchConfig::parse(config.as_bytes()).unwrap().vm;
        let tree = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let descriptors = Some(fuse::descriptors().unwrap());
        start(&config.filesystems, Taken { trees: vec![tree], descriptors, owners })
    }

    #[test]
    fn what_is_neither_file_nor_directory_is_refused_by_its_tag() {
        let error = start_on(Path::new("/dev/null"), "", false).unwrap_err();
        assert!(matches!(&error, FilesError::Export { tag, .. } if tag == "t"), "{error}");
    }

    #[test]
    fn owners_are_mapped_only_where_they_are_users() {
        let folder = tempfile::tempdir().unwrap();
        let error = start_on(folder.path(), r#","ownership":"mapped""#, false).unwrap_err();
        assert!(matches!(error, FilesError::NotRoot { .. }), "{error}");
        assert_eq!(start_on(folder.path(), "", false).unwrap().len(), 1);
    }

    #[test]
    fn a_thread_that_cannot_act_as_the_owner_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let stat = rustix::fs::fstat(std::fs::File::open(folder.path()).unwrap().as_fd()).unwrap();
        // Everybody may act as himself.
        assert!(FileThread::start(0, Ownership::Squash { uid: 0, gid: 0 }, Some((stat.st_uid, stat.st_gid))).is_ok());
        let nobody = (u32::MAX, u32::MAX);
        assert!(FileThread::start(0, Ownership::Squash { uid: 0, gid: 0 }, Some(nobody)).is_err());
    }
}
