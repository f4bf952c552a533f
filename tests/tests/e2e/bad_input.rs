//! What is wrong is told in one line, with a documented exit code, and leaves nothing behind: every sandbox checks that
//! at its end.

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;

use serde_json::json;
use tar::EntryType;
use tests::layer::{Access, Layer};
use tests::layout::{Compression, Layout};
use tests::sandbox::{Sandbox, programs, registry};

/// The exit code when there is no container whose code could be passed on.
const FAILED: i32 = 125;

#[test]
fn an_image_that_is_nowhere() {
    let sandbox = Sandbox::with_empty_store();
    let registry = registry();
    let unknown = format!("{}/no/such/image:1.0", registry.address());
    sandbox.run(&["-q"], &unknown, &["true"]).end().failed(FAILED, &["no/such/image"]);
    let untagged = format!("{}/busybox:none", registry.address());
    sandbox.run(&["-q"], &untagged, &["true"]).end().failed(FAILED, &["busybox:none"]);
    sandbox.run(&["-q"], "oci:/no/such/folder", &["true"]).end().failed(FAILED, &["/no/such/folder"]);
    sandbox.run(&["-q"], "docker-archive:/etc/passwd", &["true"]).end().failed(FAILED, &["/etc/passwd"]);
    sandbox.run(&["-q"], "Not:A/Reference", &["true"]).end().failed(FAILED, &["Not:A/Reference"]);
    sandbox.cofferdam(["pull", "-q", &unknown]).end().failed(1, &["no/such/image"]);
    sandbox.cofferdam(["rmi", "nothing"]).end().failed(1, &["nothing"]);
}

#[test]
fn a_registry_that_does_not_answer() {
    let sandbox = Sandbox::with_empty_store();
    // A port that was just free: nobody listens there.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let reference = format!("{address}/busybox:latest");
    sandbox.run(&["-q"], &reference, &["true"]).end().failed(FAILED, &[&address.to_string()]);
}

/// An image layout with one layer, under the tag `latest`, and where the layer is.
fn layout(sandbox: &Sandbox, name: &str, architecture: &str, layer: &[u8]) -> (PathBuf, String) {
    let folder = sandbox.files().join(name);
    let mut layout = Layout::create(&folder).unwrap();
    let blob = layout.layer(layer, Compression::Gzip).unwrap();
    layout.image("latest", architecture, &json!({ "Cmd": ["true"] }), std::slice::from_ref(&blob)).unwrap();
    (layout.path(blob.digest()), format!("oci:{}:latest", folder.display()))
}

fn small_layer() -> Vec<u8> {
    let mut layer = Layer::new();
    layer.file("file", Access::root(0o644), &[b'x'; 9000]).unwrap();
    layer.finish().unwrap()
}

#[test]
fn an_image_for_another_machine() {
    let sandbox = Sandbox::with_empty_store();
    let (_, reference) = layout(&sandbox, "arm", "arm64", &small_layer());
    sandbox.run(&["-q"], &reference, &[]).end().failed(FAILED, &["amd64"]);
}

#[test]
fn layers_that_were_damaged_on_the_way() {
    let sandbox = Sandbox::with_empty_store();
    let (blob, truncated) = layout(&sandbox, "truncated", "amd64", &small_layer());
    let bytes = fs::read(&blob).unwrap();
    fs::write(&blob, &bytes[..bytes.len() / 2]).unwrap();
    sandbox.run(&["-q"], &truncated, &[]).end().failed(FAILED, &["sha256:"]);

    let (blob, changed) = layout(&sandbox, "changed", "amd64", &small_layer());
    let mut bytes = fs::read(&blob).unwrap();
    // The time in gzip's header: everything else stays readable.
    bytes[4] ^= 1;
    fs::write(&blob, bytes).unwrap();
    sandbox.run(&["-q"], &changed, &[]).end().failed(FAILED, &["sha256:"]);

    let (blob, missing) = layout(&sandbox, "missing", "amd64", &small_layer());
    fs::remove_file(&blob).unwrap();
    sandbox.run(&["-q"], &missing, &[]).end().failed(FAILED, &["sha256"]);
    assert_eq!(sandbox.cofferdam(["images", "-q"]).end().succeeded(), "");
}

#[test]
fn layers_that_mean_harm() {
    let sandbox = Sandbox::with_empty_store();
    let outside = sandbox.files().join("outside");
    let target = outside.to_str().unwrap();
    let hostile = |name: &str, entries: &[(EntryType, &str, &str)]| {
        let mut layer = Layer::new();
        for (kind, path, target) in entries {
            layer.unchecked(*kind, path, target, b"").unwrap();
        }
        layout(&sandbox, name, "amd64", &layer.finish().unwrap()).1
    };
    let up = hostile("up", &[(EntryType::Regular, "../../../../outside", "")]);
    let through = [(EntryType::Symlink, "link", target), (EntryType::Regular, "link/file", "")];
    let through = hostile("through", &through);
    let link = hostile("link", &[(EntryType::Link, "passwd", "../../../../etc/passwd")]);
    for reference in [up, through, link] {
        let ended = sandbox.cofferdam(["pull", "-q", &reference]).end();
        // What can be kept inside is kept inside; what cannot is refused.
        if ended.code() != 0 {
            ended.failed(1, &["sha256:"]);
        }
        assert!(!outside.exists(), "{reference} wrote outside");
    }
}

#[test]
fn a_layer_that_never_ends() {
    let sandbox = Sandbox::with_empty_store();
    let mut layer = Layer::new();
    // Holes cost nothing to say, and count all the same: 65 TiB is beyond every limit.
    layer.sparse("bomb", 65 << 40, (0, b"x")).unwrap();
    let (_, reference) = layout(&sandbox, "bomb", "amd64", &layer.finish().unwrap());
    sandbox.run(&["-q"], &reference, &[]).end().failed(FAILED, &["`bomb`", "more than 68719476736 bytes"]);
}

#[test]
fn a_kernel_that_is_none() {
    let sandbox = Sandbox::new();
    for (path, part) in [("/no/such/vmlinux", "--kernel"), ("/etc/passwd", "kernel"), ("/etc", "kernel")] {
        sandbox.run(&["--kernel", path], "busybox", &["true"]).end().failed(FAILED, &[path, part]);
    }
    // A compressed kernel (boot protocol of Linux, offset 0x202), as distributions install it.
    let mut image = vec![0u8; 4096];
    image[0x1fe..0x206].copy_from_slice(b"\x55\xaa\xeb\x66HdrS");
    let path = sandbox.files().join("bzImage");
    fs::write(&path, image).unwrap();
    sandbox.run(&["--kernel", path.to_str().unwrap()], "busybox", &["true"]).end().failed(FAILED, &["bzImage"]);
    // A kernel that ends in the middle.
    let whole = fs::read(kernel()).unwrap();
    let path = sandbox.files().join("half");
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    sandbox.run(&["--kernel", path.to_str().unwrap()], "busybox", &["true"]).end().failed(FAILED, &["half"]);
}

/// The guest kernel that the tests use.
fn kernel() -> PathBuf {
    match std::env::var_os("COFFERDAM_KERNEL") {
        Some(path) => path.into(),
        None => programs().join("vmlinux"),
    }
}

#[test]
fn a_guest_that_panics_shows_its_console() {
    let sandbox = Sandbox::new();
    let folder = sandbox.files();
    fs::copy("/bin/busybox", folder.join("busybox")).unwrap();
    fs::write(folder.join("init"), "#!/busybox sh\necho the last words of init\nexit 3\n").unwrap();
    let script = "chmod 755 init; printf 'init\\nbusybox\\n' | ./busybox cpio -o -H newc > initramfs 2> /dev/null";
    assert_eq!(sandbox.program("sh", ["-c", script]).end().succeeded(), "");
    let ended = sandbox.run(&[], "busybox", &["true"]).env("COFFERDAM_INITRAMFS", folder.join("initramfs")).end();
    assert_eq!((ended.code(), ended.text()), (FAILED, ""), "{ended:?}");
    let errors = ended.stderr.lines().filter(|line| line.starts_with("error: ")).count();
    assert_eq!(errors, 1, "{ended:?}");
    assert!(ended.stderr.contains("Attempted to kill init"), "{ended:?}");
}

#[test]
fn a_device_that_may_not_be_opened() {
    let sandbox = Sandbox::with_empty_store();
    // As another user, with folders of its own; in a user namespace where we are not root ourselves.
    let script = "set -e
        if [ \"$(id -u)\" = 0 ]; then
          mkdir run data; chmod 700 run data; chown 65534 run data; chmod 755 .. .
          mknod -m 600 kvm c 10 232
          exec unshare --mount sh -ec 'mount --bind kvm /dev/kvm
            export COFFERDAM_RUN=\"$PWD/run\" COFFERDAM_DATA=\"$PWD/data\"
            exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$@\"' sh \"$@\"
        fi
        exec unshare --map-root-user --mount sh -ec 'mount --bind /etc/shadow /dev/kvm; exec \"$@\"' sh \"$@\"";
    let (_, reference) = layout(&sandbox, "image", "amd64", &small_layer());
    let cofferdam = programs().join("cofferdam");
    let words = ["-c", script, "sh", cofferdam.to_str().unwrap(), "run", "--rm", "-q", &reference, "true"];
    sandbox.program("sh", words).end().failed(FAILED, &["/dev/kvm", "ermission"]);
    for folder in ["run", "data/tmp"] {
        let entries = fs::read_dir(sandbox.files().join(folder)).into_iter().flatten().count();
        assert_eq!(entries, 0, "{folder} is not empty");
    }
}

#[test]
fn commands_that_cannot_be_run() {
    let sandbox = Sandbox::new();
    for (words, code, part) in [(["no-such-command"], 127, "no-such-command"), (["/etc/data"], 126, "/etc/data")] {
        sandbox.run(&[], "busybox", &words).end().failed(code, &[part]);
    }
    sandbox.run(&["-u", "nobody-here"], "busybox", &["true"]).end().failed(FAILED, &["nobody-here"]);
    sandbox.run(&["-w", "/etc/data"], "busybox", &["true"]).end().failed(FAILED, &["/etc/data"]);
}

#[test]
fn more_than_the_host_has() {
    let sandbox = Sandbox::new();
    sandbox.run(&["-m", "900t"], "busybox", &["true"]).end().failed(FAILED, &["memory"]);
    sandbox.run(&["--cpus", "4000"], "busybox", &["true"]).end().failed(FAILED, &["--cpus", "4000"]);
    sandbox.run(&["-m", "1k"], "busybox", &["true"]).end().failed(FAILED, &["--memory"]);
}

#[test]
fn flags_that_mean_nothing_yet_are_refused() {
    let sandbox = Sandbox::new();
    for (flags, part) in [
        (["-v", "/a:/b"].as_slice(), "-v/--volume"),
        (&["-p", "80:80"], "-p/--publish"),
        (&["--network", "host"], "--network host"),
        (&["--privileged"], "--privileged"),
        (&["--name", "a/b"], "a/b"),
        (&["--no-such-flag"], "--no-such-flag"),
        (&["-e", "=x"], "=x"),
        (&["--security-opt", "seccomp=/etc/passwd"], "/etc/passwd"),
    ] {
        sandbox.run(flags, "busybox", &["true"]).end().failed(FAILED, &[part]);
    }
}
