//! The agent's program: PID 1 of a micro-VM. It serves the host until the host lets go, and ends the machine.
//!
//! Rust's own `main` is not used: it would want /dev/null before there is a /dev, and end the machine without it.
#![no_main]

use std::os::fd::{AsFd, OwnedFd};
use std::panic;

use agent::control::{ServeError, serve};
use agent::{boot, clock, sys};
use protocol::CONTROL_PORT;

/// The entry point that the C library calls.
#[expect(unsafe_code, reason = "the name is the C library's")]
#[unsafe(no_mangle)]
pub extern "C" fn main() -> i32 {
    let started_us = clock::boot_us();
    // Anywhere else it would mount over a root that others use and restart their machine.
    if std::process::id() != 1 {
        eprintln!("cofferdam-agent: this is the first process of a micro-VM: cofferdam starts it in one");
        return 1;
    }
    panic::set_hook(Box::new(|panic| {
        eprintln!("cofferdam-agent: {panic}");
        boot::power_off()
    }));
    if let Err(error) = run(started_us) {
        report(error.as_ref());
    }
    boot::power_off()
}

fn run(started_us: u64) -> Result<(), Box<dyn std::error::Error>> {
    boot::prepare()?;
    let control = dial_control().map_err(|source| ServeError::Step { step: "connect to the host", source })?;
    serve(control, started_us, sys::dial_host)?;
    // Seen only by a host that did not mean it: one that did is gone.
    eprintln!("cofferdam-agent: the host ended the control connection");
    Ok(())
}

fn dial_control() -> std::io::Result<OwnedFd> {
    let control = sys::dial_host(CONTROL_PORT)?;
    sys::wait_connected(control.as_fd())?;
    Ok(control)
}

/// One line with the cause chain on the console.
fn report(error: &dyn std::error::Error) {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line = format!("{line}: {error}");
        cause = error.source();
    }
    eprintln!("cofferdam-agent: {line}");
}
