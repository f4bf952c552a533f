//! Images that mean harm.

use std::fs;
use std::path::Path;
use std::process::Command;

use protocol::container::{Mount, MountSource};
use protocol::{Call, FailureKind};

use crate::host::Host;
use crate::image::Image;

#[test]
fn the_image_cannot_lead_out_of_its_root() {
    let image = Image::with(|root| {
        use std::os::unix::fs::symlink;
        fs::remove_dir_all(root.join("etc")).unwrap();
        symlink("../../../../elsewhere/etc", root.join("etc")).unwrap();
        symlink("/loose/dev", root.join("dev")).unwrap();
        symlink("/../../sys-here", root.join("sys")).unwrap();
        symlink("/proc/1/root/run", root.join("run")).unwrap();
    });
    let mut host = Host::new();
    let output =
        host.run(&image.shell("cat /elsewhere/etc/hostname; ls /loose/dev/null /sys-here/fs/cgroup/cgroup.procs"), b"");
    assert_eq!(
        (output.stdout.as_str(), output.code),
        ("box\n/loose/dev/null\n/sys-here/fs/cgroup/cgroup.procs\n", 0),
        "{output:?}"
    );
    let mut spec = image.shell("true");
    let source = MountSource::Tmpfs { size_bytes: None, mode: 0o755, exec: true, dev: true, suid: true };
    spec.mounts = vec![Mount { destination: "/run/x".into(), source, read_only: false }];
    let failure = host.call(Call::Create(Box::new(spec))).unwrap_err();
    assert_eq!(
        (failure.kind, failure.message.as_str()),
        (FailureKind::InvalidRequest, "cannot make /run/x in the container: too many levels of symbolic links")
    );
    assert!(!Path::new("/elsewhere").exists() && !Path::new("/loose").exists() && !Path::new("/sys-here").exists());
}

#[test]
fn files_of_the_image_that_are_no_files_are_refused() {
    let image = Image::with(|root| {
        fs::remove_file(root.join("etc/passwd")).unwrap();
        assert!(Command::new("mkfifo").arg(root.join("etc/passwd")).status().unwrap().success());
    });
    let failure = Host::new().call(Call::Create(Box::new(image.shell("true")))).unwrap_err();
    assert_eq!(failure.message, "/etc/passwd of the image is not a regular file of at most 1048576 bytes");
    let image = Image::with(|root| fs::write(root.join("etc/group"), vec![b'x'; (1 << 20) + 1]).unwrap());
    let failure = Host::new().call(Call::Create(Box::new(image.shell("true")))).unwrap_err();
    assert_eq!(failure.message, "/etc/group of the image is not a regular file of at most 1048576 bytes");
}
