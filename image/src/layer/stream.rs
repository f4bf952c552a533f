//! A layer's bytes on their way in: counted, hashed, decompressed, and stopped at the limits.

use std::io::{self, BufReader, Chain, Cursor, Read};

use flate2::bufread::MultiGzDecoder;
use sha2::{Digest as _, Sha256};

use crate::digest::Digest;
use crate::limits::Limits;
use crate::problem::Problem;

/// Bytes read at once from the compressed side.
const INPUT_BUFFER_BYTES: usize = 256 << 10;
/// Bytes looked at to tell the compression.
const MAGIC_BYTES: u64 = 6;
/// log2 of the largest zstd window accepted (128 MiB): the decoder's memory is the author's choice up to it.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// Hashes and counts what is read.
#[derive(Debug)]
pub(crate) struct Counted<R> {
    inner: R,
    hash: Sha256,
    bytes: u64,
}

impl<R: Read> Counted<R> {
    pub(crate) fn new(inner: R) -> Counted<R> {
        Counted { inner, hash: Sha256::new(), bytes: 0 }
    }

    /// Reads to the end; tells the digest and the number of bytes.
    ///
    /// # Errors
    /// Reading failed.
    pub(crate) fn finish(mut self) -> io::Result<(Digest, u64)> {
        io::copy(&mut self, &mut io::sink())?;
        Ok((Digest::from_hash(self.hash), self.bytes))
    }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        self.bytes += count as u64;
        Ok(count)
    }
}

/// The compressed side: the bytes that told the compression, then the rest.
type Input<R> = BufReader<Chain<Cursor<Vec<u8>>, Counted<R>>>;

enum Decoder<R: Read> {
    Plain(Input<R>),
    Gzip(Box<MultiGzDecoder<Input<R>>>),
    Zstd(zstd::Decoder<'static, Input<R>>),
}

/// The uncompressed side of a layer.
pub(crate) struct LayerStream<R: Read> {
    decoder: Decoder<R>,
    hash: Sha256,
    unpacked: u64,
    unpacked_max: u64,
    /// What [`Problem::TooLarge`] shall name: the limit of the whole image.
    image_max: u64,
    compressed: u64,
    ratio: u64,
    ratio_floor: u64,
}

/// What a layer turned out to be.
pub(crate) struct Measured {
    /// Digest and size of the compressed form.
    pub(crate) blob: (Digest, u64),
    /// Digest and size of the uncompressed form.
    pub(crate) diff_id: Digest,
    pub(crate) unpacked: u64,
}

impl<R: Read> LayerStream<R> {
    /// Starts on a layer of `compressed` bytes, of an image that already unpacked to `before` bytes.
    ///
    /// # Errors
    /// Reading failed, or the compression is none that images use.
    pub(crate) fn new(input: R, compressed: u64, before: u64, limits: &Limits) -> Result<LayerStream<R>, Problem> {
        let mut counted = Counted::new(input);
        let mut magic = Vec::new();
        counted.by_ref().take(MAGIC_BYTES).read_to_end(&mut magic).map_err(read_problem)?;
        let kind = Compression::of(&magic)?;
        let input = BufReader::with_capacity(INPUT_BUFFER_BYTES, Cursor::new(magic).chain(counted));
        let decoder = match kind {
            Compression::None => Decoder::Plain(input),
            Compression::Gzip => Decoder::Gzip(Box::new(MultiGzDecoder::new(input))),
            Compression::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(input).map_err(read_problem)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(read_problem)?;
                Decoder::Zstd(decoder)
            }
        };
        Ok(LayerStream {
            decoder,
            hash: Sha256::new(),
            unpacked: 0,
            unpacked_max: limits.unpacked_bytes.saturating_sub(before),
            image_max: limits.unpacked_bytes,
            compressed,
            ratio: limits.ratio,
            ratio_floor: limits.ratio_floor_bytes,
        })
    }

    /// Reads both sides to their end and tells what they were.
    ///
    /// # Errors
    /// Reading failed or a limit was reached.
    pub(crate) fn finish(mut self) -> Result<Measured, Problem> {
        io::copy(&mut self, &mut io::sink()).map_err(read_problem)?;
        let diff_id = Digest::from_hash(self.hash);
        let (_, counted) = self.decoder.into_input().into_inner().into_inner();
        Ok(Measured { blob: counted.finish().map_err(read_problem)?, diff_id, unpacked: self.unpacked })
    }

    /// Reads only the compressed side to its end: after a failure, to see whether wrong bytes were the cause.
    ///
    /// # Errors
    /// Reading failed.
    pub(crate) fn abandon(self) -> io::Result<(Digest, u64)> {
        let (_, counted) = self.decoder.into_input().into_inner().into_inner();
        counted.finish()
    }
}

impl<R: Read> Read for LayerStream<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = match &mut self.decoder {
            Decoder::Plain(input) => input.read(buffer)?,
            Decoder::Gzip(input) => input.read(buffer)?,
            Decoder::Zstd(input) => input.read(buffer)?,
        };
        self.hash.update(&buffer[..count]);
        self.unpacked += count as u64;
        if self.unpacked > self.unpacked_max {
            return Err(io::Error::other(Problem::TooLarge(self.image_max)));
        }
        if self.unpacked > self.ratio_floor && self.unpacked / self.ratio.max(1) > self.compressed {
            return Err(io::Error::other(Problem::Bomb {
                compressed: self.compressed,
                unpacked: self.unpacked,
                ratio: self.ratio,
            }));
        }
        Ok(count)
    }
}

impl<R: Read> Decoder<R> {
    fn into_input(self) -> Input<R> {
        match self {
            Decoder::Plain(input) => input,
            Decoder::Gzip(decoder) => decoder.into_inner(),
            Decoder::Zstd(decoder) => decoder.finish(),
        }
    }
}

enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    fn of(magic: &[u8]) -> Result<Compression, Problem> {
        match magic {
            [0x1f, 0x8b, ..] => Ok(Compression::Gzip),
            // A frame, or a skippable one in front of it.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Ok(Compression::Zstd),
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => Err(Problem::Compression("bzip2")),
            [0xfd, b'7', b'z', b'X', b'Z', 0] => Err(Problem::Compression("xz")),
            _ => Ok(Compression::None),
        }
    }
}

/// Gives a failed read its name: a limit of ours, an early end, or the rest.
pub(super) fn read_problem(error: io::Error) -> Problem {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return Problem::Truncated;
    }
    match error.downcast::<Problem>() {
        Ok(problem) => problem,
        Err(error) => Problem::Read(error),
    }
}
