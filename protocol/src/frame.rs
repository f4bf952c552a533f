//! Frames: a little-endian `u32` body length, then a postcard body of that length.
//!
//! A reader allocates at most the limit it was given, whatever length the other side claims.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// The longest body the agent may send: an error message and a container id fit many times over.
pub const MAX_FROM_AGENT: usize = 64 << 10;

/// The longest body the host may send: Linux limits arguments and environment of one program to a quarter of the stack
/// limit, 2 MiB by default, and a spec holds one program and a few small files.
pub const MAX_FROM_HOST: usize = 4 << 20;

/// Why a frame could not be sent or received.
#[derive(Debug, Error)]
pub enum FrameError {
    /// The other side closed the connection between frames.
    #[error("the connection was closed")]
    Closed,
    /// Reading or writing failed, or the connection ended within a frame.
    #[error("cannot transfer a frame")]
    Io(#[source] io::Error),
    /// The length field is over the limit.
    #[error("a frame of {length} bytes is over the limit of {limit}")]
    TooLong {
        /// The length claimed or needed.
        length: usize,
        /// The limit in force.
        limit: usize,
    },
    /// The body does not decode, or has bytes left over.
    #[error("a frame of {length} bytes does not decode")]
    Malformed {
        /// The body's length.
        length: usize,
        /// What the decoder says.
        #[source]
        source: postcard::Error,
    },
    /// The message does not encode.
    #[error("a message does not encode")]
    Encode(#[source] postcard::Error),
}

/// Encodes a message as one frame, to be written with a single `write`.
///
/// # Errors
/// [`FrameError::TooLong`] when the body is over `limit`.
pub fn encode<T: Serialize>(message: &T, limit: usize) -> Result<Vec<u8>, FrameError> {
    let mut bytes = postcard::to_extend(message, vec![0u8; 4]).map_err(FrameError::Encode)?;
    let length = bytes.len() - 4;
    match u32::try_from(length) {
        Ok(prefix) if length <= limit => bytes[..4].copy_from_slice(&prefix.to_le_bytes()),
        _ => return Err(FrameError::TooLong { length, limit }),
    }
    Ok(bytes)
}

/// Writes a message as one frame.
///
/// # Errors
/// As [`encode`], or what the writer says.
pub fn write<T: Serialize>(writer: &mut impl Write, message: &T, limit: usize) -> Result<(), FrameError> {
    writer.write_all(&encode(message, limit)?).map_err(FrameError::Io)
}

/// Reads one frame, blocking until it is whole.
///
/// # Errors
/// [`FrameError::Closed`] at the end of the stream between frames; the others as they say.
pub fn read<T: DeserializeOwned>(reader: &mut impl Read, limit: usize) -> Result<T, FrameError> {
    let mut prefix = [0u8; 4];
    match reader.read(&mut prefix) {
        Ok(0) => return Err(FrameError::Closed),
        Ok(n) => reader.read_exact(&mut prefix[n..]).map_err(FrameError::Io)?,
        Err(error) if error.kind() == io::ErrorKind::Interrupted => {
            reader.read_exact(&mut prefix).map_err(FrameError::Io)?;
        }
        Err(error) => return Err(FrameError::Io(error)),
    }
    let length = u32::from_le_bytes(prefix) as usize;
    if length > limit {
        return Err(FrameError::TooLong { length, limit });
    }
    let mut body = vec![0u8; length];
    reader.read_exact(&mut body).map_err(FrameError::Io)?;
    decode(&body)
}

fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
    let length = body.len();
    let malformed = |source| FrameError::Malformed { length, source };
    match postcard::take_from_bytes(body).map_err(malformed)? {
        (message, []) => Ok(message),
        _ => Err(malformed(postcard::Error::DeserializeBadEncoding)),
    }
}

/// Collects frames from a connection that is read piecemeal, for readers that may not block.
#[derive(Debug)]
pub struct Decoder {
    limit: usize,
    pending: Vec<u8>,
}

impl Decoder {
    /// A decoder for bodies of at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { limit, pending: Vec::new() }
    }

    /// Adds bytes as they came in.
    pub fn push(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    /// Takes the next whole message, or `None` until more bytes are there.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] and [`FrameError::Malformed`]; the stream is then unusable.
    pub fn take<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        let Some((prefix, rest)) = self.pending.split_first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_le_bytes(*prefix) as usize;
        if length > self.limit {
            return Err(FrameError::TooLong { length, limit: self.limit });
        }
        let Some(body) = rest.get(..length) else { return Ok(None) };
        let message = decode(body)?;
        self.pending.drain(..4 + length);
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{ExitStatus, FromAgent};

    fn message() -> FromAgent {
        let status = ExitStatus { code: 137, out_of_memory: true, executed_us: 42, agent_resident_kib: 900 };
        FromAgent::Exited { container: "c".repeat(64), status }
    }

    #[test]
    fn a_message_survives_the_way() {
        let bytes = encode(&message(), MAX_FROM_AGENT).unwrap();
        assert_eq!(read::<FromAgent>(&mut bytes.as_slice(), MAX_FROM_AGENT).unwrap(), message());
    }

    #[test]
    fn a_claimed_length_over_the_limit_allocates_nothing() {
        let bytes = u32::MAX.to_le_bytes();
        let error = read::<FromAgent>(&mut bytes.as_slice(), MAX_FROM_AGENT).unwrap_err();
        assert!(matches!(error, FrameError::TooLong { length, .. } if length == u32::MAX as usize));
    }

    #[test]
    fn bytes_left_over_in_a_body_are_malformed() {
        let mut bytes = encode(&message(), MAX_FROM_AGENT).unwrap();
        bytes.push(0);
        let length = u32::try_from(bytes.len() - 4).unwrap();
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        assert!(matches!(read::<FromAgent>(&mut bytes.as_slice(), MAX_FROM_AGENT), Err(FrameError::Malformed { .. })));
    }

    #[test]
    fn the_end_between_frames_is_told_from_the_end_within_one() {
        let bytes = encode(&message(), MAX_FROM_AGENT).unwrap();
        assert!(matches!(read::<FromAgent>(&mut [].as_slice(), MAX_FROM_AGENT), Err(FrameError::Closed)));
        assert!(matches!(read::<FromAgent>(&mut &bytes[..9], MAX_FROM_AGENT), Err(FrameError::Io(_))));
    }

    proptest! {
        #[test]
        fn a_decoder_finds_the_messages_however_they_are_cut(cuts in proptest::collection::vec(1usize..40, 1..20)) {
            let stream = encode(&message(), MAX_FROM_AGENT).unwrap().repeat(3);
            let mut decoder = Decoder::new(MAX_FROM_AGENT);
            let (mut rest, mut found) = (stream.as_slice(), 0);
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                decoder.push(now);
                while let Some(got) = decoder.take::<FromAgent>().unwrap() {
                    prop_assert_eq!(got, message());
                    found += 1;
                }
                rest = later;
                if rest.is_empty() { break; }
            }
            prop_assert_eq!(found, 3);
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut decoder = Decoder::new(MAX_FROM_AGENT);
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.take::<FromAgent>() {}
        }
    }
}
