//! `-it`: the caller's terminal is raw while the container has it, and as it was afterwards, however the run ends.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::process::Command;

use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::bench::{Bench, kill};

/// Both ends of a new terminal.
fn terminal() -> (File, OwnedFd) {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let terminal = rustix::fs::open(&*name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    tcsetwinsize(&terminal, Winsize { ws_row: 30, ws_col: 90, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    (File::from(master), terminal)
}

fn raw(terminal: &OwnedFd) -> bool {
    !tcgetattr(terminal).unwrap().local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
}

fn on(terminal: &OwnedFd, mut command: Command) -> Command {
    command.stdin(terminal.try_clone().unwrap());
    command
}

#[test]
fn keys_are_the_containers_and_the_size_follows() {
    let bench = Bench::new(
        "cp $CONFIG $HERE/config; say started; echo ready; head -c 3 >$HERE/keys; echo again; hear 7 resize; say exited-0",
    );
    let (mut keyboard, terminal) = terminal();
    let mut child = bench.start(on(&terminal, bench.command(&["run", "-it", &bench.image()])));
    assert!(raw(&terminal));
    // In cooked mode the first would be a signal and the last a line's end.
    keyboard.write_all(b"\x03a\r").unwrap();
    let mut line = [0; 6];
    child.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
    assert_eq!(fs::read(bench.path("keys")).unwrap(), b"\x03a\r");
    tcsetwinsize(&terminal, Winsize { ws_row: 31, ws_col: 91, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    kill(&child, Signal::WINCH);
    assert!(child.wait().unwrap().success());
    assert!(!raw(&terminal));
    // A frame of three bytes: the message `Resize`, 31 lines, 91 columns.
    assert_eq!(fs::read(bench.path("resize")).unwrap(), [3, 0, 0, 0, 1, 31, 91]);
    let config = fs::read_to_string(bench.path("config")).unwrap();
    assert!(config.contains(r#""terminal":{"rows":30,"columns":90}"#), "{config}");
}

#[test]
fn the_mode_is_restored_on_every_way_out() {
    for (script, signal) in [
        ("echo ready; wait_for_end", Some(Signal::TERM)),
        ("echo ready; kill -KILL $$", None),
        ("echo ready; say failed-127", None),
        ("echo ready; printf '\\377\\377\\377\\377' >&$FD; exec sleep 600", None),
    ] {
        let bench = Bench::new(script);
        let (_keyboard, terminal) = terminal();
        let mut child = bench.start(on(&terminal, bench.command(&["run", "-it", &bench.image()])));
        if let Some(signal) = signal {
            kill(&child, signal);
        }
        assert!(!child.wait().unwrap().success());
        assert!(!raw(&terminal), "{script}");
    }
}

#[test]
fn without_keys_the_terminal_stays_as_it_is() {
    let bench = Bench::new("echo ready; hear 6 signal; say exited-0");
    let (_keyboard, terminal) = terminal();
    let child = bench.start(on(&terminal, bench.command(&["run", "-t", &bench.image()])));
    assert!(!raw(&terminal));
    kill(&child, Signal::TERM);
    child.wait_with_output().unwrap();
}
