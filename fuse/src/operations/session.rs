//! INIT, DESTROY and what the guest takes back.

use fuse_abi::linux as abi;
use rustix::io::Errno;

use super::{Call, Done, Outcome};
use crate::export::Cache;
use crate::server::Server;
use crate::wire::{DATA_MAX, put};

/// The oldest guest: Linux 5.4, the first with virtio-fs.
const MINOR_MIN: u32 = 31;
/// How many requests a guest should have under way that nobody waits for.
const BACKGROUND_MAX: u16 = 64;
/// The unit in which a guest counts the data of a request.
const PAGE: u32 = 4096;

impl Server {
    pub(super) fn init(&mut self, mut call: Call<'_>) -> Outcome {
        // An older kernel's is shorter.
        let mut request = [0u8; size_of::<abi::fuse_init_in>()];
        let given = (call.header.len as usize).saturating_sub(size_of::<abi::fuse_in_header>()).min(request.len());
        request[..given].copy_from_slice(call.arguments.bytes(given)?);
        let request: abi::fuse_init_in = zerocopy::transmute!(request);
        let mut reply = abi::fuse_init_out {
            major: abi::FUSE_KERNEL_VERSION,
            minor: abi::FUSE_KERNEL_MINOR_VERSION,
            max_readahead: request.max_readahead.min(DATA_MAX),
            flags: 0,
            max_background: BACKGROUND_MAX,
            congestion_threshold: BACKGROUND_MAX / 4 * 3,
            max_write: DATA_MAX,
            time_gran: 1,
            max_pages: u16::try_from(DATA_MAX / PAGE).unwrap_or(u16::MAX),
            map_alignment: 0,
            flags2: 0,
            max_stack_depth: 0,
            unused: [0; 6],
        };
        if request.major > abi::FUSE_KERNEL_VERSION {
            // It begins again with ours.
            put(call.reply, &reply);
            return Ok(Done::Reply);
        }
        if request.major < abi::FUSE_KERNEL_VERSION || request.minor < MINOR_MIN {
            return Err(Errno::PROTO);
        }
        self.end_session();
        self.let_go();
        self.session = true;
        let offered = u64::from(request.flags) | u64::from(request.flags2) << 32;
        let accepted = offered & self.features();
        reply.minor = reply.minor.min(request.minor);
        let [a, b, c, d, e, f, g, h] = accepted.to_le_bytes();
        (reply.flags, reply.flags2) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        put(call.reply, &reply);
        Ok(Done::Reply)
    }

    /// What this server can and this mount wants.
    fn features(&self) -> u64 {
        let options = &self.export.options;
        let mut low = abi::FUSE_ASYNC_READ
            | abi::FUSE_ATOMIC_O_TRUNC
            | abi::FUSE_BIG_WRITES
            | abi::FUSE_ASYNC_DIO
            | abi::FUSE_PARALLEL_DIROPS
            // The host's kernel does it, for a thread that cannot keep the bits (`prepare_thread`).
            | abi::FUSE_HANDLE_KILLPRIV_V2
            | abi::FUSE_MAX_PAGES
            | abi::FUSE_INIT_EXT;
        if options.cache != Cache::Never {
            // What may not be kept need not be told of before it is asked for.
            low |= abi::FUSE_DO_READDIRPLUS | abi::FUSE_READDIRPLUS_AUTO;
        }
        let mut high = 0;
        if options.shared_locks {
            low |= abi::FUSE_POSIX_LOCKS | abi::FUSE_FLOCK_LOCKS;
        }
        match options.cache {
            // Files can be mapped all the same.
            Cache::Never => high |= abi::FUSE_DIRECT_IO_ALLOW_MMAP,
            // A link leads where it leads as long as it is the same inode.
            Cache::Auto => low |= abi::FUSE_AUTO_INVAL_DATA | abi::FUSE_CACHE_SYMLINKS,
            Cache::Always => low |= abi::FUSE_CACHE_SYMLINKS,
        }
        u64::from(low) | high
    }

    pub(super) fn destroy(&mut self) -> Outcome {
        self.end_session();
        self.let_go();
        Ok(Done::Reply)
    }

    pub(super) fn forget(&mut self, mut call: Call<'_>) -> Outcome {
        // There is no reply that could say what is wrong.
        if let Ok(request) = call.arguments.take::<abi::fuse_forget_in>() {
            self.forget_one(call.header.nodeid, request.nlookup);
        }
        Ok(Done::Nothing)
    }

    pub(super) fn batch_forget(&mut self, mut call: Call<'_>) -> Outcome {
        let request = call.arguments.take::<abi::fuse_batch_forget_in>();
        for _ in 0..request.map_or(0, |request| request.count) {
            // The count is the guest's; the bytes are there or not.
            let Ok(one) = call.arguments.take::<abi::fuse_forget_one>() else { break };
            self.forget_one(one.nodeid, one.nlookup);
        }
        Ok(Done::Nothing)
    }

    fn forget_one(&mut self, number: u64, count: u64) {
        if self.nodes.forget(number, count) {
            self.locks.forget(number);
        }
    }
}
