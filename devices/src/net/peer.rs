//! The other end of a tap, for tests: a network namespace of the test's own, and what can be sent and received there.

#![expect(unsafe_code, reason = "packet sockets")]

use std::ffi::c_int;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;

use nix::sched::{CloneFlags, unshare};

use super::tap::Tap;
use super::{Net, NetOptions};

/// The interface's name.
pub const TAP: &str = "tap0";
/// What the address of the test's own side of it is.
pub const HOST_MAC: &str = "02:00:00:00:00:01";
/// The header of a packet socket's messages: that of VIRTIO 1.2 §5.1.6 without `num_buffers`.
pub const SHORT_HEADER: usize = 10;
/// How long to wait for what has to come, in seconds.
const PATIENCE: i64 = 20;

/// Gives the calling thread a network namespace of its own with a tap in it that has so many queues, and is up.
///
/// # Panics
/// The test may not do that, or there are no taps here.
pub fn tap(queues: usize) -> Vec<Tap> {
    unshare(CloneFlags::CLONE_NEWNET)
        .expect("a network device is tested in a network namespace of the test's own: run as root");
    // Otherwise it sends frames of its own. Where there is no IPv6 there is nothing to forbid.
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    let taps = Tap::open(TAP, queues).unwrap_or_else(|error| {
        let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        panic!("a network device is tested with a tap: {error}: {source}")
    });
    ip(&format!("link set dev {TAP} address {HOST_MAC} mtu 1500 up"));
    taps
}

/// `ip WORDS`.
///
/// # Panics
/// It fails.
pub fn ip(words: &str) {
    let output = Command::new("ip").args(words.split(' ')).output().expect("iproute2 is not installed");
    assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A tap's interface, as something on the host sees it: a socket for whole frames, each behind a header.
pub struct Wire(OwnedFd);

impl Wire {
    /// Listens to the tap.
    ///
    /// # Panics
    /// The system does not let it.
    pub fn open() -> Self {
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: takes three numbers; the descriptor is new and nobody else's.
        let socket = unsafe {
            let number = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol.into());
            assert!(number >= 0, "cannot make a packet socket: {}", io::Error::last_os_error());
            OwnedFd::from_raw_fd(number)
        };
        let wire = Self(socket);
        wire.set(libc::SOL_PACKET, libc::PACKET_VNET_HDR, &1i32);
        let patience = libc::timeval { tv_sec: PATIENCE, tv_usec: 0 };
        wire.set(libc::SOL_SOCKET, libc::SO_RCVTIMEO, &patience);
        let index = rustix::net::netdevice::name_to_index(&wire.0, TAP).unwrap();
        // SAFETY: an address is numbers, which zeroes are; the kernel reads as much as it is told.
        let bound = unsafe {
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol;
            address.sll_ifindex = index.cast_signed();
            let length = size_of::<libc::sockaddr_ll>() as u32;
            libc::bind(wire.0.as_raw_fd(), (&raw const address).cast(), length)
        };
        assert_eq!(bound, 0, "cannot listen to {TAP}: {}", io::Error::last_os_error());
        wire
    }

    fn set<T>(&self, level: c_int, option: c_int, value: &T) {
        let length = size_of::<T>() as u32;
        // SAFETY: the kernel reads a value of this length.
        let set = unsafe { libc::setsockopt(self.0.as_raw_fd(), level, option, (&raw const *value).cast(), length) };
        assert_eq!(set, 0, "cannot set option {option}: {}", io::Error::last_os_error());
    }

    /// Sends a frame towards the guest.
    ///
    /// # Panics
    /// The system refuses it.
    pub fn send(&self, header: [u8; SHORT_HEADER], frame: &[u8]) {
        let message = [&header, frame].concat();
        // SAFETY: the kernel reads as much as it is told.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
        assert_eq!(usize::try_from(sent), Ok(message.len()), "{}", io::Error::last_os_error());
    }

    /// The next frame that comes from the guest, with its header.
    ///
    /// # Panics
    /// None comes.
    pub fn receive(&self) -> ([u8; SHORT_HEADER], Vec<u8>) {
        let mut message = vec![0; 1 << 17];
        loop {
            // SAFETY: an address is numbers, which zeroes are; the kernel writes no more than it is told.
            let (length, kind) = unsafe {
                let mut address: libc::sockaddr_ll = std::mem::zeroed();
                let mut size = size_of::<libc::sockaddr_ll>() as u32;
                let (at, from) = (message.as_mut_ptr().cast(), (&raw mut address).cast());
                let length = libc::recvfrom(self.0.as_raw_fd(), at, message.len(), 0, from, &raw mut size);
                (length, address.sll_pkttype)
            };
            let length = usize::try_from(length).unwrap_or_else(|_| panic!("{}", io::Error::last_os_error()));
            if kind != libc::PACKET_OUTGOING {
                let header = message[..SHORT_HEADER].try_into().unwrap();
                return (header, message[SHORT_HEADER..length].to_vec());
            }
        }
    }
}

/// A device with two pairs of queues, behind which is something that stands in for a tap.
pub fn device() -> Net {
    let taps = [stand_in(), stand_in()].map(|(tap, _)| tap);
    Net::new(taps.into(), NetOptions { mac: None, pinned: false, mtu: None, receive: None, transmit: None })
}

/// Two ends of something that is like a tap to those who read and write it.
pub fn stand_in() -> (Tap, OwnedFd) {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None).unwrap();
    (Tap::stand_in(ours), theirs)
}
