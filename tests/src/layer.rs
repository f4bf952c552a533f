//! Layers of images, written entry by entry: also such as no tool would make.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use tar::{Builder, EntryType, Header};

/// The time of every entry: a date on which nothing happened, so that a clock that was used instead is seen.
const TIME: u64 = 1_000_000_000;

/// A layer under construction: an uncompressed tar archive.
pub struct Layer {
    archive: Builder<Vec<u8>>,
}

/// Who owns an entry, and what may be done with it.
#[derive(Clone, Copy)]
pub struct Access {
    /// The number of the user.
    pub user: u64,
    /// The number of the group.
    pub group: u64,
    /// The permissions.
    pub mode: u32,
}

impl Access {
    /// Root's, with these permissions.
    #[must_use]
    pub fn root(mode: u32) -> Self {
        Self { user: 0, group: 0, mode }
    }
}

impl Default for Layer {
    fn default() -> Self {
        Self::new()
    }
}

impl Layer {
    /// A layer with nothing in it.
    #[must_use]
    pub fn new() -> Self {
        Self { archive: Builder::new(Vec::new()) }
    }

    /// Adds a directory.
    ///
    /// # Errors
    /// The path is none.
    pub fn directory(&mut self, path: &str, access: Access) -> Result<()> {
        let mut header = header(EntryType::Directory, access, 0);
        self.archive.append_data(&mut header, path, &[][..]).with_context(|| format!("cannot add {path}"))
    }

    /// Adds a regular file. A path of more than 100 bytes becomes GNU's long name.
    ///
    /// # Errors
    /// The path is none.
    pub fn file(&mut self, path: &str, access: Access, content: &[u8]) -> Result<()> {
        let mut header = header(EntryType::Regular, access, content.len() as u64);
        self.archive.append_data(&mut header, path, content).with_context(|| format!("cannot add {path}"))
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// The path or the target is none.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        self.link(EntryType::Symlink, path, target)
    }

    /// Adds a further name of a file, which this layer or a lower one has.
    ///
    /// # Errors
    /// The path or the target is none.
    pub fn hard_link(&mut self, path: &str, target: &str) -> Result<()> {
        self.link(EntryType::Link, path, target)
    }

    fn link(&mut self, kind: EntryType, path: &str, target: &str) -> Result<()> {
        let mut header = header(kind, Access::root(0o777), 0);
        self.archive.append_link(&mut header, path, target).with_context(|| format!("cannot add {path}"))
    }

    /// Removes what lower layers have at a path.
    ///
    /// # Errors
    /// The path is none.
    pub fn whiteout(&mut self, path: &str) -> Result<()> {
        let marker = match path.rsplit_once('/') {
            Some((folder, name)) => format!("{folder}/.wh.{name}"),
            None => format!(".wh.{path}"),
        };
        self.file(&marker, Access::root(0o600), b"")
    }

    /// Removes what lower layers have in a directory, but not the directory.
    ///
    /// # Errors
    /// The path is none.
    pub fn opaque(&mut self, directory: &str) -> Result<()> {
        self.file(&format!("{directory}/.wh..wh..opq"), Access::root(0o600), b"")
    }

    /// Adds a file with an extended attribute, as an extended header of POSIX (`SCHILY.xattr.`).
    ///
    /// # Errors
    /// The path is none.
    pub fn file_with_attribute(
        &mut self,
        path: &str,
        access: Access,
        content: &[u8],
        attribute: (&str, &[u8]),
    ) -> Result<()> {
        let key = format!("SCHILY.xattr.{}", attribute.0);
        self.archive.append_pax_extensions([(key.as_str(), attribute.1)])?;
        self.file(path, access, content)
    }

    /// Adds a sparse file of `size` bytes with data at one offset, in GNU's format 1.0.
    ///
    /// # Errors
    /// The path is none.
    pub fn sparse(&mut self, path: &str, size: u64, (offset, data): (u64, &[u8])) -> Result<()> {
        let size_text = size.to_string();
        let records: [(&str, &[u8]); 4] = [
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", path.as_bytes()),
            ("GNU.sparse.realsize", size_text.as_bytes()),
        ];
        self.archive.append_pax_extensions(records)?;
        // Two pieces: the data, and an empty one that says where the file ends.
        let mut content = format!("2\n{offset}\n{}\n{size}\n0\n", data.len()).into_bytes();
        ensure!(content.len() <= 512, "the map of a sparse file is too long");
        content.resize(512, 0);
        content.extend_from_slice(data);
        self.file("GNUSparseFile.0/sparse", Access::root(0o644), &content)
    }

    /// Adds an entry under a name of at most 100 bytes that is not checked at all.
    ///
    /// # Errors
    /// The name or the target is too long.
    pub fn unchecked(&mut self, kind: EntryType, name: &str, target: &str, content: &[u8]) -> Result<()> {
        let mut header = header(kind, Access::root(0o644), content.len() as u64);
        let old = header.as_old_mut();
        for (field, text) in [(&mut old.name, name), (&mut old.linkname, target)] {
            field.get_mut(..text.len()).context("the name is too long")?.copy_from_slice(text.as_bytes());
        }
        header.set_cksum();
        self.archive.append(&header, content).with_context(|| format!("cannot add {name}"))
    }

    /// The archive.
    ///
    /// # Errors
    /// It cannot be completed.
    pub fn finish(self) -> Result<Vec<u8>> {
        let mut bytes = self.archive.into_inner().context("cannot complete the layer")?;
        bytes.flush()?;
        Ok(bytes)
    }
}

fn header(kind: EntryType, access: Access, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(access.mode);
    header.set_uid(access.user);
    header.set_gid(access.group);
    header.set_mtime(TIME);
    header.set_size(size);
    header.set_cksum();
    header
}
