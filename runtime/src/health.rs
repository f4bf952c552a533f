//! The health check of a container: the image's (docker's addition to the OCI image configuration, `Healthcheck`; times in
//! nanoseconds), and what the request has instead of parts of it.

use std::str::FromStr;

use image::ImageConfig;
use protocol::container::HealthCheck;
use serde::Deserialize;

use crate::merge::MergeError;
use crate::request::{RequestError, RunRequest};

/// Docker's defaults, in nanoseconds.
const INTERVAL_NS: u64 = 30_000_000_000;
const TIMEOUT_NS: u64 = 30_000_000_000;
const START_INTERVAL_NS: u64 = 5_000_000_000;
const RETRIES: u32 = 3;

/// The shortest time, docker's.
const PERIOD_MIN_NS: u64 = 1_000_000;

/// What a request has instead of an image's. What is not given, or zero, is as in the image, or docker's default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HealthRequest {
    /// `--health-cmd`: a line for the shell.
    pub command: Option<String>,
    /// `--health-interval`.
    pub interval: Period,
    /// `--health-timeout`.
    pub timeout: Period,
    /// `--health-start-period`.
    pub start_period: Period,
    /// `--health-start-interval`.
    pub start_interval: Period,
    /// `--health-retries`.
    pub retries: u32,
}

/// A time in nanoseconds, written as docker (Go's `time.ParseDuration`) has it: `30s`, `1m30s`, `1.5h`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Period(pub u64);

impl FromStr for Period {
    type Err = RequestError;

    fn from_str(text: &str) -> Result<Self, RequestError> {
        let period = if text == "0" { Some(0) } else { nanoseconds(text) };
        let period = period.filter(|period| *period == 0 || *period >= PERIOD_MIN_NS);
        period.map(Self).ok_or_else(|| RequestError::Period { text: text.to_owned() })
    }
}

fn nanoseconds(text: &str) -> Option<u64> {
    // The longer of two that begin alike comes first. The micro sign and the letter mu look the same.
    const UNITS: [(&str, u64); 8] = [
        ("ns", 1),
        ("us", 1000),
        ("µs", 1000),
        ("μs", 1000),
        ("ms", 1_000_000),
        ("s", 1_000_000_000),
        ("m", 60_000_000_000),
        ("h", 3_600_000_000_000),
    ];
    let (mut rest, mut sum) = (text, 0u64);
    while !rest.is_empty() {
        let (number, after) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit() && c != '.')?);
        let (unit, length) = UNITS.iter().find_map(|(unit, length)| Some((after.strip_prefix(unit)?, *length)))?;
        let part = match number.parse::<u64>() {
            Ok(count) => count.checked_mul(length)?,
            // Too much becomes the largest number, which is refused below.
            Err(_) => (number.parse::<f64>().ok()? * length as f64) as u64,
        };
        (rest, sum) = (unit, sum.checked_add(part)?);
    }
    // What Go has room for.
    (!text.is_empty() && i64::try_from(sum).is_ok()).then_some(sum)
}

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

impl Written {
    fn replace(&mut self, request: &HealthRequest) {
        if let Some(command) = &request.command {
            self.test = vec!["CMD-SHELL".to_owned(), command.clone()];
        }
        for (own, given) in [
            (&mut self.interval, request.interval),
            (&mut self.timeout, request.timeout),
            (&mut self.start_period, request.start_period),
            (&mut self.start_interval, request.start_interval),
        ] {
            if given.0 > 0 {
                *own = given.0;
            }
        }
        if request.retries > 0 {
            self.retries = request.retries;
        }
    }
}

/// The check that a container has.
///
/// # Errors
/// The image's is none.
pub fn check(request: &RunRequest, image: &ImageConfig) -> Result<Option<HealthCheck>, MergeError> {
    if request.no_healthcheck {
        return Ok(None);
    }
    let mut written = match &image.healthcheck {
        Some(written) => {
            Written::deserialize(written).map_err(|error| MergeError::HealthCheck { reason: error.to_string() })?
        }
        None => Written::default(),
    };
    written.replace(&request.health);
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
    fn a_request_can_replace_all_of_it_or_parts() {
        let text = json!({ "Test": ["CMD", "x"], "Interval": 2_000_000_000u64, "Retries": 5 });
        let image = ImageConfig { healthcheck: Some(text), ..ImageConfig::default() };
        let timed = HealthRequest { timeout: Period(7_000_000), ..HealthRequest::default() };
        let whole = HealthRequest { command: Some("true && y".into()), retries: 1, ..timed.clone() };
        let with = |health: &HealthRequest, image: &ImageConfig| {
            check(&RunRequest { health: health.clone(), ..RunRequest::default() }, image).unwrap()
        };
        let part = with(&timed, &image).unwrap();
        assert_eq!(
            (part.args, part.interval_us, part.timeout_us, part.retries),
            (vec!["x".into()], 2_000_000, 7000, 5)
        );
        let whole_check = with(&whole, &image).unwrap();
        assert_eq!(whole_check.args, ["/bin/sh", "-c", "true && y"]);
        assert_eq!((whole_check.interval_us, whole_check.retries), (2_000_000, 1));
        assert_eq!(with(&whole, &ImageConfig::default()).unwrap().interval_us, 30_000_000);
        assert_eq!(with(&timed, &ImageConfig::default()), None);
    }

    #[test]
    fn times_are_written_as_in_docker() {
        for (text, nanoseconds) in [
            ("0", 0),
            ("0s", 0),
            ("30s", 30_000_000_000),
            ("1m30s", 90_000_000_000),
            ("1.5h", 5_400_000_000_000),
            ("1h0m0.5s", 3_600_500_000_000),
            ("1ms", 1_000_000),
            ("2000µs", 2_000_000),
        ] {
            assert_eq!(text.parse(), Ok(Period(nanoseconds)), "{text}");
        }
        for text in ["", "30", "s", "-5s", "5 s", "1d", "1us", "999999h1x", "1.2.3s", ".s", "99999999h", "1e3s"] {
            assert!(text.parse::<Period>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_request_can_leave_it_out() {
        let image = ImageConfig { healthcheck: Some(json!({ "Test": ["CMD", "x"] })), ..ImageConfig::default() };
        let request = RunRequest { no_healthcheck: true, ..RunRequest::default() };
        assert_eq!(check(&request, &image).unwrap(), None);
    }
}
