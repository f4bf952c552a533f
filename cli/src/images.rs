//! `pull`, `images`, `rmi` and `prune`: what the image store can do, shown as docker shows it.

use std::time::{SystemTime, UNIX_EPOCH};

use chrono::DateTime;
use image::{PullOptions, Reference, Store, Summary};
use runtime::control::{Control, ControlError};
use runtime::state::{RunRoot, StateError};
use serde::Serialize;

use crate::args::{Images, Prune, Pull, Rmi};
use crate::progress;
use crate::report;
use crate::table;

/// How many digits of an id are shown.
const DIGITS: usize = 12;

fn store() -> anyhow::Result<Store> {
    Ok(Store::open(&Store::default_root())?)
}

/// Gets an image, and shows its id.
pub fn pull(args: &Pull) -> anyhow::Result<u8> {
    let reference: Reference = args.image.parse()?;
    let store = store()?;
    let image = progress::show(args.quiet, |progress| store.pull(&reference, &PullOptions::default(), progress))?;
    report::print(&format!("{}\n", image.id))?;
    Ok(0)
}

/// Shows what is in the store.
pub fn list(args: &Images) -> anyhow::Result<u8> {
    let images = store()?.list()?;
    let text = if args.quiet { ids(&images) } else { args.format.show(&json(&images), |_| rows(&images))? };
    report::print(&text)?;
    Ok(0)
}

/// Removes images. All of them are tried; the last failure is the one reported at the end.
pub fn remove(args: &Rmi) -> anyhow::Result<u8> {
    let store = store()?;
    let mut code = 0;
    for name in &args.images {
        match store.remove(name, args.force) {
            Ok(removed) => {
                let untagged = removed.untagged.iter().map(|name| format!("Untagged: {name}\n"));
                let deleted = removed.deleted.iter().map(|id| format!("Deleted: {id}\n"));
                report::print(&untagged.chain(deleted).collect::<String>())?;
            }
            Err(error) => {
                report::error(&format!("{:#}", anyhow::Error::from(error)));
                code = 1;
            }
        }
    }
    Ok(code)
}

/// Removes what nobody needs. All of it is tried: what fails is told, and what was removed before is told all the same.
pub fn prune(_args: &Prune) -> anyhow::Result<u8> {
    let (mut text, mut code) = (String::new(), 0);
    let mut failed = |error: anyhow::Error| {
        report::error(&format!("{error:#}"));
        code = 1;
    };
    let root = RunRoot::open()?;
    root.sweep();
    let dead = root.list()?.into_iter().filter(|found| !found.alive);
    let runtime = runtime::run::runtime()?;
    for control in dead.map(|found| Control::new(&root, found)) {
        let id = control.found.record.id.clone();
        match runtime.block_on(control.remove(false)) {
            Ok(()) => text.push_str(&format!("Deleted: {id}\n")),
            // Another command was faster.
            Err(ControlError::State(StateError::NoSuchContainer { .. } | StateError::Alive { .. })) => {}
            Err(error) => failed(error.into()),
        }
    }
    match store().and_then(|store| Ok(store.prune()?)) {
        Ok(pruned) => {
            text.extend(pruned.images.iter().map(|id| format!("Deleted: {id}\n")));
            text.push_str(&format!("Total reclaimed space: {}\n", table::bytes(pruned.freed_bytes)));
        }
        Err(error) => failed(error),
    }
    report::print(&text)?;
    Ok(code)
}

/// An id as people see it: the first digits.
fn short(id: &str) -> &str {
    let digits = id.strip_prefix("sha256:").unwrap_or(id);
    digits.get(..DIGITS).unwrap_or(digits)
}

fn ids(images: &[Summary]) -> String {
    let mut seen = Vec::new();
    for id in images.iter().map(|image| short(&image.id)) {
        if !seen.contains(&id) {
            seen.push(id);
        }
    }
    seen.iter().map(|id| format!("{id}\n")).collect()
}

fn rows(images: &[Summary]) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let none = || "<none>".to_owned();
    let rows: Vec<_> = images
        .iter()
        .map(|image| {
            [
                image.repository.clone().unwrap_or_else(none),
                image.tag.clone().unwrap_or_else(none),
                short(&image.id).to_owned(),
                image.created.as_deref().map_or_else(|| "N/A".to_owned(), |time| age(time, now)),
                table::bytes(image.size_bytes),
            ]
        })
        .collect();
    table::table(["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"], &rows)
}

/// How long ago an image says it was made. Reproducible builds say 1970, or a time to come.
fn age(created: &str, now: u64) -> String {
    let Ok(time) = DateTime::parse_from_rfc3339(created) else { return "N/A".to_owned() };
    table::ago(now.saturating_sub(u64::try_from(time.timestamp()).unwrap_or(0)))
}

/// An image, for programs.
#[derive(Debug, Serialize)]
struct Row<'a> {
    id: &'a str,
    repository: Option<&'a str>,
    tag: Option<&'a str>,
    created: Option<&'a str>,
    size_bytes: u64,
}

fn json(images: &[Summary]) -> Vec<Row<'_>> {
    images
        .iter()
        .map(|image| Row {
            id: &image.id,
            repository: image.repository.as_deref(),
            tag: image.tag.as_deref(),
            created: image.created.as_deref(),
            size_bytes: image.size_bytes,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(repository: Option<&str>, id: &str) -> Summary {
        Summary {
            repository: repository.map(str::to_owned),
            tag: repository.map(|_| "latest".to_owned()),
            id: format!("sha256:{}", id.repeat(64)),
            created: Some("2020-01-01T00:00:00.123456789Z".into()),
            size_bytes: 4_261_000,
        }
    }

    #[test]
    fn images_are_listed_as_docker_lists_them() {
        let text = rows(&[summary(Some("busybox"), "a"), summary(None, "b")]);
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split("   ").map(str::trim).filter(|cell| !cell.is_empty()).collect())
            .collect();
        assert_eq!(lines[0], ["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"]);
        assert_eq!(lines[1][..3], ["busybox", "latest", "aaaaaaaaaaaa"]);
        assert_eq!(lines[2][..3], ["<none>", "<none>", "bbbbbbbbbbbb"]);
        assert_eq!(lines[1][4], "4.26MB");
    }

    #[test]
    fn ids_are_listed_once() {
        let images = [summary(Some("x"), "a"), summary(Some("y"), "a"), summary(None, "b")];
        assert_eq!(ids(&images), "aaaaaaaaaaaa\nbbbbbbbbbbbb\n");
    }

    #[test]
    fn json_is_an_array_of_objects() {
        let images = [summary(None, "a")];
        let value = serde_json::to_value(json(&images)).unwrap();
        assert_eq!(value[0]["size_bytes"], 4_261_000);
        assert!(value[0]["repository"].is_null());
    }

    #[test]
    fn ages_survive_strange_dates() {
        assert_eq!(age("2020-01-01T00:01:00Z", 1_577_836_800), "0 seconds ago");
        assert_eq!(age("1970-01-01T00:00:00Z", 1_577_836_800), "50 years ago");
        assert_eq!(age("yesterday", 0), "N/A");
    }
}
