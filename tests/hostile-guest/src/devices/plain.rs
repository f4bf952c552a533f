//! Entropy (VIRTIO 1.2 §5.4.6) and the console (§5.3.6): buffers, and nothing in them that means anything.

use crate::honest::{Driver, Fault};
use crate::mmio::Device;
use crate::request::Request;

/// Room of any length.
pub fn entropy(request: &mut Request<'_>, _: u32) {
    for _ in 0..1 + request.random.below(4) {
        let room = request.random.pick(&[16, 64, 0, 1, 4097, 0x1_0000, 0x10_0000]);
        request.hear(room);
    }
    if request.random.one_in(8) {
        request.say(&[0; 16]);
    }
}

/// Asks for 16 bytes.
pub fn ask_entropy(device: Device) -> Result<(), Fault> {
    let mut driver = Driver::start(device, 1)?;
    let room = driver.hears(16);
    let length = driver.ask(0, &[room])?;
    if length == 16 { Ok(()) } else { Err("it does not fill its buffer") }
}

/// Receives, or prints a little.
pub fn console(request: &mut Request<'_>, queue: u32) {
    if queue == 0 {
        return request.hear(64);
    }
    for _ in 0..request.random.below(4) {
        let text = request.random.pick(&["", "\n", "x", "\u{1b}[2J", "error: not an error\n", "\r\r\0\u{7f}"]);
        request.say(text.as_bytes());
    }
}

/// Prints the end of a line.
pub fn ask_console(device: Device) -> Result<(), Fault> {
    let mut driver = Driver::start(device, 2)?;
    let text = driver.says(b"\n");
    driver.ask(1, &[text]).map(drop)
}
