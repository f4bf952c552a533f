//! What can be wrong with an entry of a layer. [`crate::Error::Layer`] adds which layer and which path.

use std::io;

/// Why an entry of a layer was refused, or why the layer could not be read on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// A `..` component in the entry's own name or in a hard link's target.
    #[error("the path has a `..` component, which could leave the image")]
    DotDot,
    /// The path reaches above the root through a symbolic link of the image.
    #[error("a symbolic link in the path leads out of the image")]
    LinkEscapes,
    /// A symbolic link loop, or a chain longer than Linux follows.
    #[error("the path goes through more than 40 symbolic links")]
    TooManyLinks,
    /// The path has a NUL byte.
    #[error("the path holds a NUL byte")]
    NulInPath,
    /// A component is too long.
    #[error("a name of {0} bytes is too long, at most {max} are possible", max = crate::limits::NAME_BYTES_MAX)]
    NameTooLong(usize),
    /// The whole path, or a link's target, is too long.
    #[error("a path of {0} bytes is too long, at most {max} are possible", max = crate::limits::PATH_BYTES_MAX)]
    PathTooLong(usize),
    /// The entry has no name, or its name is that of the root, which must be a directory.
    #[error("the entry has no name of its own")]
    NoName,
    /// Directories nested too deeply.
    #[error("directories are nested more than {0} deep")]
    TooDeep(u16),
    /// A parent is there but is no directory.
    #[error("`{}` is not a directory, nothing can be put below it", .0.escape_ascii())]
    ParentNotDirectory(Vec<u8>),
    /// A hard link's target does not exist in this or a lower layer.
    #[error("the hard link's target `{}` does not exist in the image", .0.escape_ascii())]
    LinkTargetMissing(Vec<u8>),
    /// A hard link to a directory.
    #[error("the hard link's target is a directory")]
    LinkToDirectory,
    /// A symbolic link without target, or with a NUL byte in it.
    #[error("the symbolic link's target is empty or holds a NUL byte")]
    BadTarget,
    /// A whiteout whose name removes nothing that could exist, or that is used as a directory.
    #[error("the whiteout does not name a file beside it")]
    BadWhiteout,
    /// A device number that Linux can't have.
    #[error("the device number {major}:{minor} does not exist, at most 4095:1048575 is possible")]
    BadDevice {
        /// The major number given.
        major: u64,
        /// The minor number given.
        minor: u64,
    },
    /// An owner that Linux can't have.
    #[error("the owner id {0} is out of range, at most 4294967294 is possible")]
    BadOwner(u64),
    /// An extended attribute that Linux or EROFS can't hold.
    #[error("the extended attribute `{}` is too large or has no valid name", .0.escape_ascii())]
    BadXattr(Vec<u8>),
    /// Extended attributes of one file that are too much together.
    #[error("the extended attributes take {0} bytes, at most {max} are possible", max = crate::limits::XATTRS_BYTES_MAX)]
    TooManyXattrs(usize),
    /// A type of entry that is no file.
    #[error("entries of type `{}` are not supported", .0.escape_ascii())]
    UnknownType(u8),
    /// The header's checksum is wrong: this is not a tar archive, or it is damaged.
    #[error("the tar header at byte {0} is damaged (wrong checksum)")]
    BadChecksum(u64),
    /// A field of the header, or a PAX record, is not what it must be.
    #[error("the tar header's field `{0}` is malformed")]
    BadField(&'static str),
    /// An extended header that is too large.
    #[error("an extended header of {0} bytes is too large, at most {max} are read", max = crate::limits::EXTENDED_HEADER_BYTES_MAX)]
    HeaderTooLarge(u64),
    /// A sparse file's map contradicts itself or is too long.
    #[error("the map of the sparse file is malformed")]
    BadSparseMap,
    /// The archive ends inside an entry.
    #[error("the layer is truncated")]
    Truncated,
    /// The compressed stream is damaged, or reading failed.
    #[error("the layer cannot be read")]
    Read(#[source] io::Error),
    /// The layer is compressed with something that images don't use.
    #[error("compression `{0}` is not supported, only gzip and zstd are")]
    Compression(&'static str),
    /// More entries than the limit.
    #[error("the image has more than {0} files")]
    TooManyEntries(u32),
    /// More bytes of names, link targets and extended attributes than the limit.
    #[error("names, links and extended attributes take more than {0} bytes")]
    TooMuchMetadata(u64),
    /// More bytes than the limit.
    #[error("the image unpacks to more than {0} bytes")]
    TooLarge(u64),
    /// A bomb: far more bytes than were compressed.
    #[error("the layer unpacks to more than {unpacked} bytes, over {ratio} times its compressed size of {compressed}")]
    Bomb {
        /// Compressed bytes.
        compressed: u64,
        /// Uncompressed bytes when it was stopped.
        unpacked: u64,
        /// The ratio allowed.
        ratio: u64,
    },
    /// The image under construction could not be written.
    #[error("the image file cannot be written")]
    Write(#[source] io::Error),
}
