//! Layers that no honest tool writes, and content that is not what its name promises: one clear line each, and
//! nothing left behind.

use image::{Digest, Limits, PullOptions, Reference, Silent};
use proptest::prelude::*;
use tar::EntryType;

use crate::images::{Compression, Layer, TestImage};
use crate::{Fixture, chain};

/// Pulls an image that must be refused, with a store that is as empty as before afterwards. Gives the error.
fn refused(image: &TestImage, options: &PullOptions) -> String {
    let fixture = Fixture::new();
    let directory = fixture.path("layout");
    image.write_layout(&directory, "latest");
    refused_from(&fixture, &format!("oci:{}", directory.display()), options)
}

fn refused_from(fixture: &Fixture, reference: &str, options: &PullOptions) -> String {
    let reference: Reference = reference.parse().unwrap();
    let error = fixture.store.pull(&reference, options, &Silent).expect_err("the image was accepted");
    assert_eq!(fixture.leftovers(), Vec::<std::path::PathBuf>::new());
    assert_eq!(fixture.store.list().unwrap(), []);
    assert!(crate::entries(&fixture.path("store/images")).is_empty());
    assert!(matches!(fixture.store.find(&reference), Ok(None)));
    chain(&error)
}

fn refused_layer(layer: Layer) -> String {
    refused(&TestImage::single(layer), &PullOptions::default())
}

/// The error names the layer, the path and what is wrong.
fn assert_layer_error(layer: Layer, path: &str, problem: &str) {
    let image = TestImage::single(layer);
    let text = refused(&image, &PullOptions::default());
    let at = if path.is_empty() { String::new() } else { format!(" at `{path}`") };
    let expected = format!("layer {} cannot be unpacked{at}: {problem}", image.layers[0]);
    assert!(text.starts_with(&expected), "got:      {text}\nexpected: {expected}");
}

#[test]
fn paths_that_leave_the_image_are_refused() {
    let dotdot = "the path has a `..` component";
    assert_layer_error(Layer::new().file("../etc/passwd", b"x"), "../etc/passwd", dotdot);
    assert_layer_error(Layer::new().file("a/../../x", b"x"), "a/../../x", dotdot);
    assert_layer_error(Layer::new().file("a/..", b"x"), "a/..", dotdot);
    assert_layer_error(Layer::new().directory(".."), "..", dotdot);
    assert_layer_error(Layer::new().file("../.wh.x", b""), "../.wh.x", dotdot);
    assert_layer_error(Layer::new().pax(&[("path", b"/x/../../y")]).file("x", b""), "/x/../../y", dotdot);
    assert_layer_error(Layer::new().file("a", b"").hard_link("b", "../a"), "b", dotdot);
    assert_layer_error(Layer::new().hard_link("b", "/../../etc/shadow"), "b", dotdot);
    let escape = "a symbolic link in the path leads out of the image";
    assert_layer_error(Layer::new().symlink("up", "../../..").file("up/etc/passwd", b"x"), "up/etc/passwd", escape);
    assert_layer_error(Layer::new().symlink("a/b", "../../c").file("a/b/x", b"x"), "a/b/x", escape);
    assert_layer_error(Layer::new().symlink("up", "..").hard_link("x", "up/etc/passwd"), "x", escape);
    assert_layer_error(Layer::new().symlink("up", "..").file("up/.wh.etc", b""), "up/.wh.etc", escape);
}

#[test]
fn links_that_lead_nowhere_are_refused() {
    assert_layer_error(
        Layer::new().hard_link("a", "/etc/passwd"),
        "a",
        "the hard link's target `/etc/passwd` does not exist",
    );
    assert_layer_error(Layer::new().hard_link("a", "a"), "a", "the hard link's target `a` does not exist");
    assert_layer_error(Layer::new().directory("d").hard_link("a", "d"), "a", "the hard link's target is a directory");
    assert_layer_error(
        Layer::new().file("a", b"").hard_link("b", "/"),
        "b",
        "the hard link's target `/` does not exist",
    );
    assert_layer_error(
        Layer::new().symlink("a", "b").symlink("b", "a").file("a/x", b""),
        "a/x",
        "the path goes through more than 40",
    );
    assert_layer_error(Layer::new().symlink("a", ""), "a", "the symbolic link's target is empty");
    assert_layer_error(
        Layer::new().pax(&[("linkpath", b"a\0b")]).symlink("a", "x"),
        "a",
        "the symbolic link's target is empty or holds a NUL",
    );
}

#[test]
fn impossible_files_are_refused() {
    assert_layer_error(Layer::new().file("f", b"").file("f/x", b""), "f/x", "`f` is not a directory");
    assert_layer_error(
        Layer::new().device("d", EntryType::Char, 1, 3).file("d/x", b""),
        "d/x",
        "`d` is not a directory",
    );
    assert_layer_error(Layer::new().symlink("/", "x"), "/", "the entry has no name of its own");
    assert_layer_error(
        Layer::new().device("dev", EntryType::Block, 4096, 0),
        "dev",
        "the device number 4096:0 does not exist",
    );
    assert_layer_error(
        Layer::new().device("dev", EntryType::Char, 1, 1 << 20),
        "dev",
        "the device number 1:1048576 does not exist",
    );
    assert_layer_error(Layer::new().entry(EntryType::new(b'V'), b"v", b"", b"", |_| {}), "v", "entries of type `V`");
    assert_layer_error(
        Layer::new().pax(&[("uid", b"4294967295")]).file("u", b""),
        "u",
        "the owner id 4294967295 is out of range",
    );
    assert_layer_error(Layer::new().file(".wh.", b""), ".wh.", "the whiteout does not name a file");
    assert_layer_error(Layer::new().file(".wh...", b""), ".wh...", "the whiteout does not name a file");
    assert_layer_error(Layer::new().file(".wh.a/b", b""), ".wh.a/b", "the whiteout does not name a file");
}

#[test]
fn names_and_attributes_beyond_the_limits_are_refused() {
    let name = "n".repeat(256);
    assert_layer_error(
        Layer::new().file(&name, b""),
        &format!("{}...", &name[..200]),
        "a name of 256 bytes is too long",
    );
    let deep = "d/".repeat(2049);
    assert!(refused_layer(Layer::new().file(&deep, b"")).contains("a path of 4098 bytes is too long"));
    let deep = "d/".repeat(1100);
    assert!(refused_layer(Layer::new().file(&deep, b"")).contains("directories are nested more than 1024 deep"));
    assert_layer_error(Layer::new().pax(&[("path", b"a\0b")]).file("x", b""), "a\\x00b", "the path holds a NUL byte");
    let xattr = |name: &str, size: usize| refused_layer(Layer::new().pax(&[(name, &vec![b'x'; size])]).file("x", b""));
    assert!(xattr("SCHILY.xattr.user.a", 65_536).contains("the extended attribute `user.a` is too large"));
    assert!(
        xattr("SCHILY.xattr.user.", 1).contains("the extended attribute `user.` is too large or has no valid name")
    );
    assert!(xattr("comment", 2 << 20).contains("bytes is too large, at most 1048576 are read"));
    let many: Vec<_> = (0..3).map(|n| format!("SCHILY.xattr.user.{n}")).collect();
    let value = vec![b'x'; 60_000];
    let records: Vec<_> = many.iter().map(|name| (name.as_str(), &value[..])).collect();
    assert!(refused_layer(Layer::new().pax(&records).file("x", b"")).contains("the extended attributes take"));
}

#[test]
fn damaged_archives_are_refused() {
    assert!(refused_layer(Layer::new().file("a", b"x").raw(&[1; 512])).contains("the tar header"));
    let truncated = |at: usize| {
        let archive = Layer::new().file("a", &[1; 5000]).file("b", b"").finish();
        refused(&TestImage::new(&[(archive[..at].to_vec(), Compression::Gzip)], "amd64"), &PullOptions::default())
    };
    for at in [100, 600, 5000] {
        assert!(truncated(at).ends_with("the layer is truncated"), "{at}: {}", truncated(at));
    }
    let sparse = |map: &[u8]| {
        refused_layer(
            Layer::new().pax(&[("GNU.sparse.size", b"100"), ("GNU.sparse.map", map)]).file("s", b"0123456789"),
        )
    };
    for map in [&b"0,5,3,5"[..], b"0,5", b"0,10,5", b"95,10", b"18446744073709551615,10", b"0,18446744073709551615,1,1"]
    {
        let text = sparse(map);
        assert!(text.ends_with("the map of the sparse file is malformed"), "{}: {text}", map.escape_ascii());
    }
}

#[test]
fn other_compressions_are_named() {
    let with = |bytes: &[u8]| {
        let mut image = TestImage::single(Layer::new().file("a", b""));
        replace_layer(&mut image, bytes.to_vec());
        refused(&image, &PullOptions::default())
    };
    assert!(with(b"BZh91AY&SY").contains("compression `bzip2` is not supported"));
    assert!(with(b"\xfd7zXZ\0\0").contains("compression `xz` is not supported"));
    assert!(with(b"not a tar archive at all, but long enough to be looked at").contains("the layer is truncated"));
}

/// Gives the image's only layer other bytes, and a manifest that fits them.
fn replace_layer(image: &mut TestImage, bytes: Vec<u8>) {
    let old = image.layers[0];
    let old_size = image.blobs[&old].len();
    let new = Digest::of(&bytes);
    let text = String::from_utf8(image.blobs[&image.manifest].clone()).unwrap();
    let text = text.replace(&old.to_string(), &new.to_string());
    let text = text.replace(&format!("\"size\":{old_size}"), &format!("\"size\":{}", bytes.len()));
    image.blobs.insert(new, bytes);
    image.manifest = Digest::of(text.as_bytes());
    image.blobs.insert(image.manifest, text.into_bytes());
    image.layers[0] = new;
}

#[test]
fn bombs_are_stopped() {
    let zeroes = |size: usize, compression| {
        TestImage::new(&[(Layer::new().file("z", &vec![0; size]).finish(), compression)], "amd64")
    };
    let limits = Limits { ratio_floor_bytes: 1 << 20, ..Limits::default() };
    let options = PullOptions { limits, ..PullOptions::default() };
    for compression in [Compression::Gzip, Compression::Zstd] {
        let text = refused(&zeroes(8 << 20, compression), &options);
        assert!(text.contains(", over 250 times its compressed size of "), "{text}");
    }
    let limits = Limits { unpacked_bytes: 1 << 20, ..Limits::default() };
    let options = PullOptions { limits, ..PullOptions::default() };
    let text = refused(&zeroes(2 << 20, Compression::Gzip), &options);
    assert!(text.contains("the image unpacks to more than 1048576 bytes"), "{text}");
    // Two layers together, and a sparse file that is small in the archive.
    let half = (Layer::new().file("z", &vec![0; 600 << 10]).finish(), Compression::Gzip);
    let text = refused(&TestImage::new(&[half.clone(), half], "amd64"), &options);
    assert!(text.contains("the image unpacks to more than 1048576 bytes"), "{text}");
    let sparse =
        Layer::new().pax(&[("GNU.sparse.size", b"9000000000000000000"), ("GNU.sparse.map", b"0,1")]).file("s", b"x");
    assert_layer_error(sparse, "s", "the image unpacks to more than 68719476736 bytes");
    let limits = Limits { entries: 100, ..Limits::default() };
    let options = PullOptions { limits, ..PullOptions::default() };
    let many = (0..100).fold(Layer::new(), |layer, n| layer.file(&n.to_string(), b""));
    assert!(refused(&TestImage::single(many), &options).contains("at `99`: the image has more than 100 files"));
    let limits = Limits { metadata_bytes: 10_000, ..Limits::default() };
    let options = PullOptions { limits, ..PullOptions::default() };
    let many = (0..100).fold(Layer::new(), |layer, n| layer.file(&format!("{n:0>200}"), b""));
    assert!(
        refused(&TestImage::single(many), &options).contains("names, links and extended attributes take more than")
    );
}

#[test]
fn content_that_is_not_what_its_digest_says_is_refused() {
    let good = TestImage::single(Layer::new().file("a", b"hello"));
    let layer = good.layers[0];
    let with = |digest: Digest, edit: fn(&mut Vec<u8>)| {
        let mut image = good.clone();
        edit(image.blobs.get_mut(&digest).unwrap());
        refused(&image, &PullOptions::default())
    };
    let flip = |bytes: &mut Vec<u8>| *bytes.last_mut().unwrap() ^= 1;
    for (digest, name) in [(layer, "layer"), (good.config, "image configuration"), (good.manifest, "manifest")] {
        let text = with(digest, flip);
        assert!(
            text.starts_with(&format!("{name} {digest} has the wrong digest: expected {digest}, got sha256:")),
            "{text}"
        );
    }
    // In the middle of the compressed data, where unpacking fails before the end is seen.
    let text = with(layer, |bytes| bytes[20] ^= 0xff);
    assert!(text.starts_with(&format!("layer {layer} has the wrong digest")), "{text}");
    let text = with(layer, |bytes| bytes.truncate(bytes.len() - 9));
    assert!(text.contains("it is truncated or was replaced"), "{text}");
    let text = with(layer, |bytes| bytes.extend_from_slice(&[0; 100]));
    assert!(text.contains("it is truncated or was replaced"), "{text}");
    // The layer is what the manifest says, but not what the configuration says.
    let mut other = good.clone();
    let bytes =
        TestImage::single(Layer::new().file("a", b"other")).blobs.into_values().find(|b| b.starts_with(&[0x1f, 0x8b]));
    replace_layer(&mut other, bytes.unwrap());
    let text = refused(&other, &PullOptions::default());
    assert!(text.starts_with("the unpacked layer ") && text.contains("has the wrong digest"), "{text}");
}

#[test]
fn images_for_other_machines_are_refused() {
    let image = TestImage::new(&[(Layer::new().finish(), Compression::Gzip)], "riscv64");
    let text = refused(&image, &PullOptions::default());
    assert!(text.ends_with("is for linux/riscv64, this host runs linux/amd64"), "{text}");
}

#[test]
fn layouts_that_are_none_are_refused() {
    let fixture = Fixture::new();
    let text = refused_missing(&fixture, &format!("oci:{}", fixture.path("missing").display()));
    assert!(text.contains("there is no index.json in"), "{text}");
    let directory = fixture.path("layout");
    let image = TestImage::single(Layer::new());
    image.write_layout(&directory, "one");
    TestImage::single(Layer::new().file("x", b"")).write_layout(&directory, "two");
    let text = refused_from(&fixture, &format!("oci:{}:three", directory.display()), &PullOptions::default());
    assert!(text.ends_with("the layout has: one, two"), "{text}");
    let text = refused_from(&fixture, &format!("oci:{}", directory.display()), &PullOptions::default());
    assert!(text.ends_with("the layout has: one, two"), "{text}");
    std::fs::remove_file(directory.join("blobs/sha256").join(image.layers[0].hex())).unwrap();
    let text = refused_from(&fixture, &format!("oci:{}:one", directory.display()), &PullOptions::default());
    assert!(text.contains("it lacks the blob"), "{text}");
    for (index, problem) in [
        ("[", "index.json is malformed"),
        ("{}", "it is neither a manifest nor an index"),
        (r#"{"schemaVersion":1,"layers":[]}"#, "schema 1"),
        (r#"{"schemaVersion":2,"layers":[],"manifests":[]}"#, "a manifest and an index at once"),
        (
            r#"{"schemaVersion":2,"manifests":[{"mediaType":"x","size":1,"digest":"sha256:../../../etc/passwd"}]}"#,
            "malformed",
        ),
        (r#"{"schemaVersion":2,"manifests":[]}"#, "the layout has: none with a name"),
    ] {
        std::fs::write(directory.join("index.json"), index).unwrap();
        let text = refused_from(&fixture, &format!("oci:{}", directory.display()), &PullOptions::default());
        assert!(text.contains(problem), "{index}: {text}");
    }
}

/// As [`refused_from`], where not even looking for the image is possible.
fn refused_missing(fixture: &Fixture, reference: &str) -> String {
    let error = fixture.pull(reference).expect_err("the image was accepted");
    assert_eq!(fixture.leftovers(), Vec::<std::path::PathBuf>::new());
    chain(&error)
}

/// Small, and with one of everything a parser can trip over.
fn specimen() -> Vec<u8> {
    Layer::new()
        .directory("d")
        .file("d/f", b"hello")
        .pax(&[("path", b"d/long"), ("mtime", b"1.5"), ("SCHILY.xattr.user.a", b"b"), ("size", b"3")])
        .file("x", b"abc")
        .pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"s"),
            ("GNU.sparse.realsize", b"9"),
        ])
        .file("y", &[&b"2\n0\n2\n5\n3\n"[..], &[0; 501], b"abcde"].concat())
        .file(&"n".repeat(150), b"")
        .symlink("l", "d")
        .hard_link("h", "l/f")
        .device("c", EntryType::Char, 1, 3)
        .file("d/.wh.f", b"")
        .finish()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn damaged_layers_give_an_image_or_an_error(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut archive = specimen();
        for (index, byte, mend) in edits {
            let at = index.index(archive.len());
            archive[at] = byte;
            if mend {
                // With a checksum that fits, the damage gets past the first check.
                let start = at / 512 * 512;
                let mut header = tar::Header::new_old();
                header.as_mut_bytes().copy_from_slice(&archive[start..start + 512]);
                header.set_cksum();
                archive[start..start + 512].copy_from_slice(header.as_bytes());
            }
        }
        if let Some(cut) = cut {
            archive.truncate(cut.index(archive.len()));
        }
        let fixture = Fixture::new();
        let limits = Limits { unpacked_bytes: 1 << 24, ..Limits::default() };
        let image = TestImage::new(&[(archive, Compression::None)], "amd64");
        let directory = fixture.path("layout");
        image.write_layout(&directory, "latest");
        let reference: Reference = format!("oci:{}", directory.display()).parse().unwrap();
        match fixture.store.pull(&reference, &PullOptions { limits, ..PullOptions::default() }, &Silent) {
            Ok(image) => {
                crate::snapshot::fsck(&image.rootfs);
                crate::snapshot::read_by_crate(&image.rootfs);
            }
            Err(error) => prop_assert!(!chain(&error).is_empty()),
        }
        prop_assert_eq!(fixture.leftovers(), Vec::<std::path::PathBuf>::new());
    }
}

#[test]
fn a_full_disk_leaves_nothing_behind() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let fixture = Fixture::new();
    let mount = fixture.path("store");
    let run = |command: &mut std::process::Command| command.status().unwrap().success();
    // Without the right to mount there is nothing to test here.
    if !run(std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "none"]).arg(&mount)) {
        return;
    }
    let store = image::Store::open(&mount).unwrap();
    let directory = fixture.path("layout");
    TestImage::single(Layer::new().file("a", &crate::registry::noise(1, 2 << 20))).write_layout(&directory, "latest");
    let reference: Reference = format!("oci:{}", directory.display()).parse().unwrap();
    let text = chain(&store.pull(&reference, &PullOptions::default(), &Silent).unwrap_err());
    let left = fixture.leftovers();
    assert!(run(std::process::Command::new("umount").arg(&mount)));
    assert!(text.starts_with("cannot write ") && text.contains("No space left on device"), "{text}");
    assert_eq!(left, Vec::<std::path::PathBuf>::new());
}
