//! Inputs made of others, for where there is no fuzzer that sees what they do: the same ones in each run.

/// Numbers that are often one too many or too few.
const EDGES: [u8; 10] = [0, 1, 2, 0x0f, 0x10, 0x20, 0x7f, 0x80, 0xfe, 0xff];
/// The longest input that is made.
const LENGTH_MAX: usize = 8 << 10;

/// A source of inputs (xorshift64).
#[derive(Debug, Clone)]
pub struct Mutator(u64);

impl Mutator {
    /// One that makes the same inputs each time.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, most: usize) -> usize {
        (self.next() >> 11) as usize % most.max(1)
    }

    /// An input made of one or two of `seeds`, or of nothing.
    pub fn make(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = seeds.get(self.below(seeds.len())).cloned().unwrap_or_default();
        if bytes.is_empty() || self.below(16) == 0 {
            bytes = (0..self.below(256)).map(|_| self.next() as u8).collect();
        }
        for _ in 0..=self.below(8) {
            self.change(&mut bytes, seeds);
        }
        bytes.truncate(LENGTH_MAX);
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>, seeds: &[Vec<u8>]) {
        let at = self.below(bytes.len());
        let end = at + self.below((bytes.len() - at.min(bytes.len())).min(64) + 1);
        let end = end.min(bytes.len());
        match self.below(8) {
            0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
            1 if at < bytes.len() => bytes[at] = EDGES[self.below(EDGES.len())],
            2 if at < bytes.len() => bytes[at] = self.next() as u8,
            3 => drop(bytes.drain(at.min(end)..end)),
            4 => {
                let piece = bytes[at.min(end)..end].to_vec();
                let to = self.below(bytes.len() + 1);
                bytes.splice(to..to, piece);
            }
            5 => {
                let piece: Vec<u8> = (0..self.below(16)).map(|_| self.next() as u8).collect();
                bytes.splice(at.min(bytes.len())..at.min(bytes.len()), piece);
            }
            6 => bytes.truncate(at),
            _ => {
                let Some(other) = seeds.get(self.below(seeds.len())) else { return };
                let from = self.below(other.len() + 1);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
        }
    }
}
