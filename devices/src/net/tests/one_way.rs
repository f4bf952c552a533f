//! Frames for the guest alone, and frames from it alone.

use super::*;

#[test]
fn a_long_frame_is_spread_over_buffers_that_are_put_together() {
    let taps = tap(1);
    let wire = Wire::open();
    let mut guest = Guest::new(taps, options(), MERGEABLE | 1 << VIRTIO_RING_F_EVENT_IDX);
    // Wherever the driver cuts its buffers, be it in the header.
    for lengths in [&[5, 9, 586][..], &[600], &[600], &[300, 300]] {
        guest.offer(0, lengths);
    }
    // The driver waits for the second buffer that is used.
    guest.driver.set_used_event(0, 1);
    guest.driver.write(0x64, Interrupt::USED);
    wire.send(SHORT, &incoming(1500));
    guest.tap_is_ready();
    assert_eq!(guest.driver.read(0x60), Interrupt::USED);
    let mut header = PLAIN;
    header[10] = 3;
    assert_eq!(guest.received(0), Some((header, incoming(1500))));
    wire.send(SHORT, &incoming(100));
    guest.tap_is_ready();
    assert_eq!(guest.received(0), Some((PLAIN, incoming(100))));
    assert_eq!(guest.received(0), None);
}

#[test]
fn what_the_guest_has_no_buffers_for_waits_in_the_tap() {
    let taps = tap(1);
    let wire = Wire::open();
    let mut guest = Guest::new(taps, options(), 0);
    for length in [100, 200, 300] {
        wire.send(SHORT, &incoming(length));
    }
    guest.tap_is_ready();
    assert_eq!((guest.received(0), guest.metric("receive_stalls")), (None, 1));
    guest.offer(0, &[2048]);
    guest.offer(0, &[2048]);
    guest.kick(0);
    for length in [100, 200] {
        assert_eq!(guest.received(0), Some((PLAIN, incoming(length))));
    }
    assert_eq!((guest.received(0), guest.metric("receive_stalls")), (None, 2));
    guest.offer(0, &[2048]);
    guest.kick(0);
    assert_eq!(guest.received(0), Some((PLAIN, incoming(300))));
    assert_eq!(guest.metric("receive_dropped_frames"), 0);
}

#[test]
fn notifications_are_asked_for_only_where_buffers_are_missing() {
    let taps = tap(1);
    let wire = Wire::open();
    let mut guest = Guest::new(taps, options(), MERGEABLE | 1 << VIRTIO_RING_F_EVENT_IDX);
    for _ in 0..3 {
        guest.offer(0, &[600]);
    }
    wire.send(SHORT, &incoming(100));
    guest.tap_is_ready();
    assert_eq!(guest.driver.available_event(0), 0);
    // All three are needed, but one has been used.
    wire.send(SHORT, &incoming(1500));
    guest.tap_is_ready();
    assert_eq!(guest.driver.available_event(0), 3);
}

#[test]
fn a_driver_sees_nothing_in_headers_that_it_did_not_agree_to() {
    let seen = |flags, segmentation, features: &[u32]| {
        let header = [flags, segmentation, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
        let seen = receive::admissible(header, features.iter().fold(0, |all, feature| all | 1 << feature))?;
        assert_eq!((seen[1], &seen[2..]), (header[1], &header[2..]));
        Some(seen[0])
    };
    let sums = VIRTIO_NET_F_GUEST_CSUM;
    assert_eq!((seen(0, 0, &[]), seen(2, 0, &[]), seen(1, 0, &[])), (Some(0), Some(0), None));
    assert_eq!((seen(2, 0, &[sums]), seen(1, 0, &[sums])), (Some(2), Some(1)));
    for (segmentation, feature) in
        [(1, VIRTIO_NET_F_GUEST_TSO4), (3, VIRTIO_NET_F_GUEST_UFO), (4, VIRTIO_NET_F_GUEST_TSO6)]
    {
        let ecn = [sums, feature, VIRTIO_NET_F_GUEST_ECN];
        assert_eq!((seen(1, segmentation, &[sums]), seen(1, segmentation, &ecn[..2])), (None, Some(1)));
        let with_ecn = segmentation | 0x80;
        assert_eq!((seen(1, with_ecn, &ecn[..2]), seen(1, with_ecn, &ecn)), (None, Some(1)));
        assert_eq!(seen(1, with_ecn, &[sums, VIRTIO_NET_F_GUEST_ECN]), None);
    }
    for unknown in [2, 5, 6, 0x7f] {
        assert_eq!(seen(1, unknown, &GUEST_OFFLOADS.map(|(feature, _)| feature)), None, "{unknown}");
    }
}

#[test]
fn a_frame_for_which_there_are_too_few_buffers_is_kept() {
    let taps = tap(1);
    let wire = Wire::open();
    let mut guest = Guest::new(taps, options(), MERGEABLE);
    guest.offer(0, &[200, 300]);
    wire.send(SHORT, &incoming(1500));
    wire.send(SHORT, &incoming(60));
    guest.tap_is_ready();
    guest.offer(0, &[600]);
    guest.kick(0);
    assert_eq!(guest.received(0), None);
    guest.offer(0, &[600]);
    guest.kick(0);
    let mut header = PLAIN;
    header[10] = 3;
    assert_eq!(guest.received(0), Some((header, incoming(1500))));
    guest.offer(0, &[100]);
    guest.kick(0);
    assert_eq!(guest.received(0), Some((PLAIN, incoming(60))));
    assert_eq!((guest.metric("receive_dropped_frames"), guest.metric("received_frames")), (0, 2));
}

#[test]
fn long_frames_are_received_whole_after_many_short_ones() {
    let taps = tap(1);
    let wire = Wire::open();
    let mut guest = Guest::new(taps, options(), MERGEABLE);
    // As many as a long frame needs.
    for _ in 0..3 {
        guest.offer(0, &[600]);
    }
    for length in [60; 100].into_iter().chain([1500, 60, 1500, 1500, 60]) {
        wire.send(SHORT, &incoming(length));
        guest.tap_is_ready();
        let (header, frame) = guest.received(0).unwrap();
        assert_eq!((header[10], frame), (if length == 60 { 1 } else { 3 }, incoming(length)));
        for _ in 0..header[10] {
            guest.offer(0, &[600]);
        }
    }
}

#[test]
fn a_frame_for_which_there_is_never_room_is_dropped() {
    let taps = tap(1);
    let wire = Wire::open();
    // All that a queue can hold, put together or not, is too little.
    let mut guest = Guest::new(taps, options(), MERGEABLE);
    for _ in 0..SIZE {
        guest.offer(0, &[20]);
    }
    wire.send(SHORT, &incoming(1500));
    wire.send(SHORT, &incoming(60));
    guest.tap_is_ready();
    assert_eq!(guest.received(0).unwrap().1, incoming(60));
    assert_eq!(guest.metric("receive_dropped_frames"), 1);

    guest.driver.write(0x70, 0);
    guest.driver = guest.driver.start_with(0);
    guest.offer(0, &[600]);
    wire.send(SHORT, &incoming(1500));
    wire.send(SHORT, &incoming(60));
    guest.tap_is_ready();
    assert_eq!(guest.received(0), Some((PLAIN, incoming(60))));
    assert_eq!(guest.metric("receive_dropped_frames"), 2);
}

#[test]
fn segments_are_cut_and_sums_are_made_for_a_driver_that_cannot() {
    let taps = tap(1);
    let wire = Wire::open();
    let mut guest = Guest::new(taps, options(), MERGEABLE);
    for _ in 0..SIZE {
        guest.offer(0, &[2048]);
    }
    guest.kick(0);
    let (header, long) = segment(MAC, HOST_MAC, 10 * 1460);
    wire.send(header, &long);
    guest.tap_is_ready();
    let mut payload = Vec::new();
    while let Some((header, packet)) = guest.received(0) {
        assert_eq!((header, packet.len()), (PLAIN, 1514));
        let pseudo = [&packet[26..34], &[0, 6], &1480u16.to_be_bytes()].concat();
        assert_eq!(sum(&[&pseudo, &packet[34..]].concat()), 0xffff);
        payload.extend_from_slice(&packet[54..]);
    }
    assert!(payload == long[54..]);
    assert_eq!(guest.metric("received_frames"), 10);
}

#[test]
fn frames_that_make_no_sense_are_dropped_and_nothing_else() {
    let taps = tap(1);
    let wire = Wire::open();
    let mut guest = Guest::new(taps, options(), 0);
    let mut bad = PLAIN;
    bad[1] = 77;
    let mut beyond = PLAIN;
    // A sum to be made behind the end.
    (beyond[0], beyond[6], beyond[8]) = (1, 0xff, 0xff);
    let too_long = vec![0; FRAME_MAX + 1];
    for bytes in [
        &[0; 11][..],
        &PLAIN,
        &[&PLAIN, &outgoing(14)[..13]].concat(),
        &[&bad, &outgoing(100)[..]].concat(),
        &[&beyond, &outgoing(100)[..]].concat(),
        &too_long,
    ] {
        guest.send(bytes, &[]);
    }
    assert_eq!((guest.metric("transmit_dropped_frames"), guest.metric("transmitted_frames")), (6, 0));
    assert_eq!((guest.metric("tap_errors"), guest.is_broken()), (0, false));
    guest.send(&[&PLAIN, &outgoing(64)[..]].concat(), &[]);
    assert_eq!(wire.receive().1, outgoing(64));
}

#[test]
fn frames_from_addresses_of_others_do_not_leave_the_guest_unless_they_may() {
    for (pinned, spoofed) in [(true, 2), (false, 0)] {
        let taps = tap(1);
        let wire = Wire::open();
        let mut guest = Guest::new(taps, NetOptions { pinned, ..options() }, 0);
        let other = frame(HOST_MAC, [2, 0, 0, 0, 0, 3], 64);
        guest.send(&[&PLAIN, &other[..]].concat(), &[]);
        guest.send(&[&PLAIN, &frame([0xff; 6], [0; 6], 64)[..]].concat(), &[12, 6, 3]);
        guest.send(&[&PLAIN, &outgoing(64)[..]].concat(), &[]);
        assert_eq!(wire.receive().1, if pinned { outgoing(64) } else { other });
        assert_eq!(guest.metric("transmit_spoofed_frames"), spoofed);
        assert_eq!(guest.metric("transmitted_frames"), 3 - spoofed);
    }
}

#[test]
fn a_tap_that_is_full_is_waited_for() {
    let (tap, peer) = stand_in();
    let mut guest = Guest::with_size(vec![tap], options(), 0, 256);
    // Stands in until its buffers are full, which are some hundred messages of the system's choice.
    while guest.metric("transmit_tap_full") == 0 {
        guest.offer_frame(&[&PLAIN, &outgoing(60_000)[..]].concat(), &[]);
        guest.kick(1);
    }
    let before = guest.metric("transmitted_frames");
    assert!(guest.metric("transmit_dropped_frames") == 0 && before > 0);
    let mut message = vec![0; FRAME_MAX];
    for _ in 0..before {
        rustix::io::read(&peer, &mut message).unwrap();
    }
    guest.tap_is_ready();
    assert_eq!(guest.metric("transmitted_frames"), before + 1);
    assert_eq!(rustix::io::read(&peer, &mut message), Ok(HEADER + 60_000));
}

#[test]
fn a_tap_that_is_down_is_an_error_of_the_tap_until_it_is_up_again() {
    let taps = tap(1);
    let wire = Wire::open();
    let mut guest = Guest::new(taps, options(), 0);
    ip("link set dev tap0 down");
    guest.send(&[&PLAIN, &outgoing(64)[..]].concat(), &[]);
    assert_eq!((guest.metric("tap_errors"), guest.metric("transmit_dropped_frames")), (1, 1));
    ip("link set dev tap0 up");
    drop(wire);
    let wire = Wire::open();
    guest.send(&[&PLAIN, &outgoing(65)[..]].concat(), &[]);
    assert_eq!(wire.receive().1, outgoing(65));
    // One that is gone is never tried in a loop.
    ip("link del dev tap0");
    guest.offer(0, &[2048]);
    guest.tap_is_ready();
    assert_eq!((guest.metric("tap_errors"), guest.is_broken()), (2, false));
}
