//! Frames in both directions.

use super::*;

#[test]
fn frames_go_both_ways_and_are_counted() {
    let taps = tap(1);
    let wire = Wire::open();
    let mut guest = Guest::new(taps, options(), 0);
    guest.offer(0, &[2048]);
    wire.send(SHORT, &incoming(700));
    guest.tap_is_ready();
    assert_eq!(guest.received(0), Some((PLAIN, incoming(700))));
    for cuts in [&[][..], &[12], &[5, 3, 4, 1, 600], &[12, 14]] {
        guest.send(&[&PLAIN, &outgoing(900)[..]].concat(), cuts);
        assert_eq!(wire.receive(), (SHORT, outgoing(900)), "{cuts:?}");
    }
    for (name, count) in [
        ("received_frames", 1),
        ("received_bytes", 700),
        ("transmitted_frames", 4),
        ("transmitted_bytes", 3600),
        ("tap_errors", 0),
    ] {
        assert_eq!(guest.metric(name), count, "{name}");
    }
}

#[test]
fn segments_go_whole_both_ways_where_the_driver_can_cut_them() {
    let taps = tap(1);
    let wire = Wire::open();
    let mut guest = Guest::new(taps, options(), MERGEABLE | GUEST_TSO4 | 1 << VIRTIO_NET_F_HOST_TSO4);
    for _ in 0..15 {
        guest.offer(0, &[4096]);
    }
    // The longest segment, and not all of the room.
    let (header, long) = segment(MAC, HOST_MAC, 60_000);
    guest.kick(0);
    wire.send(header, &long);
    guest.tap_is_ready();
    let (told, received) = guest.received(0).unwrap();
    assert_eq!((told[..2].to_vec(), told[4..SHORT_HEADER].to_vec()), (vec![1, 1], header[4..].to_vec()));
    assert_eq!((told[10], received == long), (15, true));

    let (header, long) = segment(HOST_MAC, MAC, 60_000);
    guest.send(&[&header[..], &[0, 0], &long].concat(), &[12, 54, 4096, 10_000]);
    let (told, received) = wire.receive();
    assert_eq!((told[..2].to_vec(), told[4..6].to_vec()), (vec![1, 1], header[4..6].to_vec()));
    assert!(received == long);
    assert_eq!(guest.metric("transmitted_bytes"), 60_054);
}

#[test]
fn sums_are_left_to_whoever_can_make_them() {
    let taps = tap(1);
    ip("addr add 10.0.0.1/24 dev tap0");
    ip("neigh add 10.0.0.2 lladdr 02:00:00:00:00:02 dev tap0");
    let socket = UdpSocket::bind("10.0.0.1:1000").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut guest = Guest::new(taps, options(), 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_GUEST_CSUM);
    guest.kick(0);
    guest.offer(0, &[2048]);
    socket.send_to(b"for the guest", "10.0.0.2:1000").unwrap();
    guest.tap_is_ready();
    let (header, packet) = guest.received(0).unwrap();
    // NEEDS_CSUM, from the UDP header on, at the place of its sum.
    assert_eq!((header[0], &header[6..10]), (1, &[34, 0, 6, 0][..]));
    assert_eq!(&packet[42..], b"for the guest");

    // The same datagram back, with nothing but the pseudo header summed.
    let mut answer = [&packet[6..12], &packet[..6], &packet[12..]].concat();
    answer.copy_within(26..30, 42);
    let (host, own) = (packet[26..30].to_vec(), packet[30..34].to_vec());
    answer[26..30].copy_from_slice(&own);
    answer[30..34].copy_from_slice(&host);
    guest.send(&[&header, &answer[..]].concat(), &[]);
    let mut text = [0; 64];
    let (length, from) = socket.recv_from(&mut text).unwrap();
    assert_eq!((&text[4..length], from.to_string().as_str()), (&b"the guest"[..], "10.0.0.2:1000"));
}

#[test]
fn chains_out_of_memory_or_without_room_for_a_header_break_the_device() {
    let taps = tap(1);
    let wire = Wire::open();
    let mut guest = Guest::new(taps, options(), 0);
    guest.driver.offer(1, &[Buffer { address: u64::MAX - 100, length: 100, writable: false }]);
    guest.kick(1);
    assert!(guest.is_broken());
    for length in [11, 0] {
        guest.driver.write(0x70, 0);
        guest.driver = guest.driver.start_with(MERGEABLE);
        guest.offer(0, &[length]);
        wire.send(SHORT, &incoming(64));
        guest.tap_is_ready();
        assert!(guest.is_broken(), "{length}");
    }
    assert_eq!(guest.metric("broken"), 3);
}

#[test]
fn a_driver_that_was_reset_has_nothing_of_the_one_before() {
    let taps = tap(1);
    let wire = Wire::open();
    let mut guest = Guest::new(taps, options(), MERGEABLE | GUEST_TSO4);
    guest.kick(0);
    guest.offer(0, &[100]);
    // One is kept; a segment and a small one are in the tap when the driver goes.
    wire.send(SHORT, &incoming(1500));
    guest.tap_is_ready();
    let (header, long) = segment(MAC, HOST_MAC, 10_000);
    wire.send(header, &long);
    wire.send(SHORT, &incoming(70));
    guest.driver.write(0x70, 0);
    assert_eq!(guest.metric("receive_dropped_frames"), 1);
    // The next one can neither cut segments nor put buffers together.
    guest.driver = guest.driver.start_with(0);
    for _ in 0..2 {
        guest.offer(0, &[65_562]);
    }
    guest.kick(0);
    assert_eq!(guest.received(0), Some((PLAIN, incoming(70))));
    assert_eq!((guest.received(0), guest.metric("receive_dropped_frames")), (None, 2));
}

#[test]
fn limits_hold_in_both_directions() {
    let taps = tap(1);
    let wire = Wire::open();
    let rate = Rate { size: 1, refill: Duration::from_secs(3), burst: 0 };
    let limiter = || Some(Limiter::new(None, Some(rate)).unwrap());
    let mut guest = Guest::new(taps, NetOptions { receive: limiter(), transmit: limiter(), ..options() }, 0);
    for _ in 0..2 {
        guest.offer(0, &[2048]);
        wire.send(SHORT, &incoming(100));
        guest.offer_frame(&[&PLAIN, &outgoing(200)[..]].concat(), &[]);
    }
    let frames = |guest: &Guest| (guest.metric("received_frames"), guest.metric("transmitted_frames"));
    guest.tap_is_ready();
    assert_eq!(frames(&guest), (1, 1));
    // Neither a kick nor a frame gets past.
    guest.kick(0);
    guest.kick(1);
    guest.tap_is_ready();
    assert_eq!(frames(&guest), (1, 1));
    assert_eq!((guest.metric("receive_throttled"), guest.metric("transmit_throttled")), (1, 1));
    // The timers tell when it goes on.
    while frames(&guest) != (2, 2) {
        guest.driver.turn();
    }
    for _ in 0..2 {
        assert_eq!((guest.received(0).unwrap().1, wire.receive().1), (incoming(100), outgoing(200)));
    }
}

#[test]
fn a_limit_of_bytes_counts_what_is_on_the_wire() {
    let taps = tap(1);
    let wire = Wire::open();
    let rate = Rate { size: 1000, refill: Duration::from_secs(3600), burst: 0 };
    let limiter = || Some(Limiter::new(Some(rate), None).unwrap());
    let mut guest = Guest::new(taps, NetOptions { receive: limiter(), transmit: limiter(), ..options() }, 0);
    for _ in 0..4 {
        guest.offer(0, &[2048]);
        wire.send(SHORT, &incoming(500));
        guest.offer_frame(&[&PLAIN, &outgoing(500)[..]].concat(), &[]);
    }
    guest.tap_is_ready();
    // An operation may owe, but there is nothing to owe after 1,000 bytes.
    assert_eq!((guest.metric("received_bytes"), guest.metric("transmitted_bytes")), (1000, 1000));
}

#[test]
fn limits_outlive_a_driver_but_not_the_guest() {
    let taps = tap(1);
    let wire = Wire::open();
    let rate = Rate { size: 1, refill: Duration::from_secs(3600), burst: 0 };
    let limiter = || Some(Limiter::new(None, Some(rate)).unwrap());
    let mut guest = Guest::new(taps, NetOptions { receive: limiter(), transmit: limiter(), ..options() }, 0);
    guest.send(&[&PLAIN, &outgoing(100)[..]].concat(), &[]);
    guest.driver.write(0x70, 0);
    guest.driver = guest.driver.start_with(0);
    guest.offer_frame(&[&PLAIN, &outgoing(200)[..]].concat(), &[]);
    guest.kick(1);
    assert_eq!((guest.metric("transmitted_frames"), guest.metric("transmit_throttled")), (1, 1));
    // What it has said last is delivered.
    guest.driver.device.flush();
    assert_eq!((wire.receive().1, wire.receive().1), (outgoing(100), outgoing(200)));
}

#[test]
fn a_flood_of_either_side_lets_others_have_their_turn() {
    let taps = tap(1);
    let wire = Wire::open();
    let mut guest = Guest::with_size(taps, options(), 0, 256);
    guest.kick(1);
    for _ in 0..200 {
        wire.send(SHORT, &incoming(64));
        guest.offer(0, &[2048]);
        guest.offer_frame(&[&PLAIN, &outgoing(64)[..]].concat(), &[]);
    }
    // The kicks of the start have been seen.
    let kicks = |guest: &Guest, queue: usize| guest.driver.device.queues()[queue].kick().read().is_ok();
    assert!(kicks(&guest, 0) && kicks(&guest, 1));
    guest.tap_is_ready();
    assert_eq!((guest.metric("received_frames"), guest.metric("transmitted_frames")), (64, 64));
    // What is left is asked for again, and does not need the driver for it.
    for round in 2..=4 {
        assert!(kicks(&guest, 0) && kicks(&guest, 1), "{round}");
        guest.kick(0);
        guest.kick(1);
    }
    assert_eq!((guest.metric("received_frames"), guest.metric("transmitted_frames")), (200, 200));
    assert!(!kicks(&guest, 0) && !kicks(&guest, 1));
}
