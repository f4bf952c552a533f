//! Drivers that break every rule.

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Step {
    Chain(usize, Vec<(u64, u32, bool)>),
    Command(Vec<u8>),
    Index(usize, u16),
    Kick(u16),
    Tap(usize),
    Frame(Vec<u8>, usize),
    Again(u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let address = prop_oneof![8 => ROOM..OUT, 1 => any::<u64>(), 1 => Just((4 << 20) - 1)];
    let length = prop_oneof![8 => 0u32..2000, 4 => Just(12u32), 1 => 60_000u32..80_000, 1 => any::<u32>()];
    let writable = proptest::bool::weighted(0.7);
    let step = prop_oneof![
        6 => (0usize..5, proptest::collection::vec((address, length, writable), 1..4))
            .prop_map(|(queue, chain)| Step::Chain(queue, chain)),
        2 => proptest::collection::vec(0u8..6, 0..6).prop_map(Step::Command),
        1 => (0usize..5, any::<u16>()).prop_map(|(queue, index)| Step::Index(queue, index)),
        4 => (0u16..6).prop_map(Step::Kick),
        4 => (0usize..5).prop_map(Step::Tap),
        4 => (proptest::collection::vec(0u8..8, 0..14), prop_oneof![0usize..3000, 60_000usize..70_000])
            .prop_map(|(head, length)| Step::Frame(head, length)),
        1 => any::<u32>().prop_map(Step::Again),
    ];
    proptest::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    /// Whatever a driver does while whatever comes from outside: the device neither panics nor hangs.
    #[test]
    fn a_hostile_driver_does_no_harm(features in any::<u32>(), steps in steps()) {
        let ((first, peer), (second, other)) = (stand_in(), stand_in());
        let mut guest = Guest::new(vec![first, second], options(), features & all_features());
        let peers = [peer, other];
        for step in steps {
            match step {
                Step::Chain(queue, chain) => {
                    let chain: Vec<_> = chain
                        .into_iter()
                        .map(|(address, length, writable)| Buffer { address, length, writable })
                        .collect();
                    guest.driver.offer(queue, &chain);
                }
                Step::Command(bytes) => {
                    guest.driver.memory.write_slice(&bytes, GuestAddress(OUT)).unwrap();
                    let answer = Buffer { address: OUT + 0x100, length: 1, writable: true };
                    let command = Buffer { address: OUT, length: bytes.len() as u32, writable: false };
                    guest.driver.offer(4, &[command, answer]);
                    guest.kick(4);
                }
                Step::Index(queue, index) => guest.driver.set_available(queue, index),
                Step::Kick(queue) => guest.kick(queue),
                // Some of them are timers.
                Step::Tap(index) => guest.driver.device.dispatch(Event::Backend(index)),
                Step::Frame(mut bytes, length) => {
                    bytes.resize(length.max(bytes.len()), 7);
                    // Refused when the buffers are full.
                    let _ = rustix::io::write(&peers[length % 2], &bytes);
                }
                Step::Again(features) => {
                    guest.driver.write(0x70, 0);
                    guest.driver = guest.driver.start_with(features & all_features());
                }
            }
        }
        // Where nobody has offered anything.
        for at in [0, 0x100, BUFFERS / 2 - 8] {
            prop_assert_eq!(guest.driver.memory.read_obj::<u64>(GuestAddress(at)).unwrap(), 0);
        }
    }
}

/// What a device over something that stands in for a tap offers.
fn all_features() -> u32 {
    HOST_OFFLOADS as u32 | MERGEABLE | MANY | 1 << VIRTIO_RING_F_EVENT_IDX
}
