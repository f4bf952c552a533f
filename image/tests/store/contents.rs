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
        .symlink("long-link", &"t".repeat(4000).as_bytes().chunks(100).map(|c| std::str::from_utf8(c).unwrap()).collect::<Vec<_>>().join("/"))
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
        .pax(&[("mtime", b"-5.5"), ("uid", b"4000000000"), ("SCHILY.xattr.user.a", b"one"), ("SCHILY.xattr.user.b", b"\n\0=")])
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
