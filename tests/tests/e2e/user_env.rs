//! What a program finds when it starts: environment, working directory, user, names.

use tests::sandbox::Sandbox;

#[test]
fn the_environment_is_the_images_and_what_was_added() {
    let sandbox = Sandbox::new();
    let file = sandbox.files().join("variables");
    std::fs::write(&file, "# a comment\nFROM_FILE=file value\nFROM_HOST\n").unwrap();
    let flags = ["-e", "ADDED=a=b c", "-e", "CHANGED=run", "-e", "INHERITED", "-e", "NOWHERE", "--env-file"];
    let flags: Vec<&str> =
        flags.into_iter().chain([file.to_str().unwrap(), "-h", "box", "--entrypoint", "env"]).collect();
    let ended = sandbox.run(&flags, "defaults", &[]).env("INHERITED", "host").env("FROM_HOST", "host").end();
    let mut lines: Vec<&str> = ended.succeeded().lines().collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        [
            "ADDED=a=b c",
            "CHANGED=run",
            "FROM_FILE=file value",
            "FROM_HOST=host",
            "FROM_IMAGE=yes",
            "HOME=/home/alice",
            "HOSTNAME=box",
            "INHERITED=host",
            "PATH=/bin",
        ]
    );
}

#[test]
fn users_are_those_of_the_image() {
    let sandbox = Sandbox::new();
    for (user, id, home) in [
        ("alice", "uid=1000(alice) gid=1000(alice) groups=1000(alice),10(wheel),29(audio)", "/home/alice"),
        ("1000", "uid=1000(alice) gid=1000(alice) groups=1000(alice),10(wheel),29(audio)", "/home/alice"),
        ("alice:staff", "uid=1000(alice) gid=50(staff) groups=50(staff)", "/home/alice"),
        ("4242:77", "uid=4242 gid=77 groups=77", "/"),
    ] {
        let ended = sandbox.run(&["-u", user], "busybox", &["sh", "-c", "id; echo $HOME"]).end();
        let mut lines = ended.succeeded().lines();
        assert_eq!(groups_sorted(lines.next().unwrap_or_default()), groups_sorted(id), "{user}");
        assert_eq!(lines.next(), Some(home), "{user}");
    }
}

/// What `id` says, with the groups in an order that does not depend on the kernel's.
fn groups_sorted(id: &str) -> (String, Vec<String>) {
    let (head, groups) = id.split_once(" groups=").unwrap_or((id, ""));
    let mut groups: Vec<String> = groups.split(',').map(str::to_owned).collect();
    groups.sort();
    (head.to_owned(), groups)
}

#[test]
fn groups_can_be_added() {
    let sandbox = Sandbox::new();
    let ended =
        sandbox.run(&["-u", "1000:1000", "--group-add", "staff", "--group-add", "99"], "busybox", &["id", "-G"]).end();
    let mut groups: Vec<&str> = ended.succeeded().split_whitespace().collect();
    groups.sort_unstable();
    assert_eq!(groups, ["1000", "50", "99"]);
}

#[test]
fn a_working_directory_is_made_when_it_is_missing() {
    let sandbox = Sandbox::new();
    let script = "pwd; stat -c '%u %a' .; touch here && echo writable";
    let ended = sandbox.run(&["-w", "/srv/new/directory"], "busybox", &["sh", "-c", script]).end();
    assert_eq!(ended.succeeded(), "/srv/new/directory\n0 755\nwritable\n");
}

#[test]
fn entrypoint_and_command_combine_as_in_docker() {
    let sandbox = Sandbox::new();
    for (flags, words, output) in [
        (&[][..], &[][..], "entrypoint: command of the image\n"),
        (&[], &["words", "given"], "entrypoint: words given\n"),
        // An entrypoint that is given replaces both.
        (&["--entrypoint", "pwd"], &[], "/srv/work\n"),
        (&["--entrypoint", ""], &["id", "-un"], "alice\n"),
    ] {
        let ended = sandbox.run(flags, "defaults", words).end();
        assert_eq!(ended.succeeded(), output, "{flags:?} {words:?}");
    }
}

#[test]
fn a_container_knows_its_names() {
    let sandbox = Sandbox::new();
    let script = "hostname; cat /etc/hostname; grep -c 'localhost' /etc/hosts; grep -w box /etc/hosts | wc -l; \
                  ip -o link show lo | grep -c LOOPBACK,UP; [ -e /etc/resolv.conf ] && echo resolv";
    let ended = sandbox.run(&["--hostname", "box"], "busybox", &["sh", "-c", script]).end();
    let lines: Vec<&str> = ended.succeeded().lines().collect();
    assert_eq!(lines[..2], ["box", "box"]);
    assert!(lines[2] != "0" && lines[3] != "0", "{lines:?}");
    assert_eq!(lines[4..], ["1", "resolv"]);
}
