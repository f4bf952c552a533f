//! Reading and writing one file or block device.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::OFlags;

use crate::{Work, drop_caches};

/// What buffers for `O_DIRECT` have to be aligned to.
const ALIGNMENT: usize = 4096;
/// Operations up to this size go to places all over the file if no cache is between; larger ones, one after the other.
const SCATTERED_MAX: usize = 64 << 10;
/// Odd, and therefore a way through all places of a file that has a power of two of them.
const STRIDE: usize = 7919;

/// How it is done.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Bytes of an operation.
    pub size: usize,
    /// How many operations.
    pub count: usize,
    /// How many threads do them, each its part: as many operations are under way.
    pub threads: usize,
}

/// Opens everything; a file that is to be read is made as long as that takes. What is `buffered` goes through the page cache, which holds nothing of it before; writing ends with a
/// sync then.
pub fn prepare(path: &str, direction: &str, cache: &str, shape: Shape) -> Result<Work> {
    let direct = match cache {
        "direct" => true,
        "buffered" => false,
        _ => bail!("{cache:?} is neither direct nor buffered"),
    };
    let write = match direction {
        "read" => false,
        "write" => true,
        _ => bail!("{direction:?} is neither read nor write"),
    };
    ensure!(shape.size > 0 && shape.threads > 0, "a size and a number of threads cannot be 0");
    if !write {
        lengthen(path, shape.size * shape.count)?;
    }
    drop_caches()?;
    let flags = if direct { OFlags::DIRECT } else { OFlags::empty() };
    let file = OpenOptions::new()
        .read(!write)
        .write(write)
        .create(write)
        .truncate(false)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .with_context(|| format!("cannot open {path}"))?;
    let scattered = direct && shape.size <= SCATTERED_MAX;
    let (stride, room) = if scattered {
        // Seeking gives the length of block devices too.
        let length = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).context("cannot find the length")?;
        (STRIDE, 1 << (usize::try_from(length)? / shape.size).max(1).ilog2())
    } else {
        (1, shape.count)
    };
    let places: Vec<u64> = (0..shape.count).map(|index| (index * stride % room * shape.size) as u64).collect();
    let mut buffers: Vec<Vec<u8>> = (0..shape.threads).map(|_| vec![0x5a; shape.size + ALIGNMENT]).collect();
    Ok(Box::new(move || {
        let share = places.len().div_ceil(shape.threads);
        let mut parts = places.chunks(share.max(1)).zip(&mut buffers);
        if shape.threads == 1 {
            parts.try_for_each(|(places, buffer)| transfer(&file, write, places, buffer, shape.size))?;
        } else {
            thread::scope(|scope| {
                let workers: Vec<_> = parts
                    .map(|(places, buffer)| scope.spawn(|| transfer(&file, write, places, buffer, shape.size)))
                    .collect();
                workers.into_iter().try_for_each(|worker| match worker.join() {
                    Ok(outcome) => outcome,
                    Err(_) => bail!("a thread panicked"),
                })
            })?;
        }
        if write && !direct {
            file.sync_data().context("cannot sync")?;
        }
        Ok(())
    }))
}

/// Makes a file at least so long, with data in it. A block device is as long as it is.
fn lengthen(path: &str, length: usize) -> Result<()> {
    match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() || metadata.len() >= length as u64 => Ok(()),
        _ => fs::write(path, vec![0x5a; length]).with_context(|| format!("cannot fill {path}")),
    }
}

fn transfer(file: &File, write: bool, places: &[u64], buffer: &mut [u8], size: usize) -> Result<()> {
    let start = buffer.as_ptr().align_offset(ALIGNMENT);
    let buffer = buffer.get_mut(start..).and_then(|rest| rest.get_mut(..size)).context("a buffer is too small")?;
    for &place in places {
        let moved = if write { file.write_all_at(buffer, place) } else { file.read_exact_at(buffer, place) };
        moved.with_context(|| format!("cannot move {size} bytes at {place}"))?;
    }
    Ok(())
}
