//! The memory device (VIRTIO 1.2 §5.15, "Memory Device", device ID 24).
//!
//! A region of guest-physical memory in blocks of 2 MiB, of which the guest plugs as many as the host asks for ([`host`]) and
//! can spare. The guest is not told of the region in any other way. A block that is unplugged is given back to the host.
//!
//! The whole region is mapped for the guest and for every device from the beginning, plugged or not, so that no access can
//! fail, whoever makes it. So a guest that breaks the rules can use blocks that it has not plugged: the region's size is the
//! bound of what it costs the host, and the host chose it. A guest that keeps to the rules does not touch them
//! (VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE is offered). NUMA nodes are not supported.

pub mod host;
#[cfg(test)]
mod tests;

use std::ops::Range;

use serde::{Deserialize, Serialize};

use self::host::{BLOCK, HostMem};
use crate::GuestMemory;
use crate::device::{Broken, Configuration, Event, Resources, Trigger, VirtioDevice, Watch, read_config_bytes};
use crate::queue::{Buffers, Chain};
use crate::reclaim::discard_range;
use crate::state::{self, StateError, impossible};

/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE (§5.15.3).
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// The length of every request (§5.15.6).
const REQUEST_LENGTH: usize = 24;
/// The length of every response.
const RESPONSE_LENGTH: u32 = 10;
const QUEUE_SIZES: [u16; 1] = [16];
/// The offset of plugged_size in the configuration space.
const PLUGGED_SIZE: u64 = 40;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// The answer to a request (§5.15.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Response {
    Acknowledged,
    /// More than the host asked for.
    Refused,
    /// Not now: the host did not take the memory.
    Busy,
    /// It makes no sense.
    Error,
    /// The answer to a question for the state of blocks.
    State(State),
}

/// The state of some blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Plugged,
    Unplugged,
    Mixed,
}

impl Response {
    fn encode(self) -> [u8; RESPONSE_LENGTH as usize] {
        let (kind, state): (u16, u16) = match self {
            Self::Acknowledged => (0, 0),
            Self::Refused => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
            Self::State(State::Plugged) => (0, 0),
            Self::State(State::Unplugged) => (0, 1),
            Self::State(State::Mixed) => (0, 2),
        };
        let mut bytes = [0; RESPONSE_LENGTH as usize];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&state.to_le_bytes());
        bytes
    }
}

/// The memory device.
#[derive(Debug)]
pub struct Mem {
    host: HostMem,
    /// Where the region begins: the beginning of a block.
    start: u64,
    /// Whether each block is plugged.
    blocks: Vec<bool>,
    plugged: u64,
    /// What the driver knows that the host asked for.
    told: u64,
    counters: Counters,
}

/// What is kept of it. What is in the blocks is kept with the rest of the guest's memory.
#[derive(Debug, Serialize, Deserialize)]
struct MemState {
    requested: u64,
    told: u64,
    /// A bit for each block, the first one the lowest of the first byte; those behind the last block are zero.
    plugged: Vec<u8>,
}

#[derive(Debug, Default)]
struct Counters {
    plugged_blocks: u64,
    unplugged_blocks: u64,
    served_requests: u64,
    refused_requests: u64,
}

impl Mem {
    /// A device whose region, in guest memory from `start` on, is as large as the host's side of it says.
    pub fn new(host: HostMem, start: u64) -> Self {
        let count = usize::try_from(host.size() / BLOCK).unwrap_or(usize::MAX);
        Self { host, start, blocks: vec![false; count], plugged: 0, told: 0, counters: Counters::default() }
    }

    /// Serves one request and returns how many bytes were written into its buffers.
    fn serve(
        &mut self,
        memory: &GuestMemory,
        configuration: &mut Configuration<'_>,
        chain: Chain<'_>,
    ) -> Result<u32, &'static str> {
        let mut request = [0; REQUEST_LENGTH];
        let mut buffers = Buffers::of(memory, chain)?;
        buffers.take(&mut request).ok_or("a request is too short")?;
        let response = self.execute(memory, request);
        configuration.update(PLUGGED_SIZE, &self.plugged.to_le_bytes());
        let Counters { served_requests, refused_requests, .. } = &mut self.counters;
        *match response {
            Response::Acknowledged | Response::State(_) => served_requests,
            Response::Refused | Response::Busy | Response::Error => refused_requests,
        } += 1;
        buffers.put(&response.encode()).ok_or("a request has no room for the response")?;
        Ok(RESPONSE_LENGTH)
    }

    fn execute(&mut self, memory: &GuestMemory, request: [u8; REQUEST_LENGTH]) -> Response {
        let [t0, t1, _, _, _, _, _, _, a0, a1, a2, a3, a4, a5, a6, a7, n0, n1, ..] = request;
        let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
        let count = u16::from_le_bytes([n0, n1]);
        let kind = u16::from_le_bytes([t0, t1]);
        if kind == UNPLUG_ALL {
            return self.set(memory, 0..self.blocks.len(), false);
        }
        let Some(range) = self.range(address, count) else { return Response::Error };
        let blocks = &self.blocks[range.clone()];
        let (any, all) = (blocks.contains(&true), !blocks.contains(&false));
        match kind {
            PLUG if any => Response::Error,
            PLUG if self.plugged + u64::from(count) * BLOCK > self.host.requested() => Response::Refused,
            PLUG => self.set(memory, range, true),
            UNPLUG if !all => Response::Error,
            UNPLUG => self.set(memory, range, false),
            STATE if all => Response::State(State::Plugged),
            STATE if any => Response::State(State::Mixed),
            STATE => Response::State(State::Unplugged),
            _ => Response::Error,
        }
    }

    /// The indices of blocks that a request names, if they are whole and lie in the region.
    fn range(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.start).filter(|offset| offset.is_multiple_of(BLOCK))?;
        let first = usize::try_from(offset / BLOCK).ok()?;
        let end = first.checked_add(count.into())?;
        (count > 0 && end <= self.blocks.len()).then_some(first..end)
    }

    fn set(&mut self, memory: &GuestMemory, range: Range<usize>, plugged: bool) -> Response {
        let address = |index: usize| self.start + index as u64 * BLOCK;
        let bytes = address(range.start)..address(range.end);
        if !plugged && discard_range(memory, &bytes) != bytes.end - bytes.start {
            return Response::Busy;
        }
        let blocks = &mut self.blocks[range];
        let changed = blocks.iter().filter(|block| **block != plugged).count() as u64;
        blocks.fill(plugged);
        if plugged {
            self.plugged += changed * BLOCK;
            self.counters.plugged_blocks += changed;
        } else {
            self.plugged -= changed * BLOCK;
            self.counters.unplugged_blocks += changed;
        }
        self.host.set_plugged(self.plugged);
        Response::Acknowledged
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_MEM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        UNPLUGGED_INACCESSIBLE
    }

    /// `struct virtio_mem_config` (§5.15.4): block_size, node_id with padding, addr, region_size, usable_region_size,
    /// plugged_size, requested_size.
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let size = self.host.size();
        let fields = [BLOCK, 0, self.start, size, size, self.plugged, self.host.requested()];
        read_config_bytes(fields.map(u64::to_le_bytes).as_flattened(), offset, data);
    }

    fn start(&mut self, _: u64) {
        // The driver looks at what is asked of it after this (§5.15.5).
        self.told = self.host.requested();
    }

    fn process(&mut self, resources: Resources<'_>, event: Event) -> Result<(), Broken> {
        let Resources { memory, queues: [queue], mut configuration } = resources else { return Ok(()) };
        if let Event::Backend(_) = event {
            let requested = self.host.requested();
            if std::mem::replace(&mut self.told, requested) != requested {
                configuration.change();
            }
            return Ok(());
        }
        queue.for_each(memory, |chain| {
            self.serve(memory, &mut configuration, chain).map_err(|reason| Broken::Chain { queue: 0, reason })
        })
    }

    /// Blocks stay plugged, with what is in them (§5.15.5.2); a driver that begins anew unplugs them.
    fn reset(&mut self) {}

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let bits = |eight: &[bool]| eight.iter().rev().fold(0, |byte, block| byte << 1 | u8::from(*block));
        let plugged = self.blocks.chunks(8).map(bits).collect();
        Ok(state::encode(&MemState { requested: self.host.requested(), told: self.told, plugged }))
    }

    /// The request is again what it was, until the host makes another one. More may be plugged than that: the guest was asked
    /// for less since.
    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let MemState { requested, told, plugged } = state::decode("memory device", state)?;
        let bits = plugged.iter().flat_map(|byte| (0..8).map(move |bit| byte & 1 << bit != 0));
        let mut blocks: Vec<bool> = bits.collect();
        if plugged.len() != self.blocks.len().div_ceil(8) || blocks.split_off(self.blocks.len()).contains(&true) {
            return Err(impossible("of another region the number of bytes for blocks", plugged.len() as u64));
        }
        if requested > self.host.size() || !requested.is_multiple_of(BLOCK) {
            return Err(impossible("what is asked for", requested));
        }
        self.plugged = blocks.iter().filter(|block| **block).count() as u64 * BLOCK;
        (self.blocks, self.told) = (blocks, told);
        self.host.set_plugged(self.plugged);
        self.host.request(requested);
        Ok(())
    }

    fn watched(&self) -> Vec<Watch> {
        vec![Watch { descriptor: self.host.descriptor(), trigger: Trigger::Readable }]
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let Counters { plugged_blocks, unplugged_blocks, served_requests, refused_requests } = self.counters;
        vec![
            ("plugged_blocks", plugged_blocks),
            ("unplugged_blocks", unplugged_blocks),
            ("served_requests", served_requests),
            ("refused_requests", refused_requests),
        ]
    }
}
