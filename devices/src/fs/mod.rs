//! The file system device (VIRTIO 1.2 §5.11, "File System Device", device ID 26).
//!
//! A high-priority queue and one or more queues of requests. A request is a FUSE message: what the driver wrote, then room for
//! the reply. The messages are the business of the `fuse` crate; here they are found in guest memory, and data moves between
//! it and files without a copy. Requests that wait for a lock are kept and returned when they are over. No notification queue,
//! and no shared memory (DAX).
//!
//! What is saved is the session, as far as the `fuse` crate keeps one: a driver that holds locks, or has files open that have no
//! name any more, is not saved. It is restored by the thread that will serve.
//!
//! The device waits for the host's file system: it has to be in an event loop of its own thread, prepared by
//! [`fuse::prepare_thread`].

mod message;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::os::fd::AsRawFd as _;

use fuse::{Served as Answer, Server, Session};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use self::message::GuestMessage;
use crate::GuestMemory;
use crate::device::{Broken, Event, Loop, Resources, Trigger, VirtioDevice, Watch, read_config_bytes};
use crate::limit::Limiter;
use crate::queue::{Chain, QUEUE_SIZE_MAX, Served, VirtQueue};
use crate::state::{self, LimiterState, StateError};

/// The length of a tag (§5.11.4).
pub const TAG_MAX: usize = 36;
/// The most request queues.
pub const REQUEST_QUEUES_MAX: usize = 8;
/// The high-priority queue (§5.11.2).
const HIGH_PRIORITY: usize = 0;
/// What the device watches, in this order.
const LOCKS: usize = 0;
const LIMITS: usize = 1;

/// Why a device cannot be made.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum FsError {
    /// A tag that does not fit its field.
    #[error("the tag {tag:?} has {} bytes: give 1 to {TAG_MAX}", tag.len())]
    Tag {
        /// The tag.
        tag: String,
    },
    /// A number of queues that is not offered.
    #[error("{count} request queues: give 1 to {REQUEST_QUEUES_MAX}")]
    Queues {
        /// How many.
        count: usize,
    },
}

/// A request that is kept.
#[derive(Debug)]
struct Kept {
    queue: usize,
    head: u16,
    reply: message::Room,
}

/// What is kept of the device.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct FsState {
    session: Session,
    limiter: Option<LimiterState>,
}

/// The file system device.
#[derive(Debug)]
pub struct Fs {
    server: Server,
    configuration: [u8; TAG_MAX + 4],
    queue_sizes: Vec<u16>,
    limiter: Option<Limiter>,
    kept: HashMap<u64, Kept>,
}

impl Fs {
    /// A device by whose tag the guest finds what `server` exports.
    ///
    /// # Errors
    /// [`FsError`].
    pub fn new(server: Server, tag: &str, request_queues: usize, limiter: Option<Limiter>) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > TAG_MAX {
            return Err(FsError::Tag { tag: tag.to_owned() });
        }
        let count = u32::try_from(request_queues).ok().filter(|_| (1..=REQUEST_QUEUES_MAX).contains(&request_queues));
        let count = count.ok_or(FsError::Queues { count: request_queues })?;
        // struct virtio_fs_config (§5.11.4): tag, num_request_queues.
        let mut configuration = [0; TAG_MAX + 4];
        configuration[..tag.len()].copy_from_slice(tag.as_bytes());
        configuration[TAG_MAX..].copy_from_slice(&count.to_le_bytes());
        let queue_sizes = vec![QUEUE_SIZE_MAX; 1 + request_queues];
        Ok(Self { server, configuration, queue_sizes, limiter, kept: HashMap::new() })
    }

    /// Serves the requests of a queue, as many as there are and may be served.
    fn drain(&mut self, memory: &GuestMemory, index: usize, queue: &mut VirtQueue) -> Result<(), Broken> {
        let limited = index != HIGH_PRIORITY;
        queue.serve_each(memory, |chain| {
            if limited && !Limiter::admits(&mut self.limiter) {
                return Ok(Served::Refused);
            }
            let (served, moved) = self.serve(memory, index, chain)?;
            if let (true, Some(limiter)) = (limited, &mut self.limiter) {
                limiter.charge(moved);
            }
            Ok(served)
        })
    }

    /// Serves one request. Gives what became of it, and how many bytes it moved.
    fn serve(&mut self, memory: &GuestMemory, queue: usize, chain: Chain<'_>) -> Result<(Served, u64), Broken> {
        let number = u16::try_from(queue).unwrap_or(u16::MAX);
        let broken = |reason| Broken::Chain { queue: number, reason };
        let head = chain.head_index();
        let room = chain.clone();
        let mut message = GuestMessage::of(memory, chain).map_err(broken)?;
        let before = self.server.written_bytes();
        let served = match self.server.serve(&mut message) {
            Answer::Reply { reply, data } => Served::Used(message.reply(reply, data).map_err(broken)?),
            Answer::Nothing => Served::Used(0),
            Answer::Waiting(ticket) => {
                self.kept.insert(ticket, Kept { queue, head, reply: message::Room::of(room) });
                Served::Kept
            }
            Answer::Malformed => return Err(broken("a request has no header")),
        };
        let replied = if let Served::Used(length) = served { length } else { 0 };
        // What was copied from file to file did not come through the queue.
        Ok((served, self.server.written_bytes() - before + u64::from(replied)))
    }

    /// Returns the requests whose waits are over.
    fn return_kept(&mut self, memory: &GuestMemory, queues: &mut [VirtQueue]) -> Result<(), Broken> {
        for (ticket, reply) in self.server.over() {
            let Some(kept) = self.kept.remove(&ticket) else { continue };
            let Some(queue) = queues.get_mut(kept.queue) else { continue };
            queue.push(memory, kept.head, kept.reply.write(memory, &reply))?;
            queue.signal(memory)?;
        }
        Ok(())
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&self.configuration, offset, data);
    }

    fn start(&mut self, _: u64) {}

    fn process(&mut self, resources: Resources<'_>, event: Event) -> Result<(), Broken> {
        let Resources { memory, queues, .. } = resources;
        match event {
            Event::Queue(number) => {
                let index = usize::from(number);
                queues.get_mut(index).map_or(Ok(()), |queue| self.drain(memory, index, queue))
            }
            Event::Backend(LOCKS) => self.return_kept(memory, queues),
            Event::Backend(LIMITS) => {
                if let Some(limiter) = &mut self.limiter {
                    limiter.wake();
                }
                let mut requests = queues.iter_mut().enumerate().skip(HIGH_PRIORITY + 1);
                requests.try_for_each(|(index, queue)| self.drain(memory, index, queue))
            }
            Event::Backend(_) => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.server.reset();
        self.kept.clear();
        self.limiter.iter_mut().for_each(Limiter::reset);
    }

    fn quiesce(&mut self, resources: Resources<'_>) -> Result<(), Broken> {
        // Nothing is under way but waits, and nobody ends those that are not over.
        self.return_kept(resources.memory, resources.queues)
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let session = self.server.save()?;
        Ok(state::encode(&FsState { session, limiter: Limiter::save(&self.limiter) }))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let FsState { session, limiter } = state::decode("file system device", state)?;
        self.server.restore(session)?;
        Limiter::restore(&mut self.limiter, limiter);
        Ok(())
    }

    fn let_go(&mut self) {
        self.server.let_go();
    }

    fn watched(&self) -> Vec<Watch> {
        let locks = Watch { descriptor: self.server.event().as_raw_fd(), trigger: Trigger::Readable };
        [locks].into_iter().chain(self.limiter.iter().map(Limiter::watch)).collect()
    }

    fn event_loop(&self) -> Loop {
        Loop::Files
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let mut metrics = self.server.metrics();
        metrics.push(("throttled", self.limiter.as_ref().map_or(0, Limiter::throttled)));
        metrics
    }

    fn hurry(&mut self) {
        self.limiter.iter_mut().for_each(Limiter::lift);
    }
}
