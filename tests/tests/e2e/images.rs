//! Images on their way from a registry to a container.

use std::fs;
use std::os::unix::fs::MetadataExt;

use tests::images::{LONG_PATH, SPARSE_SIZE};
use tests::sandbox::{Sandbox, registry};

#[test]
fn an_image_is_pulled_run_listed_and_removed() {
    let sandbox = Sandbox::with_empty_store();
    let registry = registry();
    let reference = format!("{}/busybox", registry.address());
    // `run` pulls what is missing and says so on standard error, where it does not disturb.
    let ended = sandbox.run(&[], &reference, &["echo", "hello"]).end();
    assert_eq!((ended.text(), ended.code()), ("hello\n", 0), "{ended:?}");
    let id = sandbox.cofferdam(["images", "--quiet"]).end().succeeded().trim().to_owned();
    assert!(!id.is_empty());
    let table = sandbox.cofferdam(["images"]).end();
    assert!(table.succeeded().lines().any(|line| line.contains("/busybox") && line.contains("latest")), "{table:?}");

    // What is in the store needs no registry.
    drop(registry);
    let flags = ["--pull", "never", "--quiet"];
    assert_eq!(sandbox.run(&flags, &reference, &["echo", "again"]).end().succeeded(), "again\n");
    assert_eq!(sandbox.cofferdam(["rmi", &reference]).end().code(), 0);
    assert_eq!(sandbox.cofferdam(["images", "--quiet"]).end().succeeded(), "");
    sandbox.run(&flags, &reference, &["true"]).end().failed(125, &["not in the store"]);
    assert_eq!(sandbox.cofferdam(["prune"]).end().code(), 0);
    let left = fs::read_dir(sandbox.store().join("images")).unwrap().count();
    assert_eq!(left, 0, "prune left an image");
}

#[test]
fn a_digest_names_one_image_for_ever() {
    let sandbox = Sandbox::with_empty_store();
    let registry = registry();
    let reference = format!("{}/defaults", registry.address());
    let digest = tests::sandbox::manifest_digest("defaults");
    let exact = format!("{reference}@{digest}");
    let ended = sandbox.run(&["-q"], &exact, &["exact"]).end();
    assert_eq!(ended.succeeded(), "entrypoint: exact\n");
    let wrong = format!("{reference}@sha256:{}", "0".repeat(64));
    sandbox.run(&["-q"], &wrong, &["exact"]).end().failed(125, &["0000"]);
}

#[test]
fn two_pulls_at_once_do_the_work_once() {
    let sandbox = Sandbox::with_empty_store();
    let registry = registry();
    let reference = format!("{}/busybox", registry.address());
    let pulls = [(); 2].map(|()| sandbox.cofferdam(["pull", &reference]).start());
    for pull in pulls {
        let ended = pull.end();
        assert_eq!(ended.code(), 0, "{ended:?}");
    }
    // Each asks what the image is, by the manifest and the configuration, whose digest is the image's id.
    let id = sandbox.cofferdam(["images", "--quiet"]).end().succeeded().trim().to_owned();
    let requests = registry.end();
    let layers = requests.iter().filter(|path| path.contains("/blobs/") && !path.contains(&id));
    assert_eq!(layers.count(), 1, "{requests:?}");
}

#[test]
fn layers_become_one_tree() {
    let sandbox = Sandbox::with_empty_store();
    let registry = registry();
    let reference = format!("{}/layers", registry.address());
    let script = layers_script();
    let ended = sandbox.run(&["-q"], &reference, &["sh", "-c", &script]).end();
    assert_eq!(ended.succeeded(), layers_output());
    // Holes stay holes.
    let images = fs::read_dir(sandbox.store().join("images")).unwrap().flatten();
    let size: u64 = images.map(|image| image.metadata().unwrap().blocks() * 512).sum();
    assert!(size < SPARSE_SIZE / 4, "the image takes {size} bytes");
}

#[test]
fn layers_on_debian_become_one_tree() {
    let sandbox = Sandbox::new();
    let script = layers_script()
        + "; getfattr -n user.note /opt/attribute 2>/dev/null | grep -c hello; \
        python3 -c 'import os; print(os.getxattr(\"/opt/attribute\", \"user.note\"), \
        os.getxattr(\"/opt/capable\", \"security.capability\").hex())'";
    let ended = sandbox.run(&[], "debian", &["sh", "-c", &script]).end();
    let attributes = "0\nb'hello' 0100000200200000000000000000000000000000\n";
    assert_eq!(ended.succeeded(), layers_output() + attributes);
}

/// Looks at everything that the upper layers of `layers` and `debian` do.
fn layers_script() -> String {
    format!(
        "cd /opt; LC_ALL=C ls -A opaque kept was-a-file
         ls gone removed 2>/dev/null; LC_ALL=C ls -Ad .wh* */.wh* 2>/dev/null
         stat -c '%s %u:%g %a' replaced
         stat -c '%h %a' first second kept/third; cat kept/third; echo
         readlink symlink; cat symlink; echo
         stat -c %s sparse; tail -c +{middle} sparse | head -c 13; echo
         cat '/{LONG_PATH}'; echo; cat '\u{fc}ml\u{e4}ut \u{2713}'; echo
         stat -c %Y first",
        middle = SPARSE_SIZE / 2 + 1,
    )
}

fn layers_output() -> String {
    let mut lines: Vec<String> =
        ["kept:", "file", "third", "", "opaque:", "new", "", "was-a-file:", "inside", "5 1000:50 4711"]
            .map(str::to_owned)
            .into();
    lines.extend(["3 640", "3 640", "3 640", "linked", "/opt/kept/file", "kept"].map(str::to_owned));
    lines.push(SPARSE_SIZE.to_string());
    lines.extend(["in the middle", "long", "utf-8", "1000000000"].map(str::to_owned));
    lines.join("\n") + "\n"
}
