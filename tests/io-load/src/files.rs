//! Many small files: what a file system does besides moving data.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::{Work, drop_caches};

/// Prepares an operation on each of `count` files in a folder, which are made if it needs them. What is `cold` finds the caches of a guest empty.
pub fn prepare(what: &str, folder: &str, count: usize) -> Result<Work> {
    let folder = Path::new(folder);
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let files: Vec<PathBuf> = (0..count).map(|number| folder.join(format!("file-{number}"))).collect();
    let renamed: Vec<PathBuf> = (0..count).map(|number| folder.join(format!("renamed-{number}"))).collect();
    let needed: &[PathBuf] = match what {
        "create" => &[],
        "unlink" => &renamed,
        _ => &files,
    };
    for file in needed.iter().filter(|file| !file.exists()) {
        File::create_new(file).with_context(|| format!("cannot make {}", file.display()))?;
    }
    if what.starts_with("cold-") {
        drop_caches()?;
    }
    Ok(match what {
        "create" => each(files, |file| File::create_new(file).map(drop)),
        "stat" | "cold-stat" => each(files, |file| fs::symlink_metadata(file).map(drop)),
        "open" | "cold-open" => each(files, |file| File::open(file)?.read(&mut [0; 512]).map(drop)),
        "rename" => Box::new(move || {
            for (from, to) in files.iter().zip(&renamed) {
                fs::rename(from, to).with_context(|| format!("cannot rename {}", from.display()))?;
            }
            Ok(())
        }),
        "unlink" => each(renamed, |file| fs::remove_file(file)),
        _ => bail!("unknown operation on files {what:?}"),
    })
}

fn each(files: Vec<PathBuf>, call: impl Fn(&Path) -> std::io::Result<()> + 'static) -> Work {
    Box::new(move || {
        files
            .iter()
            .try_for_each(|file| call(file).with_context(|| format!("an operation on {} failed", file.display())))
    })
}
