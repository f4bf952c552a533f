//! Writer of EROFS images: uncompressed, read by any kernel since 5.4.
//!
//! On-disk format: `Documentation/filesystems/erofs.rst`, "On-disk details", and `fs/erofs/erofs_fs.h` of Linux.
//! What is written, in the order of the file:
//!
//! ```text
//! block 0      1024 bytes unused, superblock (128 bytes), zeroes
//! blocks 1..   data of regular files, each from a block boundary, in the order of the layers
//! then         whole blocks of large directories, and link targets too long to stand beside their inode
//! meta_blkaddr inodes (64-byte form), each with its extended attributes and, where it fits, the directory's
//!              last (mostly only) block or the link's target right behind it
//! ```
//!
//! File data is written as the layers are read, so its place comes before the metadata that refers to it. A block
//! of zeroes becomes a hole of the host's file. The same tree and data always give the same bytes.

mod data;
mod metadata;
mod ondisk;

pub(crate) use data::DataWriter;
pub(crate) use metadata::write_metadata;
pub(crate) use ondisk::xattr_prefix;

/// Bytes of a block: that of a page, or the guest's kernel could not mount the image.
pub(crate) const BLOCK_BYTES: u64 = 4096;

/// Changes whenever the same layers would give other bytes. It is part of the name of every image file, so files
/// of an older writer are never mistaken for new ones.
pub(crate) const WRITER_VERSION: u32 = 1;
