//! Random layers against a model: a flat map of paths, with the rules of the specification spelled out naively.

use std::collections::BTreeMap;
use std::path::PathBuf;

use image::Digest;
use proptest::prelude::*;

use crate::Fixture;
use crate::images::{Compression, Layer, TestImage};
use crate::snapshot::{self, Content};

/// One entry of a layer. Names are few, so that entries meet.
#[derive(Clone, Debug)]
enum Operation {
    File(Vec<u8>, u16),
    Directory(Vec<u8>),
    Symlink(Vec<u8>),
    HardLink(Vec<u8>, Vec<u8>),
    Whiteout(Vec<u8>),
    Opaque(Vec<u8>),
}

/// A path of one to three names out of `a` to `d`.
fn path() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop::sample::select(&b"abcd"[..]), 1..=3)
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        4 => (path(), any::<u16>()).prop_map(|(path, size)| Operation::File(path, size)),
        3 => path().prop_map(Operation::Directory),
        1 => path().prop_map(Operation::Symlink),
        2 => (path(), path()).prop_map(|(path, target)| Operation::HardLink(path, target)),
        2 => path().prop_map(Operation::Whiteout),
        1 => path().prop_map(Operation::Opaque),
    ]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    Directory,
    Symlink,
    /// Its number among all files ever made, and its size.
    File(usize, u16),
}

/// Path to node, and the layer that wrote it.
#[derive(Default)]
struct Model {
    nodes: BTreeMap<Vec<u8>, (Node, usize)>,
    files: usize,
    layer: usize,
}

impl Model {
    fn node(&self, path: &[u8]) -> Option<Node> {
        if path.is_empty() { Some(Node::Directory) } else { self.nodes.get(path).map(|(node, _)| *node) }
    }

    /// Whether an entry can be put there: every parent is a directory or nothing.
    fn has_place(&self, path: &[u8]) -> bool {
        (1..path.len()).all(|end| matches!(self.node(&path[..end]), None | Some(Node::Directory)))
    }

    fn put(&mut self, path: &[u8], node: Node) {
        for end in 1..path.len() {
            self.nodes.entry(path[..end].to_vec()).or_insert((Node::Directory, self.layer));
        }
        if node != Node::Directory || self.node(path) != Some(Node::Directory) {
            self.nodes.retain(|other, _| !other.starts_with(path));
        }
        self.nodes.insert(path.to_vec(), (node, self.layer));
    }

    /// Removes what lower layers left at and below `path`, at it only if `whole`.
    fn hide(&mut self, path: &[u8], whole: bool) {
        let layer = self.layer;
        let own: Vec<Vec<u8>> =
            self.nodes.iter().filter(|(_, (_, written))| *written == layer).map(|(path, _)| path.clone()).collect();
        self.nodes.retain(|other, _| {
            let below = other.starts_with(path) && (whole || other.len() > path.len());
            // Directories stay for what this layer put into them.
            !below || own.iter().any(|own| own.starts_with(other))
        });
    }

    /// Applies an operation, and adds it to the layer; one that the rules forbid is left out of both.
    fn apply(&mut self, operation: &Operation, archive: Layer) -> Layer {
        let (Operation::File(path, _)
        | Operation::Directory(path)
        | Operation::Symlink(path)
        | Operation::HardLink(path, _)
        | Operation::Whiteout(path)
        | Operation::Opaque(path)) = operation;
        if !self.has_place(path) {
            return archive;
        }
        let name = text(path);
        match operation {
            Operation::File(_, size) => {
                self.files += 1;
                self.put(path, Node::File(self.files, *size));
                archive.file(&name, &content(self.files, *size))
            }
            Operation::Directory(_) => {
                self.put(path, Node::Directory);
                archive.directory(&name)
            }
            Operation::Symlink(_) => {
                self.put(path, Node::Symlink);
                archive.symlink(&name, "nowhere")
            }
            Operation::HardLink(_, target) => match self.node(target) {
                Some(node @ Node::File(..)) if self.has_place(target) => {
                    // If the target lies below, it goes with what it replaces, and only the new name stays.
                    self.put(path, node);
                    archive.hard_link(&name, &text(target))
                }
                _ => archive,
            },
            Operation::Whiteout(path) => {
                self.hide(path, true);
                let (last, parents) = path.split_last().unwrap();
                let parents: String = parents.iter().map(|name| format!("{}/", char::from(*name))).collect();
                archive.file(&format!("{parents}.wh.{}", char::from(*last)), b"")
            }
            Operation::Opaque(path) => match self.node(path) {
                None | Some(Node::Directory) => {
                    self.hide(path, false);
                    archive.file(&format!("{name}/.wh..wh..opq"), b"")
                }
                _ => archive,
            },
        }
    }
}

fn text(path: &[u8]) -> String {
    path.iter().map(|name| char::from(*name).to_string()).collect::<Vec<_>>().join("/")
}

fn content(number: usize, size: u16) -> Vec<u8> {
    format!("{number}.").into_bytes().into_iter().cycle().take(usize::from(size)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 80, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn an_image_is_what_the_model_says(
        layers in prop::collection::vec(prop::collection::vec(operation(), 0..25), 1..4),
    ) {
        let mut model = Model::default();
        let mut archives = Vec::new();
        for (number, operations) in layers.iter().enumerate() {
            model.layer = number + 1;
            let archive = operations.iter().fold(Layer::new(), |archive, operation| model.apply(operation, archive));
            archives.push((archive.finish(), Compression::None));
        }
        let fixture = Fixture::new();
        let image = fixture.pull_image(&TestImage::new(&archives, "amd64")).unwrap();
        snapshot::fsck(&image.rootfs);
        let tree = snapshot::read_by_crate(&image.rootfs);
        let expected: Vec<_> = std::iter::once(PathBuf::new()).chain(model.nodes.keys().map(|path| text(path).into())).collect();
        let mut actual: Vec<_> = tree.keys().cloned().collect();
        actual.sort();
        let mut sorted = expected;
        sorted.sort();
        prop_assert_eq!(actual, sorted);
        for (path, (node, _)) in &model.nodes {
            let seen = &tree[&PathBuf::from(text(path))];
            match node {
                Node::Directory => prop_assert_eq!(seen.mode & 0o170_000, 0o040_000),
                Node::Symlink => prop_assert_eq!(&seen.content, &Content::Target(b"nowhere".to_vec())),
                Node::File(number, size) => {
                    let data = content(*number, *size);
                    prop_assert_eq!(&seen.content, &Content::Data(u64::from(*size), Digest::of(&data)));
                    let names: Vec<_> = model.nodes.iter().filter(|(_, (other, _))| other == node).collect();
                    prop_assert_eq!(seen.links, names.len() as u64);
                    for (name, _) in names {
                        prop_assert_eq!(tree[&PathBuf::from(text(name))].inode, seen.inode);
                    }
                }
            }
        }
    }
}
