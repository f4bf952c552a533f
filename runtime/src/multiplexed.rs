//! Taking a process's output apart: frames of both its streams on one connection (docker's `multiplexed-stream`).
//!
//! The monitor that sends them is not believed: nothing but a header and a short line is held, however long a frame says
//! that it is.

use std::io;

use api::model::{HEADER_LENGTH, StreamKind, TROUBLE};

/// How much of a line that says what is wrong is read.
const TROUBLE_MAX: usize = 4096;
/// What is told of a frame that breaks off.
pub(crate) const CUT: &str = "the output was cut";

/// Why there is no more.
#[derive(Debug)]
pub enum Stop {
    /// There was more, and this is known of it.
    Lost(String),
    /// Whoever takes the output takes no more.
    Unwritten(io::Error),
}

/// Where in the frames one is.
#[derive(Debug)]
enum Place {
    /// In a header, of which there are so many bytes.
    Header([u8; HEADER_LENGTH], usize),
    /// In the output of a stream, of which so much is to come.
    Output(StreamKind, usize),
    /// In a line that says what is wrong, of which so much is to come.
    Trouble(Vec<u8>, usize),
}

/// Frames that come piece by piece.
#[derive(Debug)]
pub struct Frames(Place);

impl Default for Frames {
    fn default() -> Self {
        Self(BETWEEN)
    }
}

const BETWEEN: Place = Place::Header([0; HEADER_LENGTH], 0);

impl Frames {
    /// Takes the next piece apart and gives `take` what it holds of each stream.
    ///
    /// # Errors
    /// [`Stop`]: what comes behind makes no sense any more.
    pub fn push(
        &mut self,
        mut bytes: &[u8],
        mut take: impl FnMut(StreamKind, &[u8]) -> io::Result<()>,
    ) -> Result<(), Stop> {
        while !bytes.is_empty() {
            match &mut self.0 {
                Place::Header(header, have) => {
                    let count = bytes.len().min(HEADER_LENGTH - *have);
                    header[*have..*have + count].copy_from_slice(&bytes[..count]);
                    *have += count;
                    bytes = &bytes[count..];
                    if *have == HEADER_LENGTH {
                        self.0 = begin(*header)?;
                    }
                }
                Place::Output(kind, left) => {
                    let count = bytes.len().min(*left);
                    take(*kind, &bytes[..count]).map_err(Stop::Unwritten)?;
                    *left -= count;
                    bytes = &bytes[count..];
                    if *left == 0 {
                        self.0 = BETWEEN;
                    }
                }
                Place::Trouble(line, left) => {
                    let count = bytes.len().min(*left);
                    line.extend_from_slice(&bytes[..count]);
                    *left -= count;
                    bytes = &bytes[count..];
                    if *left == 0 {
                        return Err(Stop::Lost(shown(line)));
                    }
                }
            }
        }
        Ok(())
    }

    /// What is lost when nothing comes any more.
    pub fn lost(&self) -> Option<String> {
        match &self.0 {
            Place::Header(_, 0) => None,
            Place::Trouble(line, _) => Some(shown(line)),
            _ => Some(CUT.to_owned()),
        }
    }
}

/// What follows a header.
fn begin([kind, _, _, _, a, b, c, d]: [u8; HEADER_LENGTH]) -> Result<Place, Stop> {
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    match (StreamKind::from_byte(kind), length) {
        (None, 1..) if kind == TROUBLE => Ok(Place::Trouble(Vec::new(), length.min(TROUBLE_MAX))),
        // What is no frame has no end that could be waited for.
        (None, _) => Err(Stop::Lost(CUT.to_owned())),
        (Some(_), 0) => Ok(BETWEEN),
        (Some(kind), length) => Ok(Place::Output(kind, length)),
    }
}

/// What became of the output, fit for a terminal.
fn shown(line: &[u8]) -> String {
    match api::session::shown(String::from_utf8_lossy(line).trim()) {
        line if line.is_empty() => CUT.to_owned(),
        line => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What both streams hold, however the frames are cut, and what is lost.
    fn taken(bytes: &[u8], piece: usize) -> (Vec<u8>, Option<String>) {
        let (mut frames, mut output) = (Frames::default(), Vec::new());
        for piece in bytes.chunks(piece) {
            let pushed = frames.push(piece, |kind, bytes| {
                output.push(kind as u8);
                output.extend_from_slice(bytes);
                Ok(())
            });
            match pushed {
                Ok(()) => {}
                Err(Stop::Lost(line)) => return (output, Some(line)),
                Err(Stop::Unwritten(error)) => panic!("{error}"),
            }
        }
        (output, frames.lost())
    }

    #[test]
    fn frames_are_taken_apart_however_they_are_cut() {
        let bytes = b"\x01\0\0\0\0\0\0\x01a\x02\0\0\0\0\0\0\x01b\x01\0\0\0\0\0\0\0";
        for piece in 1..bytes.len() {
            assert_eq!(taken(bytes, piece), (b"\x01a\x02b".to_vec(), None));
        }
    }

    #[test]
    fn what_breaks_off_is_told_of() {
        let cut = || Some(CUT.to_owned());
        assert_eq!(taken(b"\x01\0\0\0\0\0\0\x05ab", 9), (b"\x01a\x01b".to_vec(), cut()));
        for bytes in [&b"\x01\0\0"[..], b"\x07\0\0\0\0\0\0\x01x", b"\x03\0\0\0\0\0\0\0"] {
            assert_eq!(taken(bytes, 3), (Vec::new(), cut()));
        }
        assert_eq!(taken(b"\x03\0\0\0\0\0\0\x08too\x1bslow\n", 5).1, Some("too\u{fffd}slow".to_owned()));
    }

    #[test]
    fn a_frame_as_long_as_one_can_be_is_not_held() {
        let mut frames = Frames::default();
        let mut seen = 0;
        let mut push = |bytes: &[u8]| {
            frames.push(bytes, |_, bytes| {
                seen += bytes.len();
                Ok(())
            })
        };
        push(b"\x01\0\0\0\xff\xff\xff\xff").unwrap();
        push(&[0; 1000]).unwrap();
        assert_eq!(seen, 1000);
        let mut frames = Frames::default();
        frames.push(b"\x03\0\0\0\xff\xff\xff\xff", |_, _| Ok(())).unwrap();
        // It ends long before the frame does.
        let pushed = frames.push(&[b'a'; 2 * TROUBLE_MAX], |_, _| Ok(()));
        assert!(matches!(pushed, Err(Stop::Lost(line)) if line.len() <= TROUBLE_MAX));
    }
}
