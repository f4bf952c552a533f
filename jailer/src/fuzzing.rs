//! Readers of the kernel's texts, for `fuzz`: names in them are chosen by others.

use crate::cgroup::hierarchy::{Controller, Kind, hierarchy};
use crate::readback::{Status, limit, mount};

/// Reads a text as each of those in /proc that a jail is made or told by.
pub fn proc_text(text: &str) {
    let kinds = [Kind::Unified, Kind::Older(Controller::ALL.to_vec())];
    for line in text.lines() {
        let _ = (hierarchy(line), mount(line), limit(line));
        for kind in &kinds {
            let _ = kind.group(line);
        }
    }
    let status = Status(text.to_owned());
    for name in ["Uid", "Groups", "Name", "NoNewPrivs", "Seccomp", "Seccomp_filters", "CapEff"] {
        let _ = (status.value(name), status.numbers(name));
    }
}
