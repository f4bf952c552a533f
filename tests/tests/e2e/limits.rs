//! What a container may use and touch.

use tests::sandbox::Sandbox;

#[test]
fn a_fork_bomb_ends_at_the_limit_of_processes() {
    let sandbox = Sandbox::new();
    // Once forking has failed, only what the shell does itself can be relied on.
    let script = "bomb() { bomb | bomb & }; bomb 2>/dev/null
                  n=0; while [ \"$n\" -eq 0 ]; do while read key n; do [ $key = max ] && break; done \
                  < /sys/fs/cgroup/pids.events; done
                  read max < /sys/fs/cgroup/pids.max; echo \"$max\"; exit 9";
    let ended = sandbox.run(&["--pids-limit", "48"], "busybox", &["sh", "-c", script]).end();
    assert_eq!((ended.text(), ended.code()), ("48\n", 9), "{ended:?}");
}

#[test]
fn running_out_of_memory_is_reported_as_such() {
    let sandbox = Sandbox::new();
    let script = "echo begin; x=0123456789abcdef; while :; do x=$x$x; done";
    let ended = sandbox.run(&["-m", "32m"], "busybox", &["sh", "-c", script]).end();
    assert_eq!((ended.text(), ended.code()), ("begin\n", 137), "{ended:?}");
    assert_eq!(ended.stderr, "error: the container ran out of memory at its limit of 32 MiB: give it more with -m\n");
}

#[test]
fn a_program_that_survives_its_childrens_lack_of_memory_goes_on() {
    let sandbox = Sandbox::new();
    let script = "sh -c 'x=0123456789abcdef; while :; do x=$x$x; done'; echo \"child: $?\"";
    let ended = sandbox.run(&["-m", "32m"], "busybox", &["sh", "-c", script]).end();
    assert_eq!((ended.text(), ended.code()), ("child: 137\n", 0), "{ended:?}");
}

#[test]
fn cpus_and_memory_are_those_asked_for() {
    let sandbox = Sandbox::new();
    let script = "nproc; cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/memory.max; df -k /dev/shm | tail -n 1; ulimit -n";
    let flags = ["--cpus", "1.5", "-m", "100m", "--shm-size", "8m", "--ulimit", "nofile=321"];
    let ended = sandbox.run(&flags, "busybox", &["sh", "-c", script]).end();
    let lines: Vec<&str> = ended.succeeded().lines().collect();
    assert_eq!(lines[..3], ["2", "150000 100000", "104857600"]);
    assert_eq!(lines[3].split_whitespace().nth(1), Some("8192"), "{lines:?}");
    assert_eq!(lines[4], "321");
}

#[test]
fn whole_cpus_have_no_quota() {
    let sandbox = Sandbox::new();
    let ended = sandbox.run(&["--cpus", "2"], "busybox", &["nproc"]).end();
    assert_eq!(ended.succeeded(), "2\n");
}

#[test]
fn two_containers_run_at_once_and_apart() {
    let sandbox = Sandbox::new();
    let script = "echo mine > /tmp/file; echo $(hostname) ready; read line; cat /tmp/file";
    let start = |name: &str| {
        let flags = ["-i", "--name", name, "-h", name];
        sandbox.run(&flags, "busybox", &["sh", "-c", script]).open_input().start()
    };
    let (mut one, mut other) = (start("one"), start("other"));
    one.wait_for("one ready\n");
    other.wait_for("other ready\n");
    assert_ne!(one.monitor(), other.monitor());
    // A name belongs to one container at a time.
    sandbox.run(&["--name", "one"], "busybox", &["true"]).end().failed(125, &["\"one\"", "in use"]);
    one.write("\n");
    other.write("\n");
    assert_eq!(one.end().succeeded(), "one ready\nmine\n");
    assert_eq!(other.end().succeeded(), "other ready\nmine\n");
}

#[test]
fn a_read_only_root_has_writable_places_where_asked() {
    let sandbox = Sandbox::new();
    let script = "touch /file 2>&1; touch /etc/hosts 2>&1 && echo hosts; touch /tmp/file && echo tmp; \
                  touch /dev/shm/file && echo shm; df -k /tmp | tail -n 1; stat -c %a /tmp; grep -c ' / .*ro[, ]' /proc/mounts";
    let flags = ["--read-only", "--tmpfs", "/tmp:size=3m,mode=1770"];
    let ended = sandbox.run(&flags, "busybox", &["sh", "-c", script]).end();
    let lines: Vec<&str> = ended.succeeded().lines().collect();
    assert_eq!(lines[0], "touch: /file: Read-only file system");
    assert!(lines[1].contains("Read-only") || lines[1] == "hosts", "{lines:?}");
    assert_eq!(lines[2..4], ["tmp", "shm"]);
    assert_eq!(lines[4].split_whitespace().nth(1), Some("3072"), "{lines:?}");
    assert_eq!(lines[5..], ["1770", "1"]);
}

#[test]
fn what_is_written_is_gone_with_the_container() {
    let sandbox = Sandbox::new();
    let script =
        "ls /etc/new 2>/dev/null; echo changed > /etc/data; rm /etc/group; echo new > /etc/new; cat /etc/data /etc/new";
    for _ in 0..2 {
        let ended = sandbox.run(&[], "busybox", &["sh", "-c", script]).end();
        assert_eq!(ended.succeeded(), "changed\nnew\n");
    }
}

#[test]
fn the_kernels_secrets_are_out_of_reach() {
    let sandbox = Sandbox::new();
    let script =
        "for path in kcore keys timer_list; do cat /proc/$path 2>/dev/null | wc -c; done; ls /sys/firmware | wc -l
                  for path in /proc/sys/kernel/hostname /proc/sysrq-trigger /sys/kernel/uevent_helper; do
                    (echo x > $path) 2>/dev/null && echo wrote $path
                  done
                  ls /dev | sort | tr '\\n' ' '";
    let ended = sandbox.run(&[], "busybox", &["sh", "-c", script]).end();
    let text = ended.succeeded();
    let (head, devices) = text.split_at(8);
    assert_eq!(head, "0\n0\n0\n0\n", "{text}");
    let expected = "core fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero ";
    assert_eq!(devices, expected);
}

#[test]
fn system_calls_and_privileges_are_dockers() {
    let sandbox = Sandbox::new();
    let script = "unshare -U true 2>&1; mount -t tmpfs none /tmp 2>&1; grep -E '^(CapBnd|NoNewPrivs|Seccomp):' /proc/self/status";
    let ended = sandbox.run(&[], "busybox", &["sh", "-c", script]).end();
    let text = ended.succeeded();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "unshare: unshare(0x10000000): Operation not permitted");
    assert!(lines[1].contains("permission denied") || lines[1].contains("Operation not permitted"), "{text}");
    // The 14 capabilities that docker's containers have.
    assert_eq!(lines[2..], ["CapBnd:\t00000000a80425fb", "NoNewPrivs:\t0", "Seccomp:\t2"]);

    let script = "mount -t tmpfs none /tmp && echo mounted; grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status";
    let flags = ["--cap-drop", "ALL", "--cap-add", "SYS_ADMIN"];
    let options = ["--security-opt", "seccomp=unconfined", "--security-opt", "no-new-privileges"];
    let flags: Vec<&str> = flags.into_iter().chain(options).collect();
    let ended = sandbox.run(&flags, "busybox", &["sh", "-c", script]).end();
    assert_eq!(ended.succeeded(), "mounted\nCapEff:\t0000000000200000\nNoNewPrivs:\t1\nSeccomp:\t0\n");
}
