//! Whether monitors can be confined here: the jail is entered once, by a monitor that has no VM (`cofferdam-vmm --jail`).
//!
//! Settings alone do not tell: a security module, or the filter of a container that this runs in, refuses what they allow.
//! They are looked at where it was refused, for what to do about it.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use jailer::{Birth, Born, Place};
use rustix::process::{Signal, WaitId, WaitIdOptions, geteuid, pidfd_send_signal, waitid};

use super::{Report, chain, ends, failure, good, warning};
use crate::paths;

/// How much of what the monitor says is read. It says a line.
const SAID_MAX: u64 = 4 << 10;

/// The kernel's settings that forbid user namespaces, as sysctl(8) names them.
const MOST: &str = "user.max_user_namespaces";
const UNPRIVILEGED: &str = "kernel.unprivileged_userns_clone";
const APPARMOR: &str = "kernel.apparmor_restrict_unprivileged_userns";

pub(super) fn namespaces() -> Report {
    let monitor = match paths::monitor() {
        Ok(monitor) => monitor,
        Err(error) => return failure(chain(&error), "build or install all of cofferdam"),
    };
    if !Path::new("/proc/self/ns/user").exists() {
        return failure("the kernel has no user namespaces", "use one that was built with CONFIG_USER_NS");
    }
    match enter(&monitor) {
        Ok(()) => good("monitors can be confined, in user namespaces of their own"),
        Err(said) => refused(&said, !geteuid().is_root(), setting),
    }
}

/// Has a monitor enter a jail, and gives what it says if it does not get in.
pub(super) fn enter(monitor: &Path) -> Result<(), String> {
    let said = |error: io::Error| format!("cannot run {} --jail: {error}", monitor.display());
    let null = File::options().read(true).write(true).open("/dev/null").map_err(said)?;
    let (mut errors, theirs) = io::pipe().map_err(said)?;
    let birth = Birth {
        program: monitor,
        arguments: &["--jail".as_ref()],
        streams: [null.as_fd(), null.as_fd(), theirs.as_fd()],
        descriptors: &[],
        mask: None,
        jail: Some(Place { network: None, cgroup: None }),
    };
    let Born { process, .. } = birth.start().map_err(|error| chain(&error))?;
    drop(theirs);
    let in_time = ends(&process);
    if !matches!(in_time, Ok(true)) {
        // It may have ended in between; either way it is waited for below.
        _ = pidfd_send_signal(&process, Signal::KILL);
    }
    let status = wait(&process).map_err(said)?;
    if !in_time.map_err(said)? {
        return Err("to enter one does not end".to_owned());
    }
    if status == Some(0) {
        return Ok(());
    }
    let mut text = String::new();
    // What can be read of it is told.
    _ = errors.by_ref().take(SAID_MAX).read_to_string(&mut text);
    let line = text.lines().next().unwrap_or("it ended without a word");
    Err(line.strip_prefix("error: ").unwrap_or(line).to_owned())
}

fn wait(process: &OwnedFd) -> io::Result<Option<i32>> {
    let waiting = || waitid(WaitId::PidFd(process.as_fd()), WaitIdOptions::EXITED);
    let status = rustix::io::retry_on_intr(waiting)?;
    Ok(status.and_then(|status| status.exit_status()))
}

/// What a setting is, where the kernel has it.
fn setting(name: &str) -> Option<u64> {
    fs::read_to_string(Path::new("/proc/sys").join(name.replace('.', "/"))).ok()?.trim().parse().ok()
}

/// What to do where the jail was refused: most likely one of these settings did it.
fn refused(said: &str, unprivileged: bool, setting: impl Fn(&str) -> Option<u64>) -> Report {
    let finding = |name: &str, value: u64| format!("monitors cannot be confined: {said} ({name} is {value})");
    let is = |name: &str, value: u64| setting(name) == Some(value);
    if is(MOST, 0) {
        return failure(finding(MOST, 0), format!("sudo sysctl {MOST}=10000, and in a file in /etc/sysctl.d"));
    }
    if unprivileged && is(UNPRIVILEGED, 0) {
        return failure(
            finding(UNPRIVILEGED, 0),
            format!("sudo sysctl {UNPRIVILEGED}=1, and in a file in /etc/sysctl.d"),
        );
    }
    if unprivileged && is(APPARMOR, 1) {
        return failure(
            finding(APPARMOR, 1),
            format!("give cofferdam an AppArmor profile that has `userns,` in it, or sudo sysctl {APPARMOR}=0"),
        );
    }
    failure(
        format!("monitors cannot be confined: {said}"),
        "allow user, mount, pid, network, ipc and uts namespaces: within a container, run that with \
         --security-opt seccomp=unconfined --security-opt apparmor=unconfined",
    )
}

pub(super) fn landlock() -> Report {
    if jailer::readback::Landlock::of_this_kernel().supported {
        return good("monitors are restricted to their folders by Landlock, too");
    }
    warning(
        "the kernel has no Landlock: what keeps monitors from files is the jail's mount namespace alone",
        "use Linux 5.13 or newer with landlock in the lsm= parameter of the kernel; containers do not need it",
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::super::Verdict;
    use super::*;

    fn script(text: &str) -> tempfile::TempPath {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(file.path(), fs::Permissions::from_mode(0o755)).unwrap();
        file.into_temp_path()
    }

    #[test]
    fn a_setting_that_forbids_is_named_with_what_to_do() {
        for (name, value, unprivileged, remedy) in [
            (MOST, 0, false, "sysctl user.max_user_namespaces=10000"),
            (MOST, 0, true, "sysctl user.max_user_namespaces=10000"),
            (UNPRIVILEGED, 0, true, "sysctl kernel.unprivileged_userns_clone=1"),
            (APPARMOR, 1, true, "AppArmor profile"),
        ] {
            let (verdict, finding, told) = refused("no", unprivileged, |asked| (asked == name).then_some(value));
            assert_eq!(verdict, Verdict::Failure);
            assert!(finding.contains(&format!("no ({name} is {value})")), "{finding}");
            assert!(told.as_ref().unwrap().contains(remedy), "{told:?}");
        }
    }

    #[test]
    fn settings_that_do_not_concern_the_user_are_not_blamed() {
        let all_allowed = |name: &str| Some(if name == APPARMOR { 0 } else { 1 });
        let for_others = |name: &str| match name {
            MOST => Some(5),
            UNPRIVILEGED => Some(0),
            _ => Some(1),
        };
        for (_, finding, remedy) in
            [refused("no", true, all_allowed), refused("no", true, |_| None), refused("no", false, for_others)]
        {
            assert_eq!(finding, "monitors cannot be confined: no");
            assert!(remedy.unwrap().contains("within a container"));
        }
    }

    #[test]
    fn what_the_monitor_says_is_told_in_one_line() {
        assert_eq!(enter(&script("exit 0")), Ok(()));
        let told = enter(&script("echo 'error: cannot make a user namespace' >&2; echo more >&2; exit 125"));
        assert_eq!(told, Err("cannot make a user namespace".to_owned()));
        assert_eq!(enter(&script("exit 125")), Err("it ended without a word".to_owned()));
        assert!(enter(Path::new("/nowhere/monitor")).unwrap_err().contains("cannot execute it"));
    }

    #[test]
    fn a_monitor_that_does_not_enter_its_jail_is_ended() {
        assert_eq!(enter(&script("exec sleep 600")), Err("to enter one does not end".to_owned()));
    }
}
