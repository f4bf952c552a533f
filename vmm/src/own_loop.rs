//! Event loops of one device each, on threads of their own: a device that may wait holds up nobody but its driver there.

use std::sync::{Arc, Mutex};
use std::{io, thread};

use devices::mmio::MmioDevice;
use event_manager::{EventManager, MutEventSubscriber, SubscriberOps as _};

use crate::confinement::Confinement;
use crate::monitor::{MonitorError, fail};

/// Starts the thread of a disk: `disk N`, the N-th of those that have one.
///
/// # Errors
/// When the system has no thread left.
pub(crate) fn start_disk(index: usize, device: &Arc<Mutex<MmioDevice>>, confinement: &Confinement) -> io::Result<()> {
    let (device, confinement) = (Arc::clone(device), confinement.clone());
    let run = move || run(device, jailer::Thread::Disk, &confinement);
    thread::Builder::new().name(format!("disk {index}")).spawn(run).map(drop)
}

/// Calls a device when there is something for it to do, until the process is over. Before the first time the calling thread
/// becomes one of this kind.
pub(crate) fn run(device: Arc<Mutex<MmioDevice>>, kind: jailer::Thread, confinement: &Confinement) -> ! {
    let mut events = match EventManager::new() {
        Ok(events) => events,
        Err(error) => fail(&MonitorError::EventLoop(error)),
    };
    events.add_subscriber(device as Arc<Mutex<dyn MutEventSubscriber>>);
    confinement.enter(kind);
    loop {
        if let Err(error) = turn(&mut events) {
            fail(&error);
        }
    }
}

/// Waits until there is something for a device of an event loop to do, and calls it.
///
/// # Errors
/// [`MonitorError::EventLoop`].
pub(crate) fn turn<S: MutEventSubscriber>(events: &mut EventManager<S>) -> Result<(), MonitorError> {
    match events.run() {
        Ok(_) => Ok(()),
        Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EINTR => Ok(()),
        Err(error) => Err(MonitorError::EventLoop(error)),
    }
}
