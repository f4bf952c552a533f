//! Who comes and goes in the run root (inotify(7)): the directories of containers, and in them the sockets of their monitors.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;

use api::client::SOCKET;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::sync::mpsc;

/// Changes that wait to be heard of.
const QUEUE: usize = 64;

/// What happened to a container's directory.
#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    /// A monitor is about to serve the container of this id.
    Served(String),
    /// The container of this id was removed.
    Gone(String),
}

/// Tells of changes, beginning with those after this call, from a thread of its own: it ends with the process, or after it has
/// told why it cannot go on.
pub fn changes(root: &Path) -> io::Result<mpsc::Receiver<io::Result<Change>>> {
    let notify = inotify::init(CreateFlags::CLOEXEC)?;
    let (sender, receiver) = mpsc::channel(QUEUE);
    let mut watch = Watch { notify, root: root.to_owned(), folders: HashMap::new(), sender };
    inotify::add_watch(&watch.notify, root, FOLDERS)?;
    for name in watch.names()? {
        watch.add(name)?;
    }
    let run = move || {
        if let Err(error) = watch.run() {
            _ = watch.sender.blocking_send(Err(error));
        }
    };
    thread::Builder::new().name("watch".into()).spawn(run)?;
    Ok(receiver)
}

/// What comes into a directory.
const FOLDERS: WatchFlags = WatchFlags::CREATE.union(WatchFlags::MOVED_TO).union(WatchFlags::ONLYDIR);

struct Watch {
    notify: OwnedFd,
    root: PathBuf,
    /// The names of the directories in the root that are watched.
    folders: HashMap<i32, String>,
    sender: mpsc::Sender<io::Result<Change>>,
}

impl Watch {
    fn run(&mut self) -> io::Result<()> {
        let notify = self.notify.as_fd().try_clone_to_owned()?;
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&notify, &mut buffer);
        loop {
            let event = match reader.next() {
                Err(Errno::INTR) => continue,
                event => event?,
            };
            let name = event.file_name().and_then(|name| name.to_str().ok());
            let going_on = match (self.folders.get(&event.wd()), name) {
                // Too many at once: what was lost is found by looking.
                _ if event.events().contains(ReadFlags::QUEUE_OVERFLOW) => self.look()?,
                // The kernel takes a watch away with its directory.
                (Some(_), _) if event.events().contains(ReadFlags::IGNORED) => {
                    let gone = self.folders.remove(&event.wd()).unwrap_or_default();
                    self.tell(Change::Gone(gone))
                }
                (Some(id), Some(SOCKET)) => self.tell(Change::Served(id.clone())),
                (None, Some(name)) => self.enter(name.to_owned())?,
                _ => true,
            };
            if !going_on {
                return Ok(());
            }
        }
    }

    /// Sends a change; whether anybody listens.
    fn tell(&self, change: Change) -> bool {
        self.sender.blocking_send(Ok(change)).is_ok()
    }

    fn names(&self) -> io::Result<Vec<String>> {
        Ok(fs::read_dir(&self.root)?.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
    }

    /// Watches a directory, if it is one and still there.
    fn add(&mut self, name: String) -> io::Result<()> {
        match inotify::add_watch(&self.notify, self.root.join(&name), FOLDERS) {
            Ok(watch) => _ = self.folders.insert(watch, name),
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(())
    }

    /// Watches a directory that has come, and tells of a socket that was faster than the watch.
    fn enter(&mut self, name: String) -> io::Result<bool> {
        let is_served = self.root.join(&name).join(SOCKET);
        self.add(name.clone())?;
        Ok(!is_served.exists() || self.tell(Change::Served(name)))
    }

    fn look(&mut self) -> io::Result<bool> {
        let names = self.names()?;
        let gone: Vec<i32> =
            self.folders.iter().filter(|(_, name)| !names.contains(name)).map(|(watch, _)| *watch).collect();
        for watch in gone {
            if let Some(name) = self.folders.remove(&watch)
                && !self.tell(Change::Gone(name))
            {
                return Ok(false);
            }
        }
        for name in names {
            if !self.enter(name)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn sockets_come_in_old_and_in_new_directories_and_go_with_them() {
        let root = tempfile::tempdir().unwrap();
        let (old, new) = (root.path().join("old"), root.path().join("new"));
        fs::create_dir(&old).unwrap();
        let mut changes = changes(root.path()).unwrap();
        let mut next = || changes.blocking_recv().unwrap().unwrap();
        for _ in 0..2 {
            fs::write(old.join("lock"), b"").unwrap();
            let socket = UnixListener::bind(old.join(SOCKET)).unwrap();
            assert_eq!(next(), Change::Served("old".into()));
            drop(socket);
            fs::remove_file(old.join(SOCKET)).unwrap();
        }
        fs::write(root.path().join("file"), b"").unwrap();
        fs::create_dir(&new).unwrap();
        let _socket = UnixListener::bind(new.join(SOCKET)).unwrap();
        assert_eq!(next(), Change::Served("new".into()));
        fs::remove_dir_all(&old).unwrap();
        // The socket may be told of twice: it may come between the watch and the look.
        let gone = std::iter::from_fn(|| Some(next())).find(|change| *change != Change::Served("new".into()));
        assert_eq!(gone, Some(Change::Gone("old".into())));
    }
}
