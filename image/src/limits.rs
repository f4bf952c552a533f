//! How much an image may ask for. The author of an image is not trusted: each number is checked where bytes come in.

/// Bounds of one pull. The defaults admit every image known to be in use and stop a bomb before it hurts the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all layers together once uncompressed, holes of sparse files included. The largest images in wide
    /// use (GPU toolkits) unpack to about 40 GiB.
    pub unpacked_bytes: u64,
    /// How many times larger than its compressed form a layer may be, once it is beyond [`Limits::ratio_floor_bytes`].
    /// Text compresses 10 to 20 times, gzip can't exceed 1032, a zstd bomb reaches millions.
    pub ratio: u64,
    /// Bytes that a layer may unpack to whatever its ratio: a layer of zeroes is legitimate while it is small.
    pub ratio_floor_bytes: u64,
    /// Files, directories, links and devices over all layers, those that later layers remove included. Large images
    /// hold some hundred thousand; each costs about 200 bytes of memory while unpacking.
    pub entries: u32,
    /// Bytes of names, link targets and extended attributes over all layers: they stay in memory while unpacking.
    pub metadata_bytes: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            unpacked_bytes: 64 << 30,
            ratio: 250,
            ratio_floor_bytes: 1 << 30,
            entries: 4_000_000,
            metadata_bytes: 512 << 20,
        }
    }
}

/// Bytes of a manifest, an index or an image configuration: registries refuse larger ones too.
pub(crate) const DOCUMENT_BYTES_MAX: u64 = 4 << 20;

/// Layers of one image. Docker stops at 127, containerd at what mount(2) takes; nothing legitimate has more.
pub(crate) const LAYERS_MAX: usize = 512;

/// Bytes of one path in a layer (PATH_MAX of Linux).
pub(crate) const PATH_BYTES_MAX: usize = 4096;

/// Bytes of one name in a layer (NAME_MAX of Linux).
pub(crate) const NAME_BYTES_MAX: usize = 255;

/// Bytes of a symbolic link's target (PATH_MAX without its terminating NUL).
pub(crate) const TARGET_BYTES_MAX: usize = 4095;

/// Bytes of one extended attribute's value: EROFS has 16 bits for it, Linux takes one more.
pub(crate) const XATTR_VALUE_BYTES_MAX: usize = u16::MAX as usize;

/// Bytes of all extended attributes of one file, as EROFS lays them out. listxattr(2) can't return more names
/// than 64 KiB, and EROFS can count 256 KiB.
pub(crate) const XATTRS_BYTES_MAX: usize = 128 << 10;

/// Bytes of one extended header (PAX or GNU long name) in a layer: they are read into memory, and hold at most the
/// extended attributes and a few paths.
pub(crate) const EXTENDED_HEADER_BYTES_MAX: u64 = 1 << 20;

/// Data segments of a sparse file: 16 bytes of memory each.
pub(crate) const SPARSE_SEGMENTS_MAX: usize = 1 << 20;
