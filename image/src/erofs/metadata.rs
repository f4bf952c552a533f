//! The metadata area: places every inode first, then writes directories, inodes and at last the superblock.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use super::BLOCK_BYTES;
use super::ondisk::{
    DIRENT_BYTES, DataLayout, Dirent, FileType, INODE_BYTES, RawInode, SLOT_BYTES, SUPERBLOCK_OFFSET, Superblock,
    encode_device, encode_dirents, encode_xattrs, xattr_bytes,
};
use crate::tree::{Ino, Kind, ROOT, Tree};

/// An inode without a place.
const UNPLACED: u64 = 0;

/// Where one inode goes.
struct Placement {
    ino: Ino,
    layout: DataLayout,
    /// First of the blocks that hold its directory entries or link target, and how many.
    first_block: u32,
    blocks: u32,
    /// Bytes of the directory or the link.
    size: u64,
}

/// The whole plan: what goes where.
struct Plan {
    /// In the order of the metadata area.
    placements: Vec<Placement>,
    /// Node number of each inode, [`UNPLACED`] without.
    nids: Vec<u64>,
    metadata_block: u32,
    metadata_bytes: u64,
}

/// Writes everything but file data behind `data_end` (a block number), and the superblock. The file is complete
/// then, but not yet synced.
///
/// # Errors
/// Writing failed, or the image has outgrown what EROFS can address.
pub(crate) fn write_metadata(file: &File, data_end: u32, tree: &Tree, uuid: [u8; 16]) -> io::Result<()> {
    let plan = Plan::new(tree, data_end)?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.seek(SeekFrom::Start(u64::from(data_end) * BLOCK_BYTES))?;
    plan.write_blocks(tree, &mut out)?;
    plan.write_inodes(tree, &mut out)?;
    out.flush()?;
    drop(out);
    let blocks = u64::from(plan.metadata_block) + plan.metadata_bytes.div_ceil(BLOCK_BYTES);
    file.set_len(blocks * BLOCK_BYTES)?;
    let superblock = Superblock {
        root_nid: plan.nids[ROOT as usize] as u16,
        inodes: plan.placements.len() as u64,
        blocks: u32::try_from(blocks).map_err(|_| too_large())?,
        metadata_block: plan.metadata_block,
        uuid,
    };
    file.write_all_at(&superblock.encode(), SUPERBLOCK_OFFSET)
}

impl Plan {
    /// Places the inodes: the root first (its number has 16 bits), then directory by directory, the children of one
    /// directory side by side, so that a walk down a path touches few blocks.
    fn new(tree: &Tree, data_end: u32) -> io::Result<Plan> {
        let mut plan = Plan {
            placements: Vec::new(),
            nids: vec![UNPLACED; tree.len()],
            metadata_block: data_end,
            // Number 0 stays free: programs take inode 0 for "no file".
            metadata_bytes: SLOT_BYTES,
        };
        plan.place(tree, ROOT)?;
        let mut pending = vec![ROOT];
        while let Some(ino) = pending.pop() {
            let Some(directory) = tree.directory(ino) else { continue };
            for entry in directory.entries.values() {
                if plan.nids[entry.ino as usize] == UNPLACED {
                    plan.place(tree, entry.ino)?;
                }
            }
            let children = directory.entries.values().rev().map(|entry| entry.ino);
            pending.extend(children.filter(|child| tree.directory(*child).is_some()));
        }
        Ok(plan)
    }

    fn place(&mut self, tree: &Tree, ino: Ino) -> io::Result<()> {
        let inode = tree.inode(ino);
        let size = match &inode.kind {
            Kind::Directory(_) => directory_size(tree, ino),
            Kind::Symlink(target) => target.len() as u64,
            _ => 0,
        };
        let header = INODE_BYTES + xattr_bytes(&inode.attributes.xattrs);
        let tail = (size % BLOCK_BYTES) as usize;
        let block = BLOCK_BYTES as usize;
        // The kernel wants an inline tail in one block; inode and tail in the same one costs it one read.
        let layout = if tail > 0 && header + tail <= block { DataLayout::Inline } else { DataLayout::Plain };
        let mut position = self.metadata_bytes.next_multiple_of(SLOT_BYTES);
        let left = block - (position % BLOCK_BYTES) as usize;
        let together = if layout == DataLayout::Inline { header + tail } else { INODE_BYTES };
        if left < together {
            position += left as u64;
        }
        let blocks = if layout == DataLayout::Inline { size / BLOCK_BYTES } else { size.div_ceil(BLOCK_BYTES) };
        let blocks = u32::try_from(blocks).map_err(|_| too_large())?;
        self.placements.push(Placement { ino, layout, first_block: self.metadata_block, blocks, size });
        self.metadata_block = self.metadata_block.checked_add(blocks).ok_or_else(too_large)?;
        self.nids[ino as usize] = position / SLOT_BYTES;
        let behind = if layout == DataLayout::Inline { header + tail } else { header };
        self.metadata_bytes = position + behind as u64;
        Ok(())
    }

    /// Writes the whole blocks of directories and links, in the order they were placed.
    fn write_blocks(&self, tree: &Tree, out: &mut impl Write) -> io::Result<()> {
        let mut bytes = Vec::new();
        for placement in self.placements.iter().filter(|placement| placement.blocks > 0) {
            bytes.clear();
            self.encode_content(tree, placement, &mut bytes);
            bytes.resize((u64::from(placement.blocks) * BLOCK_BYTES) as usize, 0);
            out.write_all(&bytes)?;
        }
        Ok(())
    }

    fn write_inodes(&self, tree: &Tree, out: &mut impl Write) -> io::Result<()> {
        let mut position = 0;
        let mut bytes = Vec::new();
        for (index, placement) in self.placements.iter().enumerate() {
            let start = self.nids[placement.ino as usize] * SLOT_BYTES;
            bytes.clear();
            bytes.resize((start - position) as usize, 0);
            let inode = tree.inode(placement.ino);
            bytes.extend_from_slice(&self.raw_inode(tree, placement, index as u32 + 1).encode());
            encode_xattrs(&inode.attributes.xattrs, &mut bytes);
            if placement.layout == DataLayout::Inline {
                let mut content = Vec::new();
                self.encode_content(tree, placement, &mut content);
                bytes.extend_from_slice(&content[placement.blocks as usize * BLOCK_BYTES as usize..]);
            }
            position += bytes.len() as u64;
            out.write_all(&bytes)?;
        }
        Ok(())
    }

    fn raw_inode(&self, tree: &Tree, placement: &Placement, serial: u32) -> RawInode {
        let inode = tree.inode(placement.ino);
        let attributes = &inode.attributes;
        let (size, union) = match &inode.kind {
            Kind::File { size, block } => (*size, *block),
            Kind::Character(device) | Kind::Block(device) => (0, encode_device(*device)),
            Kind::Directory(_) | Kind::Symlink(_) => (placement.size, placement.first_block),
            Kind::Fifo | Kind::Gone => (0, 0),
        };
        let links = match &inode.kind {
            // Its name, its own `.`, and the `..` of each directory in it.
            Kind::Directory(directory) => {
                2 + directory.entries.values().filter(|entry| tree.directory(entry.ino).is_some()).count() as u32
            }
            _ => inode.links,
        };
        RawInode {
            layout: placement.layout,
            xattr_bytes: xattr_bytes(&attributes.xattrs),
            mode: file_type(&inode.kind).mode_bits() | attributes.permissions,
            size,
            union,
            serial,
            uid: attributes.uid,
            gid: attributes.gid,
            mtime_seconds: attributes.mtime_seconds,
            mtime_nanoseconds: attributes.mtime_nanoseconds,
            links,
        }
    }

    /// Appends a directory's entries, block after block, or a link's target.
    fn encode_content(&self, tree: &Tree, placement: &Placement, out: &mut Vec<u8>) {
        if let Kind::Symlink(target) = &tree.inode(placement.ino).kind {
            out.extend_from_slice(target);
            return;
        }
        let mut block = Vec::new();
        let mut used = 0;
        for (name, ino) in directory_entries(tree, placement.ino) {
            let bytes = DIRENT_BYTES + name.len();
            if used + bytes > BLOCK_BYTES as usize {
                encode_dirents(&block, out);
                out.resize(out.len().next_multiple_of(BLOCK_BYTES as usize), 0);
                block.clear();
                used = 0;
            }
            let file_type = file_type(&tree.inode(ino).kind);
            block.push(Dirent { name, nid: self.nids[ino as usize], file_type });
            used += bytes;
        }
        encode_dirents(&block, out);
    }
}

/// A directory's entries with `.` and `..`, in the byte order that the kernel's binary search needs.
fn directory_entries(tree: &Tree, ino: Ino) -> impl Iterator<Item = (&[u8], Ino)> {
    let directory = tree.directory(ino);
    let parent = directory.map_or(ROOT, |directory| directory.parent);
    let mut dots = [(&b"."[..], ino), (&b".."[..], parent)].into_iter().peekable();
    let mut names = directory
        .into_iter()
        .flat_map(|directory| directory.entries.iter())
        .map(|(name, entry)| (name.as_ref(), entry.ino))
        .peekable();
    std::iter::from_fn(move || match (dots.peek(), names.peek()) {
        (Some(dot), Some(name)) if name.0 < dot.0 => names.next(),
        (Some(_), _) => dots.next(),
        (None, _) => names.next(),
    })
}

/// Bytes of a directory's entries: full blocks, each padded, and what the last one uses.
fn directory_size(tree: &Tree, ino: Ino) -> u64 {
    let (mut full, mut used) = (0, 0);
    for (name, _) in directory_entries(tree, ino) {
        let bytes = (DIRENT_BYTES + name.len()) as u64;
        if used + bytes > BLOCK_BYTES {
            full += 1;
            used = 0;
        }
        used += bytes;
    }
    full * BLOCK_BYTES + used
}

fn file_type(kind: &Kind) -> FileType {
    match kind {
        // A name never leads to an inode that is gone.
        Kind::File { .. } | Kind::Gone => FileType::Regular,
        Kind::Directory(_) => FileType::Directory,
        Kind::Symlink(_) => FileType::Symlink,
        Kind::Character(_) => FileType::Character,
        Kind::Block(_) => FileType::Block,
        Kind::Fifo => FileType::Fifo,
    }
}

fn too_large() -> io::Error {
    io::Error::from(io::ErrorKind::FileTooLarge)
}
