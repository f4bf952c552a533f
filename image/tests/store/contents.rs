//! What comes out of layers: compared with tar(1), read by the kernel's driver, by erofs-utils and by erofs-rs.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use tar::EntryType;

use crate::Fixture;
use crate::images::{Compression, Layer, TestImage};
use crate::snapshot::{self, Content, Tree};

/// Unpacks archives with tar(1), one over the other. Only root can make devices and owners.
fn reference(archives: &[Vec<u8>], directory: &Path) -> Tree {
    for archive in archives {
        let mut child = Command::new("tar")
            .args(["--extract", "--numeric-owner", "--same-permissions", "--xattrs", "--xattrs-include=*"])
            .arg("--directory")
            .arg(directory)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(archive).unwrap();
        assert!(child.wait().unwrap().success(), "tar failed");
    }
    snapshot::directory(directory)
}

/// Compares trees; times of directories that no layer mentions and inode numbers are nobody's promise.
fn assert_same(actual: &Tree, expected: &Tree) {
    let names = |tree: &Tree| tree.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(actual), names(expected));
    for (path, actual) in actual {
        let mut expected = expected[path].clone();
        expected.inode = actual.inode;
        if path.as_os_str().is_empty() {
            expected.mtime = actual.mtime;
            expected.mode = actual.mode;
        }
        if !matches!(actual.content, Content::Data(..)) && actual.mode & 0o170_000 == 0o040_000 {
            // Filesystems differ in how they count the links of directories.
            expected.links = actual.links;
        }
        assert_eq!(actual, &expected, "{}", path.display());
    }
}

fn everything() -> Vec<Vec<u8>> {
    let long = "l".repeat(120) + "/" + &"m".repeat(200);
    // Version 2; owner rw, user 1000 r, group r, mask r, others r.
    let acl = b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x04\0\xe8\x03\0\0\x04\0\x04\0\xff\xff\xff\xff\
        \x10\0\x04\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";
    let mut base = Layer::new()
        .directory("./")
        .directory("dir/")
        .file("dir/small", b"hello\n")
        .file("dir/empty", b"")
        .file("block", &[7; 4096])
        .file("block+1", &[8; 4097])
        .file("zeroes", &[0; 40_000])
        .file("large", &(0..300_000u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>())
        .symlink("link", "dir/small")
        .symlink(
            "long-link",
            &"t".repeat(4000)
                .as_bytes()
                .chunks(100)
                .map(|c| std::str::from_utf8(c).unwrap())
                .collect::<Vec<_>>()
                .join("/"),
        )
        .hard_link("dir/hard", "dir/small")
        .hard_link("link2", "link")
        .device("null", EntryType::Char, 1, 3)
        .device("loop", EntryType::Block, 7, 300)
        .device("big", EntryType::Char, 4095, 1_048_575)
        .entry(EntryType::Fifo, b"fifo", b"", b"", |_| {})
        .directory(&("l".repeat(120) + "/"))
        .file(&long, b"long names")
        .entry(EntryType::Regular, b"setuid", b"", b"x", |header| {
            header.set_mode(0o4755);
            header.set_uid(1000);
            header.set_gid(3_000_000_000);
        })
        .pax(&[
            ("mtime", b"-5.5"),
            ("uid", b"4000000000"),
            ("SCHILY.xattr.user.a", b"one"),
            ("SCHILY.xattr.user.b", b"\n\0="),
        ])
        .file("pax", b"extended")
        .pax(&[("SCHILY.xattr.security.capability", b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0")])
        .file("capable", b"ping")
        .pax(&[("SCHILY.xattr.system.posix_acl_access", acl)])
        .file("acl", b"")
        .directory("ünïcode")
        .pax(&[("path", "ünïcode/ページ".as_bytes())])
        .file("placeholder", b"names");
    base = base.directory("many");
    for index in 0..700 {
        base = base.file(&format!("many/{}-{index}", "n".repeat(index % 90)), index.to_string().as_bytes());
    }
    let upper = Layer::new()
        .directory("dir")
        .file("dir/small", b"replaced")
        .directory("new")
        .directory("new/deep")
        .file("new/deep/er", b"x")
        .hard_link("new/hard-to-lower", "large");
    vec![base.finish(), upper.finish()]
}

#[test]
fn an_image_holds_what_tar_makes_of_its_layers() {
    let fixture = Fixture::new();
    let archives = everything();
    let compressions = [Compression::Gzip, Compression::Zstd];
    let layers: Vec<_> = archives.iter().cloned().zip(compressions).collect();
    let image = fixture.pull_image(&TestImage::new(&layers, "amd64")).unwrap();
    snapshot::fsck(&image.rootfs);
    let read = snapshot::read_by_crate(&image.rootfs);
    if let Some(mounted) = snapshot::mounted(&image.rootfs) {
        assert_eq!(mounted.len(), read.len());
        let directory = tempfile::tempdir().unwrap();
        let expected = reference(&archives, directory.path());
        // tar(1) unlinks and rewrites dir/small, as an upper layer does; its other name keeps the old content.
        assert_same(&mounted, &expected);
        assert_same(&read, &expected);
    }
    let same = |a: &str, b: &str| read[Path::new(a)].inode == read[Path::new(b)].inode;
    assert!(same("link", "link2") && same("large", "new/hard-to-lower") && !same("dir/small", "dir/hard"));
    assert_eq!(fixture.leftovers(), Vec::<std::path::PathBuf>::new());
}

#[test]
fn the_same_layers_give_the_same_bytes() {
    let (first, second) = (Fixture::new(), Fixture::new());
    let build = |compression| everything().into_iter().map(|archive| (archive, compression)).collect::<Vec<_>>();
    let gzip = first.pull_image(&TestImage::new(&build(Compression::Gzip), "amd64")).unwrap();
    let plain = second.pull_image(&TestImage::new(&build(Compression::None), "amd64")).unwrap();
    assert_eq!(gzip.rootfs.file_name(), plain.rootfs.file_name());
    assert!(std::fs::read(&gzip.rootfs).unwrap() == std::fs::read(&plain.rootfs).unwrap(), "bytes differ");
}

/// Paths of an image made of some layers, each with the content of files.
fn listing(layers: Vec<Layer>) -> Vec<String> {
    let fixture = Fixture::new();
    let layers: Vec<_> = layers.into_iter().map(|layer| (layer.finish(), Compression::Gzip)).collect();
    let image = fixture.pull_image(&TestImage::new(&layers, "amd64")).unwrap();
    snapshot::fsck(&image.rootfs);
    let tree = snapshot::read_by_crate(&image.rootfs);
    if let Some(mounted) = snapshot::mounted(&image.rootfs) {
        assert_eq!(mounted.keys().collect::<Vec<_>>(), tree.keys().collect::<Vec<_>>());
    }
    tree.into_keys().skip(1).map(|path| path.display().to_string()).collect()
}

#[test]
fn whiteouts_remove_what_lower_layers_left() {
    let base = || {
        Layer::new()
            .file("a", b"1")
            .directory("d")
            .file("d/x", b"2")
            .directory("d/sub")
            .file("d/sub/y", b"3")
            .directory("e")
            .file("e/z", b"4")
    };
    let upper = |layer: Layer| listing(vec![base(), layer]);
    let blank = |layer: Layer, name: &str| layer.file(name, b"");
    assert_eq!(upper(blank(Layer::new(), ".wh.a")), ["d", "d/sub", "d/sub/y", "d/x", "e", "e/z"]);
    assert_eq!(upper(blank(Layer::new(), "d/.wh.sub")), ["a", "d", "d/x", "e", "e/z"]);
    assert_eq!(upper(blank(Layer::new(), ".wh.d")), ["a", "e", "e/z"]);
    assert_eq!(upper(blank(Layer::new(), "d/.wh..wh..opq")), ["a", "d", "e", "e/z"]);
    assert_eq!(upper(blank(Layer::new(), ".wh..wh..opq")), Vec::<String>::new());
    // Whatever the order, a whiteout does not touch what its own layer brings.
    let kept = ["a", "d", "d/sub", "d/sub/n", "e", "e/z"];
    assert_eq!(upper(blank(Layer::new(), "d/.wh..wh..opq").file("d/sub/n", b"")), kept);
    assert_eq!(upper(blank(Layer::new().file("d/sub/n", b""), "d/.wh..wh..opq")), kept);
    assert_eq!(upper(blank(Layer::new().file("d/sub/n", b""), ".wh.d")), kept);
    assert_eq!(upper(blank(Layer::new().file("a", b"new"), ".wh.a")), upper(Layer::new()));
    // What is not there can be removed all the same, and makes no directory; AUFS leftovers mean nothing.
    assert_eq!(upper(blank(blank(Layer::new(), "no/such/.wh.x"), ".wh.nothing")), upper(Layer::new()));
    assert_eq!(
        upper(Layer::new().directory(".wh..wh.plnk").file(".wh..wh.plnk/1.2", b"").file(".wh..wh.aufs", b"")),
        upper(Layer::new())
    );
}

#[test]
fn files_and_directories_replace_each_other() {
    let base = || Layer::new().directory("d").file("d/x", b"").file("f", b"").symlink("l", "d");
    let over = |layer: Layer| listing(vec![base(), layer]);
    assert_eq!(over(Layer::new().file("d", b"")), ["d", "f", "l"]);
    assert_eq!(over(Layer::new().directory("f").file("f/y", b"")), ["d", "d/x", "f", "f/y", "l"]);
    assert_eq!(over(Layer::new().directory("l").file("l/y", b"")), ["d", "d/x", "f", "l", "l/y"]);
    assert_eq!(over(Layer::new().hard_link("d", "d/x")), ["d", "f", "l"]);
    assert_eq!(
        listing(vec![base(), Layer::new().file("d", b""), Layer::new().file("d2", b"").directory("d")]),
        ["d", "d2", "f", "l"]
    );
}

#[test]
fn names_are_relative_to_the_image_and_links_are_followed_inside_it() {
    let base = || Layer::new().directory("usr").directory("usr/lib").symlink("lib", "usr/lib").symlink("abs", "/usr");
    let over = |layer: Layer| listing(vec![base(), layer]);
    let with = |more: &[&str]| {
        let mut all = vec!["abs".to_owned(), "lib".to_owned(), "usr".to_owned(), "usr/lib".to_owned()];
        all.extend(more.iter().map(|path| (*path).to_owned()));
        all.sort();
        all
    };
    assert_eq!(over(Layer::new().file("/x", b"")), with(&["x"]));
    assert_eq!(over(Layer::new().file("./x//y/./z", b"")), with(&["x", "x/y", "x/y/z"]));
    assert_eq!(over(Layer::new().file("lib/so", b"")), with(&["usr/lib/so"]));
    assert_eq!(over(Layer::new().file("abs/lib/so", b"").hard_link("so", "/lib/so")), with(&["so", "usr/lib/so"]));
    assert_eq!(
        over(Layer::new().file("lib/x", b"").file("lib/.wh.x", b"").file("usr/lib/k", b"")),
        with(&["usr/lib/k", "usr/lib/x"])
    );
    // A link to what does not exist yet: its target is made.
    assert_eq!(
        over(Layer::new().symlink("run", "var/run").file("run/pid", b"")),
        with(&["run", "var", "var/run", "var/run/pid"])
    );
}

#[test]
fn sparse_files_are_filled_in_and_take_no_space() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("sparse");
    let writer = std::fs::File::create(&file).unwrap();
    writer.set_len(40 << 20).unwrap();
    for offset in [0u64, 5000, 1 << 20, (20 << 20) + 77, (40 << 20) - 3] {
        std::os::unix::fs::FileExt::write_all_at(&writer, b"xyz", offset).unwrap();
    }
    let expected = snapshot::directory(directory.path());
    for format in [
        "--format=gnu",
        "--format=posix --sparse-version=0.0",
        "--format=posix --sparse-version=0.1",
        "--format=posix --sparse-version=1.0",
    ] {
        let output = Command::new("tar")
            .args(["--create", "--sparse", "--numeric-owner"])
            .args(format.split(' '))
            .arg("--directory")
            .arg(directory.path())
            .arg("sparse")
            .output()
            .unwrap();
        assert!(output.status.success() && output.stdout.len() < 1 << 20, "{format}: {} bytes", output.stdout.len());
        let fixture = Fixture::new();
        let image = fixture.pull_image(&TestImage::new(&[(output.stdout, Compression::Zstd)], "amd64")).unwrap();
        let tree = snapshot::read_by_crate(&image.rootfs);
        let name = Path::new("sparse");
        assert_eq!(tree.keys().collect::<Vec<_>>(), [Path::new(""), name], "{format}");
        assert!(tree[name].content == expected[name].content, "{format}: {:?}", tree[name].content);
        let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&image.rootfs).unwrap());
        assert!(blocks * 512 < 1 << 20, "{format}: {blocks} blocks");
    }
}

#[test]
fn replaced_data_gives_its_space_back() {
    let noise: Vec<u8> = (0..1_000_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let fixture = Fixture::new();
    let layers = [Layer::new().file("f", &noise), Layer::new().file("f", b"small")];
    let layers: Vec<_> = layers.into_iter().map(|layer| (layer.finish(), Compression::Zstd)).collect();
    let image = fixture.pull_image(&TestImage::new(&layers, "amd64")).unwrap();
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&image.rootfs).unwrap());
    assert!(blocks * 512 < 100_000, "{blocks} blocks");
}

#[test]
fn an_empty_image_is_an_empty_directory() {
    assert_eq!(listing(vec![]), Vec::<String>::new());
    assert_eq!(listing(vec![Layer::new()]), Vec::<String>::new());
    assert_eq!(listing(vec![Layer::new().directory("/"), Layer::new().directory("./")]), Vec::<String>::new());
}

#[test]
fn a_large_directory_is_searchable() {
    let mut layer = Layer::new();
    let names: Vec<_> = (0..5000).map(|n| format!("{:0>width$}", n * 7919 % 5000, width = 1 + n % 60)).collect();
    for name in &names {
        layer = layer.file(&format!("d/{name}"), b"");
    }
    let paths = listing(vec![layer]);
    let distinct: std::collections::BTreeSet<_> = names.iter().collect();
    assert_eq!(paths.len(), distinct.len() + 1);
}
