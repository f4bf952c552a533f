//! PAX extended headers (POSIX.1-2017, pax, "pax Extended Header"), with the keys that images use.
//!
//! The crate's own parser splits at newlines, which binary values (file capabilities, ACLs) contain; the length in
//! front of each record is what counts.

use crate::problem::Problem;

/// What the extended headers before one entry say. Later ones win.
#[derive(Debug, Default)]
pub(super) struct PaxRecords {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link_path: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    /// Seconds and nanoseconds since 1970.
    pub(super) mtime: Option<(i64, u32)>,
    /// Full name and value.
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: SparseRecords,
}

/// GNU tar's sparse files in PAX archives: versions 0.0, 0.1 and 1.0.
#[derive(Debug, Default)]
pub(super) struct SparseRecords {
    pub(super) major: Option<u64>,
    /// The file's name in version 1.0, where the entry's own is a placeholder.
    pub(super) name: Option<Vec<u8>>,
    /// `GNU.sparse.size` or `GNU.sparse.realsize`.
    pub(super) real_size: Option<u64>,
    /// Offsets and lengths one after the other (0.0 and 0.1).
    pub(super) map: Vec<u64>,
}

impl PaxRecords {
    /// Adds the records of one extended header.
    ///
    /// # Errors
    /// A record is malformed.
    pub(super) fn parse(&mut self, mut bytes: &[u8]) -> Result<(), Problem> {
        while !bytes.is_empty() {
            let space = bytes.iter().take(20).position(|byte| *byte == b' ').ok_or(MALFORMED)?;
            let length = decimal(&bytes[..space])?;
            let length = usize::try_from(length).ok().filter(|n| *n > space + 1 && *n <= bytes.len());
            let (record, rest) = bytes.split_at(length.ok_or(MALFORMED)?);
            let record = record[space + 1..].strip_suffix(b"\n").ok_or(MALFORMED)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or(MALFORMED)?;
            self.record(&record[..equals], &record[equals + 1..])?;
            bytes = rest;
        }
        Ok(())
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), Problem> {
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link_path = Some(value.to_vec()),
            b"size" => self.size = Some(decimal(value)?),
            b"uid" => self.uid = Some(decimal(value)?),
            b"gid" => self.gid = Some(decimal(value)?),
            b"mtime" => self.mtime = Some(time(value)?),
            b"GNU.sparse.major" => self.sparse.major = Some(decimal(value)?),
            b"GNU.sparse.name" => self.sparse.name = Some(value.to_vec()),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.real_size = Some(decimal(value)?),
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => self.sparse.map.push(decimal(value)?),
            b"GNU.sparse.map" => {
                let numbers = value.split(|byte| *byte == b',').filter(|number| !number.is_empty());
                self.sparse.map = numbers.map(decimal).collect::<Result<_, _>>()?;
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Ok(())
    }
}

const MALFORMED: Problem = Problem::BadField("pax record");

fn decimal(bytes: &[u8]) -> Result<u64, Problem> {
    parse_decimal(bytes).ok_or(MALFORMED)
}

/// A number of decimal digits and nothing else.
pub(super) fn parse_decimal(bytes: &[u8]) -> Option<u64> {
    if bytes.is_empty() || !bytes.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(bytes).ok()?.parse().ok()
}

/// Seconds since 1970, with a sign and a fraction if need be. Digits below a nanosecond are cut off.
fn time(bytes: &[u8]) -> Result<(i64, u32), Problem> {
    let (negative, bytes) = match bytes.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, bytes),
    };
    let (whole, fraction) = match bytes.iter().position(|byte| *byte == b'.') {
        Some(point) => (&bytes[..point], &bytes[point + 1..]),
        None => (bytes, &b""[..]),
    };
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(MALFORMED);
    }
    let seconds = i64::try_from(decimal(whole)?).map_err(|_| MALFORMED)?;
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanoseconds = digits.fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0'));
    Ok(match (negative, nanoseconds) {
        (false, _) => (seconds, nanoseconds),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanoseconds),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_may_hold_newlines_and_equals_signs() {
        let mut records = PaxRecords::default();
        records.parse(b"34 SCHILY.xattr.user.a=\n=b\nc\x00defg\n").unwrap();
        assert_eq!(records.xattrs, [(b"user.a".to_vec(), b"\n=b\nc\0defg".to_vec())]);
    }

    #[test]
    fn times_before_1970_round_down() {
        assert_eq!(time(b"1.5").unwrap(), (1, 500_000_000));
        assert_eq!(time(b"-1.25").unwrap(), (-2, 750_000_000));
        assert_eq!(time(b"-7").unwrap(), (-7, 0));
        assert_eq!(time(b"12.1234567891").unwrap(), (12, 123_456_789));
        assert!(time(b"1.x").is_err());
        assert!(time(b"").is_err());
    }

    #[test]
    fn malformed_records_are_refused() {
        for bytes in [&b"5 a=b"[..], b"999 a=b\n", b"x a=b\n", b"6 abc\n", b"3 \n", b"00000000000000000000000000 a=b\n"]
        {
            assert!(PaxRecords::default().parse(bytes).is_err(), "{}", bytes.escape_ascii());
        }
    }
}
