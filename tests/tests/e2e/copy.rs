//! Files in and out of a container.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;

use tests::sandbox::Sandbox;

#[test]
fn files_and_trees_go_both_ways() {
    let sandbox = Sandbox::new();
    let host = sandbox.detached("host", &[], "busybox", &["sleep", "1000"]);
    let files = sandbox.files();
    fs::create_dir_all(files.join("tree/deep")).unwrap();
    fs::write(files.join("tree/deep/file"), "content\n").unwrap();
    fs::set_permissions(files.join("tree/deep/file"), fs::Permissions::from_mode(0o640)).unwrap();
    symlink("deep/file", files.join("tree/link")).unwrap();
    let copy = |from: &str, to: &str| sandbox.cofferdam(["cp", from, to]).end();
    assert_eq!(copy("tree", "host:/tmp").succeeded(), "");
    assert_eq!(copy("tree", "host:/srv").succeeded(), "");
    let look = "cat /tmp/tree/link /srv/link; stat -c %a /tmp/tree/deep/file; readlink /tmp/tree/link";
    assert_eq!(host.verb("exec", &[], &["sh", "-c", look]).end().succeeded(), "content\ncontent\n640\ndeep/file\n");
    assert_eq!(copy("tree/deep/file", "host:/tmp/renamed").succeeded(), "");
    assert_eq!(copy("host:/tmp/renamed", "back").succeeded(), "");
    assert_eq!(copy("host:/tmp/tree", "there").succeeded(), "");
    assert_eq!(copy("host:/tmp/tree/.", ".").succeeded(), "");
    assert_eq!(fs::read_to_string(files.join("back")).unwrap(), "content\n");
    assert_eq!(fs::read_to_string(files.join("there/link")).unwrap(), "content\n");
    assert_eq!(fs::read_to_string(files.join("deep/file")).unwrap(), "content\n");
    let archive = sandbox.cofferdam(["cp", "host:/tmp/tree", "-"]).end();
    assert_eq!(archive.code(), 0, "{archive:?}");
    assert_eq!(sandbox.cofferdam(["cp", "-", "host:/tmp/tree"]).input(archive.stdout).end().succeeded(), "");
    assert_eq!(host.verb("exec", &[], &["cat", "/tmp/tree/tree/deep/file"]).end().succeeded(), "content\n");
    copy("host:/not/there", "x").failed(1, &["/not/there"]);
    copy("nothing", "host:/tmp").failed(1, &["nothing"]);
    copy("tree", "host:/tmp/renamed").failed(1, &["/tmp/renamed"]);
    copy("host:/a", "host:/b").failed(1, &["one side must be here"]);
}

/// CVE-2018-15664 with links that stay; `agent/tests/container/copy.rs` exchanges them while it copies.
#[test]
fn a_link_in_the_container_leads_nowhere_else() {
    let sandbox = Sandbox::new();
    let host = sandbox.detached("host", &[], "busybox", &["sleep", "1000"]);
    let plant = "ln -s / /tmp/root; ln -s /etc/passwd /tmp/secret; ln -s ../../../../../../etc /tmp/up";
    assert_eq!(host.verb("exec", &[], &["sh", "-c", plant]).end().succeeded(), "");
    let before = fs::read_to_string("/etc/passwd").unwrap();
    // As a link, not as what it leads to.
    assert_eq!(sandbox.cofferdam(["cp", "host:/tmp/secret", "secret"]).end().succeeded(), "");
    assert!(sandbox.files().join("secret").is_symlink());
    fs::write(sandbox.files().join("passwd"), "x").unwrap();
    // Into the container's own /etc.
    assert_eq!(sandbox.cofferdam(["cp", "passwd", "host:/tmp/up/copied"]).end().succeeded(), "");
    assert_eq!(host.verb("exec", &[], &["cat", "/etc/copied"]).end().succeeded(), "x");
    assert_eq!(fs::read_to_string("/etc/passwd").unwrap(), before);
    assert!(!fs::exists("/etc/copied").unwrap());
}

#[test]
fn links_and_contents_are_what_docker_takes_them_for() {
    let sandbox = Sandbox::new();
    let host = sandbox.detached("host", &[], "busybox", &["sleep", "1000"]);
    let files = sandbox.files();
    let copy = |from: &str, to: &str| sandbox.cofferdam(["cp", from, to]).end();
    let shell = |script: &str| host.verb("exec", &[], &["sh", "-c", script]).end().succeeded().to_owned();
    shell(
        "mkdir -p /srv/real/sub /srv/far/away; echo x > /srv/real/sub/x; echo old > /srv/old; ln -s real /srv/link; \
         ln -s far/away /srv/hop; ln -s ../real /srv/far/back; ln -s old /srv/to-file; ln -s new /srv/to-nothing",
    );
    fs::write(files.join("file"), "new\n").unwrap();
    // In: through links, whatever they lead to.
    for to in ["/srv/link", "/srv/far/back", "/srv/hop/", "/srv/to-file", "/srv/to-nothing"] {
        assert_eq!(copy("file", &format!("host:{to}")).succeeded(), "", "{to}");
    }
    let look = "cd /srv; cat real/file far/away/file old new; for l in link hop to-file to-nothing; do readlink $l; done; ls far";
    assert_eq!(shell(look), "new\nnew\nnew\nnew\nreal\nfar/away\nold\nnew\naway\nback\n");
    // Out: a link is itself, unless its contents are meant.
    assert_eq!(copy("host:/srv/link", "link").succeeded(), "");
    assert_eq!(fs::read_link(files.join("link")).unwrap().to_str(), Some("real"));
    for (from, to) in [("/srv/link/.", "contents"), ("/srv/real/.", "again"), ("/srv/link/", "slash")] {
        assert_eq!(copy(&format!("host:{from}"), to).succeeded(), "", "{from}");
        assert_eq!(fs::read_to_string(files.join(to).join("sub/x")).unwrap(), "x\n", "{from}");
    }
    fs::create_dir(files.join("root")).unwrap();
    for from in ["host:/", "host:/."] {
        assert_eq!(copy(from, "root").code(), 0, "{from}");
        assert!(
            files.join("root/srv/real/sub/x").is_file() && files.join("root/bin/sh").symlink_metadata().is_ok(),
            "{from}"
        );
        fs::remove_dir_all(files.join("root/srv")).unwrap();
    }
    let followed = sandbox.cofferdam(["cp", "-L", "host:/srv/to-file", "followed"]).end();
    assert_eq!(followed.succeeded(), "");
    assert_eq!(fs::read_to_string(files.join("followed")).unwrap(), "new\n");
    // Here, a link to a directory is one, and no other is written through: the container may have made it.
    symlink("file", files.join("to-file")).unwrap();
    assert_eq!(copy("host:/srv/real/sub/x", "to-file").succeeded(), "");
    assert_eq!(fs::read_to_string(files.join("file")).unwrap(), "new\n");
    symlink("again", files.join("to-again")).unwrap();
    assert_eq!(copy("host:/srv/old", "to-again").succeeded(), "");
    assert_eq!(fs::read_to_string(files.join("again/old")).unwrap(), "new\n");
    copy("host:/srv/real", "file").failed(1, &["file"]);
    copy("host:/srv/real", "none/new").failed(1, &["none"]);
    copy("host:/srv/old", "new/").failed(1, &["new/"]);
    copy("host:/dev/null", "null").failed(1, &["/dev/null"]);
}

#[test]
fn unusual_trees_go_both_ways() {
    let sandbox = Sandbox::new();
    let host = sandbox.detached("host", &[], "busybox", &["sleep", "1000"]);
    let files = sandbox.files();
    let shell = |script: &str| host.verb("exec", &[], &["sh", "-c", script]).end().succeeded().to_owned();
    shell(
        "mkdir -p /srv/odd/closed; cd /srv/odd; echo x > closed/file; chmod 4755 closed/file; ln closed/file hard; \
         mkfifo fifo; mknod null c 1 3; chmod 555 closed",
    );
    for _ in 0..2 {
        let copied = sandbox.cofferdam(["cp", "host:/srv/odd", "."]).end();
        assert_eq!(copied.code(), 0, "{copied:?}");
        assert_eq!(copied.stderr, "warning: odd/null is a device or a socket: it was left out\n");
    }
    let status = |path: &str| fs::symlink_metadata(files.join("odd").join(path)).unwrap();
    assert_eq!(status("closed").permissions().mode() & 0o7777, 0o555);
    assert_eq!(status("closed/file").permissions().mode() & 0o7777, 0o755);
    assert_eq!(status("closed/file").ino(), status("hard").ino());
    assert!(status("fifo").file_type().is_fifo() && !files.join("odd/null").exists());
    // A file with holes comes in, a socket does not.
    fs::File::create(files.join("odd/sparse")).unwrap().set_len(8 << 20).unwrap();
    let _socket = UnixListener::bind(files.join("odd/socket")).unwrap();
    let copied = sandbox.cofferdam(["cp", "odd", "host:/tmp"]).end();
    assert_eq!(copied.code(), 0, "{copied:?}");
    assert_eq!(shell("cd /tmp/odd; ls; stat -c %s sparse"), "closed\nfifo\nhard\nsparse\n8388608\n");
}

#[test]
fn an_archive_that_breaks_off_is_no_copy() {
    let sandbox = Sandbox::new();
    let host = sandbox.detached("host", &[], "busybox", &["sleep", "1000"]);
    // Deeper than the agent goes, which it only finds on the way.
    let deep = "mkdir -p /srv/deep; cd /srv/deep; i=0; while [ $i -lt 600 ]; do mkdir d; cd d; i=$((i+1)); done";
    assert_eq!(host.verb("exec", &[], &["sh", "-c", deep]).end().succeeded(), "");
    for to in ["out", "-"] {
        let copied = sandbox.cofferdam(["cp", "host:/srv/deep", to]).end();
        assert_eq!(copied.code(), 1, "{to}: {copied:?}");
        assert!(copied.stderr.contains("the archive is not whole: the copy is incomplete"), "{copied:?}");
    }
}
