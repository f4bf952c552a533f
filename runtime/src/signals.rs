//! The signals sent to this process, to be read instead of delivered, and which of them are the container's.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};

use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The signals that are the container's.
const FORWARDED: [Signal; 17] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGABRT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGTERM,
    Signal::SIGSTKFLT,
    Signal::SIGXCPU,
    Signal::SIGXFSZ,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGWINCH,
    Signal::SIGIO,
    Signal::SIGPWR,
    Signal::SIGSYS,
];

/// Those that end what we do where there is no container yet.
const CANCELLING: [Signal; 4] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM];

/// Whether a signal ends what we do where there is no container yet.
pub fn cancels(signal: Signal) -> bool {
    CANCELLING.contains(&signal)
}

/// The signals sent to this process from now on, to be read instead of delivered.
#[derive(Debug)]
pub struct Signals {
    descriptor: SignalFd,
    /// The mask of before, for a monitor.
    pub children: SigSet,
}

impl Signals {
    /// Blocks the signals that are the container's, and opens a descriptor to read them from. Before any thread is
    /// started.
    ///
    /// # Errors
    /// What the system says.
    pub fn block() -> io::Result<Self> {
        let set: SigSet = FORWARDED.into_iter().collect();
        let children = set.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        let descriptor = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        Ok(Self { descriptor, children })
    }

    /// A way to wait for them in a runtime.
    ///
    /// # Errors
    /// What the system says.
    pub fn wait(&self) -> io::Result<Waiter<'_>> {
        #[expect(deprecated, reason = "its successor is unsafe, and a borrowed descriptor is what that asks for")]
        let ready = AsyncFd::with_interest(self.descriptor.as_fd(), Interest::READABLE)?;
        Ok(Waiter { ready, signals: self })
    }
}

/// Waits for signals.
pub struct Waiter<'a> {
    ready: AsyncFd<BorrowedFd<'a>>,
    signals: &'a Signals,
}

impl Waiter<'_> {
    /// The next signal.
    ///
    /// # Errors
    /// What the system says.
    pub async fn next(&self) -> io::Result<Signal> {
        loop {
            let mut ready = self.ready.readable().await?;
            match self.signals.descriptor.read_signal()? {
                Some(information) => {
                    let number = i32::try_from(information.ssi_signo).unwrap_or_default();
                    if let Ok(signal) = Signal::try_from(number) {
                        return Ok(signal);
                    }
                }
                None => ready.clear_ready(),
            }
        }
    }
}
