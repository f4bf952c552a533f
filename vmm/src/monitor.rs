//! The event loop, the API's thread, and how both end.
//!
//! Two things can end a monitor: the API, whose container has ended or whose client says so; and the guest, by a triple
//! fault. Each arrives as an [`End`] at the event loop. After the guest's end, what it had already said is delivered, and
//! the API, which then finds its conversation with the agent closed, says what that means.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::{io, thread};

use api::config::{FilesystemConfig, LaunchConfig, VmConfig};
use api::folder::Folder;
use api::model::{Balloon, Device, Generation, VmBoot};
use api::server::{self, DeviceFigures, Outcome, Plugged, Server, Setup};
use api::session::{chain, now};
use devices::device::Loop;
use devices::generation::{self, GenerationId};
use devices::vsock::ports::HostPorts;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use jailer::{Entered, Jail, JailError, Tree};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::attach::memory::Controls;
use crate::confinement::Confinement;
use crate::files::{self, FileThread, FilesError, Served, Taken};
use crate::machine::{self, Machine, MachineError};
use crate::own_loop;
use crate::pause::Threads;
use crate::resources::{ResourceError, Resources};
use crate::vcpu::{self, Bus, GuestEnd};

/// The most of the guest's console that the API tells, in bytes.
const CONSOLE_MAX: usize = 8 << 10;

/// Why a monitor did not get as far as running a guest, or could not go on.
#[derive(Debug, Error)]
pub enum MonitorError {
    /// Something that the VM is made of is not there.
    #[error(transparent)]
    Resources(#[from] ResourceError),
    /// The jail is not in force.
    #[error("cannot confine the monitor")]
    Jail(#[from] JailError),
    /// Files of the host cannot be served.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// The VM was not built.
    #[error("cannot build the VM")]
    Machine(#[from] MachineError),
    /// The system is out of something.
    #[error("cannot {step}")]
    System {
        /// What was tried.
        step: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The event loop failed.
    #[error("the event loop failed: {0:?}")]
    EventLoop(event_manager::Error),
    /// The guest ended in a way that is no power-off.
    #[error("the guest failed")]
    Guest(#[source] GuestEnd),
}

fn system(step: &'static str) -> impl FnOnce(io::Error) -> MonitorError {
    move |source| MonitorError::System { step, source }
}

/// What ends the event loop.
enum End {
    Guest(GuestEnd),
    Api(io::Result<Outcome>),
}

/// A way to end the event loop from another thread.
struct Ender {
    ends: Sender<End>,
    event: EventFd,
}

impl Ender {
    fn end(&self, end: End) {
        // Fails when the loop is over, and then nobody needs to be told; likewise a full eventfd has been seen.
        let _ = self.ends.send(end);
        let _ = self.event.write(1);
    }
}

/// What a monitor has in its jail.
pub struct Inside {
    /// The id of this process outside.
    pub pid: u32,
    /// `/proc/PID/statm` of this process, which no path leads to.
    pub statm: File,
    /// What the VM is made of.
    pub resources: Resources,
    /// What its file systems show, and who serves it, in their order.
    pub served: Vec<Served>,
    /// Where the container's log and the record of its end go.
    pub folder: Option<Folder>,
}

/// Opens what a VM is made of and enters the jail. `tied` is the process whose end is this one's.
///
/// # Errors
/// [`MonitorError`]; the process may be half confined then and has to end.
pub fn enter(config: &LaunchConfig, tied: Option<OwnedFd>) -> Result<Inside, MonitorError> {
    let vm = &config.vm;
    // The file system's word is that of whoever has mounted it, outside of this process's namespace.
    let pid = std::fs::read_link("/proc/self").ok().and_then(|link| link.to_str()?.parse().ok());
    let pid = pid.unwrap_or_else(std::process::id);
    let statm = File::open("/proc/self/statm").map_err(system("open /proc/self/statm"))?;
    let resources = Resources::open(vm)?;
    let id = config.container.as_ref().map(|container| container.spec.id.clone());
    let id = id.or_else(|| Some(config.folder.as_ref()?.display().to_string())).unwrap_or_default();
    let trees = vm.filesystems.iter().map(|config| Tree { path: &config.path, read_only: config.read_only });
    let jail = Jail {
        folder: config.folder.as_deref(),
        user: jailer::identity::user(&id),
        limits: limits(vm, &resources)?,
        tied: tied.is_some(),
        trees: &trees.collect::<Vec<_>>(),
    };
    let Entered { folder, trees, descriptors, owners } = jail.enter()?;
    let folder = folder.zip(config.folder.clone()).map(|(descriptor, path)| Folder::new(descriptor, path));
    let served = files::start(&vm.filesystems, Taken { trees, descriptors, owners })?;
    if owners {
        jailer::identity::drop_rest()?;
    }
    // It may have ended before it was said that this process ends with it.
    if let Some(parent) = tied
        && poll(&mut [PollFd::new(&parent, PollFlags::IN)], Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    {
        return Err(system("go on without the process that started it")(io::ErrorKind::BrokenPipe.into()));
    }
    Ok(Inside { pid, statm, resources, served, folder })
}

/// What a monitor may use that runs this VM.
fn limits(vm: &VmConfig, resources: &Resources) -> Result<jailer::Limits, ResourceError> {
    let limits = jailer::Limits::new(vm.vcpus, resources.mapped_mib(vm)?, resources.largest_drive(vm)?);
    let descriptors = vm.filesystems.iter().map(FilesystemConfig::descriptors).sum();
    let written = vm.filesystems.iter().any(|filesystem| !filesystem.read_only);
    Ok(limits.serving(vm.device_threads().into(), descriptors, written))
}

/// Runs a VM to its end, and serves its API at `listener`.
///
/// # Errors
/// [`MonitorError`] when there was no guest to run, or it failed and nobody could be told.
pub fn run(
    config: LaunchConfig,
    inside: Inside,
    listener: Option<UnixListener>,
    started: u64,
) -> Result<Outcome, MonitorError> {
    let Inside { pid, statm, resources, served: files, folder } = inside;
    let ports = resources.ports.clone();
    let served = config.container.is_some() || listener.is_some();
    let (exports, threads): (Vec<_>, Vec<_>) = files.into_iter().map(|files| (files.export, files.thread)).unzip();
    let mut machine = machine::build(&config.vm, resources, exports, !served)?;
    let own_loops = threads.len() + machine.devices_in(Loop::Disk).count();
    // Besides those: this one, and the API's.
    let confinement = Confinement::of(own_loops + machine.vcpus.len() + 1 + usize::from(served));
    start_own_loops(&machine, threads, &confinement)?;
    let boot = VmBoot { monitor_started_ns: started, vm_created_ns: now(), ..VmBoot::default() };
    let event = EventFd::new(EFD_NONBLOCK).map_err(system("make an eventfd"))?;
    let (ends, ended) = mpsc::channel();
    let ender = || -> Result<Ender, MonitorError> {
        Ok(Ender { ends: ends.clone(), event: event.try_clone().map_err(system("clone an eventfd"))? })
    };
    let vcpus = Arc::new(Threads::default());
    let guest_end = Arc::new(Mutex::new(None));
    let mut flushing = None;
    if served {
        let (agent, theirs) = UnixStream::pair().map_err(system("make a socket for the agent"))?;
        ports.offer(protocol::CONTROL_PORT, theirs);
        let (sender, guest_ended) = server::guest_end();
        flushing = Some(sender);
        let (bus, console, memory) = (machine.bus.clone(), machine.console.clone(), machine.memory.clone());
        let generation = machine.generation.clone();
        let figures = bus.devices.iter().enumerate().map(|(index, device)| {
            let device = vcpu::lock(device);
            DeviceFigures { kind: device.kind(), index, figures: device.metrics() }
        });
        let figures = Mutex::new(figures.collect());
        let (ports, vcpus) = (ports.clone(), Arc::clone(&vcpus));
        let handle = Handle { pid, statm, bus, figures, console, memory, generation, ports, vcpus };
        let LaunchConfig { vm, container, .. } = config;
        let machine: Arc<dyn server::Machine> = Arc::new(handle);
        let setup = Setup { config: vm, container, listener, folder, machine, agent, boot, guest_ended };
        serve(setup, Arc::clone(&guest_end), confinement.clone(), ender()?)?;
    }
    let event = event.try_clone().map_err(system("clone an eventfd"))?;
    let end = match run_guest(&mut machine, &vcpus, &confinement, event, &ended, &ender) {
        Err(error @ MonitorError::EventLoop(_)) => return Ok(told(&error)),
        end => end?,
    };
    match (end, flushing) {
        (End::Api(outcome), _) => Ok(of_api(outcome)),
        (End::Guest(end), Some(flushing)) => {
            *guest_end.lock().unwrap_or_else(PoisonError::into_inner) = Some(end);
            // From now on slow clients are not waited for, and what the guest has said is delivered.
            drop(flushing);
            machine.flush();
            ports.withdraw_all();
            outcome_of_api(&ended)
        }
        (End::Guest(GuestEnd::Shutdown), None) => Ok(Outcome { exit_code: 0, error: None }),
        (End::Guest(end), None) => Err(MonitorError::Guest(end)),
    }
}

/// Has the devices that may wait begin, each on a thread of its own.
fn start_own_loops(machine: &Machine, threads: Vec<FileThread>, confinement: &Confinement) -> Result<(), MonitorError> {
    for (thread, device) in threads.into_iter().zip(machine.devices_in(Loop::Files)) {
        thread.serve(Arc::clone(device), confinement.clone());
    }
    for (index, device) in machine.devices_in(Loop::Disk).enumerate() {
        own_loop::start_disk(index, device, confinement).map_err(system("start a disk's thread"))?;
    }
    Ok(())
}

/// Starts the API's thread.
fn serve(
    setup: Setup,
    guest_end: Arc<Mutex<Option<GuestEnd>>>,
    confinement: Confinement,
    ender: Ender,
) -> Result<(), MonitorError> {
    // Without one it was the agent that let go.
    let explain = move || guest_end.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|end| chain(end));
    let thread = thread::Builder::new().name("api".into());
    let folder = setup.folder.clone();
    let serve = move || {
        settle_allocator();
        let server = Server::new(setup);
        confinement.enter(jailer::Thread::Api);
        let outcome = server.and_then(|server| server.run(explain));
        if let (Err(error), Some(folder)) = (&outcome, folder) {
            // Here and not where it is told: the other threads can open nothing any more.
            record_failure(&folder, &format!("cannot serve the API: {}", chain(error)));
        }
        ender.end(End::Api(outcome));
        // The process ends without this thread's doing so, which would take system calls that nothing else of it does.
        loop {
            thread::park();
        }
    };
    thread.spawn(serve).map(drop).map_err(system("start the API's thread"))
}

/// Has the C library find out how the memory of this thread is given back, which it does once, when there is much of it: it
/// opens a file for that (`check_may_shrink_heap` of glibc's malloc). Whichever thread frees what this one has allocated may
/// come to do it, and the others' filters let them open nothing.
fn settle_allocator() {
    // Each is small enough to be a part of the heap, and together they are more than the C library keeps (M_TRIM_THRESHOLD).
    let pieces: Vec<Vec<u8>> = (0..4).map(|_| Vec::with_capacity(100 << 10)).collect();
    drop(std::hint::black_box(pieces));
}

/// Runs the event loop and the guest until one of them, or the API, has ended.
fn run_guest(
    machine: &mut Machine,
    vcpus: &Threads,
    confinement: &Confinement,
    event: EventFd,
    ended: &Receiver<End>,
    ender: &dyn Fn() -> Result<Ender, MonitorError>,
) -> Result<End, MonitorError> {
    for (id, vcpu) in (0u8..).zip(std::mem::take(&mut machine.vcpus)) {
        let ender = ender()?;
        let ended = move |end| ender.end(End::Guest(end));
        vcpu::spawn(vcpus, id, vcpu, machine.bus.clone(), confinement.clone(), ended)
            .map_err(system("start a vCPU's thread"))?;
    }
    let mut events = subscribe(machine, event)?;
    confinement.enter(jailer::Thread::EventLoop);
    let end = wait(&mut events, ended)?;
    // Fails when nobody watches any more.
    let _ = machine.console.flush();
    Ok(end)
}

/// A failure that is only told: once a guest runs, nothing can be opened any more by this thread to record it.
fn told(error: &dyn std::error::Error) -> Outcome {
    Outcome { exit_code: api::control::EXIT_FAILED, error: Some(chain(error)) }
}

fn of_api(outcome: io::Result<Outcome>) -> Outcome {
    outcome.map_err(system("serve the API")).unwrap_or_else(|error| told(&error))
}

fn outcome_of_api(ended: &Receiver<End>) -> Result<Outcome, MonitorError> {
    loop {
        match ended.recv() {
            Ok(End::Api(outcome)) => return Ok(of_api(outcome)),
            // Other vCPUs stop when the first one does.
            Ok(End::Guest(_)) => {}
            Err(_) => return Err(system("hear from the API's thread")(io::ErrorKind::BrokenPipe.into())),
        }
    }
}

type Subscriber = Arc<Mutex<dyn MutEventSubscriber>>;

fn subscribe(machine: &Machine, event: EventFd) -> Result<EventManager<Subscriber>, MonitorError> {
    let mut events = EventManager::new().map_err(MonitorError::EventLoop)?;
    for device in machine.devices_in(Loop::Shared) {
        let subscriber: Subscriber = Arc::clone(device) as Subscriber;
        events.add_subscriber(subscriber);
    }
    events.add_subscriber(Arc::new(Mutex::new(Wake(event))));
    Ok(events)
}

/// Wakes the event loop up to look at what ended it.
struct Wake(EventFd);

impl MutEventSubscriber for Wake {
    fn init(&mut self, ops: &mut EventOps) {
        ops.add(Events::new(&self.0, EventSet::IN)).expect("an eventfd can be watched");
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        let _ = self.0.read();
    }
}

fn wait(events: &mut EventManager<Subscriber>, ended: &Receiver<End>) -> Result<End, MonitorError> {
    loop {
        own_loop::turn(events)?;
        if let Ok(end) = ended.try_recv() {
            return Ok(end);
        }
    }
}

/// The bytes of resident memory that `/proc/PID/statm` tells, in pages of 4 KiB (proc(5)).
fn resident(statm: &[u8]) -> Option<u64> {
    let pages: u64 = std::str::from_utf8(statm).ok()?.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages << 12)
}

/// Ends the process.
pub(crate) fn fail(error: &dyn std::error::Error) -> ! {
    // The disk behind it may be full.
    let _ = writeln!(io::stderr(), "error: {}", chain(error));
    std::process::exit(api::control::EXIT_FAILED.into());
}

/// The machine as the API knows it.
struct Handle {
    pid: u32,
    statm: File,
    bus: Bus,
    /// What each device had counted when it was asked last.
    figures: Mutex<Vec<DeviceFigures>>,
    console: devices::console::ConsoleOutput,
    memory: Controls,
    generation: Option<Arc<GenerationId>>,
    ports: HostPorts,
    vcpus: Arc<Threads>,
}

impl server::Machine for Handle {
    fn pid(&self) -> u32 {
        self.pid
    }

    fn resident_bytes(&self) -> u64 {
        let mut text = [0; 128];
        let length = self.statm.read_at(&mut text, 0).unwrap_or(0);
        resident(&text[..length]).unwrap_or(0)
    }

    fn pause(&self) {
        self.vcpus.pause();
    }

    fn resume(&self) {
        self.vcpus.resume();
    }

    fn console(&self) -> Vec<u8> {
        let tail = self.console.tail();
        tail[tail.len().saturating_sub(CONSOLE_MAX)..].to_vec()
    }

    fn devices(&self) -> Vec<Device> {
        // One that is at work is not waited for: its disk may not answer.
        let status = |device: &Mutex<devices::mmio::MmioDevice>| match device.try_lock() {
            Ok(device) => device.driver_status().to_owned(),
            Err(_) => "busy".to_owned(),
        };
        let figures = self.figures.lock().unwrap_or_else(PoisonError::into_inner);
        let both = figures.iter().zip(self.bus.devices.iter());
        both.map(|(known, device)| Device { kind: known.kind.to_owned(), status: status(device) }).collect()
    }

    fn figures(&self) -> Vec<DeviceFigures> {
        let mut figures = self.figures.lock().unwrap_or_else(PoisonError::into_inner);
        for (known, device) in figures.iter_mut().zip(self.bus.devices.iter()) {
            // As above: one that is at work has counted at least what it had.
            if let Ok(device) = device.try_lock() {
                known.figures = device.metrics();
            }
        }
        let mut figures = figures.clone();
        if let Some(generation) = &self.generation {
            let changes = ("changes", generation.now().1);
            figures.push(DeviceFigures { kind: "generation_id", index: figures.len(), figures: vec![changes] });
        }
        figures
    }

    fn offer(&self, port: u32, stream: UnixStream) {
        self.ports.offer(port, stream);
    }

    fn withdraw(&self, port: u32) {
        self.ports.withdraw(port);
    }

    fn plugged(&self) -> Plugged {
        self.memory.show_plugged()
    }

    fn plug(&self, mib: u32) {
        self.memory.plug(mib);
    }

    fn balloon(&self) -> Option<Balloon> {
        self.memory.show_balloon()
    }

    fn set_balloon(&self, target_mib: u32) {
        self.memory.set_balloon(target_mib);
    }

    fn ask_statistics(&self, heard: Box<dyn FnOnce() + Send>) {
        if let Some(balloon) = &self.memory.balloon {
            balloon.ask(heard);
        }
    }

    fn generation(&self) -> Option<Generation> {
        self.generation.as_ref().map(|generation| Generation { id: hexadecimal(generation.now().0) })
    }

    fn renew_generation(&self) -> io::Result<()> {
        self.generation.as_ref().map_or(Ok(()), |generation| generation.renew())
    }
}

/// The digits of a number that begins with these bytes.
fn hexadecimal(bytes: [u8; generation::LENGTH]) -> String {
    format!("{:032x}", u128::from_be_bytes(bytes))
}

/// Records in a container's folder that it ended before it could begin, or that nobody could serve it any more.
pub fn record_failure(folder: &Folder, error: &str) {
    let state = api::model::ContainerState {
        status: api::model::ContainerStatus::Exited,
        exit_code: Some(api::control::EXIT_FAILED),
        error: Some(error.to_owned()),
        ..Default::default()
    };
    // The error itself is told anyway.
    let _ = api::record::write(folder, &api::record::End { state, ..Default::default() });
}
