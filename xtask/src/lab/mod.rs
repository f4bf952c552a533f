//! `cargo xtask lab -- CMD…`: runs a command in an emulated machine whose `/dev/kvm` works.
//!
//! The machine (QEMU without any acceleration, AMD-V with nested paging emulated) sees all of the host's files through
//! an overlay in RAM, so nothing the command does reaches the host but what it writes below `$COFFERDAM_LAB_OUT`.
//! Streams go through virtio-serial ports of their own, which are sockets on this side:
//!
//! | port | direction | content |
//! |---|---|---|
//! | stdin | to the lab | bytes; a half-closed socket is the end of the stream |
//! | stdout, stderr | from the lab | bytes |
//! | control | from the lab | `up`, then `exit CODE BYTES-OF-STDOUT BYTES-OF-STDERR` |
//! | pulse | from the lab | a byte every few seconds, as long as all of the machine's CPUs go on |
//!
//! The byte counts say when both streams have arrived completely; QEMU is ended then. It is ended as well when there is no pulse
//! any more.

mod hold;
mod machine;
mod pulse;
mod relay;

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

pub use hold::hold;
pub use pulse::pulse;
pub use relay::relay;

use machine::{Machine, Session};

/// The emulated CPU. Without a virtual global interrupt flag, which KVM uses when there is one, since the lab's kernel died
/// quickly with it in one setting; what that does and does not show is in docs/STATUS.md.
const CPU: &str = "max,+svm,+npt,-vgif,-v-vmsave-vmload";

/// The exit code when the time limit ended the command, as `timeout(1)` has it.
const TIMED_OUT: u8 = 124;
/// How long a machine may be without a pulse; it takes less than that to come up, too.
const STILL: Duration = Duration::from_secs(180);
/// How much of the machine's console is kept to be shown when it does not come up.
const CONSOLE_KEPT: usize = 32 * 1024;

/// Run a command in an emulated machine whose /dev/kvm can run guests
#[derive(Args)]
pub struct LabArgs {
    /// Count instructions instead of time: 1 instruction takes 1 ns inside, whatever the host is doing (one CPU, about
    /// twice as slow)
    #[arg(long)]
    pub icount: bool,
    /// The machine's memory in MiB; files written inside are kept in it
    #[arg(long, value_name = "MIB", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(512..=1_048_576))]
    pub mem: u32,
    /// The machine's CPUs
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=62), conflicts_with = "icount")]
    pub cpus: u8,
    /// Seconds after which the command is ended with exit code 124
    #[arg(long, value_name = "S", default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub timeout: u32,
    /// The folder that the command can write results to, as $COFFERDAM_LAB_OUT [default: target/lab]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Where the command starts: the caller's folder unless set
    #[arg(skip)]
    pub folder: Option<PathBuf>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

impl LabArgs {
    /// The default machine running `command`.
    pub fn for_command(command: Vec<OsString>) -> Self {
        Self { icount: false, mem: 4096, cpus: 2, timeout: 600, out: None, folder: None, command }
    }
}

/// What a thread that serves one of the machine's streams has to say.
enum Event {
    /// The machine runs the command now.
    Up,
    /// The command ended and wrote this many bytes to stdout and stderr.
    Exit { code: u8, written: [u64; 2] },
    /// So many bytes have been passed on from stream 0 (stdout) or 1 (stderr).
    Passed { stream: usize, total: u64 },
    /// All of the machine's CPUs go on.
    Pulse,
    /// Our own standard output or error takes no more.
    ReaderGone,
    /// QEMU ended.
    Down,
}

/// Runs a command in the lab; the exit code is the command's.
pub fn run(args: &LabArgs) -> Result<ExitCode> {
    let machine = Machine::prepare()?;
    let out = machine::out_folder(args.out.clone())?;
    let folder = match &args.folder {
        Some(folder) => folder.clone(),
        None => std::env::current_dir().context("the current folder is gone")?,
    };
    let scratch =
        tempfile::Builder::new().prefix("cofferdam-lab-").tempdir().context("cannot create a temporary folder")?;
    let initramfs = scratch.path().join("initramfs.cpio");
    machine.write_initramfs(&initramfs, &Session { command: &args.command, folder: &folder, out: &out })?;

    let [stdin, stdout, stderr, control, pulse] = listen(scratch.path())?;
    let patience = Patience::new(args);
    let mut qemu = start(args, &machine, &initramfs, scratch.path(), &out)?;
    let (events, inbox) = mpsc::channel();
    let console = watch_console(&mut qemu, events.clone())?;
    thread::spawn(move || send_stdin(&stdin));
    receive(stdout, io::stdout(), 0, events.clone());
    receive(stderr, io::stderr(), 1, events.clone());
    let pulses = events.clone();
    thread::spawn(move || read_control(&control, &events));
    thread::spawn(move || feel(&pulse, &pulses));

    let result = supervise(&inbox, patience, scratch, &console);
    // Ended already, or of no use any more: the machine holds nothing that is not on the host by now.
    let _ = qemu.kill();
    let _ = qemu.wait();
    result
}

/// How long a machine is waited for.
struct Patience {
    /// The time limit of the command, in seconds.
    limit: u32,
    end: Instant,
    /// When there was a pulse. None where time is counted in instructions: there is none, since it would be counted, too.
    pulse: Option<Instant>,
}

impl Patience {
    fn new(args: &LabArgs) -> Self {
        let now = Instant::now();
        let end = now + Duration::from_secs(args.timeout.into());
        Self { limit: args.timeout, end, pulse: (!args.icount).then_some(now) }
    }

    /// The next event; None when the time limit is over.
    fn next(&self, inbox: &Receiver<Event>) -> Result<Option<Event>> {
        let until = self.pulse.map_or(self.end, |pulse| self.end.min(pulse + STILL));
        match inbox.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(event) => Ok(Some(event)),
            Err(RecvTimeoutError::Timeout) if until == self.end => Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                bail!("the lab's machine stands still: no sign of life from one of its CPUs for {} s", STILL.as_secs())
            }
            Err(RecvTimeoutError::Disconnected) => bail!("the lab's streams ended without an exit code"),
        }
    }
}

/// Waits for the end of the command and of its streams, or for whatever comes before that.
fn supervise(
    inbox: &Receiver<Event>,
    mut patience: Patience,
    scratch: tempfile::TempDir,
    console: &Console,
) -> Result<ExitCode> {
    // Removed as soon as QEMU has read what is in it, so that an interrupted run leaves nothing behind.
    let mut scratch = Some(scratch);
    let mut ended: Option<(u8, [u64; 2])> = None;
    let mut passed = [0u64; 2];
    loop {
        match patience.next(inbox).inspect_err(|_| console.show())? {
            None => {
                if scratch.is_some() {
                    console.show();
                }
                let limit = patience.limit;
                eprintln!("lab: the time limit of {limit} s is over: ended (raise it with --timeout)");
                return Ok(ExitCode::from(TIMED_OUT));
            }
            Some(Event::Up) => drop(scratch.take()),
            Some(Event::Exit { code, written }) => ended = Some((code, written)),
            Some(Event::Passed { stream, total }) => passed[stream] = total,
            Some(Event::Pulse) => patience.pulse = Some(Instant::now()),
            // As a program does that gets SIGPIPE.
            Some(Event::ReaderGone) => return Ok(ExitCode::from(128 + 13)),
            Some(Event::Down) => {
                console.show();
                let when = if scratch.is_some() { "before it ran the command" } else { "while the command ran" };
                bail!("the lab's machine ended {when}: its console is above");
            }
        }
        if let Some((code, _)) = ended.filter(|(_, written)| passed[0] >= written[0] && passed[1] >= written[1]) {
            return Ok(ExitCode::from(code));
        }
    }
}

/// How many CPUs the machine has for a command that gets so many: one more, which is kept free of guests.
///
/// Whenever a CPU loads the state of its FPU, QEMU clears a bit in the first CPU's word of flags (`cpu_clear_ignne`, up to
/// 10.0 at least), by reading the word and writing it back, while that CPU may be doing the same in a thread of its own. What
/// is lost is what changes with VMRUN and #VMEXIT: whether interrupts are taken, and whether there are nested pages. A guest
/// goes astray by that, or the machine's kernel is interrupted where it must not be. Where no guest runs, nothing changes.
fn smp(cpus: u8) -> u32 {
    u32::from(cpus) + 1
}

/// The machine's ports.
const PORTS: [&str; 5] = ["stdin", "stdout", "stderr", "control", "pulse"];

/// Sockets for the ports, at which QEMU will connect.
fn listen(folder: &Path) -> Result<[UnixListener; PORTS.len()]> {
    let one = |port: &str| {
        let path = folder.join(port);
        UnixListener::bind(&path).with_context(|| format!("cannot listen at {}", path.display()))
    };
    let [stdin, stdout, stderr, control, pulse] = PORTS;
    Ok([one(stdin)?, one(stdout)?, one(stderr)?, one(control)?, one(pulse)?])
}

/// Starts QEMU, tied to this process's life.
fn start(args: &LabArgs, machine: &Machine, initramfs: &Path, sockets: &Path, out: &Path) -> Result<Child> {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"]);
    command.args(["-M", "q35,usb=off,graphics=off,vmport=off,sata=off,smbus=off", "-cpu", CPU]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-bios", "qboot.rom"]);
    if args.icount {
        command.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"]);
    } else {
        command.args(["-accel", "tcg,thread=multi", "-smp", &smp(args.cpus).to_string()]);
    }
    command.args(["-m", &args.mem.to_string()]);
    command.arg("-kernel").arg(&machine.kernel).arg("-initrd").arg(initramfs);
    command.args([
        "-append",
        "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check nowatchdog audit=0 \
         random.trust_cpu=on systemd.unified_cgroup_hierarchy=1",
    ]);
    command.args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]);
    command.args(["-device", "virtio-serial-pci,max_ports=8"]);
    for port in PORTS {
        // QEMU's option syntax doubles commas in values.
        let path = sockets.join(port).to_string_lossy().replace(',', ",,");
        command.arg("-chardev").arg(format!("socket,id={port},path={path}"));
        command.arg("-device").arg(format!("virtserialport,chardev={port},name={port}"));
    }
    command.arg("-virtfs").arg("local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap");
    let out = out.to_string_lossy().replace(',', ",,");
    command.arg("-virtfs").arg(format!("local,path={out},mount_tag=out,security_model=none,multidevs=remap"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().context("cannot start qemu-system-x86_64 through setpriv: run `cargo xtask setup`")
}

/// The end of what the machine's console and QEMU itself have said.
#[derive(Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Console {
    /// Reads a stream to its end.
    fn read(&self, mut from: impl Read) {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            kept.extend_from_slice(&buffer[..count]);
            let excess = kept.len().saturating_sub(CONSOLE_KEPT);
            kept.drain(..excess);
        }
    }

    /// Writes what is kept to standard error, which may be gone.
    fn show(&self) {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = io::stderr().write_all(&kept);
    }
}

/// Follows the machine's console and QEMU's own complaints, and reports when both have ended.
fn watch_console(qemu: &mut Child, events: Sender<Event>) -> Result<Console> {
    let output = qemu.stdout.take().context("QEMU has no standard output")?;
    let complaints = qemu.stderr.take().context("QEMU has no standard error")?;
    let console = Console::default();
    let kept = console.clone();
    thread::spawn(move || {
        let other = kept.clone();
        let complaints = thread::spawn(move || other.read(complaints));
        kept.read(output);
        let _ = complaints.join();
        // Nobody listens when the run is over already.
        let _ = events.send(Event::Down);
    });
    Ok(console)
}

/// Passes our standard input on. The half-close at its end lets QEMU read all of it before it closes the port.
fn send_stdin(listener: &UnixListener) {
    let Ok((mut to, _)) = listener.accept() else { return };
    // An error means that one end is gone: the end of the stream, too.
    let _ = io::copy(&mut io::stdin().lock(), &mut to);
    let _ = to.shutdown(Shutdown::Write);
    // QEMU must not see the socket vanish while bytes are still in it.
    let _ = to.read(&mut [0]);
}

/// Passes one of the command's streams on to ours.
fn receive(listener: UnixListener, mut to: impl Write + Send + 'static, stream: usize, events: Sender<Event>) {
    thread::spawn(move || {
        let Ok((mut from, _)) = listener.accept() else { return };
        let mut buffer = vec![0; 64 * 1024];
        let mut total = 0;
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let event = match to.write_all(&buffer[..count]).and_then(|()| to.flush()) {
                Ok(()) => {
                    total += count as u64;
                    Event::Passed { stream, total }
                }
                Err(_) => Event::ReaderGone,
            };
            if events.send(event).is_err() {
                return;
            }
        }
    });
}

/// Reads the lines that the lab's process 1 sends.
fn read_control(listener: &UnixListener, events: &Sender<Event>) {
    let Ok((from, _)) = listener.accept() else { return };
    for line in BufReader::new(&from).lines() {
        let Ok(line) = line else { return };
        let Some(event) = parse_control(&line) else { continue };
        if events.send(event).is_err() {
            return;
        }
    }
}

/// Tells of each pulse.
fn feel(listener: &UnixListener, events: &Sender<Event>) {
    let Ok((mut from, _)) = listener.accept() else { return };
    while let Ok(1) = from.read(&mut [0]) {
        if events.send(Event::Pulse).is_err() {
            return;
        }
    }
}

/// What a control line means.
fn parse_control(line: &str) -> Option<Event> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        ["up"] => Some(Event::Up),
        ["exit", code, out, err] => {
            Some(Event::Exit { code: code.parse().ok()?, written: [out.parse().ok()?, err.parse().ok()?] })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_lines_are_understood() {
        assert!(matches!(parse_control("up"), Some(Event::Up)));
        assert!(matches!(parse_control("exit 7 10 0"), Some(Event::Exit { code: 7, written: [10, 0] })));
        assert!(parse_control("exit 700 0 0").is_none());
        assert!(parse_control("").is_none());
    }

    #[test]
    fn only_the_end_of_a_console_is_kept() {
        let mut text = vec![b'a'; CONSOLE_KEPT];
        text.extend_from_slice(b"end");
        let console = Console::default();
        console.read(&text[..]);
        let kept = console.0.lock().unwrap();
        assert_eq!(kept.len(), CONSOLE_KEPT);
        assert!(kept.ends_with(b"aend"));
    }
}
