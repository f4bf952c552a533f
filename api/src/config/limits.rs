//! Limits of how much a device moves.

use serde::{Deserialize, Serialize};

use super::ConfigError;

/// The most tokens in a bucket or in its burst: more bytes than any device moves in the longest time that a bucket may take.
const TOKENS_MAX: u64 = 1 << 50;
/// The longest that a bucket may take to fill: a day, in milliseconds.
const REFILL_MS_MAX: u64 = 24 * 60 * 60 * 1000;

/// How much a device may move. What is not given is not limited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitsConfig {
    /// Bytes.
    #[serde(default)]
    pub bytes: Option<RateConfig>,
    /// Operations: requests, packets or buffers, whatever the device has.
    #[serde(default)]
    pub operations: Option<RateConfig>,
}

/// A token bucket. A token is a byte or an operation; `size` tokens in `refill_ms` is the rate over time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateConfig {
    /// How many tokens it holds, 1 to 2^50: what may be used at once after a rest.
    pub size: u64,
    /// How long it takes from empty to full, in milliseconds, 1 to a day.
    pub refill_ms: u64,
    /// What it has above its size in the beginning, once; up to 2^50.
    #[serde(default)]
    pub burst: u64,
}

impl LimitsConfig {
    /// Checks the limits of a device.
    ///
    /// # Errors
    /// [`ConfigError::Limit`] names the device, the field, its value and what is allowed.
    pub(super) fn check(&self, device: &'static str) -> Result<(), ConfigError> {
        for (tokens, rate) in [("bytes", self.bytes), ("operations", self.operations)] {
            let Some(RateConfig { size, refill_ms, burst }) = rate else { continue };
            for (field, value, least, most) in [
                ("size", size, 1, TOKENS_MAX),
                ("refill_ms", refill_ms, 1, REFILL_MS_MAX),
                ("burst", burst, 0, TOKENS_MAX),
            ] {
                if !(least..=most).contains(&value) {
                    return Err(ConfigError::Limit { device, tokens, field, value, least, most });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(limits: &str) -> Result<(), ConfigError> {
        serde_json::from_str::<LimitsConfig>(limits).unwrap().check("block")
    }

    #[test]
    fn a_bucket_of_each_kind_is_enough_and_none_is_no_limit() {
        check("{}").unwrap();
        check(r#"{"bytes":{"size":1,"refill_ms":1}}"#).unwrap();
        check(r#"{"operations":{"size":1,"refill_ms":86400000,"burst":1125899906842624}}"#).unwrap();
    }

    #[test]
    fn a_bucket_that_never_fills_is_refused_by_name() {
        let cases = [
            (r#"{"bytes":{"size":0,"refill_ms":1}}"#, "bytes.size of the block device's limits is 0"),
            (r#"{"operations":{"size":1,"refill_ms":0}}"#, "operations.refill_ms of the block device's limits is 0"),
            (
                r#"{"bytes":{"size":1,"refill_ms":86400001}}"#,
                "bytes.refill_ms of the block device's limits is 86400001",
            ),
            (r#"{"bytes":{"size":1,"refill_ms":1,"burst":1125899906842625}}"#, "bytes.burst of"),
        ];
        for (limits, expected) in cases {
            let error = check(limits).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
