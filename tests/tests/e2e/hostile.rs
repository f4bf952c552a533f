//! A guest whose agent lies: whatever it says, whenever, and however slowly, the host gets a clear error in time, and can
//! end it.
//!
//! The agent is `agent/examples/hostile.rs`, which names the points and the tricks.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tests::process::Ended;
use tests::sandbox::Sandbox;

/// How long any verb that does not need the agent may take, in the slowest lab.
const PATIENCE: Duration = Duration::from_secs(30);

/// The verbs that need the agent, and the point of the conversation that each is answered at.
const VERBS: [(&str, &[&str]); 8] = [
    ("exec", &["exec", "liar", "true"]),
    ("stats", &["stats", "--no-stream", "liar"]),
    ("processes", &["top", "liar"]),
    ("freeze", &["pause", "liar"]),
    ("update", &["update", "--pids-limit", "10", "liar"]),
    ("copy-out", &["cp", "liar:/etc", "."]),
    ("copy-in", &["cp", "behaviour", "liar:/tmp"]),
    ("signal", &["kill", "-s", "USR1", "liar"]),
];

/// A guest that was started with a hostile agent.
struct Guest {
    sandbox: Sandbox,
    initramfs: PathBuf,
    case: String,
}

impl Guest {
    fn new(point: &str, trick: &str) -> Self {
        let sandbox = Sandbox::new();
        let folder = sandbox.files();
        let agent = std::env::var_os(tests::HOSTILE_VARIABLE).expect("`cargo xtask e2e` names the hostile agent");
        fs::copy(agent, folder.join("init")).unwrap();
        fs::write(folder.join("behaviour"), format!("{point} {trick}\n")).unwrap();
        // The kernel wants a console to give it.
        let script = "mkdir dev && mknod -m 600 dev/console c 5 1 && chmod 755 init &&
            printf 'init\nbehaviour\ndev\ndev/console\n' | busybox cpio -o -H newc > initramfs 2> /dev/null";
        assert_eq!(sandbox.program("sh", ["-c", script]).end().succeeded(), "");
        let initramfs = folder.join("initramfs");
        Self { sandbox, initramfs, case: format!("{trick} at {point}") }
    }

    /// A verb, which must not take longer than it may: the code 137 says that it did not end by itself.
    fn verb(&self, seconds: u32, words: &[&str]) -> Ended {
        // By a shell: timeout(1) ends by the signal that it has sent.
        let script = format!("timeout --signal=KILL {seconds} \"$COFFERDAM\" \"$@\"; exit $?");
        let given = ["-c", script.as_str(), "sh"].into_iter().chain(words.iter().copied());
        self.sandbox.program("sh", given).env("COFFERDAM_INITRAMFS", &self.initramfs).end()
    }

    fn start(&self, seconds: u32) -> Ended {
        self.verb(seconds, &["run", "-d", "--name", "liar", &Sandbox::reference("busybox"), "sleep", "1000"])
    }

    /// What must work however the guest behaves: to look at it and to end it.
    fn can_be_removed(self) {
        let Self { sandbox, initramfs: _, case } = &self;
        for words in [&["inspect", "liar"][..], &["ps", "-a"], &["rm", "-f", "liar"]] {
            let began = Instant::now();
            let ended = sandbox.cofferdam(words).end();
            assert_eq!(ended.code(), 0, "{case}: {words:?}: {ended:?}");
            assert!(began.elapsed() < PATIENCE, "{case}: {words:?} took {:?}", began.elapsed());
        }
        assert!(sandbox.leftovers().is_empty(), "{case}: {:?}", sandbox.leftovers());
    }
}

/// One line that says whose fault it is, with nothing in it that a terminal would obey.
fn is_clear(case: &str, ended: &Ended) {
    let errors: Vec<_> = ended.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{case}: {ended:?}");
    assert!(!ended.stderr.contains('\u{1b}'), "{case}: {ended:?}");
}

#[test]
fn an_agent_that_breaks_the_rules_at_the_start_is_an_error_at_once() {
    for (point, tricks) in [
        ("hello", &["garbage", "huge", "malformed", "trailing", "twice", "nobody", "power-off", "panic"][..]),
        ("create", &["garbage", "huge", "unasked", "twice", "nobody", "loud", "unfit", "power-off"]),
        ("start", &["malformed", "trailing", "unasked", "loud", "panic"]),
    ] {
        for trick in tricks {
            let guest = Guest::new(point, trick);
            let ended = guest.start(60);
            assert_eq!(ended.code(), 125, "{}: {ended:?}", guest.case);
            is_clear(&guest.case, &ended);
            guest.can_be_removed();
        }
    }
}

#[test]
fn an_agent_that_says_nothing_can_be_ended() {
    for (point, trick) in [("hello", "silence"), ("create", "silence"), ("start", "silence"), ("create", "deaf")] {
        let guest = Guest::new(point, trick);
        let ended = guest.start(10);
        // Killed by its limit, since nothing comes of it.
        assert_eq!(ended.code(), 137, "{}: {ended:?}", guest.case);
        guest.can_be_removed();
    }
}

#[test]
fn an_agent_that_is_only_odd_does_no_harm() {
    for (point, trick) in [
        ("hello", "slow"),
        ("create", "slow"),
        ("start", "slow"),
        ("start", "ports"),
        ("start", "another"),
        ("start", "early"),
    ] {
        let guest = Guest::new(point, trick);
        let ended = guest.start(60);
        assert!(matches!(ended.code(), 0 | 125), "{}: {ended:?}", guest.case);
        guest.can_be_removed();
    }
}

#[test]
fn an_agent_that_turns_later_is_an_error_of_the_one_verb() {
    for (index, (point, verb)) in VERBS.into_iter().enumerate() {
        let tricks = ["garbage", "loud", "unasked", "another", "silence", "huge"];
        // Each point gets three of them, and over all points each trick is played four times.
        for trick in (0..3).map(|turn| tricks[(index + 2 * turn) % tricks.len()]) {
            let guest = Guest::new(point, trick);
            assert_eq!(guest.start(60).code(), 0, "{}", guest.case);
            let ended = guest.verb(10, verb);
            assert_ne!(ended.code(), 0, "{}: {ended:?}", guest.case);
            if trick != "silence" {
                is_clear(&guest.case, &ended);
            }
            guest.can_be_removed();
        }
    }
}

#[test]
fn an_agent_that_dies_in_a_verb_ends_its_container() {
    for (point, verb) in VERBS {
        let guest = Guest::new(point, "panic");
        assert_eq!(guest.start(60).code(), 0, "{}", guest.case);
        let ended = guest.verb(30, verb);
        assert!(!matches!(ended.code(), 0 | 137), "{}: {ended:?}", guest.case);
        is_clear(&guest.case, &ended);
        // Its kernel takes a moment to fall. Less than output is kept for somebody to attach, which nobody does here.
        assert_ne!(guest.verb(20, &["wait", "liar"]).code(), 137, "{}: {ended:?}", guest.case);
        let told = guest.verb(30, &["inspect", "--format", "state.status", "liar"]);
        assert_eq!(told.succeeded(), "exited\n", "{}", guest.case);
        guest.can_be_removed();
    }
}

#[test]
fn an_agent_that_only_says_that_it_kills_is_killed() {
    let guest = Guest::new("signal", "deaf");
    assert_eq!(guest.start(60).code(), 0, "{}", guest.case);
    let ended = guest.verb(60, &["kill", "liar"]);
    assert_eq!((ended.code(), ended.text()), (0, "liar\n"), "{ended:?}");
    assert_eq!(guest.sandbox.monitors(), [0; 0], "{}", guest.case);
    guest.can_be_removed();
}

#[test]
fn an_agent_that_never_stops_holds_nothing_up() {
    for (point, trick) in [("running", "flood"), ("running", "silence"), ("signal", "streams"), ("running", "streams")]
    {
        let guest = Guest::new(point, trick);
        let started = guest.start(60);
        assert_eq!(started.code(), 0, "{}: {started:?}", guest.case);
        if point == "signal" {
            // It says that its container has ended, and goes on to write.
            let began = Instant::now();
            assert_eq!(guest.verb(30, &["stop", "-t", "2", "liar"]).code(), 0, "{}", guest.case);
            assert!(began.elapsed() < PATIENCE, "{}: {:?}", guest.case, began.elapsed());
        } else {
            // What the monitor holds for it is bounded, beside the guest's own memory.
            let peak = tests::process::peak_memory_kib(guest.sandbox.monitor());
            assert!(peak < 700 << 10, "{}: {peak} KiB", guest.case);
        }
        guest.can_be_removed();
    }
}

#[test]
fn impossible_numbers_are_shown_as_they_are() {
    let guest = Guest::new("nowhere", "nothing");
    assert_eq!(guest.start(60).code(), 0);
    for verb in
        [&["stats", "--no-stream", "liar"][..], &["stats", "--no-stream", "--format", "json", "liar"], &["top", "liar"]]
    {
        let ended = guest.verb(20, verb);
        assert_eq!(ended.code(), 0, "{verb:?}: {ended:?}");
        assert!(!ended.text().contains('\u{1b}'), "{verb:?}: {ended:?}");
    }
    // A name that leads elsewhere, and an archive that is none.
    let copied = guest.verb(20, &["cp", "liar:/etc/passwd", "."]);
    assert_ne!(copied.code(), 0, "{copied:?}");
    is_clear("copy", &copied);
    guest.can_be_removed();
}
