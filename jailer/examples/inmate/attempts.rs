//! What a monitor that was taken over might try. Each is one of the ways to get at something outside, tried by every path
//! that there is to it; the first that works is told.
#![expect(unsafe_code, reason = "a monitor that was taken over makes any system call")]

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::net::{TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, openat};

/// A system call's result.
fn call(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Tries; tells what came of it.
pub fn attempt(folder: &OwnedFd, name: &str, more: &[&str]) -> io::Result<String> {
    match (name, more) {
        // What a monitor does all the time: the other attempts fail for their own reasons, not for this one's.
        ("work", []) => work(folder),
        ("read", [path]) => read(folder, path),
        ("write", []) => write(folder),
        ("signal", [pid]) => signal(number(pid)?),
        ("trace", [pid, address]) => trace(number(pid)?, number(address)?),
        ("connect", [port, name]) => connect(port, name),
        ("socket", []) => UdpSocket::bind("127.0.0.1:0").map(|_| "it has a socket".to_owned()),
        ("mount", []) => mount(folder),
        ("privilege", []) => privilege(),
        ("execute", []) => execute(folder),
        ("call", [number_of, first]) => raw(number(number_of)?, number(first)?),
        ("memory", [mib]) => memory(number(mib)?, 0),
        ("reserve", [mib]) => memory(number(mib)?, libc::MAP_NORESERVE),
        ("fill", [mib]) => fill(folder, number(mib)?),
        ("burn", [ms]) => burn(Duration::from_millis(number(ms)?)),
        ("threads", [most]) => threads(number(most)?),
        ("files", [most]) => files(number(most)?),
        ("wait", []) => {
            rustix::io::write(io::stdout(), b"\n")?;
            // Every filter lets it wait for what nobody does.
            loop {
                thread::park();
            }
        }
        _ => Err(io::Error::other(format!("there is no attempt {name} {more:?}"))),
    }
}

fn number<T: std::str::FromStr>(word: &str) -> io::Result<T> {
    word.parse().map_err(|_| io::Error::other(format!("{word} is not a number")))
}

/// The first of some attempts that works.
fn any(attempts: impl IntoIterator<Item = io::Result<String>>) -> io::Result<String> {
    let mut refusals = Vec::new();
    for attempt in attempts {
        match attempt {
            Ok(told) => return Ok(told),
            Err(error) => refusals.push(error.to_string()),
        }
    }
    Err(io::Error::other(refusals.join(", ")))
}

fn work(folder: &OwnedFd) -> io::Result<String> {
    let mut told = String::new();
    for flags in [OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC, OFlags::RDONLY] {
        let mut file = File::from(openat(folder, "log", flags | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)?);
        if flags.contains(OFlags::WRONLY) {
            file.write_all(b"logged")?;
        } else {
            // As the log is read: without asking where the file is.
            (&mut file).take(64).read_to_string(&mut told)?;
        }
    }
    rustix::fs::renameat(folder, "log", folder, "log.1")?;
    Ok(told)
}

fn read(folder: &OwnedFd, path: &str) -> io::Result<String> {
    let up = "../".repeat(32);
    let ways =
        [path.to_owned(), format!("/proc/1/root{path}"), format!("/proc/self/root{path}"), format!("{up}{path}")];
    let opened = ways.iter().map(fs::read_to_string);
    let below = [format!("{up}{path}"), "..".to_owned()].map(|way| {
        let file = openat(folder, way.as_str(), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let (mut text, mut file) = (String::new(), File::from(file));
        match file.read_to_string(&mut text) {
            // The one that was given is above itself.
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => {
                let place = |stat: rustix::fs::Statx| (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino);
                let (above, own) = (place(look(&file)?), place(look(folder)?));
                if above == own { Err(error) } else { Ok("the folder above".to_owned()) }
            }
            read => read.map(|_| text),
        }
    });
    any(opened.chain(below))
}

/// What every filter that lets files be opened also lets them be asked.
fn look(file: impl std::os::fd::AsFd) -> io::Result<rustix::fs::Statx> {
    let (flags, mask) = (rustix::fs::AtFlags::EMPTY_PATH, rustix::fs::StatxFlags::BASIC_STATS);
    rustix::fs::statx(file, "", flags, mask).map_err(io::Error::from)
}

fn write(folder: &OwnedFd) -> io::Result<String> {
    let above = |path: &str| {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
        openat(folder, path, flags, Mode::RUSR | Mode::WUSR).map_err(io::Error::from)
    };
    let special = |mode: libc::mode_t| {
        // SAFETY: the path is a string.
        call(unsafe { libc::mknodat(folder.as_raw_fd(), c"node".as_ptr(), mode | 0o600, libc::makedev(1, 3)) }.into())
            .map(|_| "it has made a node".to_owned())
    };
    any([
        // It is the folder's own mount that ends it: there the file is made. Elsewhere it would be another one.
        above("../other/made").map(|_| "it has made a file of another VM's".to_owned()),
        fs::write("/file", b"x").map(|()| "it has written to the root".to_owned()),
        fs::create_dir("/folder").map(|()| "it has made a folder in the root".to_owned()),
        special(libc::S_IFCHR),
        special(libc::S_IFBLK),
    ])
}

fn signal(pid: i32) -> io::Result<String> {
    let ids = [pid, -pid];
    any(ids.into_iter().map(|id| {
        // SAFETY: kill takes integers only.
        call(unsafe { libc::kill(id, libc::SIGKILL) }.into()).map(|_| format!("it has killed {id}"))
    }))
}

/// `address` is one that the process has mapped.
fn trace(pid: i32, address: usize) -> io::Result<String> {
    let mut byte = [0u8];
    let (local, remote) = (
        libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 },
        libc::iovec { iov_base: std::ptr::without_provenance_mut(address), iov_len: 1 },
    );
    any([
        // SAFETY: seizing takes no pointers.
        call(unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) }).map(|_| "it traces it".to_owned()),
        // SAFETY: both vectors are whole; the kernel checks the addresses.
        call(unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) } as libc::c_long)
            .map(|_| "it reads its memory".to_owned()),
        fs::read(format!("/proc/{pid}/environ")).map(|_| "it reads its environment".to_owned()),
    ])
}

/// Makes a system call that has no business in a monitor, with one argument that is not zero.
fn raw(number: libc::c_long, first: libc::c_long) -> io::Result<String> {
    // SAFETY: what is called takes numbers and null pointers; a child that it makes ends at once.
    let result = unsafe { libc::syscall(number, first, 0, 0, 0, 0, 0) };
    if result == 0 && matches!(number, libc::SYS_clone | libc::SYS_fork) {
        // SAFETY: it takes an integer only.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    }
    call(result).map(|result| format!("system call {number} has given {result}"))
}

/// Makes the log longer than its limit allows.
fn fill(folder: &OwnedFd, mib: u64) -> io::Result<String> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
    let mut file = File::from(openat(folder, "log", flags, Mode::RUSR | Mode::WUSR)?);
    let piece = vec![0; 1 << 20];
    (0..mib).try_for_each(|_| file.write_all(&piece)).map(|()| format!("it has written {mib} MiB"))
}

fn connect(port: &str, name: &str) -> io::Result<String> {
    let abstract_ = SocketAddr::from_abstract_name(name).and_then(|address| UnixStream::connect_addr(&address));
    any([
        TcpStream::connect(format!("127.0.0.1:{port}")).map(|_| "it has connected by TCP".to_owned()),
        abstract_.map(|_| "it has connected to an abstract socket".to_owned()),
        UnixStream::connect(name).map(|_| "it has connected to a socket".to_owned()),
    ])
}

fn mount(folder: &OwnedFd) -> io::Result<String> {
    let mount = |kind: Option<&std::ffi::CStr>, flags| {
        let kind = kind.map_or(std::ptr::null(), std::ffi::CStr::as_ptr);
        // SAFETY: all pointers are strings or null.
        call(unsafe { libc::mount(c"none".as_ptr(), c"/".as_ptr(), kind, flags, std::ptr::null()) }.into())
    };
    any([
        mount(Some(c"tmpfs"), 0).map(|_| "it has mounted".to_owned()),
        mount(Some(c"proc"), 0).map(|_| "it has mounted procfs".to_owned()),
        mount(None, libc::MS_REMOUNT | libc::MS_BIND).map(|_| "it has made its root writable".to_owned()),
        // SAFETY: the path is a string.
        call(unsafe { libc::umount2(c"/".as_ptr(), libc::MNT_DETACH) }.into()).map(|_| "it has unmounted".to_owned()),
        // SAFETY: the path is a string.
        call(unsafe { libc::chroot(c".".as_ptr()) }.into()).map(|_| "it has changed roots".to_owned()),
        rustix::process::fchdir(folder)
            .map_err(io::Error::from)
            .and_then(|()| rustix::process::chroot(".").map_err(io::Error::from))
            .map(|()| "it has changed roots".to_owned()),
    ])
}

fn privilege() -> io::Result<String> {
    let unshare = |flags| {
        // SAFETY: unshare takes integers only.
        call(unsafe { libc::unshare(flags) }.into()).map(|_| format!("it has made namespaces {flags:#x}"))
    };
    let seat = |user| {
        // SAFETY: setresuid takes integers only.
        call(unsafe { libc::setresuid(user, user, user) }.into()).map(|_| format!("it has become {user}"))
    };
    let capability = rustix::thread::CapabilitySet::SYS_ADMIN;
    let sets = rustix::thread::CapabilitySets { effective: capability, permitted: capability, inheritable: capability };
    let limit = rustix::process::Rlimit { current: Some(1 << 40), maximum: Some(1 << 40) };
    any([
        unshare(libc::CLONE_NEWUSER),
        unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS),
        unshare(libc::CLONE_NEWNS),
        unshare(libc::CLONE_NEWPID),
        unshare(libc::CLONE_NEWNET),
        seat(0),
        seat(1000),
        rustix::thread::set_capabilities(None, sets)
            .map_err(io::Error::from)
            .map(|()| "it has a capability".to_owned()),
        rustix::process::setrlimit(rustix::process::Resource::As, limit)
            .map_err(io::Error::from)
            .map(|()| "it has raised its limits".to_owned()),
    ])
}

fn execute(folder: &OwnedFd) -> io::Result<String> {
    let program = || -> io::Result<String> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
        let mut file = File::from(openat(folder, "program", flags, Mode::RWXU)?);
        // One that is refused for what it names, where it is not refused for where it is.
        file.write_all(b"#!/program\n")?;
        drop(file);
        let arguments = [c"program".as_ptr(), std::ptr::null()];
        // SAFETY: the path is a string, and the array ends in a null pointer.
        let executed = unsafe {
            libc::syscall(
                libc::SYS_execveat,
                folder.as_raw_fd(),
                c"program".as_ptr(),
                arguments.as_ptr(),
                std::ptr::null::<*const libc::c_char>(),
                0,
            )
        };
        match call(executed) {
            // It got as far as looking for what is named in the file.
            Err(error) if error.raw_os_error() != Some(libc::EACCES) => Ok(format!("it could have executed: {error}")),
            refused => refused.map(|_| String::new()),
        }
    };
    any([
        Command::new("/bin/true").status().map(|_| "it has executed a program".to_owned()),
        Command::new("/proc/self/exe").status().map(|_| "it has executed itself".to_owned()),
        program(),
    ])
}

fn memory(mib: usize, flags: libc::c_int) -> io::Result<String> {
    let length = mib << 20;
    // SAFETY: an anonymous mapping at an address that the kernel chooses.
    let start = unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(std::ptr::null_mut(), length, protection, flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let used = if flags & libc::MAP_NORESERVE == 0 { length } else { 0 };
    for page in (0..used).step_by(4096) {
        // SAFETY: within the mapping.
        unsafe { start.cast::<u8>().add(page).write_volatile(1) };
    }
    Ok(format!("it has {mib} MiB"))
}

/// Uses all the CPU time that it can get for a while; tells how many milliseconds of it that was.
fn burn(time: Duration) -> io::Result<String> {
    let began = Instant::now();
    while began.elapsed() < time {
        std::hint::spin_loop();
    }
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Ok((used.tv_sec * 1000 + used.tv_nsec / 1_000_000).to_string())
}

fn threads(most: usize) -> io::Result<String> {
    for _ in 0..most {
        let wait = || thread::sleep(Duration::from_secs(60));
        thread::Builder::new().stack_size(64 << 10).spawn(wait)?;
    }
    Ok(format!("it has {most} threads"))
}

fn files(most: usize) -> io::Result<String> {
    let (end, _other) = io::pipe()?;
    for _ in 0..most {
        // SAFETY: dup takes an integer only.
        let copy = call(unsafe { libc::dup(end.as_raw_fd()) }.into())?;
        // SAFETY: it is new, and nobody else's.
        std::mem::forget(unsafe { OwnedFd::from_raw_fd(copy as i32) });
    }
    Ok(format!("it has {most} descriptors"))
}
