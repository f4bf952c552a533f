//! File systems (VIRTIO 1.2 §5.11.6): FUSE requests, whose header is `struct fuse_in_header` of Linux's `fuse.h`.

use crate::memory;
use crate::request::Request;

/// The length of the header.
const HEADER: usize = 40;
/// FUSE_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _WRITE, _RELEASE, _INIT, _OPENDIR, _READDIR, _BATCH_FORGET, _READDIRPLUS,
/// _SETUPMAPPING, _REMOVEMAPPING.
const OPERATIONS: [u32; 14] = [1, 2, 3, 14, 15, 16, 18, 26, 27, 28, 42, 44, 48, 49];

/// A request whose lengths and node numbers lie.
pub fn fuse(request: &mut Request<'_>, _: u32) {
    let random = &mut *request.random;
    let operation = if random.one_in(8) { random.word() } else { random.pick(&OPERATIONS) };
    let body = random.pick(&[0, 1, 8, 16, 40, 64, 4096, 0x1_0000]);
    let length = if random.one_in(4) { random.pick(&[0, 39, 40, u32::MAX]) } else { HEADER as u32 + body };
    let node = if random.one_in(2) { 1 } else { random.pick(&[0, 2, 3, 1 << 32, u64::MAX]) };
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(&length.to_le_bytes());
    header[4..8].copy_from_slice(&operation.to_le_bytes());
    header[8..16].copy_from_slice(&random.long().to_le_bytes());
    header[16..24].copy_from_slice(&node.to_le_bytes());
    let cut = if random.one_in(6) { random.below(HEADER as u64) as usize } else { HEADER };
    request.say(&header[..cut]);
    if body > 0 {
        let address = request.say_room(body);
        // The first fields are sizes, offsets, handles, or a name.
        for at in (address..address + u64::from(body.min(64))).step_by(8) {
            let number = if request.random.one_in(2) { request.random.long() } else { request.random.below(8) };
            memory::write(at, number);
        }
    }
    let room = request.random.pick(&[0, 15, 16, 80, 4096, 0x1_0000]);
    request.hear(room);
}
