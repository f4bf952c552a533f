//! Pseudo-random numbers (SplitMix64): the same case from the same seed, on every machine.

/// A generator.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The generator of one case of a seed.
    #[must_use]
    pub fn of(seed: u64, case: u64) -> Self {
        let mut of_seed = Self(seed);
        Self(of_seed.long() ^ case.wrapping_mul(0xd6e8_feb8_6659_fd93))
    }

    /// Any number of 64 bits.
    pub fn long(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// Any number of 32 bits.
    pub fn word(&mut self) -> u32 {
        (self.long() >> 32) as u32
    }

    /// Any number of 16 bits.
    pub fn half(&mut self) -> u16 {
        (self.long() >> 48) as u16
    }

    /// A number below `end`, which is not zero.
    pub fn below(&mut self, end: u64) -> u64 {
        // The bias is of no consequence here.
        self.long() % end.max(1)
    }

    /// True in one of `count` cases.
    pub fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    /// One of several, of which there is at least one.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_is_the_same_again_and_another_is_another() {
        let first = |seed, case| Random::of(seed, case).long();
        assert_eq!(first(1, 2), first(1, 2));
        assert_ne!(first(1, 2), first(1, 3));
        assert_ne!(first(1, 2), first(2, 2));
        let mut random = Random::of(0, 0);
        assert!((0..1000).all(|_| random.below(7) < 7));
        let picked: u32 = (0..1000).map(|_| random.pick(&[0, 1])).sum();
        assert!((300..700).contains(&picked), "{picked}");
    }
}
