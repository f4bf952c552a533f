//! Lines that come piece by piece from a monitor, which is not believed: none is held that is longer than a line may be.

use anyhow::bail;

/// The longest line: an event holds an error's text and no more.
const LINE_MAX: usize = 1 << 20;

/// The beginning of a line whose end is to come, and whole lines before it that nobody has taken yet.
#[derive(Debug, Default)]
pub struct Lines {
    pending: Vec<u8>,
    /// How much of it holds no end of a line.
    searched: usize,
}

impl Lines {
    /// Takes the next piece.
    ///
    /// # Errors
    /// A line is too long.
    pub fn push(&mut self, piece: &[u8]) -> anyhow::Result<()> {
        self.pending.extend_from_slice(piece);
        if self.searched > LINE_MAX {
            bail!("the VM sends a line of more than {LINE_MAX} bytes");
        }
        Ok(())
    }

    /// The next whole line, with its end.
    pub fn take(&mut self) -> Option<Vec<u8>> {
        let end = self.pending[self.searched..].iter().position(|byte| *byte == b'\n');
        let Some(end) = end else {
            self.searched = self.pending.len();
            return None;
        };
        let line = self.pending.drain(..=self.searched + end).collect();
        self.searched = 0;
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_however_they_are_cut() {
        let bytes = b"one\n\nthree\nrest";
        for piece in 1..=bytes.len() {
            let (mut lines, mut found) = (Lines::default(), Vec::new());
            for piece in bytes.chunks(piece) {
                lines.push(piece).unwrap();
                found.extend(std::iter::from_fn(|| lines.take()));
            }
            assert_eq!(found, [&b"one\n"[..], b"\n", b"three\n"]);
        }
    }

    #[test]
    fn a_line_without_an_end_is_not_held() {
        let mut lines = Lines::default();
        let pieces = (0..3 * LINE_MAX / 1024).take_while(|_| {
            let taken = lines.push(&[b'x'; 1024]).is_ok();
            taken && lines.take().is_none()
        });
        assert!(pieces.count() <= LINE_MAX / 1024 + 1);
        assert!(lines.pending.len() <= LINE_MAX + 4096);
    }
}
