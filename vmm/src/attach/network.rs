//! The taps behind network devices.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use api::config::{MacAddress, NetworkConfig, TapConfig};
use devices::net::tap::Tap;
use devices::net::{Net, NetOptions};

use super::limits::limiter;
use crate::inherited;
use crate::machine::MachineError;

/// Makes a network device and connects it with its tap.
///
/// # Errors
/// [`MachineError`] names the tap, or the descriptor.
pub(super) fn attach(network: &NetworkConfig) -> Result<Net, MachineError> {
    let failed = |source| MachineError::Device { device: "network", source };
    let taps = match &network.tap {
        TapConfig::Name(name) => Tap::open(name, network.queue_pairs.into())?,
        TapConfig::Descriptors(numbers) => {
            let queues: Vec<_> = numbers.iter().copied().map(take).collect::<Result<_, _>>()?;
            Tap::from_descriptors(queues)?
        }
    };
    let options = NetOptions {
        mac: network.mac.map(MacAddress::bytes),
        pinned: network.pin_mac,
        mtu: network.mtu,
        receive: limiter(network.rx_limits).map_err(failed)?,
        transmit: limiter(network.tx_limits).map_err(failed)?,
    };
    Ok(Net::new(taps, options))
}

fn take(number: i32) -> Result<OwnedFd, MachineError> {
    let path = || PathBuf::from(format!("/proc/self/fd/{number}"));
    inherited::take(number).map_err(|source| MachineError::Open { what: "the inherited tap", path: path(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_that_were_not_inherited_or_are_no_taps_are_named() {
        let network = |number: i32| NetworkConfig {
            tap: TapConfig::Descriptors(vec![number]),
            mac: None,
            pin_mac: true,
            mtu: None,
            queue_pairs: 1,
            rx_limits: None,
            tx_limits: None,
        };
        let error = attach(&network(9999)).unwrap_err();
        assert!(error.to_string().contains("/proc/self/fd/9999"), "{error}");
        let file = rustix::io::dup(std::fs::File::open("/dev/null").unwrap()).unwrap();
        let number = std::os::fd::IntoRawFd::into_raw_fd(file);
        let error = attach(&network(number)).unwrap_err();
        let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        assert!(cause.contains(&format!("descriptor {number} is not a tap")), "{error}: {cause}");
    }
}
