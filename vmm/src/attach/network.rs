//! Network devices.

use std::io;

use api::config::{MacAddress, NetworkConfig};
use devices::net::tap::Tap;
use devices::net::{Net, NetOptions};

use super::limits::limiter;

/// Makes a network device of its tap's queues.
///
/// # Errors
/// When the system has no descriptor left.
pub(super) fn attach(network: &NetworkConfig, taps: Vec<Tap>) -> io::Result<Net> {
    let options = NetOptions {
        mac: network.mac.map(MacAddress::bytes),
        pinned: network.pin_mac,
        mtu: network.mtu,
        receive: limiter(network.rx_limits)?,
        transmit: limiter(network.tx_limits)?,
    };
    Ok(Net::new(taps, options))
}
