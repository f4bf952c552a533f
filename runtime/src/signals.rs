//! The signals sent to this process, to be read instead of delivered, and which of them are the container's.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
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

/// The exit code of a command that a signal has ended.
pub fn exit_code(signal: Signal) -> u8 {
    u8::try_from(128 + signal as i32).unwrap_or(u8::MAX)
}

/// What came first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum First {
    /// The end of the process.
    End,
    /// A signal that ends what we do.
    Signal(Signal),
    /// Nothing of it in time.
    Neither,
}

/// The signals sent to this process from now on, to be read instead of delivered. Dropping it restores the mask of before,
/// so that whoever blocks signals next finds it.
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

    /// The next signal that has come; `None` when there is none.
    fn read(&self) -> io::Result<Option<Signal>> {
        while let Some(information) = self.descriptor.read_signal()? {
            let number = i32::try_from(information.ssi_signo).unwrap_or_default();
            if let Ok(signal) = Signal::try_from(number) {
                return Ok(Some(signal));
            }
        }
        Ok(None)
    }

    /// Waits for the end of the process of a descriptor, unless a signal comes first that ends what we do. Without a runtime:
    /// for what ends a command, where signals are still held back.
    ///
    /// # Errors
    /// What the system says.
    pub fn until_ended(&self, process: BorrowedFd<'_>, patience: Duration) -> io::Result<First> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut ready = [PollFd::new(&process, PollFlags::IN), PollFd::new(&self.descriptor, PollFlags::IN)];
            match poll(&mut ready, Timespec::try_from(left).ok().as_ref()) {
                Ok(0) if left.is_zero() => return Ok(First::Neither),
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            if ready[0].revents().contains(PollFlags::IN) {
                return Ok(First::End);
            }
            while let Some(signal) = self.read()? {
                if cancels(signal) {
                    return Ok(First::Signal(signal));
                }
            }
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // What came for a container that has ended is nobody's any more, and is not to end us now.
        while let Ok(Some(_)) = self.descriptor.read_signal() {}
        // A mask that was in force can be set.
        _ = self.children.thread_set_mask();
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
            match self.signals.read()? {
                Some(signal) => return Ok(signal),
                None => ready.clear_ready(),
            }
        }
    }

    /// Does something, unless a signal comes first that ends what we do.
    ///
    /// # Errors
    /// What the system says.
    pub async fn unless_cancelled<T>(&self, work: impl Future<Output = T>) -> io::Result<Result<T, Signal>> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(Ok(done)),
                signal = self.next() => match signal? {
                    signal if cancels(signal) => return Ok(Err(signal)),
                    _ => {}
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_of_before_is_restored_and_nothing_is_delivered_late() {
        let before = SigSet::thread_get_mask().unwrap();
        for _ in 0..2 {
            let signals = Signals::block().unwrap();
            assert_eq!(signals.children, before);
            nix::sys::signal::raise(Signal::SIGUSR1).unwrap();
            drop(signals);
            assert_eq!(SigSet::thread_get_mask().unwrap(), before);
        }
    }

    #[test]
    fn a_signal_that_ends_what_we_do_cancels_it_and_others_do_not() {
        let signals = Signals::block().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        runtime.block_on(async {
            let waiter = signals.wait().unwrap();
            assert_eq!(waiter.unless_cancelled(async { 7 }).await.unwrap(), Ok(7));
            nix::sys::signal::raise(Signal::SIGWINCH).unwrap();
            nix::sys::signal::raise(Signal::SIGTERM).unwrap();
            let cancelled = waiter.unless_cancelled(std::future::pending::<()>()).await.unwrap();
            assert_eq!(cancelled, Err(Signal::SIGTERM));
        });
        assert_eq!((exit_code(Signal::SIGINT), exit_code(Signal::SIGTERM)), (130, 143));
    }

    #[test]
    fn a_signal_ends_the_wait_for_a_process_and_so_does_time() {
        let signals = Signals::block().unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        let process = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        let wait = |patience| signals.until_ended(process.as_fd(), patience).unwrap();
        assert_eq!(wait(Duration::from_millis(10)), First::Neither);
        nix::sys::signal::raise(Signal::SIGWINCH).unwrap();
        assert_eq!(wait(Duration::from_millis(10)), First::Neither);
        nix::sys::signal::raise(Signal::SIGTERM).unwrap();
        assert_eq!(wait(Duration::from_secs(60)), First::Signal(Signal::SIGTERM));
        child.kill().unwrap();
        assert_eq!(wait(Duration::from_secs(60)), First::End);
        child.wait().unwrap();
    }
}
