//! Times and amounts of lines, as they are written on the command line.

use std::str::FromStr;

use anyhow::{Context as _, bail};
use chrono::DateTime;
use runtime::timeline::wall_clock_ns;

/// A moment, in nanoseconds since 1970: RFC 3339, seconds since 1970, or how long ago it was (`90s`, `10m`, `1h30m`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment(pub u64);

impl FromStr for Moment {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        if let Ok(time) = DateTime::parse_from_rfc3339(text) {
            let nanoseconds = time.timestamp_nanos_opt().and_then(|time| u64::try_from(time).ok());
            return nanoseconds.map(Self).with_context(|| format!("the time {text:?} is before 1970 or far from now"));
        }
        if let Some(seconds) = text.parse::<f64>().ok().filter(|seconds| (0.0..1e10).contains(seconds)) {
            return Ok(Self((seconds * 1e9) as u64));
        }
        let age = age_ns(text).with_context(|| {
            format!("{text:?} is no time: give 2026-01-31T12:00:00Z, seconds since 1970, or an age like 10m")
        })?;
        Ok(Self(wall_clock_ns().saturating_sub(age)))
    }
}

fn age_ns(text: &str) -> Option<u64> {
    let (mut rest, mut age) = (text, 0u64);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest[..digits].parse().ok()?;
        let (unit, length) = match &rest[digits..] {
            unit if unit.starts_with("ms") => (1_000_000, 2),
            unit if unit.starts_with('s') => (1_000_000_000, 1),
            unit if unit.starts_with('m') => (60_000_000_000, 1),
            unit if unit.starts_with('h') => (3_600_000_000_000, 1),
            unit if unit.starts_with('d') => (86_400_000_000_000, 1),
            _ => return None,
        };
        age = age.checked_add(number.checked_mul(unit)?)?;
        rest = &rest[digits + length..];
    }
    (!text.is_empty()).then_some(age)
}

/// A number of last lines, or all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tail(pub Option<usize>);

impl FromStr for Tail {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        match (text, text.parse()) {
            ("all" | "-1", _) => Ok(Self(None)),
            (_, Ok(number)) => Ok(Self(Some(number))),
            _ => bail!("{text:?} is not a number of lines: give a number, or all"),
        }
    }
}

/// A time for people and programs (RFC 3339, in UTC).
pub fn rfc3339(nanoseconds: u64) -> String {
    let time = DateTime::from_timestamp_nanos(i64::try_from(nanoseconds).unwrap_or(i64::MAX));
    time.to_rfc3339_opts(chrono::SecondsFormat::Nanos, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_have_three_forms() {
        assert_eq!("1970-01-01T00:00:01.5Z".parse::<Moment>().unwrap(), Moment(1_500_000_000));
        assert_eq!("1.5".parse::<Moment>().unwrap(), Moment(1_500_000_000));
        let moment = "1h30m".parse::<Moment>().unwrap().0;
        let ago = wall_clock_ns() - moment;
        assert!((5_400_000_000_000..5_500_000_000_000).contains(&ago), "{ago}");
        for text in ["", "yesterday", "5x", "m", "-3"] {
            assert!(text.parse::<Moment>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn tails_are_numbers_or_all() {
        assert_eq!("all".parse::<Tail>().unwrap(), Tail(None));
        assert_eq!("7".parse::<Tail>().unwrap(), Tail(Some(7)));
        assert!("-7".parse::<Tail>().is_err());
    }
}
