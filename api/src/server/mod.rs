//! The server of one micro-VM: HTTP/1.1 over a Unix socket, the conversation with the guest's agent, and the streams of
//! its processes, all on one thread.
//!
//! - [`vm`]: the state, and who may change it how.
//! - [`guest`]: calls to the agent and what it reports.
//! - [`streams`], [`log`]: what processes write and read.
//! - [`routes`]: the paths of the API, by resource: [`machine`], [`memory`], [`containers`], [`processes`], [`files`].
//! - [`problem`]: what is answered when something is wrong.
//!
//! No request waits for another: each is a task, none holds the state while it waits, and every call to the guest has a
//! deadline. Nothing wakes the thread up but a client, the guest, or a deadline of either.

mod containers;
mod files;
mod generation;
mod guest;
mod log;
mod machine;
mod memory;
pub mod problem;
mod processes;
mod routes;
mod streams;
#[cfg(test)]
mod tests;
mod vm;

use std::io::{self, Write as _};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use protocol::container::Stdio;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, oneshot, watch};

use self::guest::{Calls, Guest, Report};
use self::streams::{Ends, Streams};
use self::vm::Vm;
use crate::config::{ContainerConfig, VmConfig};
use crate::control::EXIT_FAILED;
use crate::folder::Folder;
use crate::model::{Balloon, ContainerState, ContainerStatus, Device, Generation, VmBoot, VmState};
use crate::record::End;
use crate::session::{SessionError, chain, wall_clock_ns};

pub use routes::{PROTOCOL, document};

/// The bounds of a server.
const BOUNDS: Bounds = Bounds { connections: 1024, head: Duration::from_secs(30), body: Duration::from_secs(30) };
/// How much of a request's head is kept.
const HEAD_MAX: usize = 32 << 10;
/// How long a client that was told that the VM ends may take to read its answers.
const GOODBYE: Duration = Duration::from_millis(1000);
/// How long those who are attached to other processes than the first may take to read the last of their output.
const PARTING: Duration = Duration::from_secs(10);
/// The first vsock port for streams; 1024 is the agent's.
const FIRST_PORT: u32 = protocol::CONTROL_PORT + 1;

/// What clients can take up, and for how long without doing anything with it.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    /// The most connections at a time; more wait to be accepted.
    connections: u32,
    /// How long the head of a request may take to come, from the connection's beginning or the answer before.
    head: Duration,
    /// How long a body may take that is a document. An archive is moved as fast as the guest and the client do that.
    body: Duration,
}

/// What the server needs of the monitor that it is part of.
pub trait Machine: Send + Sync {
    /// The id of this process as others know it: its own is that of its namespace.
    fn pid(&self) -> u32;
    /// Its resident memory in bytes, the guest's included.
    fn resident_bytes(&self) -> u64;

    /// Stops all vCPUs where they are.
    fn pause(&self);
    /// Lets all vCPUs go on.
    fn resume(&self);
    /// The end of the guest's console: untrusted bytes.
    fn console(&self) -> Vec<u8>;
    /// The VM's devices.
    fn devices(&self) -> Vec<Device>;
    /// What each of the VM's devices has counted; of one that is at work, and so would have to be waited for, when it was asked
    /// last.
    fn figures(&self) -> Vec<DeviceFigures>;
    /// Offers the peer of `stream` to the guest at a port of the host, for one connection.
    fn offer(&self, port: u32, stream: StdStream);
    /// Takes an offer back that was not taken.
    fn withdraw(&self, port: u32);
    /// The memory that was plugged since the VM was booted.
    fn plugged(&self) -> Plugged;
    /// Asks the guest to plug so many MiB in all.
    fn plug(&self, mib: u32);
    /// The VM's balloon, if it has one.
    fn balloon(&self) -> Option<Balloon>;
    /// Asks the guest for a balloon of so many MiB.
    fn set_balloon(&self, target_mib: u32);
    /// Asks the guest for statistics of its memory. `heard` is called when there are new ones, by another thread; it is
    /// dropped when there will be none.
    fn ask_statistics(&self, heard: Box<dyn FnOnce() + Send>);
    /// Which VM this is, if its guest is told.
    fn generation(&self) -> Option<Generation>;
    /// Tells the guest that it is another VM from now on.
    ///
    /// # Errors
    /// The system does not let it: the guest goes on as the one that it was.
    fn renew_generation(&self) -> io::Result<()>;
}

/// Memory beside that which a VM was booted with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Plugged {
    /// What the guest is asked for, in MiB.
    pub requested_mib: u32,
    /// What it has plugged, in MiB.
    pub plugged_mib: u32,
}

/// What a device has counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceFigures {
    /// Its kind, as in [`Device`].
    pub kind: &'static str,
    /// Its position among the VM's devices.
    pub index: usize,
    /// Names in `snake_case`, with the unit last, and their values.
    pub figures: Vec<(&'static str, u64)>,
}

/// What a server is started with.
pub struct Setup {
    /// The VM as booted.
    pub config: VmConfig,
    /// The container to create and start at once: the VM ends with it.
    pub container: Option<ContainerConfig>,
    /// Where clients connect.
    pub listener: Option<StdListener>,
    /// The folder for the log and for the record of the end.
    pub folder: Option<Folder>,
    /// The monitor.
    pub machine: Arc<dyn Machine>,
    /// Our end of the connection that is offered to the agent.
    pub agent: StdStream,
    /// When the monitor began and the VM was built.
    pub boot: VmBoot,
    /// Hears that the guest has ended.
    pub guest_ended: GuestEnded,
}

impl Setup {
    /// Has no socket of it block.
    fn unblock(&self) -> io::Result<()> {
        self.agent.set_nonblocking(true)?;
        self.listener.as_ref().map_or(Ok(()), |listener| listener.set_nonblocking(true))
    }
}

/// Held by whoever runs the guest, and dropped when that has ended.
#[derive(Debug)]
pub struct GuestRuns(#[expect(dead_code, reason = "dropping it is what it is for")] oneshot::Sender<()>);

/// Hears when its [`GuestRuns`] is dropped.
#[derive(Debug)]
pub struct GuestEnded(oneshot::Receiver<()>);

/// A way to tell that the guest has ended.
pub fn guest_end() -> (GuestRuns, GuestEnded) {
    let (sender, receiver) = oneshot::channel();
    (GuestRuns(sender), GuestEnded(receiver))
}

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The exit code of the container that the VM was for; else 0, or 125 when the guest failed.
    pub exit_code: u8,
    /// Why there is no exit code of its own, in one line.
    pub error: Option<String>,
}

/// What every request works with.
pub(crate) struct Context {
    vm: Vm,
    guest: Guest,
    machine: Arc<dyn Machine>,
    config: VmConfig,
    folder: Option<Folder>,
    bounds: Bounds,
    /// The container that the VM is for.
    main: Option<String>,
    next_port: AtomicU32,
    next_process: AtomicU32,
    /// Whether somebody wanted the container that the VM is for to end.
    stopped: AtomicBool,
    /// Told to end the VM.
    stop: watch::Sender<bool>,
    /// Told that the guest has ended: nothing more of it can be copied.
    guest_over: watch::Sender<bool>,
    /// Told that the VM has ended: connections end with the requests that are under way.
    closing: watch::Sender<bool>,
    /// A permit for each client that something is still being told.
    clients: Arc<Semaphore>,
}

type Shared = Arc<Context>;

/// A server that has everything of the system that serving does not make for itself, so that its thread can be confined before
/// it serves.
pub struct Server {
    setup: Setup,
    runtime: tokio::runtime::Runtime,
}

impl Server {
    /// Prepares one.
    ///
    /// # Errors
    /// The system is out of something.
    pub fn new(setup: Setup) -> io::Result<Self> {
        setup.unblock()?;
        Ok(Self { setup, runtime: tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()? })
    }

    /// Serves until the container that the VM is for has ended, the VM was told to stop, or the guest ended. `guest_end` says
    /// how the guest ended where the machine knows more than that.
    ///
    /// # Errors
    /// The system is out of something, before anything was served.
    pub fn run(self, guest_end: impl Fn() -> Option<String>) -> io::Result<Outcome> {
        self.runtime.block_on(serve(self.setup, guest_end, BOUNDS))
    }
}

/// As [`Server::run`], on the runtime that this is awaited on.
///
/// # Errors
/// As [`Server::new`] and [`Server::run`].
#[cfg(feature = "fuzzing")]
pub async fn run_here(setup: Setup, guest_end: impl Fn() -> Option<String>) -> io::Result<Outcome> {
    setup.unblock()?;
    serve(setup, guest_end, BOUNDS).await
}

async fn serve(setup: Setup, guest_end: impl Fn() -> Option<String>, bounds: Bounds) -> io::Result<Outcome> {
    let Setup { config, container, listener, folder, machine, agent, boot, guest_ended } = setup;
    let agent = UnixStream::from_std(agent)?;
    let (guest, calls) = Guest::new();
    let context = Arc::new(Context {
        vm: Vm::default(),
        guest,
        machine,
        config,
        folder,
        bounds,
        main: container.as_ref().map(|container| container.spec.id.clone()),
        next_port: AtomicU32::new(FIRST_PORT),
        next_process: AtomicU32::new(1),
        stopped: AtomicBool::new(false),
        stop: watch::Sender::new(false),
        guest_over: watch::Sender::new(false),
        closing: watch::Sender::new(false),
        clients: Arc::new(Semaphore::new(bounds.connections as usize)),
    });
    context.vm.state().boot = boot;
    if let Some(container) = container {
        containers::launch(&context, container)?;
    }
    if let Some(listener) = listener {
        tokio::spawn(accept(UnixListener::from_std(listener)?, Arc::clone(&context)));
    }
    tokio::spawn(hurry(Arc::clone(&context), guest_ended));
    let mut stop = context.stop.subscribe();
    let first = tokio::select! {
        error = talk(&context, agent, calls) => First::GuestFailed(error),
        outcome = context.main_ended() => First::MainEnded(outcome),
        _ = stop.wait_for(|stop| *stop) => First::Told,
    };
    let outcome = match first {
        First::GuestFailed(error) => {
            // What it said last arrives before anybody hears of its end.
            tokio::select! {
                () = context.finish_streams() => {}
                _ = stop.wait_for(|stop| *stop) => {}
            }
            context.guest_failed(&error, guest_end())
        }
        First::MainEnded(outcome) => outcome,
        First::Told => context.stopped(),
    };
    context.record(&outcome);
    tokio::select! {
        () = context.delivered() => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
    context.closing.send_replace(true);
    // Whoever waits for the end gets its answer; whoever does not read it is not waited for.
    let _ = tokio::time::timeout(GOODBYE, context.clients.acquire_many(bounds.connections)).await;
    Ok(outcome)
}

/// What ends a VM.
enum First {
    /// The guest has ended, or does not keep to the rules.
    GuestFailed(SessionError),
    /// The container that the VM is for has ended.
    MainEnded(Outcome),
    /// A client told it to.
    Told,
}

/// When the guest has ended, nothing more comes of it, and nobody is in the way of what it has said.
async fn hurry(context: Shared, guest_ended: GuestEnded) {
    // The other end is only ever dropped.
    let _ = guest_ended.0.await;
    // It was one of its vCPUs that has ended.
    context.machine.pause();
    context.guest_over.send_replace(true);
    context.finish_streams().await;
}

/// Talks with the agent until that is over.
async fn talk(context: &Shared, agent: UnixStream, calls: Calls) -> SessionError {
    guest::converse(agent, calls, |report| match report {
        Report::Hello(hello) => {
            context.vm.ready(&hello);
            Ok(())
        }
        Report::Message(message) => {
            if let Some(drained) = context.vm.hear(message)? {
                let context = Arc::clone(context);
                tokio::spawn(async move {
                    drained.streams.finish().await;
                    context.vm.change(|state| state.drained(&drained));
                });
            }
            Ok(())
        }
    })
    .await
}

/// Accepts clients for ever.
async fn accept(listener: UnixListener, context: Shared) {
    let (router, bounds) = (routes::router(Arc::clone(&context)), context.bounds);
    loop {
        let Ok((client, _)) = listener.accept().await else {
            // Out of descriptors: those who are there may leave some.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        // The semaphore is never closed.
        let Ok(permit) = Arc::clone(&context.clients).acquire_owned().await else { return };
        let service = TowerToHyperService::new(router.clone());
        let mut closing = context.closing.subscribe();
        tokio::spawn(async move {
            // A client that goes away is noticed while it waits: what is to be settled for it is a task of its own.
            let connection = http1::Builder::new()
                // Without it there is no deadline at all.
                .timer(TokioTimer::new())
                .header_read_timeout(bounds.head)
                .max_buf_size(HEAD_MAX)
                .serve_connection(TokioIo::new(client), service)
                .with_upgrades();
            tokio::pin!(connection);
            // A client that breaks off is its own business.
            let over = tokio::select! {
                _ = connection.as_mut() => true,
                _ = wait_for_end(&mut closing) => false,
            };
            if !over {
                connection.as_mut().graceful_shutdown();
                let _ = connection.await;
            }
            drop(permit);
        });
    }
}

/// Waits until the VM has ended.
async fn wait_for_end(closing: &mut watch::Receiver<bool>) {
    // The sender is in the context, which whoever waits has.
    let _ = closing.wait_for(|closing| *closing).await;
}

impl Context {
    /// Waits until the container that the VM is for has ended and its output has arrived.
    async fn main_ended(&self) -> Outcome {
        let Some(main) = &self.main else { return std::future::pending().await };
        let state = self
            .vm
            .until(|state| {
                let entry = state.containers.get(main)?;
                entry.is_over().then(|| entry.state.clone())
            })
            .await;
        self.vm.change(|state| state.vm_ended("the VM has ended", 137, None));
        Outcome { exit_code: state.exit_code.unwrap_or(EXIT_FAILED), error: state.error }
    }

    /// The VM was told to end.
    fn stopped(&self) -> Outcome {
        self.vm.change(|state| state.vm_ended("the VM was stopped", 137, None));
        let main = self.main.as_ref().and_then(|main| self.vm.state().containers.get(main)?.state.exit_code);
        Outcome { exit_code: main.unwrap_or(0), error: None }
    }

    /// The guest has ended, or does not keep to the rules.
    fn guest_failed(&self, error: &SessionError, guest_end: Option<String>) -> Outcome {
        let mut message = match error {
            SessionError::GuestEnded => format!("{error} before {}", self.progress()),
            _ => chain(error),
        };
        if let Some(end) = guest_end {
            message = format!("{message}: {end}");
        }
        let console = self.machine.console();
        let console = crate::session::shown_lines(&String::from_utf8_lossy(&console));
        let console = (!console.is_empty()).then_some(console.as_str());
        self.vm.change(|state| state.vm_ended(&message, EXIT_FAILED, console));
        // A guest without a container has nobody to fail: it powered off.
        match (&self.main, error) {
            (None, SessionError::GuestEnded) => Outcome { exit_code: 0, error: None },
            _ => Outcome { exit_code: EXIT_FAILED, error: Some(message) },
        }
    }

    /// The streams of everything that was executed.
    fn streams(&self) -> Vec<Arc<Streams>> {
        self.vm.state().containers.values().flat_map(vm::Entry::all_streams).collect()
    }

    /// Waits until what is left of the output of all processes, which have ended, was read.
    async fn finish_streams(&self) {
        let streams = self.streams();
        futures_util::future::join_all(streams.iter().map(|streams| streams.finish())).await;
    }

    /// Waits until whoever was promised all output has it, or has gone away: for the front end of the container that the
    /// VM is for as long as that takes, since the VM is its program; for others not very long, since the container may be
    /// wanted again.
    async fn delivered(&self) {
        let all = self.streams();
        let everybody = futures_util::future::join_all(all.iter().map(|streams| streams.delivered()));
        if tokio::time::timeout(PARTING, everybody).await.is_err() {
            let main = self
                .main
                .as_ref()
                .and_then(|main| self.vm.state().containers.get(main).map(|entry| Arc::clone(&entry.streams)));
            if let Some(streams) = main {
                streams.delivered().await;
            }
        }
    }

    /// How far the VM was.
    fn progress(&self) -> &'static str {
        let state = self.vm.state();
        if state.vm == VmState::Booting {
            return "its agent reported";
        }
        let main = self.main.as_ref().and_then(|main| state.containers.get(main));
        match main.map(|entry| entry.state.status) {
            Some(ContainerStatus::Creating) => "the container was created",
            Some(ContainerStatus::Created | ContainerStatus::Starting) => "the container was started",
            Some(_) => "the container did",
            None => "it was told to",
        }
    }

    /// Leaves the end of the container that the VM is for in the folder.
    fn record(&self, outcome: &Outcome) {
        let (Some(folder), Some(main)) = (&self.folder, &self.main) else { return };
        let state = self.vm.state().containers.get(main).map(|entry| entry.state.clone());
        let state = state.unwrap_or_else(|| ContainerState {
            status: ContainerStatus::Exited,
            finished_ns: Some(wall_clock_ns()),
            exit_code: Some(outcome.exit_code),
            error: outcome.error.clone(),
            ..ContainerState::default()
        });
        let boot = self.vm.state().boot;
        let end = End { state, boot, stopped: self.stopped.load(Ordering::Relaxed) };
        if let Err(error) = crate::record::write(folder, &end) {
            // The same disk may be full for this, too.
            let text =
                format!("error: cannot record the end of the container in {}: {error}\n", folder.path().display());
            let _ = io::stderr().write_all(text.as_bytes());
        }
    }

    /// Offers a port, and gives its number and our end, which does not block. The offer is taken back when what stands for it
    /// is dropped.
    fn offer(&self) -> io::Result<(Offer, StdStream)> {
        let port = self.next_port.fetch_add(1, Ordering::Relaxed);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        self.machine.offer(port, theirs.into());
        Ok((Offer { machine: Arc::clone(&self.machine), port }, ours.into()))
    }

    /// Offers ports for the streams of a process, and gives their numbers and our ends.
    fn offer_streams(&self, stdin: bool, terminal: bool) -> io::Result<(Stdio, Ends, Vec<Offer>)> {
        let (mut stdio, mut ends, mut offers) = (Stdio::default(), Ends::default(), Vec::new());
        let mut offer = || -> io::Result<(Option<u32>, Option<StdStream>)> {
            let (offer, end) = self.offer()?;
            let port = offer.port;
            offers.push(offer);
            Ok((Some(port), Some(end)))
        };
        if stdin || terminal {
            (stdio.stdin, ends.stdin) = offer()?;
        }
        if !terminal {
            (stdio.stdout, ends.stdout) = offer()?;
            (stdio.stderr, ends.stderr) = offer()?;
        }
        Ok((stdio, ends, offers))
    }
}

/// A port that is offered to the guest, for one connection. When it is dropped and was not taken, it is taken back: nothing is
/// left of what the guest did not dial in time.
struct Offer {
    machine: Arc<dyn Machine>,
    port: u32,
}

impl Drop for Offer {
    fn drop(&mut self) {
        self.machine.withdraw(self.port);
    }
}
