//! What a program finds: namespaces, file systems, privileges, limits, a terminal.

use std::io::Write;

use protocol::container::{Mount, MountSource, Rlimit, Seccomp, WindowSize};
use protocol::{Call, FailureKind};

use crate::host::{Host, first, read_all, read_until};
use crate::image::Image;
use crate::run;

#[test]
fn the_container_has_namespaces_of_its_own() {
    let output = run(
        "echo $$; cat /proc/sys/kernel/hostname /etc/hostname /proc/self/cgroup; set -- /proc/[0-9]*; echo $# seen",
    );
    assert!(output.stdout.starts_with("1\nbox\nbox\n"), "{output:?}");
    assert!(output.stdout.contains("0::/\n"), "{output:?}");
    // The shell.
    assert!(output.stdout.lines().any(|line| line == "1 seen"), "{output:?}");
}

#[test]
fn devices_and_file_systems_are_what_docker_gives() {
    let output = run(
        "echo x > /dev/null; head -c 4 /dev/zero | wc -c; head -c 4 /dev/urandom | wc -c; echo a > /dev/stdout; echo b > /dev/stderr; \
                      ls -l /dev/ptmx /dev/fd /dev/core | wc -l; echo shm > /dev/shm/x && cat /dev/shm/x; mount",
    );
    assert!(output.stdout.starts_with("4\n4\na\n3\nshm\n"), "{output:?}");
    assert_eq!(output.stderr, "b\n");
    for line in [
        "proc on /proc type proc (rw,nosuid,nodev,noexec",
        "tmpfs on /dev type tmpfs (rw,nosuid",
        "devpts on /dev/pts type devpts (rw,nosuid,noexec",
        "shm on /dev/shm type tmpfs (rw,nosuid,nodev,noexec",
        "mqueue on /dev/mqueue type mqueue (rw,nosuid,nodev,noexec",
        "sysfs on /sys type sysfs (ro,nosuid,nodev,noexec",
        "cgroup on /sys/fs/cgroup type cgroup2 (ro,nosuid,nodev,noexec",
        "proc on /proc/sys type proc (ro,",
        "tmpfs on /etc/hostname type tmpfs (rw",
        "overlay on / type overlay (rw",
    ] {
        assert!(output.stdout.contains(line), "{line} is missing: {}", output.stdout);
    }
    // Nothing of the agent's own file systems is left.
    assert!(!output.stdout.contains(" on /run"), "{}", output.stdout);
    assert!(!output.stdout.contains("erofs on"), "{}", output.stdout);
}

#[test]
fn masked_paths_are_empty_and_read_only_paths_refuse() {
    let output = run("cat /proc/kcore /proc/keys /proc/timer_list | wc -c; ls /sys/firmware | wc -l; \
                      echo 1 > /proc/sys/kernel/panic; echo x > /etc/new && cat /etc/new");
    assert!(output.stdout.starts_with("0\n0\nx\n"), "{output:?}");
    assert!(output.stderr.contains("can't create /proc/sys/kernel/panic: Read-only file system"), "{output:?}");
}

#[test]
fn no_descriptor_of_the_agent_is_left() {
    let output = run("ls /proc/self/fd | grep -v '^[012]$'; cat /proc/self/status | grep -E 'Sig(Blk|Ign)'");
    // The one that ls reads the directory with.
    assert_eq!(output.stdout.lines().next(), Some("3"), "{output:?}");
    let mask = |name: &str| {
        let line = output.stdout.lines().find_map(|line| line.strip_prefix(name)).expect(name);
        u64::from_str_radix(line.trim(), 16).unwrap()
    };
    assert_eq!((mask("SigBlk:"), mask("SigIgn:") & 1 << 12), (0, 0), "{output:?}");
}

#[test]
fn privileges_are_dockers_defaults() {
    let status = "cat /proc/self/status | grep -E '^(Cap|NoNewPrivs|Seccomp:|Groups)'";
    let output = run(status);
    for line in [
        "CapInh:\t0000000000000000",
        "CapPrm:\t00000000a80425fb",
        "CapEff:\t00000000a80425fb",
        "CapBnd:\t00000000a80425fb",
        "CapAmb:\t0000000000000000",
        "NoNewPrivs:\t0",
        "Seccomp:\t2",
    ] {
        assert!(output.stdout.contains(line), "{line} is missing: {}", output.stdout);
    }
    let image = Image::new();
    let mut spec =
        image.shell(&format!("id; echo $HOME; {status}; echo ok > /dev/stdout; mount -t tmpfs x /tmp; cat /root/x"));
    spec.process.user = "app".into();
    spec.process.no_new_privileges = true;
    let output = Host::new().run(&spec, b"");
    for line in [
        "uid=1000(app) gid=1001(app) groups=29(audio),1001(app)",
        "/home/app",
        "CapPrm:\t0000000000000000",
        "CapEff:\t0000000000000000",
        "CapBnd:\t00000000a80425fb",
        "NoNewPrivs:\t1",
        "ok",
    ] {
        assert!(output.stdout.contains(line), "{line} is missing: {output:?}");
    }
    assert!(
        output.stderr.contains("Operation not permitted") || output.stderr.contains("permission denied"),
        "{output:?}"
    );
}

#[test]
fn limits_and_scores_are_set() {
    let image = Image::new();
    let mut spec = image.shell("ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj; umask");
    spec.process.rlimits =
        vec![Rlimit { resource: 7, soft: 77, hard: 88 }, Rlimit { resource: 4, soft: 0, hard: u64::MAX }];
    spec.process.oom_score_adj = 321;
    let mut host = Host::new();
    assert_eq!(host.run(&spec, b"").stdout, "77\n88\n321\n0022\n");
    spec.process.rlimits = vec![Rlimit { resource: 16, soft: 0, hard: 0 }];
    let failure = host.call(Call::Create(Box::new(spec))).unwrap_err();
    assert_eq!(
        (failure.kind, failure.message.as_str()),
        (FailureKind::InvalidRequest, "resource limit 16 does not exist")
    );
}

#[test]
fn a_root_can_be_read_only_and_mounts_be_added() {
    let image = Image::new();
    let mut spec = image
        .shell("echo x > /x; echo y > /scratch/deep/y && cat /scratch/deep/y; cat /etc/hostname; mount | grep scratch");
    spec.rootfs.read_only = true;
    let source = MountSource::Tmpfs { size_bytes: Some(1 << 20), mode: 0o1777, exec: false, dev: false, suid: false };
    spec.mounts = vec![Mount { destination: "/scratch/deep".into(), source, read_only: false }];
    let output = Host::new().run(&spec, b"");
    assert!(output.stderr.contains("can't create /x: Read-only file system"), "{output:?}");
    assert!(output.stdout.starts_with("y\nbox\n"), "{output:?}");
    assert!(output.stdout.contains("tmpfs on /scratch/deep type tmpfs (rw,nosuid,nodev,noexec"), "{output:?}");
    assert!(output.stdout.contains("size=1024k"), "{output:?}");
}

#[test]
fn the_working_directory_is_made_and_the_environment_passed() {
    let image = Image::new();
    let mut spec = image.shell("pwd; env");
    spec.process.working_directory = "/srv/new/place".into();
    spec.process.env = vec!["PATH=/none:/bin".into(), "A=b c".into(), "EMPTY=".into()];
    let output = Host::new().run(&spec, b"");
    assert!(output.stdout.starts_with("/srv/new/place\n"), "{output:?}");
    for variable in ["PATH=/none:/bin", "A=b c", "EMPTY=", "HOME=/root"] {
        assert!(output.stdout.lines().any(|line| line == variable), "{variable} is missing: {output:?}");
    }
}

#[test]
fn what_cannot_be_executed_is_told_as_docker_tells_it() {
    let image = Image::new();
    let mut host = Host::new();
    let cases: [(&str, FailureKind, &str); 7] = [
        ("nope", FailureKind::CommandNotFound, "exec: \"nope\": executable file not found in $PATH"),
        ("/nope", FailureKind::CommandNotFound, "exec: \"/nope\": stat /nope: no such file or directory"),
        (
            "not-executable",
            FailureKind::CommandNotFound,
            "exec: \"not-executable\": executable file not found in $PATH",
        ),
        ("/bin/not-executable", FailureKind::CommandNotExecutable, "exec: \"/bin/not-executable\": permission denied"),
        ("/etc", FailureKind::CommandNotExecutable, "exec: \"/etc\": is a directory"),
        ("no-format", FailureKind::CommandNotExecutable, "exec /bin/no-format: exec format error"),
        ("no-interpreter", FailureKind::CommandNotFound, "exec /bin/no-interpreter: no such file or directory"),
    ];
    for (program, kind, message) in cases {
        let spec = image.spec("c", &[program]);
        let failure = match host.call(Call::Create(Box::new(spec))) {
            Ok(_) => host.start("c").unwrap_err(),
            Err(failure) => failure,
        };
        assert_eq!((failure.kind, failure.message.as_str()), (kind, message));
    }
    let mut spec = image.spec("c", &["true"]);
    spec.process.user = "nobody".into();
    let failure = host.call(Call::Create(Box::new(spec))).unwrap_err();
    assert_eq!(failure.message, "unable to find user nobody: no matching entries in passwd file");
    let mut spec = image.spec("c", &["true"]);
    spec.rootfs.device = "/dev/null".into();
    let failure = host.call(Call::Create(Box::new(spec))).unwrap_err();
    assert!(failure.message.starts_with("cannot mount the image on /dev/null: "), "{failure:?}");
    assert_eq!(host.run(&image.shell("echo fine"), b"").stdout, "fine\n");
}

#[test]
fn system_calls_outside_the_profile_fail() {
    let output = run("mount -t tmpfs none /tmp; echo $?");
    assert!(output.stdout.ends_with("1\n") || output.stdout.ends_with("255\n"), "{output:?}");
    let image = Image::new();
    let mut spec = image.shell("cat /proc/self/status | grep Seccomp:");
    spec.process.seccomp = Seccomp::Unconfined;
    assert_eq!(Host::new().run(&spec, b"").stdout, "Seccomp:\t0\n");
}
#[test]
fn a_terminal_is_the_controlling_one_and_can_be_resized() {
    let image = Image::new();
    let mut host = Host::new();
    let listener = host.listen(3000);
    let mut spec = image.shell("trap 'stty size; exit 7' WINCH; stty size; ls -l /proc/self/fd/0; echo $TERM > /dev/tty; echo c > /dev/console; \
                                read line; echo got $line; while :; do sleep 0.01; done");
    spec.process.terminal = Some(WindowSize { rows: 24, columns: 80 });
    spec.process.stdio.stdin = Some(3000);
    spec.process.user = "app".into();
    host.call(Call::Create(Box::new(spec))).unwrap();
    let (mut terminal, _) = listener.accept().unwrap();
    host.start("c").unwrap();
    terminal.write_all(b"hello\n").unwrap();
    let output = read_until(&mut terminal, "got hello\r\n");
    for text in ["24 80\r\n", "/dev/pts/0\r\n", "xterm\r\n"] {
        assert!(output.contains(text), "{text:?} is missing: {output:?}");
    }
    host.resize(first("c"), 30, 100).unwrap();
    assert_eq!(read_all(&mut terminal), "30 100\r\n");
    assert_eq!(host.exited("c").code, 7);
}
