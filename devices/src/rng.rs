//! The entropy device (VIRTIO 1.2 §5.4, "Entropy Device", device ID 4).
//!
//! The guest sends empty writable buffers on the one queue; each comes back filled with bytes of the host's `getrandom(2)`.
//! No features, no configuration space; the state is how much may still be taken.

use crate::GuestMemory;
use crate::device::{Broken, Event, Resources, VirtioDevice, Watch, read_config_bytes};
use crate::limit::Limiter;
use crate::queue::{Buffers, Chain, Served};
use crate::state::{self, StateError};

/// The most bytes given for one request; Linux asks for 64. A larger buffer is filled up to here, which the specification
/// allows, so that a request costs the host a bounded time.
const REQUEST_MAX: usize = 4 << 10;
/// Bytes fetched from the host at once, on the stack.
const PIECE: usize = 256;
const QUEUE_SIZES: [u16; 1] = [16];

/// The entropy device.
#[derive(Debug, Default)]
pub struct Rng {
    limiter: Option<Limiter>,
    requests: u64,
    bytes: u64,
}

impl Rng {
    /// A device that gives as much as `limiter` admits.
    pub fn new(limiter: Option<Limiter>) -> Self {
        Self { limiter, requests: 0, bytes: 0 }
    }

    fn serve(&mut self, memory: &GuestMemory, chain: Chain<'_>) -> u32 {
        let written = fill(memory, chain);
        self.requests += 1;
        self.bytes += u64::from(written);
        if let Some(limiter) = &mut self.limiter {
            limiter.charge(written.into());
        }
        written
    }
}

/// Fills a chain with random bytes as far as it has room, and says how many.
fn fill(memory: &GuestMemory, chain: Chain<'_>) -> u32 {
    let Ok(mut buffers) = Buffers::of(memory, chain) else { return 0 };
    let mut piece = [0u8; PIECE];
    let room = buffers.writable_length().min(REQUEST_MAX);
    let mut rest = room;
    while rest > 0 {
        let wanted = &mut piece[..rest.min(PIECE)];
        let Ok(got @ 1..) = rustix::rand::getrandom(&mut *wanted, rustix::rand::GetRandomFlags::empty()) else { break };
        if buffers.put(&wanted[..got]).is_none() {
            break;
        }
        rest -= got;
    }
    u32::try_from(room - rest).unwrap_or(0)
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&[], offset, data);
    }

    fn start(&mut self, _: u64) {}

    fn process(&mut self, resources: Resources<'_>, event: Event) -> Result<(), Broken> {
        let Resources { memory, queues: [queue], .. } = resources else { return Ok(()) };
        if let (Event::Backend(_), Some(limiter)) = (event, &mut self.limiter) {
            limiter.wake();
        }
        queue.serve(memory, |chain| {
            if !Limiter::admits(&mut self.limiter) {
                return Ok(Served::Refused);
            }
            Ok(Served::Used(self.serve(memory, chain)))
        })
    }

    fn reset(&mut self) {
        self.limiter.iter_mut().for_each(Limiter::reset);
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(state::encode(&Limiter::save(&self.limiter)))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        Limiter::restore(&mut self.limiter, state::decode("entropy device", state)?);
        Ok(())
    }

    fn watched(&self) -> Vec<Watch> {
        self.limiter.iter().map(Limiter::watch).collect()
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let throttled = self.limiter.as_ref().map_or(0, Limiter::throttled);
        vec![("requests", self.requests), ("entropy_bytes", self.bytes), ("throttled", throttled)]
    }

    fn hurry(&mut self) {
        self.limiter.iter_mut().for_each(Limiter::lift);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::limit::Rate;
    use crate::testing::{BUFFERS, Buffer, Driver};

    const ROOM: Buffer = Buffer { address: BUFFERS, length: 64, writable: true };

    #[test]
    fn a_buffer_comes_back_full_and_a_long_one_with_what_a_request_may_cost() {
        let mut driver = Driver::new(Box::new(Rng::default())).start();
        let short = driver.offer(0, &[ROOM]);
        let long = driver.offer(0, &[Buffer { length: 1 << 20, ..ROOM }]);
        driver.device.dispatch(Event::Queue(0));
        assert_eq!(driver.used(0), Some((short, 64)));
        assert_eq!(driver.used(0), Some((long, REQUEST_MAX as u32)));
    }

    #[test]
    fn who_takes_too_much_waits_for_the_timer() {
        let rate = Rate { size: 1, refill: Duration::from_millis(1), burst: 0 };
        let limiter = Limiter::new(Some(rate), None).unwrap();
        let mut driver = Driver::new(Box::new(Rng::new(Some(limiter)))).start();
        let (first, second) = (driver.offer(0, &[ROOM]), driver.offer(0, &[ROOM]));
        driver.device.dispatch(Event::Queue(0));
        assert_eq!((driver.used(0), driver.used(0)), (Some((first, 64)), None));
        assert_eq!((driver.wait_used(0), driver.metric("throttled")), ((second, 64), 1));
    }

    #[test]
    fn who_waits_when_the_guest_ends_or_starts_anew_is_not_forgotten() {
        let rate = Rate { size: 1, refill: Duration::from_secs(3600), burst: 0 };
        let limiter = Limiter::new(None, Some(rate)).unwrap();
        let mut driver = Driver::new(Box::new(Rng::new(Some(limiter)))).start();
        driver.offer(0, &[ROOM]);
        driver.offer(0, &[ROOM]);
        driver.device.dispatch(Event::Queue(0));
        driver.write(0x70, 0);
        driver = driver.start();
        let head = driver.offer(0, &[ROOM]);
        driver.device.dispatch(Event::Queue(0));
        assert_eq!((driver.used(0), driver.metric("throttled")), (None, 2));
        driver.device.flush();
        assert_eq!(driver.used(0), Some((head, 64)));
    }
}
