//! Writer of cpio archives in the "newc" format, the one that the kernel unpacks as its initial RAM file system
//! (Documentation/driver-api/early-userspace/buffer-format.rst). Deterministic: times and owners are zero.

use std::io::Write;

use anyhow::{Context, Result};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive being written.
pub struct Archive<W> {
    to: W,
    written: usize,
    inode: u32,
}

impl<W: Write> Archive<W> {
    /// An empty archive that goes to `to`.
    pub fn new(to: W) -> Self {
        Self { to, written: 0, inode: 0 }
    }

    /// Adds a directory; its parents must have been added before it.
    pub fn directory(&mut self, path: &str) -> Result<()> {
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[])
    }

    /// Adds a regular file with the permission bits `mode`.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.entry(path, REGULAR | mode, (0, 0), content)
    }

    /// Adds a character device node.
    pub fn character_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> Result<()> {
        self.entry(path, CHARACTER_DEVICE | mode, (major, minor), &[])
    }

    /// Writes the trailer and gives back the writer.
    pub fn finish(mut self) -> Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.to)
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> Result<()> {
        self.inode += 1;
        let size = u32::try_from(content.len()).with_context(|| format!("{path} is too large for a cpio archive"))?;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let header = format!(
            "070701{:08X}{mode:08X}{:08X}{:08X}{links:08X}{:08X}{size:08X}{:08X}{:08X}{:08X}{:08X}{:08X}{:08X}",
            self.inode,
            0, // owner
            0, // group
            0, // time
            0, // device of the file itself
            0,
            device.0,
            device.1,
            path.len() + 1,
            0, // checksum: unused in this format
        );
        self.put(header.as_bytes())?;
        self.put(path.as_bytes())?;
        self.put(&[0])?;
        self.pad()?;
        self.put(content)?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.to.write_all(bytes).context("cannot write the cpio archive")?;
        self.written += bytes.len();
        Ok(())
    }

    fn pad(&mut self) -> Result<()> {
        let rest = self.written.next_multiple_of(4) - self.written;
        self.put(&[0; 4][..rest])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_sized() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("dev").unwrap();
        archive.character_device("dev/console", 0o600, 5, 1).unwrap();
        archive.file("init", 0o755, b"hello").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        // The first entry: its magic, mode 040755 in hexadecimal, two links.
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[14..22], b"000041ED");
        assert_eq!(&bytes[38..46], b"00000002");
        // 110 bytes of header and "dev\0" end at 114, so the second starts at 116.
        assert_eq!(&bytes[116..122], b"070701");
        assert!(bytes.windows(5).any(|window| window == b"hello"));
    }
}
