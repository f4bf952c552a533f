//! The kernel command line: where the devices are, and what is to be played.

use crate::memory;

/// The longest that there is.
pub const LENGTH_MAX: usize = 2048;
/// The most devices: each has a pin of the I/O APIC.
pub const DEVICES_MAX: usize = 24;

/// What is to be played.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// `hostile.seed`: which cases.
    pub seed: u64,
    /// `hostile.cases`: how many.
    pub cases: u64,
    /// `hostile.first`: the number of the first one.
    pub first: u64,
    /// `hostile.device`: the number of the only device that is attacked.
    pub only: Option<u64>,
}

/// A device's registers and its interrupt (`virtio_mmio.device=SIZE@BASE:IRQ`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Place {
    /// The address of its registers.
    pub base: u64,
    /// Its pin of the I/O APIC.
    pub pin: u8,
}

/// Reads the command line (`cmd_line_ptr` at 0x228 of the zero page), and says how long it is.
pub fn read(zero_page: u64, line: &mut [u8; LENGTH_MAX]) -> usize {
    let address = u64::from(memory::read::<u32>(zero_page + 0x228));
    let bytes = (address..).map(memory::read::<u8>).take_while(|byte| *byte != 0);
    line.iter_mut().zip(bytes).map(|(to, byte)| *to = byte).count()
}

/// What it says.
#[must_use]
pub fn parse(line: &str) -> (Plan, [Option<Place>; DEVICES_MAX]) {
    let mut plan = Plan { seed: 1, cases: 1000, first: 0, only: None };
    let mut places = [None; DEVICES_MAX];
    let mut count = 0;
    for (name, value) in line.split(' ').filter_map(|word| word.split_once('=')) {
        let as_number = value.parse();
        match (name, as_number) {
            ("hostile.seed", Ok(number)) => plan.seed = number,
            ("hostile.cases", Ok(number)) => plan.cases = number,
            ("hostile.first", Ok(number)) => plan.first = number,
            ("hostile.device", Ok(number)) => plan.only = Some(number),
            ("virtio_mmio.device", _) if count < DEVICES_MAX => {
                places[count] = place(value);
                count += 1;
            }
            _ => {}
        }
    }
    (plan, places)
}

fn place(value: &str) -> Option<Place> {
    let (base, pin) = value.split_once('@')?.1.split_once(':')?;
    Some(Place { base: u64::from_str_radix(base.strip_prefix("0x")?, 16).ok()?, pin: pin.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_and_the_plan_are_found_among_other_words() {
        let line = "quiet virtio_mmio.device=4K@0xd0000000:5 hostile.seed=7 virtio_mmio.device=4K@0xd0001000:6 \
                    hostile.cases=3 hostile.first=12 console=hvc0 hostile.device=1";
        let (plan, places) = parse(line);
        assert_eq!(plan, Plan { seed: 7, cases: 3, first: 12, only: Some(1) });
        let expected = [(0xd000_0000, 5), (0xd000_1000, 6)].map(|(base, pin)| Some(Place { base, pin }));
        assert_eq!((&places[..2], places[2]), (&expected[..], None));
    }
}
