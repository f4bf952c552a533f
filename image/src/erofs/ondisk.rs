//! Byte layouts of EROFS structures (`fs/erofs/erofs_fs.h` of Linux), all little-endian.

use crate::tree::{Device, Xattr};

/// Where the superblock stands, in bytes from the start of the image.
pub(super) const SUPERBLOCK_OFFSET: u64 = 1024;
/// Bytes of the superblock.
pub(super) const SUPERBLOCK_BYTES: usize = 128;
const SUPERBLOCK_MAGIC: u32 = 0xE0F5_E1E2;
/// EROFS_FEATURE_COMPAT_MTIME: inodes carry modification times.
const FEATURE_COMPAT_MTIME: u32 = 1 << 1;
/// log2 of the block size.
const BLOCK_BITS: u8 = 12;

/// Bytes of an extended inode (`struct erofs_inode_extended`).
pub(super) const INODE_BYTES: usize = 64;
/// Node numbers count 32-byte slots from the start of the metadata.
pub(super) const SLOT_BYTES: u64 = 32;
/// Bytes of a directory entry without its name (`struct erofs_dirent`).
pub(super) const DIRENT_BYTES: usize = 12;

/// Bytes of `struct erofs_xattr_ibody_header`.
const XATTR_HEADER_BYTES: usize = 12;
/// Bytes of `struct erofs_xattr_entry` before its name.
const XATTR_ENTRY_BYTES: usize = 4;

/// How an inode's data is found (`i_format` bits 1-3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DataLayout {
    /// EROFS_INODE_FLAT_PLAIN: whole blocks elsewhere.
    Plain = 0,
    /// EROFS_INODE_FLAT_INLINE: whole blocks elsewhere, the last part behind the inode.
    Inline = 2,
}

/// File types of directory entries (`FT_*`), and of the mode (`S_IF*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileType {
    Regular = 1,
    Directory = 2,
    Character = 3,
    Block = 4,
    Fifo = 5,
    Symlink = 7,
}

impl FileType {
    pub(super) fn mode_bits(self) -> u16 {
        match self {
            FileType::Fifo => 0o010_000,
            FileType::Character => 0o020_000,
            FileType::Directory => 0o040_000,
            FileType::Block => 0o060_000,
            FileType::Regular => 0o100_000,
            FileType::Symlink => 0o120_000,
        }
    }
}

/// What the superblock says; everything else in it is zero.
pub(super) struct Superblock {
    /// Node number of the root, which has only 16 bits.
    pub(super) root_nid: u16,
    pub(super) inodes: u64,
    pub(super) blocks: u32,
    pub(super) metadata_block: u32,
    pub(super) uuid: [u8; 16],
}

impl Superblock {
    pub(super) fn encode(&self) -> [u8; SUPERBLOCK_BYTES] {
        let mut bytes = [0; SUPERBLOCK_BYTES];
        put(&mut bytes, 0, &SUPERBLOCK_MAGIC.to_le_bytes());
        // No checksum (offset 4): the file is written once by this host, and checking it would cost every start.
        put(&mut bytes, 8, &FEATURE_COMPAT_MTIME.to_le_bytes());
        put(&mut bytes, 12, &[BLOCK_BITS]);
        put(&mut bytes, 14, &self.root_nid.to_le_bytes());
        put(&mut bytes, 16, &self.inodes.to_le_bytes());
        put(&mut bytes, 36, &self.blocks.to_le_bytes());
        put(&mut bytes, 40, &self.metadata_block.to_le_bytes());
        put(&mut bytes, 48, &self.uuid);
        bytes
    }
}

/// One inode, ready to be written.
pub(super) struct RawInode {
    pub(super) layout: DataLayout,
    pub(super) xattr_bytes: usize,
    pub(super) mode: u16,
    pub(super) size: u64,
    /// `i_u`: first block of the data, or the device number.
    pub(super) union: u32,
    /// The number stat(2) shows to 32-bit programs.
    pub(super) serial: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime_seconds: i64,
    pub(super) mtime_nanoseconds: u32,
    pub(super) links: u32,
}

impl RawInode {
    pub(super) fn encode(&self) -> [u8; INODE_BYTES] {
        /// Bit 0 of `i_format`: the 64-byte form.
        const EXTENDED: u16 = 1;
        let mut bytes = [0; INODE_BYTES];
        put(&mut bytes, 0, &(EXTENDED | (self.layout as u16) << 1).to_le_bytes());
        put(&mut bytes, 2, &xattr_count_field(self.xattr_bytes).to_le_bytes());
        put(&mut bytes, 4, &self.mode.to_le_bytes());
        put(&mut bytes, 8, &self.size.to_le_bytes());
        put(&mut bytes, 16, &self.union.to_le_bytes());
        put(&mut bytes, 20, &self.serial.to_le_bytes());
        put(&mut bytes, 24, &self.uid.to_le_bytes());
        put(&mut bytes, 28, &self.gid.to_le_bytes());
        put(&mut bytes, 32, &self.mtime_seconds.to_le_bytes());
        put(&mut bytes, 40, &self.mtime_nanoseconds.to_le_bytes());
        put(&mut bytes, 44, &self.links.to_le_bytes());
        bytes
    }
}

/// `i_xattr_icount`: 0 without attributes, else words behind the header plus one.
fn xattr_count_field(xattr_bytes: usize) -> u16 {
    // XATTRS_BYTES_MAX keeps the count far below 65536.
    if xattr_bytes == 0 { 0 } else { ((xattr_bytes - XATTR_HEADER_BYTES) / 4 + 1) as u16 }
}

/// The number EROFS has for an attribute's prefix (`EROFS_XATTR_INDEX_*`), and the rest of the name.
/// `None` for namespaces that no Linux filesystem keeps.
pub(crate) fn xattr_prefix(name: &[u8]) -> Option<(u8, &[u8])> {
    match name {
        b"system.posix_acl_access" => Some((2, b"")),
        b"system.posix_acl_default" => Some((3, b"")),
        _ => [(&b"user."[..], 1), (b"trusted.", 4), (b"security.", 6)]
            .into_iter()
            .find_map(|(prefix, number)| Some((number, name.strip_prefix(prefix)?))),
    }
}

/// Bytes that a file's extended attributes take behind its inode.
pub(super) fn xattr_bytes(xattrs: &[Xattr]) -> usize {
    if xattrs.is_empty() {
        return 0;
    }
    let entry = |x: &Xattr| (XATTR_ENTRY_BYTES + x.suffix.len() + x.value.len()).next_multiple_of(4);
    XATTR_HEADER_BYTES + xattrs.iter().map(entry).sum::<usize>()
}

/// Appends a file's extended attributes, [`xattr_bytes`] in all. None are shared between files: the header is zero.
pub(super) fn encode_xattrs(xattrs: &[Xattr], out: &mut Vec<u8>) {
    if xattrs.is_empty() {
        return;
    }
    out.extend_from_slice(&[0; XATTR_HEADER_BYTES]);
    for xattr in xattrs {
        // Both lengths were checked when the attribute was read.
        out.extend_from_slice(&[xattr.suffix.len() as u8, xattr.prefix]);
        out.extend_from_slice(&(xattr.value.len() as u16).to_le_bytes());
        out.extend_from_slice(&xattr.suffix);
        out.extend_from_slice(&xattr.value);
        let used = XATTR_ENTRY_BYTES + xattr.suffix.len() + xattr.value.len();
        out.resize(out.len() + used.next_multiple_of(4) - used, 0);
    }
}

/// `new_encode_dev` of Linux.
pub(super) fn encode_device(device: Device) -> u32 {
    (device.minor & 0xff) | (device.major << 8) | ((device.minor & !0xff) << 12)
}

/// One directory entry as it is written.
pub(super) struct Dirent<'a> {
    pub(super) name: &'a [u8],
    pub(super) nid: u64,
    pub(super) file_type: FileType,
}

/// Appends one directory block: all entries, then all names. At most a block's worth, which the caller sees to.
pub(super) fn encode_dirents(entries: &[Dirent<'_>], out: &mut Vec<u8>) {
    let mut name_offset = entries.len() * DIRENT_BYTES;
    for entry in entries {
        out.extend_from_slice(&entry.nid.to_le_bytes());
        out.extend_from_slice(&(name_offset as u16).to_le_bytes());
        out.extend_from_slice(&[entry.file_type as u8, 0]);
        name_offset += entry.name.len();
    }
    for entry in entries {
        out.extend_from_slice(entry.name);
    }
}

fn put(bytes: &mut [u8], offset: usize, field: &[u8]) {
    bytes[offset..offset + field.len()].copy_from_slice(field);
}
