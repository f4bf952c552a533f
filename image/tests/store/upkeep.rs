//! Names, ids, leases, removal and pruning; archives and layouts that change.

use image::{Error, PullOptions, Reference, Silent, Summary};

use crate::images::{Compression, Layer, TestImage, compress};
use crate::{Fixture, chain, entries, snapshot};

fn image_with(name: &str) -> TestImage {
    TestImage::single(Layer::new().file(name, name.as_bytes()))
}

fn find(fixture: &Fixture, name: &str) -> Option<image::Image> {
    fixture.store.find(&name.parse::<Reference>().unwrap()).unwrap()
}

#[test]
fn an_image_is_found_by_name_and_by_id() {
    let fixture = Fixture::new();
    let test = image_with("a");
    let directory = fixture.path("layout");
    test.write_layout(&directory, "one");
    let name = format!("oci:{}:one", directory.display());
    let pulled = fixture.pull(&name).unwrap();
    let hex = test.config.hex();
    for name in [name.clone(), hex.clone(), hex[..12].to_owned(), format!("sha256:{hex}")] {
        assert_eq!(find(&fixture, &name).unwrap().id, pulled.id, "{name}");
    }
    assert!(find(&fixture, &format!("oci:{}", directory.display())).is_none());
    assert!(find(&fixture, "0123456789ab").is_none());
    assert!(find(&fixture, "busybox").is_none());
    let list = fixture.store.list().unwrap();
    let expected = Summary {
        repository: Some(format!("oci:{}", directory.display())),
        tag: Some("one".to_owned()),
        id: pulled.id.clone(),
        created: Some("2024-01-02T03:04:05Z".to_owned()),
        size_bytes: test.archives[0].len() as u64,
    };
    assert_eq!(list, [expected]);
}

#[test]
fn a_source_that_changed_is_not_found_until_it_is_pulled_again() {
    let fixture = Fixture::new();
    let directory = fixture.path("layout");
    image_with("a").write_layout(&directory, "latest");
    let layout = format!("oci:{}", directory.display());
    fixture.pull(&layout).unwrap();
    std::fs::remove_file(directory.join("index.json")).unwrap();
    image_with("b").write_layout(&directory, "latest");
    assert!(find(&fixture, &layout).is_none());
    let second = fixture.pull(&layout).unwrap();
    assert_eq!(find(&fixture, &layout).unwrap().id, second.id);
    let archive = fixture.path("archive.tar");
    let name = format!("docker-archive:{}", archive.display());
    std::fs::write(&archive, image_with("a").legacy_archive(&["x:1"])).unwrap();
    fixture.pull(&name).unwrap();
    assert!(find(&fixture, &name).is_some());
    std::fs::write(&archive, image_with("something else").legacy_archive(&["x:1"])).unwrap();
    assert!(find(&fixture, &name).is_none());
}

#[test]
fn archives_of_every_kind_are_read() {
    let fixture = Fixture::new();
    let layers = [Layer::new().file("a", b"1"), Layer::new().file("b", b"2").file(".wh.a", b"")];
    let layers: Vec<_> = layers.into_iter().map(|layer| (layer.finish(), Compression::Gzip)).collect();
    let test = TestImage::new(&layers, "amd64");
    let kinds =
        [test.legacy_archive(&["x:1", "host:5/y:2"]), test.oci_archive("1", true), test.oci_archive("1", false)];
    for (index, archive) in kinds.iter().enumerate() {
        for compression in [Compression::None, Compression::Gzip] {
            let path = fixture.path(&format!("{index}{compression:?}.tar"));
            std::fs::write(&path, compress(archive, compression)).unwrap();
            let image = fixture.pull(&format!("docker-archive:{}", path.display())).unwrap();
            assert_eq!(image.id, test.config.to_string());
            let tree = snapshot::read_by_crate(&image.rootfs);
            assert_eq!(tree.keys().map(|path| path.to_str().unwrap()).collect::<Vec<_>>(), ["", "b"]);
        }
    }
    let path = fixture.path("0None.tar");
    for name in ["x:1", "docker.io/library/x:1", "host:5/y:2"] {
        fixture.pull(&format!("docker-archive:{}:{name}", path.display())).unwrap();
    }
    let text = chain(&fixture.pull(&format!("docker-archive:{}:z", path.display())).unwrap_err());
    assert!(text.ends_with("the archive has 1 images, with the names: x:1, host:5/y:2"), "{text}");
    assert_eq!(entries(&fixture.path("store/images")).len(), 2);
    assert_eq!(fixture.leftovers(), Vec::<std::path::PathBuf>::new());
}

#[test]
fn archives_that_are_none_are_refused() {
    let fixture = Fixture::new();
    let path = fixture.path("archive");
    let good = image_with("a").legacy_archive(&["x"]);
    let wrong_layer = {
        let text = good.clone();
        let at = text.windows(4).rposition(|window| window == b"a\0\0\0").unwrap();
        let mut text = text;
        text[at] = b'b';
        text
    };
    for (bytes, problem) in [
        (b"no archive".to_vec(), "the layer is truncated"),
        (vec![7; 4096], "is not usable"),
        (Layer::new().finish(), "there is no index.json in it"),
        (Layer::new().file("manifest.json", b"{").finish(), "is malformed"),
        (
            Layer::new().file("manifest.json", br#"[{"Config":"c","Layers":["../../etc/passwd"]}]"#).finish(),
            "`c` is not there",
        ),
        (Layer::new().hard_link("x", "y").finish(), "`x` is not a plain file"),
        (Layer::new().symlink("manifest.json", "/etc/passwd").finish(), "there is no index.json in it"),
        (wrong_layer, ""),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let text = chain(&fixture.pull(&format!("docker-archive:{}", path.display())).unwrap_err());
        assert!(text.contains(problem), "{problem}: {text}");
        assert_eq!(fixture.leftovers(), Vec::<std::path::PathBuf>::new());
    }
    for other in [fixture.directory.path().to_owned(), "/dev/zero".into(), fixture.path("missing")] {
        let text = chain(&fixture.pull(&format!("docker-archive:{}", other.display())).unwrap_err());
        assert!(text.contains(&other.display().to_string()), "{text}");
    }
}

#[test]
fn removing_the_last_name_removes_the_image() {
    let fixture = Fixture::new();
    let test = image_with("a");
    let directory = fixture.path("layout");
    test.write_layout(&directory, "one");
    test.write_layout(&directory, "two");
    let name = |tag: &str| format!("oci:{}:{tag}", directory.display());
    drop((fixture.pull(&name("one")).unwrap(), fixture.pull(&name("two")).unwrap()));
    assert!(matches!(fixture.store.remove(&test.config.hex(), false), Err(Error::Ambiguous { .. })));
    let removed = fixture.store.remove(&name("one"), false).unwrap();
    assert_eq!((removed.untagged, removed.deleted), (vec![name("one")], None));
    assert!(find(&fixture, &name("one")).is_none() && find(&fixture, &name("two")).is_some());
    let removed = fixture.store.remove(&test.config.hex()[..12], false).unwrap();
    assert_eq!((removed.untagged, removed.deleted), (vec![name("two")], Some(test.config.to_string())));
    assert_eq!(fixture.store.list().unwrap(), []);
    assert!(entries(&fixture.path("store/images")).is_empty());
    let text = chain(&fixture.store.remove(&name("two"), false).unwrap_err());
    assert!(text.starts_with("no such image"), "{text}");
    assert!(matches!(fixture.store.remove("", true), Err(Error::Reference(_))));
}

#[test]
fn an_image_in_use_stays() {
    let fixture = Fixture::new();
    let image = fixture.pull_image(&image_with("a")).unwrap();
    let name = fixture.store.list().unwrap()[0].repository.clone().unwrap();
    assert!(matches!(fixture.store.remove(&name, false), Err(Error::InUse { .. })));
    let removed = fixture.store.remove(&name, true).unwrap();
    assert_eq!((removed.untagged.len(), removed.deleted), (1, None));
    assert_eq!(fixture.store.prune().unwrap().images, Vec::<String>::new());
    assert!(image.rootfs.exists());
    // A child that was handed the lease keeps it, though this process lets it go.
    let mut child =
        std::process::Command::new("cat").stdin(image.lease).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut output = child.stdout.take().unwrap();
    std::io::Read::read_exact(&mut output, &mut [0; 1]).unwrap();
    if std::fs::metadata(&image.rootfs).unwrap().len() > 1 << 20 {
        panic!("the child would have ended already");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(fixture.store.list().unwrap()[0].repository, None);
    let pruned = fixture.store.prune().unwrap();
    assert_eq!(pruned.images, [image.id]);
    assert!(pruned.freed_bytes > 0 && !image.rootfs.exists());
}

#[test]
fn pruning_keeps_what_has_a_name() {
    let fixture = Fixture::new();
    let directory = fixture.path("layout");
    let (old, new) = (image_with("old"), image_with("new"));
    old.write_layout(&directory, "latest");
    let name = format!("oci:{}", directory.display());
    fixture.pull(&name).unwrap();
    std::fs::remove_file(directory.join("index.json")).unwrap();
    new.write_layout(&directory, "latest");
    fixture.pull(&name).unwrap();
    assert_eq!(fixture.store.list().unwrap().len(), 2);
    std::fs::write(fixture.path("store/tmp/rubbish"), b"x").unwrap();
    std::fs::write(fixture.path("store/blobs/sha256/rubbish.partial"), b"x").unwrap();
    assert_eq!(fixture.store.prune().unwrap().images, [old.config.to_string()]);
    assert_eq!(find(&fixture, &name).unwrap().id, new.config.to_string());
    assert_eq!(fixture.leftovers(), Vec::<std::path::PathBuf>::new());
}

#[test]
fn images_with_the_same_layers_share_a_file_and_part_without_harm() {
    let fixture = Fixture::new();
    let layers = [(Layer::new().file("a", b"a").finish(), Compression::Gzip)];
    let first = TestImage::new(&layers, "amd64");
    let mut second = first.clone();
    // Another configuration over the same layer.
    let config = String::from_utf8(first.blobs[&first.config].clone()).unwrap().replace("/bin/sh", "/bin/ls");
    let manifest = String::from_utf8(first.blobs[&first.manifest].clone()).unwrap();
    second.config = image::Digest::of(config.as_bytes());
    let manifest = manifest.replace(&first.config.to_string(), &second.config.to_string());
    second.manifest = image::Digest::of(manifest.as_bytes());
    second.blobs.insert(second.config, config.into_bytes());
    second.blobs.insert(second.manifest, manifest.into_bytes());
    let a = fixture.pull_image(&first).unwrap();
    let b = fixture.pull_image(&second).unwrap();
    assert_eq!(a.rootfs, b.rootfs);
    assert_ne!(a.id, b.id);
    assert_eq!(b.config.cmd, ["/bin/ls"]);
    let rootfs = a.rootfs.clone();
    drop((a, b));
    fixture.store.remove(&first.config.hex(), false).unwrap();
    assert!(rootfs.exists());
    fixture.store.remove(&second.config.hex(), false).unwrap();
    assert!(!rootfs.exists());
}

#[test]
fn only_the_owner_may_enter_the_store() {
    use std::os::unix::fs::MetadataExt;
    let fixture = Fixture::new();
    let image = fixture.pull_image(&image_with("a")).unwrap();
    for path in ["store", "store/images", "store/blobs", "store/blobs/sha256", "store/refs", "store/tmp", "store/locks"]
    {
        assert_eq!(std::fs::metadata(fixture.path(path)).unwrap().mode() & 0o777, 0o700, "{path}");
    }
    assert_eq!(std::fs::metadata(&image.rootfs).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn a_store_that_cannot_be_made_is_an_error() {
    let fixture = Fixture::new();
    std::fs::write(fixture.path("file"), b"").unwrap();
    let error = image::Store::open(&fixture.path("file/store")).unwrap_err();
    assert!(chain(&error).starts_with("cannot create "), "{}", chain(&error));
    let reference: Reference = "oci:/dev/null".parse().unwrap();
    assert!(fixture.store.pull(&reference, &PullOptions::default(), &Silent).is_err());
}
