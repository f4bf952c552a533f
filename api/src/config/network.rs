//! Network devices.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{ConfigError, LimitsConfig, within};

/// The most network devices a VM can have.
pub const NETWORKS_MAX: usize = 8;
/// The most pairs of queues of one.
pub const QUEUE_PAIRS_MAX: u16 = 8;
/// The longest name of an interface (Linux `IFNAMSIZ` without the final NUL).
const NAME_MAX: usize = 15;
/// What every IPv4 link has to carry (RFC 791), and what a device can be told (VIRTIO 1.2 §5.1.4.1).
const MTU: (u16, u16) = (68, u16::MAX);

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    /// The tap on the host that it is connected with. What the guest may reach through it, and from which IP addresses, is
    /// for whoever sets it up: the guest can send anything.
    pub tap: TapConfig,
    /// Its MAC address; without one the guest chooses.
    #[serde(default)]
    pub mac: Option<MacAddress>,
    /// Whether frames from any other address than `mac` are dropped. To be switched off for a guest that has bridges or
    /// other machines behind the device.
    #[serde(default = "yes")]
    pub pin_mac: bool,
    /// The longest packet, in bytes without the Ethernet header, 68 to 65,535, that the guest's interface has from the
    /// beginning; without one it takes 1,500. To be given when the tap's own is another.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// How many pairs of queues it has, 1 to [`QUEUE_PAIRS_MAX`]: with several vCPUs, one for each. A tap with more than one
    /// has to be made for it (`multi_queue`).
    #[serde(default = "one")]
    pub queue_pairs: u16,
    /// How much the guest may receive. What is over it waits in the tap, which drops what it has no room for.
    #[serde(default)]
    pub rx_limits: Option<LimitsConfig>,
    /// How much the guest may send. What is over it waits in the guest.
    #[serde(default)]
    pub tx_limits: Option<LimitsConfig>,
}

fn yes() -> bool {
    true
}

fn one() -> u16 {
    1
}

/// How the monitor gets at a tap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TapConfig {
    /// The name of its interface in the monitor's network namespace. One that does not exist is made, if the monitor may, and
    /// goes with the VM.
    Name(String),
    /// The numbers of file descriptors that the monitor inherits, one for each pair of queues: all queues of one tap, each
    /// opened with `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`.
    Descriptors(Vec<i32>),
}

/// The address of one device on an Ethernet, written `02:00:00:00:00:01`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// Its bytes, in the order in which they are sent.
    #[must_use]
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed =
            || format!("{text:?} is not a MAC address: give six pairs of hexadecimal digits with colons between");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part =
                parts.next().filter(|part| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit()));
            *byte = part.and_then(|part| u8::from_str_radix(part, 16).ok()).ok_or_else(malformed)?;
        }
        if parts.next().is_some() {
            return Err(malformed());
        }
        if bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(format!(
                "{text} is not the MAC address of one device: its first byte has to be even, and not all are 0"
            ));
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for MacAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(address: MacAddress) -> Self {
        address.to_string()
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(formatter, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

impl NetworkConfig {
    /// Checks what stands for itself.
    ///
    /// # Errors
    /// [`ConfigError`] names the field, its value and what is allowed.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        within("queue_pairs", self.queue_pairs.into(), 1, QUEUE_PAIRS_MAX.into())?;
        if let Some(mtu) = self.mtu {
            within("mtu", mtu.into(), MTU.0.into(), MTU.1.into())?;
        }
        match &self.tap {
            TapConfig::Descriptors(descriptors) => {
                let pairs = self.queue_pairs.into();
                within("the number of descriptors of a tap", descriptors.len() as u64, pairs, pairs)?;
            }
            TapConfig::Name(name) => {
                // As the kernel takes them, but for what it replaces by a number.
                let valid = |byte: u8| byte.is_ascii_graphic() && !b"/:%".contains(&byte);
                if name.is_empty() || name.len() > NAME_MAX || name == "." || name == ".." || !name.bytes().all(valid) {
                    return Err(ConfigError::InterfaceName { name: name.clone() });
                }
            }
        }
        for (device, limits) in [("network (rx)", self.rx_limits), ("network (tx)", self.tx_limits)] {
            limits.unwrap_or_default().check(device)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(fields: &str) -> Result<NetworkConfig, String> {
        let config: NetworkConfig =
            serde_json::from_str(&format!("{{{fields}}}")).map_err(|error| error.to_string())?;
        config.check().map_err(|error| error.to_string())?;
        Ok(config)
    }

    #[test]
    fn a_tap_is_enough_and_an_address_is_pinned_unless_told_otherwise() {
        let config = check(r#""tap":{"name":"tap0"}"#).unwrap();
        assert_eq!((config.queue_pairs, config.mac, config.pin_mac, config.mtu), (1, None, true, None));
        check(r#""tap":{"descriptors":[3,4]},"queue_pairs":2,"mac":"02:00:00:00:00:0A","mtu":68"#).unwrap();
    }

    #[test]
    fn an_address_is_read_as_it_is_written() {
        let address: MacAddress = "02:fF:00:10:0a:01".parse().unwrap();
        assert_eq!((address.bytes(), address.to_string().as_str()), ([2, 255, 0, 16, 10, 1], "02:ff:00:10:0a:01"));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (fields, part) in [
            (r#""mac":"02:00:00:00:00:01""#, "tap"),
            (r#""tap":{"name":""}"#, "\"\""),
            (r#""tap":{"name":"sixteen-letters-"}"#, "15"),
            (r#""tap":{"name":"a/b"}"#, "a/b"),
            (r#""tap":{"name":"tap%d"}"#, "tap%d"),
            (r#""tap":{"name":".."}"#, ".."),
            (r#""tap":{"descriptors":[]}"#, "descriptors"),
            (r#""tap":{"descriptors":[3,4]}"#, "descriptors"),
            (r#""tap":{"descriptors":[3,4]},"queue_pairs":9"#, "queue_pairs"),
            (r#""tap":{"name":"a"},"queue_pairs":0"#, "queue_pairs"),
            (r#""tap":{"name":"a"},"mtu":67"#, "mtu"),
            (r#""tap":{"name":"a"},"mac":"03:00:00:00:00:01""#, "03:"),
            (r#""tap":{"name":"a"},"mac":"00:00:00:00:00:00""#, "00:"),
            (r#""tap":{"name":"a"},"mac":"02:00:00:00:00""#, "02:"),
            (r#""tap":{"name":"a"},"mac":"02:00:00:00:00:1:1""#, "02:"),
            (r#""tap":{"name":"a"},"mac":"02:00:00:00:00:+1""#, "02:"),
            (r#""tap":{"name":"a"},"tx_limits":{"bytes":{"size":0,"refill_ms":1}}"#, "network (tx)"),
        ] {
            let error = check(fields).unwrap_err();
            assert!(error.contains(part), "{fields}: {error}");
        }
    }
}
