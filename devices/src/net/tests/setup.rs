//! What the driver is told and commands, and what is behind the device.

use super::*;

#[test]
fn commands_are_answered_whatever_they_are() {
    let mut guest = Guest::new(tap(2), options(), MANY);
    for refused in [
        &[][..],
        &[4],
        &[4, 0],
        &[4, 0, 1],
        &[4, 0, 0, 0],
        &[4, 0, 3, 0],
        &[4, 0, 0xff, 0xff],
        &[4, 1, 1, 0],
        &[0, 0, 1],
        &[1, 1, 2, 0, 0, 0, 0, 9],
        &[4, 0, 1, 0, 0],
        &[0xff; 200],
    ] {
        assert_eq!(guest.command(4, refused), 1, "{refused:?}");
    }
    for pairs in [2, 1, 2] {
        assert_eq!(guest.command(4, &[4, 0, pairs, 0]), 0, "{pairs}");
    }
    assert_eq!((guest.metric("commands"), guest.metric("refused_commands")), (15, 12));
    // A driver that knows of no more than one pair has its control queue after that.
    guest.driver.write(0x70, 0);
    guest.driver = guest.driver.start_with(1 << VIRTIO_NET_F_CTRL_VQ);
    assert_eq!(guest.command(2, &[4, 0, 1, 0]), 1);
    // Without room for an answer there is nothing to say.
    guest.driver.offer(2, &[Buffer { address: OUT, length: 4, writable: false }]);
    guest.kick(2);
    assert!(guest.is_broken());
}

#[test]
fn drivers_that_come_and_go_do_not_occupy_the_hosts_network() {
    let mut guest = Guest::new(tap(1), options(), GUEST_TSO4);
    let began = Instant::now();
    for turn in 0..1000 {
        guest.driver.write(0x70, 0);
        guest.driver = guest.driver.start_with(if turn % 2 == 0 { 0 } else { GUEST_TSO4 });
        guest.kick(1);
    }
    let most = began.elapsed().as_millis() as u64 / 100 + 2;
    assert!((1..=most).contains(&guest.metric("offload_changes")), "{}", guest.metric("offload_changes"));
    // What is agreed to later holds.
    let mut changes = Vec::new();
    for features in [0, GUEST_TSO4] {
        std::thread::sleep(Duration::from_millis(100));
        guest.driver.write(0x70, 0);
        guest.driver = guest.driver.start_with(features);
        guest.kick(1);
        changes.push(guest.metric("offload_changes"));
    }
    assert_eq!(changes[1], changes[0] + 1);
}

/// A datagram of one of many flows, enough for all queues of a tap.
fn datagram(port: u8) -> Vec<u8> {
    let mut packet = [&MAC[..], &HOST_MAC, &[8, 0, 0x45, 0, 0, 32, 0, 1, 0x40, 0, 64, 17, 0, 0]].concat();
    packet.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    packet.extend([0x30, port, 0, 80, 0, 12, 0, 0, 1, 2, 3, 4]);
    let checksum = !sum(&packet[14..34]);
    packet[24..26].copy_from_slice(&checksum.to_be_bytes());
    packet
}

#[test]
fn what_waits_on_a_queue_that_is_given_up_comes_on_another() {
    let taps = tap(2);
    let wire = Wire::open();
    let mut guest = Guest::with_size(taps, options(), MANY, 64);
    assert_eq!(guest.command(4, &[4, 0, 2, 0]), 0);
    for port in 0..32 {
        wire.send(SHORT, &datagram(port));
        guest.offer(0, &[2048]);
    }
    guest.tap_is_ready();
    let first = std::iter::from_fn(|| guest.received(0)).count();
    assert!(first < 32);
    assert_eq!(guest.command(4, &[4, 0, 1, 0]), 0);
    assert_eq!(first + std::iter::from_fn(|| guest.received(0)).count(), 32);
}

#[test]
fn frames_come_on_the_queues_in_use_and_on_no_others() {
    let taps = tap(2);
    let wire = Wire::open();
    let mut guest = Guest::with_size(taps, options(), MANY | MERGEABLE, 64);
    let round = |guest: &mut Guest| {
        for port in 0..32 {
            wire.send(SHORT, &datagram(port));
        }
        [0, 2].map(|queue| {
            for _ in 0..32 {
                guest.offer(queue, &[2048]);
            }
            guest.kick(queue as u16);
            std::iter::from_fn(|| guest.received(queue)).count()
        })
    };
    assert_eq!(round(&mut guest), [32, 0]);
    assert_eq!(guest.command(4, &[4, 0, 2, 0]), 0);
    let [first, second] = round(&mut guest);
    assert!(first > 0 && second > 0 && first + second == 32, "{first}, {second}");
    assert_eq!(guest.command(4, &[4, 0, 1, 0]), 0);
    // Each transmit queue has the tap's queue of its own.
    guest.driver.memory.write_slice(&[&PLAIN, &outgoing(64)[..]].concat(), GuestAddress(OUT)).unwrap();
    guest.driver.offer(3, &[Buffer { address: OUT, length: 76, writable: false }]);
    guest.kick(3);
    assert_eq!(wire.receive().1, outgoing(64));
}

#[test]
fn the_driver_is_told_what_the_device_is_like() {
    let mut driver = Driver::new(Box::new(Net::new(tap(2), options())));
    let mut space = [0; 12];
    for (at, part) in (0x100..).step_by(4).zip(space.chunks_mut(4)) {
        part.copy_from_slice(&driver.read(at).to_le_bytes());
    }
    assert_eq!(space, [2, 0, 0, 0, 0, 2, 0, 0, 2, 0, 0xdc, 5]);
    driver.write(0x14, 0);
    let offered = driver.read(0x10);
    let expected = HOST_OFFLOADS as u32 | MERGEABLE | MANY | 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_MTU;
    let expected = GUEST_OFFLOADS.iter().fold(expected, |all, (feature, _)| all | 1 << feature);
    assert_eq!(offered & ((1 << 24) - 1), expected);

    let (tap, _peer) = stand_in();
    let plain = Net::new(vec![tap], NetOptions { mac: None, mtu: None, ..options() });
    // One that can do nothing for the guest, and has no address.
    assert_eq!(
        (plain.features(), plain.queue_sizes()),
        (HOST_OFFLOADS | u64::from(MERGEABLE), &[QUEUE_SIZE_MAX; 2][..])
    );
}

#[test]
fn what_is_no_tap_of_ours_is_refused_with_a_reason() {
    use super::tap::TapError;
    let taps = tap(1);
    let again = Tap::open(TAP, 1).unwrap_err();
    assert!(again.to_string().contains("another process has it"), "{again}");
    let many = Tap::open(TAP, 2).unwrap_err();
    assert!(many.to_string().contains("multi_queue"), "{many}");
    assert!(matches!(Tap::open("a-name-that-is-too-long", 1), Err(TapError::Attach { .. })));
    assert!(matches!(Tap::open("lo", 1), Err(TapError::Attach { .. })));
    let file = || std::fs::File::open("/dev/null").unwrap().into();
    assert!(matches!(Tap::from_descriptors([file()]), Err(TapError::NotATap { .. })));

    let copy = |tap: &Tap| rustix::io::dup(tap).unwrap();
    assert_eq!(Tap::from_descriptors(taps.iter().map(copy)).unwrap().len(), 1);
    let other = Tap::open("other", 1).unwrap();
    let mixed = Tap::from_descriptors([copy(&taps[0]), copy(&other[0])]).unwrap_err();
    assert!(mixed.to_string().contains("\"other\""), "{mixed}");
    // One that was made for several queues, and is not open, can be had with one.
    ip("tuntap add dev several mode tap multi_queue");
    assert_eq!(Tap::open("several", 1).unwrap().len(), 1);
    assert_eq!(Tap::open("several", 2).unwrap().len(), 2);
}
