//! Files in and out of a container.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};

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
