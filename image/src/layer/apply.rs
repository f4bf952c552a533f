//! Applies layers to the tree, and their files' data to the image.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::sync::mpsc::sync_channel;

use super::ahead::{Ahead, CHUNKS_AHEAD, pump};
use super::stream::{LayerStream, Measured, read_problem};
use super::tarball::{Member, MemberKind, TarReader};
use crate::erofs::{DataWriter, xattr_prefix};
use crate::limits::{
    Limits, NAME_BYTES_MAX, PATH_BYTES_MAX, TARGET_BYTES_MAX, XATTR_VALUE_BYTES_MAX, XATTRS_BYTES_MAX,
};
use crate::problem::Problem;
use crate::tree::{Attributes, Ino, NewKind, Tree, Xattr};

/// What whiteouts begin with.
const WHITEOUT: &[u8] = b".wh.";
/// What names that only AUFS gave a meaning begin with.
const WHITEOUT_META: &[u8] = b".wh..wh.";
/// The name that makes its directory opaque.
const WHITEOUT_OPAQUE: &[u8] = b".wh..wh..opq";
/// Bytes copied into the image at once.
const BUFFER_BYTES: usize = 64 << 10;

/// Builds one image out of layers, from the lowest on.
#[derive(Debug)]
pub(crate) struct Flattener {
    pub(crate) tree: Tree,
    pub(crate) data: DataWriter,
    limits: Limits,
    /// Bytes of all layers so far, as files: holes of sparse files count, headers do not.
    file_bytes: u64,
    /// Bytes of all layers so far, as archives.
    unpacked: u64,
    copy_buffer: Vec<u8>,
}

/// Why a layer could not be applied.
pub(crate) struct LayerFault {
    /// The entry at hand, empty before the first and behind the last.
    pub(crate) path: Vec<u8>,
    pub(crate) problem: Problem,
    /// Digest and size of the compressed bytes, if they could be read: wrong bytes explain any other problem.
    pub(crate) blob: Option<(crate::digest::Digest, u64)>,
}

impl Flattener {
    pub(crate) fn new(data: DataWriter, limits: &Limits) -> Flattener {
        Flattener {
            tree: Tree::new(limits),
            data,
            limits: limits.clone(),
            file_bytes: 0,
            unpacked: 0,
            copy_buffer: vec![0; BUFFER_BYTES],
        }
    }

    /// Applies the next layer, `compressed` bytes large, and tells what it was.
    ///
    /// # Errors
    /// An entry is refused, the layer is damaged, or writing failed.
    pub(crate) fn apply(&mut self, input: impl Read + Send, compressed: u64) -> Result<Measured, LayerFault> {
        let fault = |path, problem, blob| LayerFault { path, problem, blob };
        let stream = LayerStream::new(input, compressed, self.unpacked, &self.limits);
        let mut stream = stream.map_err(|problem| fault(Vec::new(), problem, None))?;
        self.tree.next_layer();
        let result = std::thread::scope(|scope| {
            let (sender, receiver) = sync_channel(CHUNKS_AHEAD);
            let unpacker = std::thread::Builder::new().name("image-unpack".to_owned());
            let stream = &mut stream;
            let spawned = unpacker.spawn_scoped(scope, move || pump(stream, &sender));
            spawned.map_err(|error| (Vec::new(), Problem::Read(error)))?;
            let mut archive = TarReader::new(Ahead::new(receiver));
            self.apply_members(&mut archive).map_err(|problem| (archive.current_path().to_vec(), problem))?;
            // What follows the archive's end is part of the digests too.
            let rest = io::copy(&mut archive.into_inner(), &mut io::sink());
            rest.map(drop).map_err(|error| (Vec::new(), read_problem(error)))
        });
        if let Err((path, problem)) = result {
            return Err(fault(path, problem, stream.abandon().ok()));
        }
        let measured = stream.finish().map_err(|problem| fault(Vec::new(), problem, None))?;
        self.unpacked += measured.unpacked;
        Ok(measured)
    }

    fn apply_members<R: Read>(&mut self, archive: &mut TarReader<R>) -> Result<(), Problem> {
        while let Some(member) = archive.next()? {
            self.apply_member(archive, member)?;
        }
        Ok(())
    }

    fn apply_member<R: Read>(&mut self, archive: &mut TarReader<R>, member: Member) -> Result<(), Problem> {
        let path = components(&member.path)?;
        let Some((name, parents)) = path.split_last() else {
            return match member.kind {
                MemberKind::Directory => self.tree.set_root_attributes(attributes(&member)?),
                _ => Err(Problem::NoName),
            };
        };
        if path.iter().any(|component| component.starts_with(WHITEOUT_META)) && *name != WHITEOUT_OPAQUE {
            return Ok(());
        }
        if parents.iter().any(|component| component.starts_with(WHITEOUT)) {
            return Err(Problem::BadWhiteout);
        }
        if name.starts_with(WHITEOUT) {
            return self.apply_whiteout(parents, name);
        }
        let Some(parent) = self.tree.walk(parents, true)? else { return Err(Problem::NoName) };
        let mut attributes = attributes(&member)?;
        if matches!(member.kind, MemberKind::Symlink(_)) {
            // Linux knows no other permissions of links; archives say what they like.
            attributes.permissions = 0o777;
        }
        let kind = match member.kind {
            MemberKind::HardLink(target) => return self.apply_hard_link(parent, name, &target),
            MemberKind::File { .. } => self.copy_file(archive, &member.kind)?,
            MemberKind::Directory => NewKind::Directory,
            MemberKind::Symlink(target) => NewKind::Symlink(symlink_target(target)?),
            MemberKind::Character(device) => NewKind::Character(device),
            MemberKind::Block(device) => NewKind::Block(device),
            MemberKind::Fifo => NewKind::Fifo,
        };
        self.tree.put(parent, name, attributes, kind).map(drop)
    }

    fn apply_whiteout(&mut self, parents: &[&[u8]], name: &[u8]) -> Result<(), Problem> {
        let victim = &name[WHITEOUT.len()..];
        if name != WHITEOUT_OPAQUE && matches!(victim, b"" | b"." | b"..") {
            return Err(Problem::BadWhiteout);
        }
        // A parent that does not exist has nothing to remove.
        let Some(parent) = self.tree.walk(parents, false)? else { return Ok(()) };
        if name == WHITEOUT_OPAQUE {
            self.tree.sweep(parent);
        } else {
            self.tree.white_out(parent, victim);
        }
        Ok(())
    }

    fn apply_hard_link(&mut self, parent: Ino, name: &[u8], target: &[u8]) -> Result<(), Problem> {
        let missing = || Problem::LinkTargetMissing(target.to_vec());
        let path = components(target)?;
        let (last, parents) = path.split_last().ok_or_else(missing)?;
        let directory = self.tree.walk(parents, false)?.ok_or_else(missing)?;
        let target = self.tree.lookup(directory, last).ok_or_else(missing)?;
        self.tree.link(parent, name, target)
    }

    fn copy_file<R: Read>(&mut self, archive: &mut TarReader<R>, kind: &MemberKind) -> Result<NewKind, Problem> {
        let MemberKind::File { size, sparse } = kind else { return Err(Problem::NoName) };
        self.file_bytes = self.file_bytes.saturating_add(*size);
        if self.file_bytes > self.limits.unpacked_bytes {
            return Err(Problem::TooLarge(self.limits.unpacked_bytes));
        }
        if *size == 0 {
            return Ok(NewKind::File { size: 0, block: 0 });
        }
        let block = self.data.begin().map_err(Problem::Write)?;
        match sparse {
            None => self.copy_bytes(archive, *size)?,
            Some(map) => {
                let mut position = 0;
                for (offset, length) in map.segments() {
                    self.data.hole(offset - position).map_err(Problem::Write)?;
                    self.copy_bytes(archive, *length)?;
                    position = offset + length;
                }
                self.data.hole(size - position).map_err(Problem::Write)?;
            }
        }
        Ok(NewKind::File { size: *size, block })
    }

    fn copy_bytes<R: Read>(&mut self, archive: &mut TarReader<R>, mut count: u64) -> Result<(), Problem> {
        while count > 0 {
            let wanted = count.min(BUFFER_BYTES as u64) as usize;
            match archive.read_data(&mut self.copy_buffer[..wanted])? {
                0 => return Err(Problem::Truncated),
                read => {
                    self.data.write(&self.copy_buffer[..read]).map_err(Problem::Write)?;
                    count -= read as u64;
                }
            }
        }
        Ok(())
    }

    /// Ends the image: everything that is left to write but the metadata.
    ///
    /// # Errors
    /// Writing failed.
    pub(crate) fn finish(mut self) -> io::Result<(Tree, std::fs::File, u32)> {
        for (block, bytes) in self.tree.dead_data() {
            self.data.discard(*block, *bytes)?;
        }
        let (file, end) = self.data.finish()?;
        Ok((self.tree, file, end))
    }
}

/// Splits a path into its names. Leading `/`, `.` components and repeated or trailing slashes mean nothing.
fn components(path: &[u8]) -> Result<Vec<&[u8]>, Problem> {
    if path.len() > PATH_BYTES_MAX {
        return Err(Problem::PathTooLong(path.len()));
    }
    if path.contains(&0) {
        return Err(Problem::NulInPath);
    }
    let mut names = Vec::new();
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return Err(Problem::DotDot),
            _ if name.len() > NAME_BYTES_MAX => return Err(Problem::NameTooLong(name.len())),
            _ => names.push(name),
        }
    }
    Ok(names)
}

fn symlink_target(target: Vec<u8>) -> Result<Box<[u8]>, Problem> {
    if target.is_empty() || target.contains(&0) {
        return Err(Problem::BadTarget);
    }
    if target.len() > TARGET_BYTES_MAX {
        return Err(Problem::PathTooLong(target.len()));
    }
    // Every component of a target may become a name when something is written through the link.
    match target.split(|byte| *byte == b'/').find(|name| name.len() > NAME_BYTES_MAX) {
        Some(name) => Err(Problem::NameTooLong(name.len())),
        None => Ok(target.into_boxed_slice()),
    }
}

fn attributes(member: &Member) -> Result<Attributes, Problem> {
    Ok(Attributes {
        permissions: member.permissions,
        uid: owner(member.uid)?,
        gid: owner(member.gid)?,
        mtime_seconds: member.mtime.0,
        mtime_nanoseconds: member.mtime.1,
        xattrs: xattrs(&member.xattrs)?,
    })
}

/// The largest 32-bit number means "unchanged" to chown(2), and no file can have it.
fn owner(id: u64) -> Result<u32, Problem> {
    u32::try_from(id).ok().filter(|id| *id != u32::MAX).ok_or(Problem::BadOwner(id))
}

fn xattrs(raw: &[(Vec<u8>, Vec<u8>)]) -> Result<Vec<Xattr>, Problem> {
    let mut sorted: BTreeMap<(u8, &[u8]), &[u8]> = BTreeMap::new();
    let mut total = 0;
    for (name, value) in raw {
        let Some((prefix, suffix)) = xattr_prefix(name) else { continue };
        if name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.") {
            continue;
        }
        // Only POSIX ACLs (2 and 3) have their whole name in the prefix.
        let nameless = suffix.is_empty() && prefix != 2 && prefix != 3;
        if nameless || name.len() > NAME_BYTES_MAX || name.contains(&0) || value.len() > XATTR_VALUE_BYTES_MAX {
            return Err(Problem::BadXattr(name.iter().copied().take(NAME_BYTES_MAX).collect()));
        }
        total += suffix.len() + value.len() + 8;
        sorted.insert((prefix, suffix), value);
    }
    if total > XATTRS_BYTES_MAX {
        return Err(Problem::TooManyXattrs(total));
    }
    let xattr =
        |((prefix, suffix), value): ((u8, &[u8]), &[u8])| Xattr { prefix, suffix: suffix.into(), value: value.into() };
    Ok(sorted.into_iter().map(xattr).collect())
}
