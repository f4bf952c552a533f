//! The control queue (VIRTIO 1.2 §5.1.6.5, "Control Virtqueue"): a class, a command, its data, and a byte for the answer.

use virtio_bindings::virtio_net::{VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK};

use crate::GuestMemory;
use crate::queue::{Buffers, Chain};

/// The bytes of the only command there is; a longer one is another.
const COMMAND_MAX: usize = 4;

/// What the driver wants: class, command and data.
pub(super) struct Command([u8; COMMAND_MAX]);

impl Command {
    /// How many pairs of queues the driver is going to use (§5.1.6.5.5, "Automatic receive steering in multiqueue mode"):
    /// 1 to `most`. `None` when it wants something else.
    pub(super) fn pairs(&self, most: usize) -> Option<usize> {
        let [class, command, low, high] = self.0;
        let pairs = usize::from(u16::from_le_bytes([low, high]));
        let known = (u32::from(class), u32::from(command)) == (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET);
        (known && (1..=most).contains(&pairs)).then_some(pairs)
    }
}

/// Answers one command as `accept` says; gives how many bytes were written.
///
/// # Errors
/// The chain has no room for an answer, or is not in memory.
pub(super) fn execute(
    memory: &GuestMemory,
    chain: Chain<'_>,
    accept: impl FnOnce(&Command) -> bool,
) -> Result<u32, &'static str> {
    const NO_ROOM: &str = "a command has no room for its answer";
    let mut buffers = Buffers::of(memory, chain)?;
    let mut command = Command([0; COMMAND_MAX]);
    let length: usize = buffers.readable.iter().map(|slice| slice.len()).sum();
    let read = length.min(COMMAND_MAX);
    // As much as there is: what is too short or too long is none of the commands that there are.
    buffers.take(&mut command.0[..read]).ok_or("a command cannot be read")?;
    if length != COMMAND_MAX {
        command = Command([u8::MAX; COMMAND_MAX]);
    }
    let answer = if accept(&command) { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
    let room = buffers.writable.iter().find(|slice| !slice.is_empty()).ok_or(NO_ROOM)?;
    room.copy_from(&[u8::try_from(answer).unwrap_or(u8::MAX)]);
    Ok(1)
}
