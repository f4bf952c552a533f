//! The balloon as its driver and the host see it.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::interrupt::Interrupt;
use crate::testing::{BUFFERS, Buffer, Driver};

const ALL: u32 = (STATISTICS | DEFLATE_ON_OOM | REPORTING) as u32;
/// Memory that rings and requests are not in.
const FREE: u64 = 0x30_0000;

fn balloon() -> (Driver, HostBalloon) {
    let host = HostBalloon::new().unwrap();
    (Driver::new(Box::new(Balloon::new(host.clone()))), host)
}

fn metric(driver: &Driver, name: &str) -> u64 {
    driver.device.metrics().into_iter().find(|(found, _)| *found == name).unwrap().1
}

fn filled(driver: &Driver, pages: &[u64]) {
    for page in pages {
        driver.memory.write_slice(&[7; PAGE], GuestAddress(page * PAGE as u64)).unwrap();
    }
}

fn is_empty(driver: &Driver, page: u64) -> bool {
    driver.memory.read_obj::<u8>(GuestAddress(page * PAGE as u64 + 9)).unwrap() == 0
}

/// Sends page numbers, cut into two buffers within a number.
fn send(driver: &mut Driver, queue: u16, numbers: &[u32]) {
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    driver.memory.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
    let first = bytes.len().min(6) as u32;
    let buffers = [(BUFFERS, first), (BUFFERS + u64::from(first), bytes.len() as u32 - first)];
    let head =
        driver.offer(queue.into(), &buffers.map(|(address, length)| Buffer { address, length, writable: false }));
    driver.device.dispatch(Event::Queue(queue));
    assert_eq!(driver.used(queue.into()), Some((head, 0)));
}

fn send_statistics(driver: &mut Driver, entries: &[(u16, u64)]) -> u16 {
    let entry = |(tag, value): &(u16, u64)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    let bytes: Vec<u8> = entries.iter().flat_map(entry).collect();
    driver.memory.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
    let length = bytes.len() as u32;
    let head = driver.offer(OPTIONAL.into(), &[Buffer { address: BUFFERS, length, writable: false }]);
    driver.device.dispatch(Event::Queue(OPTIONAL));
    head
}

#[test]
fn pages_of_the_balloon_are_the_hosts() {
    let (driver, _) = balloon();
    let mut driver = driver.start_with(ALL);
    let first = FREE / PAGE as u64;
    filled(&driver, &[first, first + 1, first + 2, first + 3, first + 5]);
    let number = |offset: u64| (first + offset) as u32;
    // In any order, and one of them twice.
    send(&mut driver, INFLATE, &[number(5), number(1), number(0), number(1), number(2)]);
    assert_eq!([0, 1, 2, 3, 4, 5].map(|page| is_empty(&driver, first + page)), [true, true, true, false, true, true]);
    assert_eq!((metric(&driver, "inflated_pages"), metric(&driver, "refused_bytes")), (4, 0));
    send(&mut driver, DEFLATE, &[number(5), number(1)]);
    assert_eq!(metric(&driver, "deflated_pages"), 2);
}

#[test]
fn pages_outside_of_memory_are_left_out() {
    let (driver, _) = balloon();
    let mut driver = driver.start_with(ALL);
    let last = (4u64 << 20) / PAGE as u64 - 1;
    filled(&driver, &[last]);
    send(&mut driver, INFLATE, &[u32::MAX, last as u32, last as u32 + 1]);
    assert!(is_empty(&driver, last));
    assert_eq!((metric(&driver, "inflated_pages"), metric(&driver, "refused_bytes")), (1, 2 * PAGE as u64));
}

#[test]
fn neighbours_are_one_range() {
    let page = |number: u64| number * PAGE as u64;
    let found: Vec<_> = runs(&mut [9, 3, 4, 4, 5, u32::MAX, 1]).collect();
    let end = 1u64 << 44;
    assert_eq!(found, [page(1)..page(2), page(3)..page(6), page(9)..page(10), end - page(1)..end]);
    assert_eq!(runs(&mut []).count(), 0);
}

#[test]
fn a_request_that_is_too_long_is_served_in_part() {
    let (driver, _) = balloon();
    let mut driver = driver.start_with(ALL);
    let numbers: Vec<u32> = (0..PAGES_MAX as u32 + 500).collect();
    send(&mut driver, DEFLATE, &numbers);
    assert_eq!(metric(&driver, "deflated_pages"), PAGES_MAX as u64);
}

#[test]
fn reported_memory_is_the_hosts_on_either_queue() {
    for queue in [3, 4] {
        let (driver, _) = balloon();
        let mut driver = driver.start_with(ALL);
        let first = FREE / PAGE as u64;
        filled(&driver, &[first, first + 1, first + 2, first + 3]);
        let buffer = |page: u64, length| Buffer { address: page * PAGE as u64, length, writable: true };
        let head = driver.offer(queue, &[buffer(first, 2 * PAGE as u32), buffer(first + 3, PAGE as u32)]);
        driver.device.dispatch(Event::Queue(queue as u16));
        assert_eq!(driver.used(queue), Some((head, 0)));
        assert_eq!([0, 1, 2, 3].map(|page| is_empty(&driver, first + page)), [true, true, false, true]);
        assert_eq!(metric(&driver, "reported_bytes"), 3 * PAGE as u64);
    }
}

#[test]
fn without_statistics_reports_come_one_queue_earlier() {
    let (driver, host) = balloon();
    let mut driver = driver.start_with(REPORTING as u32);
    filled(&driver, &[FREE / PAGE as u64]);
    driver.offer(2, &[Buffer { address: FREE, length: PAGE as u32, writable: true }]);
    driver.device.dispatch(Event::Queue(2));
    assert!(is_empty(&driver, FREE / PAGE as u64));
    assert_eq!(host.statistics(), None);
}

#[test]
fn the_driver_hears_of_a_new_target_once() {
    let (driver, host) = balloon();
    host.set_target_pages(3);
    let mut driver = driver.start_with(ALL);
    driver.device.dispatch(Event::Backend(0));
    assert_eq!((driver.read(0x100), driver.read(0x60) & Interrupt::CONFIGURATION), (3, 0));
    host.set_target_pages(500);
    let generation = driver.read(0xfc);
    driver.device.dispatch(Event::Backend(0));
    assert_eq!((driver.read(0x100), driver.read(0x60)), (500, Interrupt::CONFIGURATION));
    assert_ne!(driver.read(0xfc), generation);
    driver.write(0x64, Interrupt::CONFIGURATION);
    driver.device.dispatch(Event::Backend(0));
    assert_eq!(driver.read(0x60), 0);
}

#[test]
fn the_host_learns_the_size_that_the_driver_tells() {
    let (driver, host) = balloon();
    let mut driver = driver.start_with(ALL);
    driver.write(0x104, 77);
    assert_eq!((host.actual_pages(), driver.read(0x104)), (77, 77));
    // The target is not the driver's to set, nor anything behind the size.
    driver.write(0x100, 5);
    driver.device.write(0x106, &[1, 2, 3, 4]);
    driver.device.write(0x104, &[1, 2]);
    assert_eq!((host.target_pages(), host.actual_pages()), (0, 77));
    driver.write(0x70, 0);
    assert_eq!(host.actual_pages(), 0);
}

#[test]
fn statistics_come_when_they_are_asked_for() {
    let (driver, host) = balloon();
    let mut driver = driver.start_with(ALL);
    let first = send_statistics(&mut driver, &[(4, 1000)]);
    let free = |host: &HostBalloon| host.statistics().and_then(|statistics| statistics.free_bytes);
    assert_eq!((free(&host), driver.used(OPTIONAL.into())), (Some(1000), None));

    let heard = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&heard);
    host.ask(Box::new(move || {
        count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }));
    driver.device.dispatch(Event::Backend(0));
    assert_eq!(driver.used(OPTIONAL.into()), Some((first, 0)));
    assert_eq!(heard.load(std::sync::atomic::Ordering::SeqCst), 0);
    // Unknown ones are ignored, and what is left out is not known any more.
    send_statistics(&mut driver, &[(9, 1), (77, 5), (5, 2000)]);
    let expected = Statistics { hugetlb_failures: Some(1), total_bytes: Some(2000), ..Statistics::default() };
    assert_eq!((host.statistics(), heard.load(std::sync::atomic::Ordering::SeqCst)), (Some(expected), 1));
    assert_eq!(metric(&driver, "statistics"), 2);
}

#[test]
fn a_driver_that_was_asked_before_it_came_answers_at_once() {
    let (driver, host) = balloon();
    let heard = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&heard);
    host.ask(Box::new(move || {
        count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }));
    let mut driver = driver.start_with(ALL);
    driver.device.dispatch(Event::Backend(0));
    send_statistics(&mut driver, &[(4, 1)]);
    assert_eq!(heard.load(std::sync::atomic::Ordering::SeqCst), 1);
}

#[test]
fn askers_of_a_guest_that_does_not_answer_are_bounded() {
    let host = HostBalloon::new().unwrap();
    let token = Arc::new(());
    for _ in 0..1000 {
        let held = Arc::clone(&token);
        host.ask(Box::new(move || drop(held)));
    }
    assert!(Arc::strong_count(&token) <= 17);
}
