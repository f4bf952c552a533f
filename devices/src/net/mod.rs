//! The network device (VIRTIO 1.2 §5.1, "Network Device", device ID 1).
//!
//! Frames move between the queues of a tap interface on the host ([`Tap`]) and guest memory, one system call each, without
//! a copy in between; checksums and segmentation are left to whoever is able to do them, as far as driver and tap agree.
//! The guest may put anything on its queues: a header that makes no sense is refused by the host's kernel, and the frame
//! counts as dropped; a chain that reaches out of memory or has no room for a header breaks the device.
//!
//! - [`tap`]: the host's side.
//! - [`receive`]: frames for the guest. What it has no buffers for stays in the tap.
//! - [`transmit`]: frames from the guest.
//! - [`control`]: how many of the queues are in use.
//!
//! # Several queues
//! There is a queue of the tap for each pair of virtqueues. All of them stay attached, whatever the driver uses: a frame of
//! tap queue N goes to receive queue N modulo the number of pairs in use. Detaching queues instead would have the guest
//! make the host's kernel wait for a grace period with the lock of its network configuration held.
//!
//! # What the device does not decide
//! Where frames may go, and from which IP addresses, is for the network that the tap is connected with: the guest owns all
//! that it sends. One thing is cheap and checked here: with [`NetOptions::pinned`], frames that do not come from the
//! device's own MAC address are dropped, so that a guest cannot take over the traffic of others on a bridge.
//!
//! Not supported: filters for MAC addresses and VLANs (the driver does it), the link's state (always up), RSS, hash reports,
//! coalescing, UDP segmentation offload.

mod control;
#[cfg(test)]
pub(crate) mod peer;
mod receive;
pub mod tap;
#[cfg(test)]
mod tests;
mod transmit;

use std::ffi::c_uint;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
};

use self::receive::Receiver;
use self::tap::{HEADER, Tap};
use self::transmit::Transmitter;
use crate::device::{Broken, Event, Resources, Trigger, VirtioDevice, Watch, read_config_bytes};
use crate::limit::Limiter;
use crate::queue::QUEUE_SIZE_MAX;
use crate::state::{self, LimiterState, StateError, impossible};

/// The most pairs of queues: as many as a tap in a VM of a few CPUs can use.
pub const PAIRS_MAX: usize = 8;
/// The longest frame with its header: an Ethernet header with a VLAN tag, and the longest IP packet (§5.1.6.3 counts
/// somewhat less).
const FRAME_MAX: usize = HEADER + 18 + 65_535;
/// How many frames are moved for a queue, in one direction, before other devices have the event loop: 4 MiB at most.
const BUDGET: usize = 64;
/// The control queue: a command at a time is what drivers send.
const CONTROL_SIZE: u16 = 64;
/// The least time between two changes of what the tap may leave undone.
const BETWEEN_AGREEMENTS: Duration = Duration::from_millis(100);

/// What frames for the guest may have left undone: the driver's feature, and the tap's word for it.
const GUEST_OFFLOADS: [(u32, c_uint); 5] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_UFO, libc::TUN_F_UFO),
];
/// What frames from the guest may have left undone: every tap can do it.
const HOST_OFFLOADS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_HOST_UFO;

/// What a network device is to be like.
#[derive(Debug)]
pub struct NetOptions {
    /// Its MAC address; without one the driver chooses.
    pub mac: Option<[u8; 6]>,
    /// Whether frames that come from another address than that are dropped.
    pub pinned: bool,
    /// The longest packet the driver should send, in bytes without the Ethernet header; without one, what it takes for usual.
    pub mtu: Option<u16>,
    /// Limits of what it receives.
    pub receive: Option<Limiter>,
    /// Limits of what it sends.
    pub transmit: Option<Limiter>,
}

/// The network device.
#[derive(Debug)]
pub struct Net {
    taps: Vec<Tap>,
    offered: u64,
    configuration: [u8; 12],
    queue_sizes: Vec<u16>,
    receiver: Receiver,
    transmitter: Transmitter,
    acknowledged: u64,
    /// How many pairs of queues the driver uses.
    pairs: usize,
    /// What the tap was told that it may leave undone.
    offload: c_uint,
    /// When it was told that.
    agreed_at: Option<Instant>,
    counters: Counters,
}

/// What is kept of it.
#[derive(Debug, Serialize, Deserialize)]
struct NetState {
    pairs: u16,
    receive: Option<LimiterState>,
    transmit: Option<LimiterState>,
}

/// What is counted beside frames.
#[derive(Debug, Default)]
struct Counters {
    tap_errors: u64,
    commands: u64,
    refused_commands: u64,
    offload_changes: u64,
}

impl Net {
    /// A device with a pair of queues for each of `taps`, which are queues of one interface: 1 to [`PAIRS_MAX`].
    pub fn new(taps: Vec<Tap>, options: NetOptions) -> Self {
        let NetOptions { mac, pinned, mtu, receive, transmit } = options;
        let pairs = taps.len();
        let can = taps.first().map_or(0, Tap::offloads);
        let mut offered = HOST_OFFLOADS | 1 << VIRTIO_NET_F_MRG_RXBUF;
        for (feature, offload) in GUEST_OFFLOADS {
            offered |= u64::from(can & offload != 0) << feature;
        }
        offered |= u64::from(mac.is_some()) << VIRTIO_NET_F_MAC | u64::from(mtu.is_some()) << VIRTIO_NET_F_MTU;
        let mut queue_sizes = vec![QUEUE_SIZE_MAX; 2 * pairs];
        if pairs > 1 {
            offered |= 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;
            queue_sizes.push(CONTROL_SIZE);
        }
        // struct virtio_net_config (§5.1.4): mac, status, max_virtqueue_pairs, mtu.
        let mut configuration = [0; 12];
        configuration[0..6].copy_from_slice(&mac.unwrap_or_default());
        configuration[8..10].copy_from_slice(&u16::try_from(pairs).unwrap_or(u16::MAX).to_le_bytes());
        configuration[10..12].copy_from_slice(&mtu.unwrap_or_default().to_le_bytes());
        Self {
            receiver: Receiver::new(receive, pairs),
            transmitter: Transmitter::new(transmit, mac.filter(|_| pinned)),
            taps,
            offered,
            configuration,
            queue_sizes,
            acknowledged: 0,
            pairs: 1,
            offload: 0,
            agreed_at: None,
            counters: Counters::default(),
        }
    }

    fn has(&self, feature: u32) -> bool {
        has(self.acknowledged, feature)
    }

    /// Tells the tap what it may leave undone for this driver. That takes a lock of the host's whole network and is told to all who
    /// watch interfaces there: one driver after another waits for it, and meanwhile what it cannot take is dropped. Here and not when the driver is ready: that comes from a
    /// vCPU, which may touch no tap.
    fn agree(&mut self) {
        let mut offload = 0;
        if self.has(VIRTIO_NET_F_GUEST_CSUM) {
            let agreed = GUEST_OFFLOADS.iter().filter(|(feature, _)| self.has(*feature));
            offload = agreed.fold(0, |all, (_, offload)| all | offload);
        }
        if self.offload != offload
            && self.agreed_at.is_none_or(|then| then.elapsed() >= BETWEEN_AGREEMENTS)
            && let Some(tap) = self.taps.first()
        {
            (self.offload, self.agreed_at) = (offload, Some(Instant::now()));
            self.counters.offload_changes += 1;
            // A tap that does more than it may: such frames are dropped one by one.
            self.counters.tap_errors += u64::from(tap.set_offload(offload).is_err());
        }
    }

    /// Moves frames to the guest's buffers on a pair of queues, from all taps that belong to it.
    fn receive(&mut self, resources: &mut Resources<'_>, pair: usize, asked: bool) -> Result<(), Broken> {
        let Some(queue) = resources.queues.get_mut(2 * pair) else { return Ok(()) };
        for (index, tap) in self.taps.iter().enumerate().skip(pair).step_by(self.pairs) {
            let errors = self.receiver.receive(resources.memory, queue, (index, tap), self.acknowledged, asked)?;
            self.counters.tap_errors += errors;
        }
        queue.signal(resources.memory)
    }

    /// Moves frames from the guest to the tap of a pair of queues.
    fn transmit(&mut self, resources: &mut Resources<'_>, pair: usize) -> Result<(), Broken> {
        let (Some(queue), Some(tap)) = (resources.queues.get_mut(2 * pair + 1), self.taps.get(pair)) else {
            return Ok(());
        };
        self.counters.tap_errors += self.transmitter.transmit(resources.memory, queue, tap)?;
        queue.signal(resources.memory)
    }

    fn receive_all(&mut self, resources: &mut Resources<'_>) -> Result<(), Broken> {
        (0..self.pairs).try_for_each(|pair| self.receive(resources, pair, false))
    }

    fn limiters(&mut self) -> impl Iterator<Item = &mut Limiter> {
        [&mut self.receiver.limiter, &mut self.transmitter.limiter].into_iter().flatten()
    }

    /// Where the control queue is: after the queues that the driver knows of (§5.1.2).
    fn control_queue(&self) -> Option<usize> {
        let pairs = if self.has(VIRTIO_NET_F_MQ) { self.taps.len() } else { 1 };
        self.has(VIRTIO_NET_F_CTRL_VQ).then_some(2 * pairs)
    }

    /// Executes commands, and looks anew at what the queues in use have to do then.
    fn control(&mut self, resources: &mut Resources<'_>, index: usize) -> Result<(), Broken> {
        let Some(queue) = resources.queues.get_mut(index) else { return Ok(()) };
        let most = if self.has(VIRTIO_NET_F_MQ) { self.taps.len() } else { 0 };
        let memory = resources.memory;
        let (before, mut pairs) = (self.pairs, self.pairs);
        let Counters { commands, refused_commands, .. } = &mut self.counters;
        queue.for_each(memory, |chain| {
            *commands += 1;
            let answer = control::execute(memory, chain, |command| match command.pairs(most) {
                Some(wanted) => {
                    pairs = wanted;
                    true
                }
                None => {
                    *refused_commands += 1;
                    false
                }
            });
            answer.map_err(|reason| Broken::Chain { queue: u16::try_from(index).unwrap_or(u16::MAX), reason })
        })?;
        self.pairs = pairs;
        if pairs == before { Ok(()) } else { self.receive_all(resources) }
    }
}

fn has(features: u64, feature: u32) -> bool {
    features & 1 << feature != 0
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&self.configuration, offset, data);
    }

    fn start(&mut self, features: u64) {
        self.acknowledged = features;
    }

    fn process(&mut self, mut resources: Resources<'_>, event: Event) -> Result<(), Broken> {
        let resources = &mut resources;
        self.agree();
        match event {
            Event::Queue(index) if self.control_queue() == Some(index.into()) => self.control(resources, index.into()),
            Event::Queue(index) if index % 2 == 1 => self.transmit(resources, usize::from(index / 2)),
            Event::Queue(index) if usize::from(index / 2) < self.pairs => {
                self.receive(resources, usize::from(index / 2), false)
            }
            Event::Queue(_) => Ok(()),
            Event::Backend(index) if index < self.taps.len() => {
                self.receive(resources, index % self.pairs, true)?;
                // It was full, and has room now.
                self.transmit(resources, index)
            }
            Event::Backend(index) if index == self.taps.len() && self.receiver.limiter.is_some() => {
                self.receiver.limiter.iter_mut().for_each(Limiter::wake);
                self.receive_all(resources)
            }
            Event::Backend(_) => {
                self.transmitter.limiter.iter_mut().for_each(Limiter::wake);
                (0..self.taps.len()).try_for_each(|pair| self.transmit(resources, pair))
            }
        }
    }

    fn reset(&mut self) {
        self.acknowledged = 0;
        self.pairs = 1;
        self.receiver.reset();
        self.limiters().for_each(Limiter::reset);
    }

    /// A frame that was taken from the tap and has no room with the driver is lost, as networks may.
    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(state::encode(&NetState {
            // There are [`PAIRS_MAX`] at most.
            pairs: self.pairs as u16,
            receive: Limiter::save(&self.receiver.limiter),
            transmit: Limiter::save(&self.transmitter.limiter),
        }))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let NetState { pairs, receive, transmit } = state::decode("network device", state)?;
        let most = if self.has(VIRTIO_NET_F_MQ) && self.has(VIRTIO_NET_F_CTRL_VQ) { self.taps.len() } else { 1 };
        if !(1..=most).contains(&pairs.into()) {
            return Err(impossible("the number of pairs of queues in use", pairs));
        }
        self.pairs = pairs.into();
        Limiter::restore(&mut self.receiver.limiter, receive);
        Limiter::restore(&mut self.transmitter.limiter, transmit);
        Ok(())
    }

    /// The taps, and the timers of both limits.
    fn watched(&self) -> Vec<Watch> {
        let taps = self.taps.iter().map(|tap| Watch { descriptor: tap.descriptor(), trigger: Trigger::Either });
        let limiters = [&self.receiver.limiter, &self.transmitter.limiter];
        taps.chain(limiters.into_iter().flatten().map(Limiter::watch)).collect()
    }

    fn hurry(&mut self) {
        self.limiters().for_each(Limiter::lift);
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let Counters { tap_errors, commands, refused_commands, offload_changes } = self.counters;
        let mut metrics = self.receiver.metrics().to_vec();
        metrics.extend(self.transmitter.metrics());
        metrics.extend([("tap_errors", tap_errors), ("commands", commands), ("refused_commands", refused_commands)]);
        metrics.push(("offload_changes", offload_changes));
        metrics
    }
}
