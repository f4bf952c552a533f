//! Limits, from what the configuration says to what a device counts with.

use std::io;
use std::time::Duration;

use api::config::{LimitsConfig, RateConfig};
use devices::limit::{Limiter, Rate};

/// A limiter with full buckets; `None` when nothing is limited, which costs no timer.
///
/// # Errors
/// When the system has no descriptor left.
pub(super) fn limiter(limits: Option<LimitsConfig>) -> io::Result<Option<Limiter>> {
    let LimitsConfig { bytes, operations } = limits.unwrap_or_default();
    if bytes.is_none() && operations.is_none() {
        return Ok(None);
    }
    Limiter::new(bytes.map(rate), operations.map(rate)).map(Some)
}

fn rate(config: RateConfig) -> Rate {
    let RateConfig { size, refill_ms, burst } = config;
    Rate { size, refill: Duration::from_millis(refill_ms), burst }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_limited_gets_a_limiter() {
        assert!(limiter(None).unwrap().is_none());
        assert!(limiter(Some(LimitsConfig::default())).unwrap().is_none());
        let bytes = Some(RateConfig { size: 1, refill_ms: 1000, burst: 0 });
        assert!(limiter(Some(LimitsConfig { bytes, operations: None })).unwrap().is_some());
    }
}
