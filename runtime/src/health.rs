//! The health check of an image (docker's addition to the OCI image configuration, `Healthcheck`; times in nanoseconds).

use image::ImageConfig;
use protocol::container::HealthCheck;
use serde::Deserialize;

use crate::merge::MergeError;
use crate::request::RunRequest;

/// Docker's defaults, in nanoseconds.
const INTERVAL_NS: u64 = 30_000_000_000;
const TIMEOUT_NS: u64 = 30_000_000_000;
const START_INTERVAL_NS: u64 = 5_000_000_000;
const RETRIES: u32 = 3;

/// As it is written in an image.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Written {
    test: Vec<String>,
    interval: u64,
    timeout: u64,
    start_period: u64,
    start_interval: u64,
    retries: u32,
}

/// The check that a container has.
///
/// # Errors
/// The image's is none.
pub fn check(request: &RunRequest, image: &ImageConfig) -> Result<Option<HealthCheck>, MergeError> {
    let Some(written) = image.healthcheck.as_ref().filter(|_| !request.no_healthcheck) else { return Ok(None) };
    let written =
        Written::deserialize(written).map_err(|error| MergeError::HealthCheck { reason: error.to_string() })?;
    let args = match written.test.split_first() {
        Some((kind, words)) if kind == "CMD" && !words.is_empty() => words.to_vec(),
        Some((kind, words)) if kind == "CMD-SHELL" && !words.is_empty() => {
            ["/bin/sh", "-c", &words[0]].map(str::to_owned).to_vec()
        }
        // Nothing, or `NONE`: there is none.
        _ => return Ok(None),
    };
    let us = |written: u64, default: u64| if written == 0 { default } else { written } / 1000;
    Ok(Some(HealthCheck {
        args,
        interval_us: us(written.interval, INTERVAL_NS),
        timeout_us: us(written.timeout, TIMEOUT_NS),
        start_period_us: written.start_period / 1000,
        start_interval_us: us(written.start_interval, START_INTERVAL_NS),
        retries: if written.retries == 0 { RETRIES } else { written.retries },
    }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parsed(value: serde_json::Value) -> Result<Option<HealthCheck>, MergeError> {
        check(&RunRequest::default(), &ImageConfig { healthcheck: Some(value), ..ImageConfig::default() })
    }

    #[test]
    fn a_check_has_the_defaults_of_docker() {
        let check = parsed(json!({ "Test": ["CMD-SHELL", "true"], "Retries": 5 })).unwrap().unwrap();
        assert_eq!(check.args, ["/bin/sh", "-c", "true"]);
        assert_eq!((check.interval_us, check.timeout_us, check.retries), (30_000_000, 30_000_000, 5));
        assert_eq!(parsed(json!({ "Test": ["NONE"] })).unwrap(), None);
        assert_eq!(parsed(json!({})).unwrap(), None);
        assert!(parsed(json!({ "Test": 7 })).is_err());
    }

    #[test]
    fn a_request_can_leave_it_out() {
        let image = ImageConfig { healthcheck: Some(json!({ "Test": ["CMD", "x"] })), ..ImageConfig::default() };
        let request = RunRequest { no_healthcheck: true, ..RunRequest::default() };
        assert_eq!(check(&request, &image).unwrap(), None);
    }
}
