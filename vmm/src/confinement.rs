//! The filters of a monitor's threads, all of which are in force before the guest runs.
//!
//! Each thread takes its own, as the last thing before it begins its work. The vCPUs wait for the others.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::monitor::fail;

/// Threads that are to be confined. Clones are the same.
#[derive(Debug, Clone)]
pub struct Confinement(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// How many are not confined yet.
    left: Mutex<usize>,
    all: Condvar,
}

impl Confinement {
    /// So many threads, none of which is confined.
    pub fn of(threads: usize) -> Self {
        Self(Arc::new(Inner { left: Mutex::new(threads), all: Condvar::new() }))
    }

    /// Confines the calling thread, one of those that were counted, or ends the process: nothing of the guest is handled by a
    /// thread that is not.
    pub fn enter(&self, kind: jailer::Thread) {
        if let Err(error) = jailer::thread(kind) {
            fail(&error);
        }
        self.entered();
    }

    fn entered(&self) {
        let mut left = self.0.left.lock().unwrap_or_else(PoisonError::into_inner);
        *left = left.saturating_sub(1);
        if *left == 0 {
            self.0.all.notify_all();
        }
    }

    /// Waits until all threads are confined.
    pub fn wait(&self) {
        let left = self.0.left.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.0.all.wait_while(left, |left| *left > 0).unwrap_or_else(PoisonError::into_inner));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{TryRecvError, channel};
    use std::thread;

    use super::*;

    #[test]
    fn who_waits_goes_on_when_the_last_one_is_confined() {
        let confinement = Confinement::of(3);
        let (sender, passed) = channel();
        let waiting = confinement.clone();
        let vcpu = thread::spawn(move || {
            waiting.entered();
            waiting.wait();
            sender.send(()).unwrap();
        });
        confinement.entered();
        while *confinement.0.left.lock().unwrap() > 1 {
            thread::yield_now();
        }
        assert_eq!(passed.try_recv(), Err(TryRecvError::Empty));
        confinement.entered();
        vcpu.join().unwrap();
        assert_eq!(passed.recv(), Ok(()));
        // And whoever comes later does not wait.
        confinement.wait();
    }
}
