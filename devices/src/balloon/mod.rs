//! The balloon device (VIRTIO 1.2 §5.5, "Traditional Memory Balloon Device", device ID 5).
//!
//! The guest gives memory up and takes it back, as large as the host asks for ([`host`]); it reports memory that it does not
//! use for now; and it says how it fares. What it gives up or reports is given back to the host at once
//! ([`crate::reclaim`]) and is there again as soon as the guest touches it, so that taking it back needs nothing of us.
//!
//! Addresses outside of guest memory are left out and counted. Free page hints and page poisoning are not supported; a guest
//! that poisons free pages does not report them.

pub mod host;
#[cfg(test)]
mod tests;

use std::ops::Range;

use serde::{Deserialize, Serialize};

use self::host::{HostBalloon, Statistics};
use crate::GuestMemory;
use crate::device::{Broken, Event, Resources, Trigger, VirtioDevice, Watch, read_config_bytes};
use crate::queue::{Buffers, Chain, VirtQueue};
use crate::reclaim::{PAGE, discard, discard_range};
use crate::state::{self, StateError, impossible};

/// VIRTIO_BALLOON_F_STATS_VQ, the first of the feature bits (§5.5.3) that are offered.
const STATISTICS: u64 = 1 << 1;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM: the guest takes memory back rather than kill a program.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_PAGE_REPORTING.
const REPORTING: u64 = 1 << 5;

/// The most pages taken of one request; Linux sends 256. Of a longer one the rest stays with the guest, which the
/// specification allows: each page can cost a system call.
const PAGES_MAX: usize = 1024;
/// The most memory taken of one report; Linux sends 128 MiB. It bounds how long one takes.
const REPORT_MAX: usize = 256 << 20;
/// The most statistics in a buffer; there are ten, and Linux adds some now and then.
const STATISTICS_MAX: usize = 64;
/// The length of one: a tag of 16 bits, a value of 64 (§5.5.6.3).
const STATISTIC: usize = 10;

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
/// The first queue of those that exist with their feature only. The specification numbers them 2 to 4 whether they exist
/// or not, Linux counts those that do: with no hints, reports come at 3 or at 4.
const OPTIONAL: u16 = 2;
/// Linux needs 32 places to report free pages.
const QUEUE_SIZES: [u16; 5] = [128; 5];

/// The balloon device.
#[derive(Debug)]
pub struct Balloon {
    host: HostBalloon,
    /// The target that the driver knows.
    told: u32,
    /// The queue for statistics, if the driver uses it.
    statistics: Option<u16>,
    /// The buffer that is given back to ask for statistics (§5.5.6.3).
    held: Option<u16>,
    counters: Counters,
}

/// What is kept of it.
#[derive(Debug, Serialize, Deserialize)]
struct BalloonState {
    target_pages: u32,
    actual_pages: u32,
    told: u32,
    held: Option<u16>,
}

#[derive(Debug, Default)]
struct Counters {
    inflated_pages: u64,
    deflated_pages: u64,
    reported_bytes: u64,
    refused_bytes: u64,
    statistics: u64,
}

impl Balloon {
    /// A device for the host's side of it.
    pub fn new(host: HostBalloon) -> Self {
        Self { host, told: 0, statistics: None, held: None, counters: Counters::default() }
    }

    /// Asks for statistics if somebody waits for them, and takes those that came.
    fn serve_statistics(&mut self, memory: &GuestMemory, queue: &mut VirtQueue) -> Result<(), Broken> {
        if self.host.is_asked()
            && let Some(head) = self.held.take()
        {
            queue.push(memory, head, 0)?;
            queue.signal(memory)?;
        }
        // Only one buffer is taken, whatever the driver offers: the next one comes when this one was given back. A second
        // look finds the one that came between the first and asking for a notification.
        for _ in 0..2 {
            if self.held.is_some() {
                break;
            }
            if let Some(chain) = queue.pop(memory)? {
                self.held = Some(chain.head_index());
                let statistics = parse_statistics(memory, chain).map_err(|reason| queue.malformed(reason))?;
                self.counters.statistics += 1;
                self.host.answer(statistics);
            } else if !queue.rearm(memory)? {
                break;
            }
        }
        Ok(())
    }
}

impl Counters {
    fn inflate(&mut self, memory: &GuestMemory, chain: Chain<'_>) -> Result<(), &'static str> {
        let mut pages = parse_pages(memory, chain)?;
        for run in runs(&mut pages) {
            let given = discard_range(memory, &run);
            self.inflated_pages += given / PAGE as u64;
            self.refused_bytes += run.end - run.start - given;
        }
        Ok(())
    }

    fn report(&mut self, memory: &GuestMemory, chain: Chain<'_>) -> Result<(), &'static str> {
        let mut rest = REPORT_MAX;
        for slice in Buffers::of(memory, chain)?.writable {
            let length = slice.len();
            let given = slice.subslice(0, length.min(rest)).map_or(0, |slice| discard(&slice).unwrap_or(0));
            rest -= given;
            self.reported_bytes += given as u64;
            self.refused_bytes += (length - given) as u64;
        }
        Ok(())
    }
}

/// The page numbers of a request to inflate or deflate (§5.5.6).
fn parse_pages(memory: &GuestMemory, chain: Chain<'_>) -> Result<Vec<u32>, &'static str> {
    let bytes = read(memory, chain, PAGES_MAX, 4)?;
    Ok(bytes.as_chunks().0.iter().map(|number| u32::from_le_bytes(*number)).collect())
}

fn parse_statistics(memory: &GuestMemory, chain: Chain<'_>) -> Result<Statistics, &'static str> {
    let mut statistics = Statistics::default();
    for [t0, t1, value @ ..] in read(memory, chain, STATISTICS_MAX, STATISTIC)?.as_chunks::<STATISTIC>().0 {
        statistics.set(u16::from_le_bytes([*t0, *t1]), u64::from_le_bytes(*value));
    }
    Ok(statistics)
}

/// Reads the whole elements of `size` bytes in a chain, `most` at most.
fn read(memory: &GuestMemory, chain: Chain<'_>, most: usize, size: usize) -> Result<Vec<u8>, &'static str> {
    let mut buffers = Buffers::of(memory, chain)?;
    let length = buffers.readable.iter().fold(0usize, |sum, slice| sum.saturating_add(slice.len()));
    let mut bytes = vec![0; (length / size).min(most) * size];
    buffers.take(&mut bytes).ok_or("a request is shorter than it says")?;
    Ok(bytes)
}

/// The ranges of memory that pages make up, as few as there are.
fn runs(pages: &mut [u32]) -> impl Iterator<Item = Range<u64>> {
    let address = |page: u32| u64::from(page) * PAGE as u64;
    pages.sort_unstable();
    pages.chunk_by(|a, b| a.checked_add(1).is_some_and(|next| *b <= next)).filter_map(move |run| {
        let (first, last) = (run.first()?, run.last()?);
        Some(address(*first)..address(*last) + PAGE as u64)
    })
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        STATISTICS | DEFLATE_ON_OOM | REPORTING
    }

    /// `struct virtio_balloon_config` (§5.5.4): num_pages, actual; the rest belongs to features that are not offered.
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let [a, b, c, d] = self.host.target_pages().to_le_bytes();
        let [e, f, g, h] = self.host.actual_pages().to_le_bytes();
        read_config_bytes(&[a, b, c, d, e, f, g, h], offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let (4, Ok(actual)) = (offset, data.try_into()) {
            self.host.set_actual_pages(u32::from_le_bytes(actual));
        }
    }

    fn start(&mut self, features: u64) {
        // The driver reads the target after this (§5.5.5).
        self.told = self.host.target_pages();
        self.statistics = (features & STATISTICS != 0).then_some(OPTIONAL);
        self.held = None;
    }

    fn process(&mut self, resources: Resources<'_>, event: Event) -> Result<(), Broken> {
        let Resources { memory, queues, mut configuration } = resources;
        let index = match event {
            Event::Queue(index) => index,
            Event::Backend(_) => {
                let target = self.host.target_pages();
                if std::mem::replace(&mut self.told, target) != target {
                    configuration.change();
                }
                match self.statistics {
                    Some(index) => index,
                    None => return Ok(()),
                }
            }
        };
        let Some(queue) = queues.get_mut(usize::from(index)) else { return Ok(()) };
        if self.statistics == Some(index) {
            return self.serve_statistics(memory, queue);
        }
        let counters = &mut self.counters;
        queue.for_each(memory, |chain| {
            let handled = match index {
                INFLATE => counters.inflate(memory, chain),
                DEFLATE => parse_pages(memory, chain).map(|pages| counters.deflated_pages += pages.len() as u64),
                _ => counters.report(memory, chain),
            };
            handled.map(|()| 0).map_err(|reason| Broken::Chain { queue: index, reason })
        })
    }

    fn reset(&mut self) {
        self.statistics = None;
        self.held = None;
        // The pages of a balloon are the guest's again.
        self.host.set_actual_pages(0);
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let (target_pages, actual_pages) = (self.host.target_pages(), self.host.actual_pages());
        Ok(state::encode(&BalloonState { target_pages, actual_pages, told: self.told, held: self.held }))
    }

    /// The target is again what it was, until the host sets another one.
    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let state: BalloonState = state::decode("balloon", state)?;
        if let Some(head) = state.held
            && (self.statistics.is_none() || head >= QUEUE_SIZES[usize::from(OPTIONAL)])
        {
            // One of a smaller queue is found out when it is given back.
            return Err(impossible("the buffer held for statistics", head));
        }
        self.host.set_actual_pages(state.actual_pages);
        self.host.set_target_pages(state.target_pages);
        (self.told, self.held) = (state.told, state.held);
        Ok(())
    }

    fn watched(&self) -> Vec<Watch> {
        vec![Watch { descriptor: self.host.descriptor(), trigger: Trigger::Readable }]
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let Counters { inflated_pages, deflated_pages, reported_bytes, refused_bytes, statistics } = self.counters;
        vec![
            ("inflated_pages", inflated_pages),
            ("deflated_pages", deflated_pages),
            ("reported_bytes", reported_bytes),
            ("refused_bytes", refused_bytes),
            ("statistics", statistics),
        ]
    }
}
