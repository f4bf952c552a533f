//! From requests to operations of the ring, and from these back to answers.

use std::io;

use rustix::fs::FallocateFlags;
use vm_memory::{Bytes, GuestAddress, VolatileSlice};

use super::request::{Action, Failure, Request};
use super::{Blk, MISSES_MAX, QUEUES_MAX};
use crate::GuestMemory;
use crate::device::Broken;
use crate::guest_io::{read_cached_at, write_all_at};
use crate::limit::Limiter;
use crate::queue::{Chain, Served, VirtQueue};
use crate::ring_io::{Operation, Token};

/// A request that waits for an operation.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pending {
    queue: usize,
    head: u16,
    status: GuestAddress,
    step: Step,
}

/// What an operation is for.
#[derive(Debug, Clone, Copy)]
enum Step {
    Read {
        length: u32,
    },
    Write {
        length: u32,
    },
    Discard,
    Zero {
        offset: u64,
        length: u32,
    },
    /// The last one of a request that needs nothing else.
    Last,
}

/// What became of a request at once.
enum Begun {
    /// It is done; so much data was written for the driver.
    Done(Result<u32, Failure>),
    /// An operation is under way.
    Waits(Token, Step),
}

impl Blk {
    /// Serves a queue as far as limits and the room for operations reach.
    pub(super) fn serve(&mut self, memory: &GuestMemory, index: usize, queue: &mut VirtQueue) -> Result<(), Broken> {
        queue.serve(memory, |chain| {
            if !self.io.has_room() {
                self.counters.stalls += u64::from(!self.stalled);
                self.stalled = true;
                return Ok(Served::Refused);
            }
            if !Limiter::admits(&mut self.limiter) {
                return Ok(Served::Refused);
            }
            self.take(memory, index, chain)
        })
    }

    /// Serves all queues. Each is the first one in its turn: what one leaves is what the next ones have.
    pub(super) fn serve_all(&mut self, memory: &GuestMemory, queues: &mut [VirtQueue]) -> Result<(), Broken> {
        self.stalled = false;
        self.first_queue = (self.first_queue + 1) % queues.len().max(1);
        let (later, first) = queues.split_at_mut(self.first_queue);
        let later = (0..).zip(later);
        for (index, queue) in (self.first_queue..).zip(first).chain(later) {
            self.serve(memory, index, queue)?;
        }
        Ok(())
    }

    /// Takes a request from its queue.
    fn take(&mut self, memory: &GuestMemory, queue: usize, chain: Chain<'_>) -> Result<Served, Broken> {
        let head = chain.head_index();
        let request = Request::parse(memory, chain);
        // A device has few queues.
        let request = request.map_err(|reason| Broken::Chain { queue: queue as u16, reason })?;
        let status = request.status;
        let begun = match request.action(self.limits) {
            Ok(action) => self.begin(memory, action),
            Err(failure) => {
                self.charge(0);
                Begun::Done(Err(failure))
            }
        };
        match begun {
            Begun::Done(outcome) => self.finish(memory, queue, status, outcome).map(Served::Used),
            Begun::Waits(token, step) => {
                self.pending[usize::from(token)] = Some(Pending { queue, head, status, step });
                Ok(Served::Kept)
            }
        }
    }

    fn begin(&mut self, memory: &GuestMemory, action: Action<'_>) -> Begun {
        let durable = self.write_through;
        let keep = FallocateFlags::KEEP_SIZE;
        let (operation, step) = match &action {
            Action::Read { buffers, offset, length } => {
                self.counters.reads += 1;
                self.charge(u64::from(*length));
                let done = self.read_cached(buffers, *offset);
                if done == *length as usize {
                    self.counters.cached_reads += 1;
                    self.counters.read_bytes += u64::from(*length);
                    return Begun::Done(Ok(*length));
                }
                (Operation::Read { buffers, offset: *offset, done }, Step::Read { length: *length })
            }
            Action::Write { buffers, offset, length } => {
                self.counters.writes += 1;
                self.charge(u64::from(*length));
                let step = Step::Write { length: *length };
                if !durable {
                    let outcome = write_all_at(self.io.file(), buffers, *offset);
                    return Begun::Done(self.judge(step, outcome));
                }
                (Operation::Write { buffers, offset: *offset, durable }, step)
            }
            Action::Flush => {
                self.counters.flushes += 1;
                self.charge(0);
                if self.limits.read_only {
                    return Begun::Done(Ok(0));
                }
                (Operation::Sync, Step::Last)
            }
            Action::Discard { offset, length } => {
                self.counters.discards += 1;
                self.charge(0);
                let mode = FallocateFlags::PUNCH_HOLE | keep;
                (Operation::Allocate { mode, offset: *offset, length: *length }, Step::Discard)
            }
            Action::Zero { offset, length, unmap } => {
                self.counters.zeroings += 1;
                self.charge(0);
                let mode = if *unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE } | keep;
                let (offset, length) = (*offset, *length);
                (Operation::Allocate { mode, offset, length: length.into() }, Step::Zero { offset, length })
            }
            Action::Identify { buffers } => {
                self.counters.identifications += 1;
                self.charge(0);
                return Begun::Done(scatter(&self.id, buffers));
            }
        };
        if let Operation::Allocate { length: 0, .. } = operation {
            return Begun::Done(Ok(0));
        }
        match self.io.start(memory, operation) {
            Some(token) => Begun::Waits(token, step),
            None => Begun::Done(Err(Failure::Io)),
        }
    }

    /// Reads what the page cache has, and says how much of the buffers that is. Without a ring there is nothing to gain, and
    /// little where it had nothing of what was read before: a ring finds what it has, too, though it takes longer to say so.
    fn read_cached(&mut self, buffers: &[VolatileSlice<'_>], offset: u64) -> usize {
        let expected = self.misses < MISSES_MAX || self.counters.reads.is_multiple_of(MISSES_MAX);
        if !self.cache_tells || !self.io.has_ring() || !expected {
            return 0;
        }
        match read_cached_at(self.io.file(), buffers, offset) {
            Ok(count) => {
                self.misses = 0;
                count
            }
            Err(error) => {
                self.misses += 1;
                self.cache_tells = error.kind() != io::ErrorKind::Unsupported;
                0
            }
        }
    }

    /// Goes on with the requests whose operations are completed.
    pub(super) fn complete(&mut self, memory: &GuestMemory, queues: &mut [VirtQueue]) -> Result<(), Broken> {
        // Before anything can fail: what was started is not left for another driver's time.
        self.io.submit();
        let mut used = [false; QUEUES_MAX as usize];
        while let Some((token, outcome)) = self.io.completed() {
            let Some(pending) = self.pending.get_mut(usize::from(token)).and_then(Option::take) else { continue };
            if let Some(token) = self.next_operation(memory, pending.step, &outcome) {
                self.pending[usize::from(token)] = Some(Pending { step: Step::Last, ..pending });
                continue;
            }
            let outcome = self.judge(pending.step, outcome);
            let Some(queue) = queues.get_mut(pending.queue) else { continue };
            let written = self.finish(memory, pending.queue, pending.status, outcome)?;
            queue.push(memory, pending.head, written)?;
            used[pending.queue] = true;
        }
        for (queue, used) in queues.iter_mut().zip(used) {
            if used {
                queue.signal(memory)?;
            }
        }
        Ok(())
    }

    /// Starts what a request needs after one of its operations.
    fn next_operation(&mut self, memory: &GuestMemory, step: Step, outcome: &io::Result<()>) -> Option<Token> {
        let Step::Zero { offset, length } = step else { return None };
        let durable = self.write_through;
        match outcome {
            Ok(()) if durable => self.io.start(memory, Operation::Sync),
            // The file system has no such ranges: they are written.
            Err(error) if is_unsupported(error) || error.kind() == io::ErrorKind::InvalidInput => {
                self.charge(length.into());
                self.io.start(memory, Operation::Zero { offset, length, durable })
            }
            _ => None,
        }
    }

    /// What the outcome of a request's last operation means for it.
    fn judge(&mut self, step: Step, outcome: io::Result<()>) -> Result<u32, Failure> {
        match (step, outcome) {
            (Step::Read { length }, Ok(())) => {
                self.counters.read_bytes += u64::from(length);
                Ok(length)
            }
            (Step::Write { length }, Ok(())) => {
                self.counters.written_bytes += u64::from(length);
                Ok(0)
            }
            (_, Ok(())) => Ok(0),
            (Step::Discard, Err(error)) if is_unsupported(&error) => Err(Failure::Unsupported),
            // A disk that lets go of larger blocks only. It is a hint, and what is kept reads as something, too.
            (Step::Discard, Err(error)) if error.kind() == io::ErrorKind::InvalidInput => Ok(0),
            (_, Err(_)) => Err(Failure::Io),
        }
    }

    /// Writes a request's status, and gives the number of bytes written for the driver, the status included.
    fn finish(
        &mut self,
        memory: &GuestMemory,
        queue: usize,
        status: GuestAddress,
        outcome: Result<u32, Failure>,
    ) -> Result<u32, Broken> {
        let (byte, written) = match outcome {
            Ok(written) => (0, written),
            Err(failure) => (failure.status(), 0),
        };
        self.counters.failed += u64::from(outcome.is_err());
        let reason = "the status byte cannot be written";
        memory.write_obj::<u8>(byte, status).map_err(|_| Broken::Chain { queue: queue as u16, reason })?;
        Ok(written + 1)
    }

    fn charge(&mut self, bytes: u64) {
        self.limiter.iter_mut().for_each(|limiter| limiter.charge(bytes));
    }
}

/// Whether an error says that a file has no such operation.
fn is_unsupported(error: &io::Error) -> bool {
    // EOPNOTSUPP and ENOSYS; ENODEV of what is neither a file nor a block device.
    error.kind() == io::ErrorKind::Unsupported || error.raw_os_error() == Some(libc::ENODEV)
}

/// Copies bytes into the first of `buffers`, which have room for them, and says how many.
fn scatter(mut bytes: &[u8], buffers: &[VolatileSlice<'_>]) -> Result<u32, Failure> {
    let length = u32::try_from(bytes.len()).map_err(|_| Failure::Io)?;
    for buffer in buffers {
        let (now, later) = bytes.split_at(bytes.len().min(buffer.len()));
        buffer.write_slice(now, 0).map_err(|_| Failure::Io)?;
        bytes = later;
    }
    if bytes.is_empty() { Ok(length) } else { Err(Failure::Io) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blk::Options;

    #[test]
    fn a_range_that_a_disk_cannot_let_go_of_as_it_is_cut_stays() {
        let mut device = Blk::new(tempfile::tempfile().unwrap(), Options::default()).unwrap();
        let mut judge = |step, error| device.judge(step, Err(io::Error::from_raw_os_error(error)));
        assert_eq!(judge(Step::Discard, libc::EINVAL), Ok(0));
        assert_eq!(judge(Step::Discard, libc::EOPNOTSUPP), Err(Failure::Unsupported));
        assert_eq!(judge(Step::Discard, libc::EIO), Err(Failure::Io));
        // Who asked for zeros gets them, or hears why not.
        assert_eq!(judge(Step::Last, libc::EINVAL), Err(Failure::Io));
    }
}
