//! The file tree of an image while its layers are applied: inodes and names in memory, file data already on disk.
//!
//! Everything here was chosen by whoever made the image, so each thing that grows is bounded by [`Limits`]: the
//! number of inodes, the bytes of names, link targets and extended attributes, the depth of directories.

use std::collections::BTreeMap;

use crate::limits::Limits;
use crate::problem::Problem;

/// Index of an inode in [`Tree`]. Inodes are never reused: one that lost its last name becomes [`Kind::Gone`].
pub(crate) type Ino = u32;

/// The root directory's inode.
pub(crate) const ROOT: Ino = 0;

/// Depth of the deepest directory. Linux reaches 2048 with a path of PATH_MAX bytes; software that nests deeper
/// than 1024 is not known, and the bound keeps every walk down the tree shallow.
const DEPTH_MAX: u16 = 1024;

/// Times a path may be redirected by a symbolic link before it counts as a loop (MAXSYMLINKS of Linux).
const LINKS_FOLLOWED_MAX: u32 = 40;

/// Number of a layer, from 1; 0 stands for before the first one.
pub(crate) type LayerNumber = u32;

/// Ownership, permissions and the like: what every inode has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// The twelve permission bits; the type is in [`Kind`].
    pub(crate) permissions: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime_seconds: i64,
    pub(crate) mtime_nanoseconds: u32,
    /// Sorted by name, so that the same tree always gives the same bytes.
    pub(crate) xattrs: Vec<Xattr>,
}

/// One extended attribute, its well-known prefix replaced by the number EROFS has for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Xattr {
    pub(crate) prefix: u8,
    pub(crate) suffix: Box<[u8]>,
    pub(crate) value: Box<[u8]>,
}

/// What an inode is.
#[derive(Debug)]
pub(crate) enum Kind {
    /// `size` bytes that begin at 4 KiB block `block` of the image.
    File {
        size: u64,
        block: u32,
    },
    Directory(Directory),
    Symlink(Box<[u8]>),
    Character(Device),
    Block(Device),
    Fifo,
    /// Every name was removed again; only the number remains taken.
    Gone,
}

/// A device number, as the kernel splits it (12 and 20 bits).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

#[derive(Debug)]
pub(crate) struct Directory {
    pub(crate) parent: Ino,
    pub(crate) entries: BTreeMap<Box<[u8]>, Entry>,
    depth: u16,
    /// The layer that created it: nothing of a lower layer can be in it.
    born: LayerNumber,
    /// The last layer that made it opaque, so that saying so twice costs nothing.
    swept: LayerNumber,
}

/// A name in a directory, and the layer that last wrote it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) ino: Ino,
    layer: LayerNumber,
}

#[derive(Debug)]
pub(crate) struct Inode {
    pub(crate) attributes: Attributes,
    pub(crate) kind: Kind,
    /// Names of anything but a directory.
    pub(crate) links: u32,
}

/// The tree, and which layer is being applied to it.
#[derive(Debug)]
pub(crate) struct Tree {
    inodes: Vec<Inode>,
    layer: LayerNumber,
    entries_max: u32,
    metadata_bytes_max: u64,
    metadata_bytes: u64,
    /// Data of files that lost their last name: (first block, bytes).
    dead: Vec<(u32, u64)>,
}

impl Tree {
    pub(crate) fn new(limits: &Limits) -> Tree {
        let root = Inode {
            attributes: Attributes { permissions: 0o755, ..Attributes::default() },
            kind: Kind::Directory(Directory { parent: ROOT, entries: BTreeMap::new(), depth: 0, born: 0, swept: 0 }),
            links: 1,
        };
        Tree {
            inodes: vec![root],
            layer: 0,
            entries_max: limits.entries,
            metadata_bytes_max: limits.metadata_bytes,
            metadata_bytes: 0,
            dead: Vec::new(),
        }
    }

    /// Everything that follows belongs to the next layer.
    pub(crate) fn next_layer(&mut self) {
        self.layer += 1;
    }

    pub(crate) fn inode(&self, ino: Ino) -> &Inode {
        &self.inodes[ino as usize]
    }

    /// How many inodes there ever were; every [`Ino`] is below it.
    pub(crate) fn len(&self) -> usize {
        self.inodes.len()
    }

    pub(crate) fn directory(&self, ino: Ino) -> Option<&Directory> {
        match &self.inode(ino).kind {
            Kind::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    /// Data that no name reaches any more: (first block, bytes).
    pub(crate) fn dead_data(&self) -> &[(u32, u64)] {
        &self.dead
    }

    /// The directory that `path` leads to, following symbolic links inside the tree as a chroot would.
    /// Missing directories are made when `create` is set, else the answer is `None`.
    ///
    /// # Errors
    /// A component that is not a directory, too many links, or a link that climbs above the root.
    pub(crate) fn walk(&mut self, path: &[&[u8]], create: bool) -> Result<Option<Ino>, Problem> {
        let mut current = ROOT;
        for (index, component) in path.iter().enumerate() {
            match self.lookup(current, component) {
                Some(ino) if self.directory(ino).is_some() => current = ino,
                Some(ino) if matches!(self.inode(ino).kind, Kind::Symlink(_)) => {
                    return self.walk_links(current, &path[index..], create);
                }
                Some(_) => return Err(Problem::ParentNotDirectory(component.to_vec())),
                None if create => current = self.make_directory(current, component)?,
                None => return Ok(None),
            }
        }
        Ok(Some(current))
    }

    /// [`Tree::walk`] from the first symbolic link on; the only part that must copy components.
    fn walk_links(&mut self, mut current: Ino, path: &[&[u8]], create: bool) -> Result<Option<Ino>, Problem> {
        let mut pending: Vec<Box<[u8]>> = path.iter().rev().map(|component| Box::from(*component)).collect();
        let mut followed = 0;
        while let Some(component) = pending.pop() {
            if component.as_ref() == b".." {
                if current == ROOT {
                    return Err(Problem::LinkEscapes);
                }
                current = self.directory(current).map_or(ROOT, |directory| directory.parent);
                continue;
            }
            let Some(ino) = self.lookup(current, &component) else {
                if !create {
                    return Ok(None);
                }
                current = self.make_directory(current, &component)?;
                continue;
            };
            match &self.inode(ino).kind {
                Kind::Directory(_) => current = ino,
                Kind::Symlink(target) => {
                    followed += 1;
                    if followed > LINKS_FOLLOWED_MAX {
                        return Err(Problem::TooManyLinks);
                    }
                    if target.starts_with(b"/") {
                        current = ROOT;
                    }
                    let components = target.split(|byte| *byte == b'/');
                    pending.extend(components.rev().filter(|c| !c.is_empty() && *c != b".").map(Box::from));
                }
                _ => return Err(Problem::ParentNotDirectory(component.into_vec())),
            }
        }
        Ok(Some(current))
    }

    /// The inode `name` stands for in `directory`.
    pub(crate) fn lookup(&self, directory: Ino, name: &[u8]) -> Option<Ino> {
        self.directory(directory)?.entries.get(name).map(|entry| entry.ino)
    }

    /// Puts a new inode under a name. A directory over a directory only changes its attributes; anything else that
    /// had the name goes first, with all below it.
    ///
    /// # Errors
    /// A limit of the tree is reached.
    pub(crate) fn put(
        &mut self,
        parent: Ino,
        name: &[u8],
        attributes: Attributes,
        kind: NewKind,
    ) -> Result<Ino, Problem> {
        self.account_attributes(&attributes)?;
        if let (Some(existing), NewKind::Directory) = (self.lookup(parent, name), &kind)
            && self.directory(existing).is_some()
        {
            self.inodes[existing as usize].attributes = attributes;
            self.insert(parent, name, existing);
            return Ok(existing);
        }
        let kind = match kind {
            NewKind::Directory => Kind::Directory(self.new_directory(parent)?),
            NewKind::File { size, block } => Kind::File { size, block },
            NewKind::Symlink(target) => {
                self.account(target.len())?;
                Kind::Symlink(target)
            }
            NewKind::Character(device) => Kind::Character(device),
            NewKind::Block(device) => Kind::Block(device),
            NewKind::Fifo => Kind::Fifo,
        };
        let ino = self.add_inode(Inode { attributes, kind, links: 1 })?;
        self.account(name.len())?;
        self.remove(parent, name);
        self.insert(parent, name, ino);
        Ok(ino)
    }

    /// Gives the root directory other attributes (the entry `./` of a layer).
    ///
    /// # Errors
    /// The limit on the bytes of metadata is reached.
    pub(crate) fn set_root_attributes(&mut self, attributes: Attributes) -> Result<(), Problem> {
        self.account_attributes(&attributes)?;
        self.inodes[ROOT as usize].attributes = attributes;
        Ok(())
    }

    /// Gives an existing inode that is not a directory one more name.
    ///
    /// # Errors
    /// The target is a directory, or a limit of the tree is reached.
    pub(crate) fn link(&mut self, parent: Ino, name: &[u8], target: Ino) -> Result<(), Problem> {
        if self.directory(target).is_some() {
            return Err(Problem::LinkToDirectory);
        }
        if self.lookup(parent, name) == Some(target) {
            self.insert(parent, name, target);
            return Ok(());
        }
        self.account(name.len() + size_of::<Entry>())?;
        // First the new link, then the removal of what had the name: the target may lie below it.
        let inode = &mut self.inodes[target as usize];
        inode.links = inode.links.checked_add(1).ok_or(Problem::TooManyEntries(self.entries_max))?;
        self.remove(parent, name);
        self.insert(parent, name, target);
        Ok(())
    }

    /// A whiteout: removes what lower layers left under `name`, and keeps what this layer wrote.
    pub(crate) fn white_out(&mut self, parent: Ino, name: &[u8]) {
        let Some(entry) = self.directory(parent).and_then(|directory| directory.entries.get(name)).copied() else {
            return;
        };
        if self.directory(entry.ino).is_some() {
            self.sweep(entry.ino);
        }
        if !self.is_kept(entry) {
            self.remove(parent, name);
        }
    }

    /// An opaque whiteout: removes what lower layers left in `directory`, at any depth.
    pub(crate) fn sweep(&mut self, directory: Ino) {
        let layer = self.layer;
        let Kind::Directory(swept) = &mut self.inodes[directory as usize].kind else { return };
        if swept.born == layer || swept.swept == layer {
            return;
        }
        swept.swept = layer;
        // The depth of the recursion is that of the tree, at most DEPTH_MAX.
        let entries = std::mem::take(&mut swept.entries);
        let mut kept = BTreeMap::new();
        for (name, entry) in entries {
            if self.directory(entry.ino).is_some() {
                self.sweep(entry.ino);
            }
            if self.is_kept(entry) {
                kept.insert(name, entry);
            } else {
                self.release(entry.ino);
            }
        }
        if let Kind::Directory(swept) = &mut self.inodes[directory as usize].kind {
            swept.entries = kept;
        }
    }

    /// Whether a name survives a whiteout of this layer: it was written by the layer, or something below it was.
    fn is_kept(&self, entry: Entry) -> bool {
        entry.layer == self.layer || self.directory(entry.ino).is_some_and(|directory| !directory.entries.is_empty())
    }

    fn make_directory(&mut self, parent: Ino, name: &[u8]) -> Result<Ino, Problem> {
        let attributes = Attributes { permissions: 0o755, ..Attributes::default() };
        self.put(parent, name, attributes, NewKind::Directory)
    }

    fn new_directory(&self, parent: Ino) -> Result<Directory, Problem> {
        let depth = self.directory(parent).map_or(0, |directory| directory.depth) + 1;
        if depth > DEPTH_MAX {
            return Err(Problem::TooDeep(DEPTH_MAX));
        }
        Ok(Directory { parent, entries: BTreeMap::new(), depth, born: self.layer, swept: self.layer })
    }

    fn insert(&mut self, parent: Ino, name: &[u8], ino: Ino) {
        let layer = self.layer;
        if let Kind::Directory(directory) = &mut self.inodes[parent as usize].kind {
            directory.entries.insert(name.into(), Entry { ino, layer });
        }
    }

    fn remove(&mut self, parent: Ino, name: &[u8]) {
        if let Kind::Directory(directory) = &mut self.inodes[parent as usize].kind
            && let Some(entry) = directory.entries.remove(name)
        {
            self.release(entry.ino);
        }
    }

    /// Takes one name from an inode, and from everything below it when it was a directory.
    fn release(&mut self, ino: Ino) {
        let mut pending = vec![ino];
        while let Some(ino) = pending.pop() {
            let inode = &mut self.inodes[ino as usize];
            inode.links = inode.links.saturating_sub(1);
            if inode.links > 0 {
                continue;
            }
            inode.attributes.xattrs = Vec::new();
            match std::mem::replace(&mut inode.kind, Kind::Gone) {
                Kind::Directory(directory) => pending.extend(directory.entries.values().map(|entry| entry.ino)),
                Kind::File { size, block } if size > 0 => self.dead.push((block, size)),
                _ => {}
            }
        }
    }

    fn add_inode(&mut self, inode: Inode) -> Result<Ino, Problem> {
        let ino = self.inodes.len() as u64;
        if ino >= u64::from(self.entries_max) {
            return Err(Problem::TooManyEntries(self.entries_max));
        }
        self.inodes.push(inode);
        Ok(ino as Ino)
    }

    fn account_attributes(&mut self, attributes: &Attributes) -> Result<(), Problem> {
        let bytes = attributes.xattrs.iter().map(|x| size_of::<Xattr>() + x.suffix.len() + x.value.len()).sum();
        self.account(bytes)
    }

    fn account(&mut self, bytes: usize) -> Result<(), Problem> {
        self.metadata_bytes += bytes as u64;
        if self.metadata_bytes > self.metadata_bytes_max {
            return Err(Problem::TooMuchMetadata(self.metadata_bytes_max));
        }
        Ok(())
    }
}

/// What [`Tree::put`] can make.
#[derive(Debug)]
pub(crate) enum NewKind {
    File { size: u64, block: u32 },
    Directory,
    Symlink(Box<[u8]>),
    Character(Device),
    Block(Device),
    Fifo,
}
