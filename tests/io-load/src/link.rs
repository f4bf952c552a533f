//! An address for a guest's interface, by rtnetlink(7).

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket};
use std::os::fd::AsRawFd as _;

/// The interface's address in a network of four.
const ADDRESS: [u8; 4] = [172, 30, 0, 2];
const PREFIX: u8 = 30;

/// Message types and flags (linux/rtnetlink.h, linux/netlink.h).
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const REQUEST_ACK: u16 = 1 | 4;
const CREATE_EXCLUSIVE: u16 = 0x400 | 0x200;
/// The flag of an interface that is up (linux/if.h).
const IFF_UP: u32 = 1;
/// Attributes of an address (linux/if_addr.h).
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;

/// Gives `eth0` its address and brings it up.
pub fn bring_up() -> Result<()> {
    let index = fs::read_to_string("/sys/class/net/eth0/ifindex").context("there is no eth0")?;
    let index: u32 = index.trim().parse().context("eth0 has a strange index")?;

    // struct ifinfomsg: family, padding, type, index, flags, which of them change.
    let mut link = vec![0; 4];
    link.extend([index, IFF_UP, IFF_UP].iter().flat_map(|word| word.to_ne_bytes()));
    ask(RTM_NEWLINK, REQUEST_ACK, &link).context("cannot bring eth0 up")?;

    // struct ifaddrmsg: family (AF_INET), prefix, flags, scope, index; then attributes.
    let mut address = vec![2, PREFIX, 0, 0];
    address.extend(index.to_ne_bytes());
    for attribute in [IFA_LOCAL, IFA_ADDRESS] {
        address.extend([8, attribute].iter().flat_map(|word: &u16| word.to_ne_bytes()));
        address.extend(ADDRESS);
    }
    ask(RTM_NEWADDR, REQUEST_ACK | CREATE_EXCLUSIVE, &address).context("cannot give eth0 its address")
}

/// Sends a message and waits for the kernel's word on it.
fn ask(kind: u16, flags: u16, body: &[u8]) -> Result<()> {
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    // struct nlmsghdr: length, type, flags, sequence number, port.
    let mut message = u32::try_from(16 + body.len())?.to_ne_bytes().to_vec();
    message.extend([kind, flags].iter().flat_map(|word| word.to_ne_bytes()));
    message.extend([0; 8]);
    message.extend(body);
    sendto(socket.as_raw_fd(), &message, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut answer = [0; 256];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    // An error message of code 0 is the acknowledgement.
    ensure!(length >= 20 && answer[4..6] == NLMSG_ERROR.to_ne_bytes(), "the kernel gave a strange answer");
    let code = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
    if code == 0 { Ok(()) } else { Err(std::io::Error::from_raw_os_error(-code).into()) }
}
