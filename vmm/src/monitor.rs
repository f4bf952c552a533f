//! The event loop, the container's session, and how both end.
//!
//! Three things can end a monitor: the container's exit, as the agent reports it; the guest, by a triple fault; and the
//! front end, by going away. Each arrives as an [`End`] at the event loop, which then delivers what the guest had
//! already said and returns.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::{io, thread};

use api::config::LaunchConfig;
use api::control::{Failure, FromMonitor, Timeline};
use api::session::{Outcome, Session, SessionError, now, tell};
use api::stdio::Streams;
use devices::vsock::ports::HostPorts;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::machine::{self, Machine, MachineError};
use crate::vcpu::{self, GuestEnd};

/// The most of the guest's console that goes into an error.
const CONSOLE_MAX: usize = 8 << 10;

/// Why a monitor did not get as far as running a guest, or could not go on.
#[derive(Debug, Error)]
pub enum MonitorError {
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

/// What a monitor's run came to.
#[derive(Debug)]
pub enum Report {
    /// The container's exit code, or 0 when a guest without a container powered off. The front end knows.
    Exited(u8),
    /// The container did not run to its end.
    Failed(Failure),
    /// Nobody waits for the container any more.
    Abandoned,
}

/// What ends the event loop.
enum End {
    Guest(GuestEnd),
    Session(Outcome),
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

/// Runs a VM, and the container in it, to the end.
///
/// # Errors
/// [`MonitorError`] when there was no guest to run, or it failed without a container that could report it.
pub fn run(config: LaunchConfig, front_end: Option<UnixStream>, started: u64) -> Result<Report, MonitorError> {
    let system = |step| move |source| MonitorError::System { step, source };
    let ports = HostPorts::new(config.vm.vsock.clone());
    let mut streams = Streams::default();
    let mut session = None;
    if let Some(container) = config.container {
        let (started, offers) = Streams::start(&container.process, || confine(jailer::Thread::Stream))
            .map_err(system("set the container's streams up"))?;
        streams = started;
        let front_end = front_end.as_ref().map(UnixStream::try_clone).transpose();
        let front_end = front_end.map_err(system("share the front end's socket"))?;
        let (conversation, offer) = Session::new(container, front_end).map_err(system("set the session up"))?;
        session = Some(conversation);
        offers.into_iter().chain([offer]).for_each(|offer| ports.offer(offer.port, offer.stream));
    }
    let machine = machine::build(&config.vm, ports.clone(), session.is_none())?;
    let timeline = Timeline { monitor_started: started, vm_created: now(), ..Default::default() };
    run_machine(machine, session.map(|session| (session, streams, timeline)), &ports, front_end.as_ref())
}

fn run_machine(
    mut machine: Machine,
    session: Option<(Session, Streams, Timeline)>,
    ports: &HostPorts,
    front_end: Option<&UnixStream>,
) -> Result<Report, MonitorError> {
    let system = |step| move |source| MonitorError::System { step, source };
    let event = EventFd::new(EFD_NONBLOCK).map_err(system("make an eventfd"))?;
    let (ends, ended) = mpsc::channel();
    let ender = || -> Result<Ender, MonitorError> {
        Ok(Ender { ends: ends.clone(), event: event.try_clone().map_err(system("clone an eventfd"))? })
    };
    let mut streams = None;
    if let Some((session, outputs, timeline)) = session {
        streams = Some(outputs);
        let ender = ender()?;
        let thread = thread::Builder::new().name("session".into());
        thread
            .spawn(move || {
                confine(jailer::Thread::Session);
                ender.end(End::Session(session.run(timeline)));
            })
            .map_err(system("start the session's thread"))?;
    }
    let mut events = subscribe(&machine, event.try_clone().map_err(system("clone an eventfd"))?)?;
    for (id, vcpu) in (0u8..).zip(std::mem::take(&mut machine.vcpus)) {
        let ender = ender()?;
        vcpu::spawn(id, vcpu, machine.bus.clone(), move |end| ender.end(End::Guest(end)))
            .map_err(system("start a vCPU's thread"))?;
    }
    confine(jailer::Thread::EventLoop);
    let end = wait(&mut events, &ended)?;
    drop(events);
    // Fails when nobody watches any more.
    let _ = machine.console.flush();
    match streams {
        Some(streams) => Ok(finish(&machine, end, &ended, ports, streams, front_end)),
        None => match end {
            End::Guest(GuestEnd::Shutdown) | End::Session(_) => Ok(Report::Exited(0)),
            End::Guest(end) => Err(MonitorError::Guest(end)),
        },
    }
}

type Subscriber = Arc<Mutex<dyn MutEventSubscriber>>;

fn subscribe(machine: &Machine, event: EventFd) -> Result<EventManager<Subscriber>, MonitorError> {
    let mut events = EventManager::new().map_err(MonitorError::EventLoop)?;
    for device in machine.bus.devices.iter() {
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
        match events.run() {
            Ok(_) => {}
            Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(MonitorError::EventLoop(error)),
        }
        if let Ok(end) = ended.try_recv() {
            return Ok(end);
        }
    }
}

/// Confines the calling thread, or ends the process: nothing of the guest is handled by a thread that is not.
pub(crate) fn confine(kind: jailer::Thread) {
    if let Err(error) = jailer::thread(kind) {
        eprintln!("error: {}", chain(&error));
        std::process::exit(api::control::EXIT_FAILED.into());
    }
}

/// Delivers what the guest said, and reports.
fn finish(
    machine: &Machine,
    end: End,
    ended: &Receiver<End>,
    ports: &HostPorts,
    streams: Streams,
    front_end: Option<&UnixStream>,
) -> Report {
    if let End::Session(Outcome::Abandoned) = end {
        return Report::Abandoned;
    }
    machine.flush();
    ports.withdraw();
    streams.finish();
    let (outcome, guest_end) = match end {
        End::Session(outcome) => (outcome, None),
        // The session finds its connection closed, after what the agent said last.
        End::Guest(guest_end) => (session_outcome(ended), Some(guest_end)),
    };
    match outcome {
        Outcome::Exited(status) => {
            if let Some(front_end) = front_end {
                tell(front_end, &FromMonitor::Exited(status));
            }
            Report::Exited(status.code)
        }
        Outcome::Abandoned => Report::Abandoned,
        Outcome::Failed(error) => {
            let failure = explain(&error, guest_end, machine);
            if let Some(front_end) = front_end {
                tell(front_end, &FromMonitor::Failed(failure.clone()));
            }
            Report::Failed(failure)
        }
    }
}

fn session_outcome(ended: &Receiver<End>) -> Outcome {
    loop {
        match ended.recv() {
            Ok(End::Session(outcome)) => return outcome,
            // Other vCPUs stop when the first one does.
            Ok(End::Guest(_)) => {}
            Err(_) => return Outcome::Failed(SessionError::GuestEnded("the session did")),
        }
    }
}

fn explain(error: &SessionError, guest_end: Option<GuestEnd>, machine: &Machine) -> Failure {
    let mut message = chain(error);
    // Without one it was the agent that let go.
    if let Some(end) = guest_end {
        message = format!("{message}: {}", chain(&end));
    }
    // The console explains a guest that died; it has nothing to do with a program that is not there.
    let explains = !matches!(error, SessionError::Refused(_));
    let tail = machine.console.tail();
    let tail = String::from_utf8_lossy(&tail[tail.len().saturating_sub(CONSOLE_MAX)..]).into_owned();
    Failure { exit_code: error.exit_code(), message, console: (explains && !tail.is_empty()).then_some(tail) }
}

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
