//! The entropy device (VIRTIO 1.2 §5.4, "Entropy Device", device ID 4).
//!
//! The guest sends empty writable buffers on the one queue; each comes back filled with bytes of the host's `getrandom(2)`.
//! No features, no configuration space, no state.

use std::io::Write;

use crate::device::{Broken, Event, Resources, VirtioDevice, read_config_bytes};

/// The most bytes given for one request; Linux asks for 64. A larger buffer is filled up to here, which the specification
/// allows, so that a request costs the host a bounded time.
const REQUEST_MAX: usize = 4 << 10;
/// Bytes fetched from the host at once, on the stack.
const PIECE: usize = 256;
const QUEUE_SIZES: [u16; 1] = [16];

/// The entropy device.
#[derive(Debug, Default)]
pub struct Rng;

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

    fn process(&mut self, resources: Resources<'_>, _: Event) -> Result<(), Broken> {
        let Resources { memory, queues: [queue], .. } = resources else { return Ok(()) };
        queue.for_each(memory, |chain| {
            let Ok(mut writer) = chain.writer(memory) else { return Ok(0) };
            let mut piece = [0u8; PIECE];
            let mut rest = writer.available_bytes().min(REQUEST_MAX);
            while rest > 0 {
                let wanted = &mut piece[..rest.min(PIECE)];
                let Ok(got @ 1..) = rustix::rand::getrandom(&mut *wanted, rustix::rand::GetRandomFlags::empty()) else {
                    break;
                };
                if writer.write_all(&wanted[..got]).is_err() {
                    break;
                }
                rest -= got;
            }
            Ok(u32::try_from(writer.bytes_written()).unwrap_or(0))
        })
    }

    fn reset(&mut self) {}
}
