//! What a thread does that serves files, by the server that a monitor has: one request of each kind that needs something of the
//! jail. And what it could do with what it has, if it was taken over.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};

use fuse::testing::Bytes;
use fuse::{Export, Options, Ownership, Served, Server, Source};
use jailer::{Entered, Thread};
use rustix::fs::{FileType, Mode, OFlags, fstat, openat};

use super::Result;

/// How files are served.
pub struct How<'a> {
    /// What is exported.
    pub path: &'a str,
    /// Whether nothing can be changed.
    pub read_only: bool,
    /// Whether the guest's users are the host's.
    pub mapped: bool,
}

impl<'a> How<'a> {
    /// What words say.
    pub fn of(words: &[&'a str]) -> Result<Self> {
        let [path, how @ ..] = words else { return Err("give a path".into()) };
        Ok(Self { path, read_only: how.contains(&"ro"), mapped: how.contains(&"mapped") })
    }
}

/// A guest whose user is 1234.
struct Guest {
    server: Server,
    told: String,
}

impl Guest {
    /// Asks for something, notes how it ended, and gives the first number of the reply, if there is one.
    fn ask(&mut self, name: &str, opcode: u32, node: u64, body: &[&[u8]]) -> u64 {
        let body = body.concat();
        let user = 1234u32.to_le_bytes();
        let length = (40 + body.len() as u32).to_le_bytes();
        let head = [&length[..], &opcode.to_le_bytes(), &[0; 8], &node.to_le_bytes(), &user, &user, &[0; 8]].concat();
        let request = [head, body].concat();
        let mut message = Bytes::new(&request, 4096);
        let (error, number) = match self.server.serve(&mut message) {
            Served::Reply { reply, .. } => {
                let error = reply.get(4..8).and_then(|bytes| bytes.try_into().ok()).map_or(0, i32::from_le_bytes);
                let number = reply.get(16..24).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes);
                (-error, number)
            }
            _ => (-1, 0),
        };
        self.told += &format!("{name} {error}, ");
        number
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn numbers(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// A server for what the jail has been entered with, on the calling thread.
fn server(entered: Entered, how: &How<'_>) -> Result<Server> {
    let tree = entered.trees.into_iter().next().ok_or("there is no tree")?;
    let stat = fstat(&tree)?;
    let owner = entered.owners.then_some((stat.st_uid, stat.st_gid));
    let ownership = if how.mapped { Ownership::Mapped } else { Ownership::Squash { uid: 0, gid: 0 } };
    let source = if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        Source::Directory(tree)
    } else {
        Source::File { file: tree, name: c"given".into() }
    };
    // The tree alone is to be in the way of what is read-only.
    let options = Options { ownership, ..Options::default() };
    let server = Server::new(Export::new(source, options, entered.descriptors.ok_or("it has no descriptors")?)?)?;
    fuse::prepare_thread(ownership, owner)?;
    Ok(server)
}

/// Serves one request of each kind, and tells the errors.
pub fn serve(entered: Entered, how: &How<'_>) -> Result<String> {
    let mut guest = Guest { server: server(entered, how)?, told: String::new() };
    jailer::thread(Thread::Fs)?;
    guest.ask("init", 26, 0, &[&words(&[7, 40, 0, u32::MAX]), &[0; 48]]);
    let given = guest.ask("lookup", 1, 1, &[b"given\0"]);
    let handle = guest.ask("open", 14, given, &[&words(&[2, 0])]);
    guest.ask("write", 16, given, &[&numbers(&[handle, 0, 4, 0, 0]), b"data"]);
    let handle = guest.ask("open", 14, given, &[&words(&[0, 0])]);
    guest.ask("read", 15, given, &[&numbers(&[handle, 0, 4, 0, 0])]);
    let folder = guest.ask("mkdir", 9, 1, &[&words(&[0o755, 0]), b"folder\0"]);
    let made = guest.ask("create", 35, folder, &[&words(&[2, 0o644, 0, 0]), b"made\0"]);
    // The number of an entry that was created comes before that of the open file.
    guest.ask("chmod", 4, made, &[&words(&[1, 0]), &[0; 60], &words(&[0o600]), &[0; 16]]);
    guest.ask("truncate", 4, made, &[&words(&[8, 0]), &[0; 8], &numbers(&[4096]), &[0; 64]]);
    guest.ask("symlink", 6, folder, &[b"link\0", b"../../secret\0"]);
    guest.ask("link", 13, folder, &[&numbers(&[made]), b"hard\0"]);
    guest.ask("rename", 12, folder, &[&numbers(&[1]), b"hard\0", b"moved\0"]);
    guest.ask("fifo", 8, folder, &[&words(&[0o010_644, 0, 0, 0]), b"fifo\0"]);
    guest.ask("chown", 4, made, &[&words(&[6, 0]), &[0; 68], &words(&[4321, 4321]), &[0; 4]]);
    guest.ask("unlink", 10, folder, &[b"fifo\0"]);
    Ok(guest.told)
}

/// Tries to get at anything else, without a server: `held` is a file of the host that was opened to be read.
pub fn break_out(entered: Entered, how: &How<'_>, held: &File) -> Result<String> {
    let (tree, descriptors) = (entered.trees.first().ok_or("no tree")?.try_clone()?, entered.descriptors.as_ref());
    let descriptors = descriptors.ok_or("no descriptors")?.try_clone()?;
    let server = server(entered, how)?;
    let read = |directory: &OwnedFd, path: &str| -> std::io::Result<String> {
        let mut text = String::new();
        let file = openat(directory, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        File::from(file).read_to_string(&mut text).map(|_| text)
    };
    let mut found = Vec::new();
    for path in ["../secret", "../../../../../../etc/passwd", "link", "/etc/passwd"] {
        found.extend(read(&tree, path).map(|text| format!("{path} is {text}")));
    }
    for path in ["../status", "../../1/status", "../root/etc/passwd", "../../uptime", "../environ"] {
        found.extend(read(&descriptors, path).map(|text| format!("{path} is {text}")));
    }
    let again = openat(&descriptors, held.as_raw_fd().to_string(), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
    if again.map_err(std::io::Error::from).and_then(|file| File::from(file).write_all(b"x")).is_ok() {
        found.push("what could only be read was written".to_owned());
    }
    drop(server);
    if found.is_empty() { Err("nothing else was found".into()) } else { Ok(found.join(", ")) }
}
